"""Slow, obvious float64 answers that every fast path is held to. No code is shared with the package."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def _sample(inputs: Any, row: int) -> Any:
    """Return sample `row` of `inputs` as a batch of one, its floating tensors in float64."""
    if isinstance(inputs, Tensor):
        one = inputs.detach()[row : row + 1].clone()
        return one.double() if one.is_floating_point() else one
    if isinstance(inputs, Mapping):
        return {key: _sample(value, row) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_sample(value, row) for value in inputs)
    return inputs


def _batch_size(inputs: Any) -> int:
    """Return B, the length of the first tensor in `inputs`."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next(value.shape[0] for value in values if isinstance(value, Tensor))


def _call(model: nn.Module, inputs: Any) -> Tensor:
    """Call `model`: a mapping as keywords, a tuple as positional arguments, a tensor alone."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def loop_jacobian(
    model: nn.Module,
    inputs: Any,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    parameters: Iterable[str] | None = None,
) -> Tensor:
    """Return ∂f(x)/∂θ, shape (B, D, P), float64: a loop over samples and outputs, one backward pass for each.

    The model is copied to float64; its mode (train or eval) is kept. Each sample is run as a batch of one.

    Args:
        model: maps the inputs to a tensor of shape (B, D) or (B,) (further dimensions are flattened into D).
        inputs: a tensor, a tuple of positional arguments or a mapping of keywords, batch first.
        forward: `forward(model, inputs) -> (1, D)`, where calling the model is not enough.
        parameters: names of parameters; by default those that require a gradient. The columns follow the order of
            `model.named_parameters()` by default, else that of the names given. An unused parameter gives zeros.
    """
    double = copy.deepcopy(model).double()
    by_name = dict(double.named_parameters())
    names = [name for name, p in by_name.items() if p.requires_grad] if parameters is None else list(parameters)
    chosen = [by_name[name].requires_grad_(True) for name in names]
    rows = []
    for row in range(_batch_size(inputs)):
        with torch.inference_mode(False), torch.enable_grad():
            outputs = (forward or _call)(double, _sample(inputs, row)).reshape(-1)
            per_output = []
            for value in outputs:
                grads = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
                flat = [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(chosen, grads, strict=True)]
                per_output.append(torch.cat(flat))
        rows.append(torch.stack(per_output))
    return torch.stack(rows).detach()


def dense_kernel(jacobian: Tensor) -> Tensor:
    """Return K(x_i, x_j) for all pairs, shape (N, N, D, D), from a Jacobian of shape (N, D, P)."""
    jacobian = jacobian.double()
    n, d, _ = jacobian.shape
    kernel = torch.zeros(n, n, d, d, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for a in range(d):
                for b in range(d):
                    kernel[i, j, a, b] = (jacobian[i, a] * jacobian[j, b]).sum()
    return kernel


def _dense_root(gram: Tensor, floor: float) -> tuple[Tensor, int]:
    """Return the pseudo-inverse square root of one (D, D) matrix and the number of eigenvalues above floor·λ_max."""
    root = torch.zeros_like(gram)
    rank = 0
    if not bool(torch.isfinite(gram).all()):
        return root, rank
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    largest = float(values.max())
    for value, vector in zip(values, vectors.T, strict=True):
        if largest > 0 and float(value) > floor * largest:
            root = root + torch.outer(vector, vector) / math.sqrt(float(value))
            rank += 1
    return root, rank


def dense_normalized_kernel(jacobian: Tensor, floor: float = 1e-12) -> Tensor:
    """Return K^C(x_i, x_j) = C_i^(-1/2) K(x_i, x_j) C_j^(-1/2) for all pairs, shape (N, N, D, D)."""
    kernel = dense_kernel(jacobian)
    roots = [_dense_root(kernel[i, i], floor)[0] for i in range(len(kernel))]
    rows = [torch.stack([roots[i] @ kernel[i, j] @ roots[j] for j in range(len(kernel))]) for i in range(len(kernel))]
    return torch.stack(rows)


def dense_ranks(jacobian: Tensor, floor: float = 1e-12) -> list[int]:
    """Return the rank of C(x_i) for each sample: the number of eigenvalues above floor·λ_max."""
    kernel = dense_kernel(jacobian)
    return [_dense_root(kernel[i, i], floor)[1] for i in range(len(kernel))]


def dense_similarity(jacobian: Tensor, floor: float = 1e-12) -> Tensor:
    """Return k(x_i, x_j) = tr(K^C) / √(r_i r_j) for all pairs, shape (N, N); NaN for a sample of rank 0."""
    normalized = dense_normalized_kernel(jacobian, floor)
    ranks = dense_ranks(jacobian, floor)
    n = len(ranks)
    similarity = torch.full((n, n), math.nan, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if ranks[i] > 0 and ranks[j] > 0:
                similarity[i, j] = normalized[i, j].diagonal().sum() / math.sqrt(ranks[i] * ranks[j])
    return similarity


#: (outputs of one sample (1, D), its label) -> the projected outputs (1, d).
Projection = Callable[[Tensor, int | None], Tensor]


def contrast(outputs: Tensor, label: int | None) -> Tensor:
    """Return z_y − mean of the other outputs of one sample, shape (1, 1)."""
    assert label is not None
    others = [outputs[0, column] for column in range(outputs.shape[1]) if column != label]
    return (outputs[0, label] - sum(others, torch.zeros_like(outputs[0, 0])) / len(others)).reshape(1, 1)


def target(outputs: Tensor, label: int | None) -> Tensor:
    """Return z_y of one sample, shape (1, 1)."""
    assert label is not None
    return outputs[:, label : label + 1]


def differentiable_jacobian(
    model: nn.Module,
    inputs: Any,
    labels: Tensor | None = None,
    project: Projection | None = None,
    parameters: Iterable[str] | None = None,
) -> Tensor:
    """Return ∂(Vᵀf)(x)/∂θ, shape (B, d, P), on the graph of the parameters of `model`: one backward pass for each row.

    Args:
        model: in float64; it is not copied, so that the result can be differentiated by its own parameters.
        inputs: as above.
        labels: shape (B,), handed to `project`.
        project: what is differentiated; by default all outputs.
        parameters: names of parameters; by default those that require a gradient.
    """
    by_name = dict(model.named_parameters())
    names = [name for name, p in by_name.items() if p.requires_grad] if parameters is None else list(parameters)
    chosen = [by_name[name] for name in names]
    samples = []
    with sdpa_kernel(SDPBackend.MATH):
        for row in range(_batch_size(inputs)):
            outputs = _call(model, _sample(inputs, row))
            projected = outputs if project is None else project(outputs, None if labels is None else int(labels[row]))
            samples.append(torch.stack([_flat_gradient(value, chosen) for value in projected[0]]))
    return torch.stack(samples)


def _flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient of `value`, on the graph, shape (P,)."""
    found = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, found, strict=True)])


def tangent_jacobian(
    model: nn.Module, inputs: Tensor, direction: Tensor, labels: Tensor | None = None, project: Projection | None = None
) -> Tensor:
    """Return ∂_x G(x_i)·e_i, shape (B, d, P), on the graph: backward through the gradient, then through its dependence on v.

    ⟨v, G(x)⟩ has the gradient (∂_x G)ᵀ v at x, which is linear in v; the derivative of ⟨(∂_x G)ᵀ v, e⟩ by v is ∂_x G·e.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    samples = []
    for row in range(len(inputs)):
        x = inputs[row : row + 1].detach().clone().requires_grad_(True)
        outputs = model(x)
        projected = outputs if project is None else project(outputs, None if labels is None else int(labels[row]))
        rows = []
        for value in projected[0]:
            gradient = _flat_gradient(value, parameters)
            dummy = torch.ones_like(gradient, requires_grad=True)
            (back,) = torch.autograd.grad((dummy * gradient).sum(), x, create_graph=True)
            (forward,) = torch.autograd.grad((back * direction[row : row + 1]).sum(), dummy, create_graph=True)
            rows.append(forward)
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def _differentiable_root(gram: Tensor) -> tuple[Tensor, int]:
    """Return C^(-1/2) over the eigenvalues above 1e-12·λ_max and their number; all of those must differ."""
    if len(gram) == 1:
        return gram.rsqrt(), 1
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    numbers = values.detach().tolist()
    kept = [k for k in range(len(numbers)) if numbers[k] > 1e-12 * numbers[-1]]
    terms = [torch.outer(vectors[:, k], vectors[:, k]) / values[k].sqrt() for k in kept]
    return torch.stack(terms).sum(0), len(kept)


def pair_similarities(first: Tensor, second: Tensor) -> Tensor:
    """Return k(x_i, x'_i) = tr(C^(-1/2) K C'^(-1/2)) / √(r r') of corresponding samples, shape (n,), on the graph."""
    found = []
    for one, other in zip(first, second, strict=True):
        (root, rank), (root_other, rank_other) = _differentiable_root(one @ one.T), _differentiable_root(other @ other.T)
        normalized = root @ (one @ other.T) @ root_other
        found.append(normalized.diagonal().sum() / math.sqrt(rank * rank_other))
    return torch.stack(found)


def all_similarities(jacobian: Tensor) -> list[list[Tensor]]:
    """Return k(x_i, x_j) of all pairs, on the graph."""
    n = len(jacobian)
    return [[pair_similarities(jacobian[i : i + 1], jacobian[j : j + 1])[0] for j in range(n)] for i in range(n)]


def _groups(labels: Tensor) -> list[list[int]]:
    """Return the samples of each label that has two or more, in the order of the batch."""
    groups = [[i for i in range(len(labels)) if int(labels[i]) == label] for label in sorted(set(labels.tolist()))]
    return [group for group in groups if len(group) > 1]


def pair_criterion(jacobian: Tensor, labels: Tensor) -> Tensor:
    """Return −mean k over neighbors in the circle of each label; two samples form one pair."""
    pairs = []
    for group in _groups(labels):
        links = [(group[i], group[(i + 1) % len(group)]) for i in range(len(group))]
        pairs += links if len(group) > 2 else links[:1]
    return -torch.stack([pair_similarities(jacobian[i : i + 1], jacobian[j : j + 1])[0] for i, j in pairs]).mean()


def group_criterion(jacobian: Tensor, labels: Tensor) -> Tensor:
    """Return minus the mean over labels of the mean k over all pairs of different samples."""
    k, means = all_similarities(jacobian), []
    for group in _groups(labels):
        means.append(torch.stack([k[i][j] for i in group for j in group if i != j]).mean())
    return -torch.stack(means).mean()


def minibatch_criterion(jacobian: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over labels of n_B ‖μ₁ − μ₂‖² / (‖μ₁‖ ‖μ₂‖), with the halves of each label."""
    terms = []
    for group in _groups(labels):
        half = len(group) // 2
        first, second = (
            sum((jacobian[i] for i in some[1:]), jacobian[some[0]]) / half for some in (group[:half], group[half : 2 * half])
        )
        difference, product = (first - second).square().sum(), first.square().sum().sqrt() * second.square().sum().sqrt()
        terms.append(half * difference / product)
    return torch.stack(terms).mean()


def density_criterion(jacobian: Tensor, low: float, high: float, mean: bool) -> Tensor:
    """Return the sum or mean of the squared distances of N_S(x_i)/n from [low, high]."""
    k, n = all_similarities(jacobian), len(jacobian)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        fraction = torch.stack(k[i]).sum() / n
        if float(fraction.detach()) < low:
            total = total + (low - fraction) ** 2
        if float(fraction.detach()) > high:
            total = total + (fraction - high) ** 2
    return total / n if mean else total


def _length(vector: Tensor) -> Tensor:
    """Return ‖v‖; of the zero vector a zero whose gradient is zero."""
    return vector.square().sum().sqrt() if bool((vector != 0).any()) else vector.sum() * 0


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda vector: vector.abs().sum(),
    "l2": _length,
    "squared_l2": lambda vector: vector.square().sum(),
}


def ctv_norm(differences: Tensor, norm: str, mean: bool = False) -> Tensor:
    """Return Σ_{k<l} G(m_k − m_l), or its mean over the pairs, by a loop over the pairs."""
    differences = differences.double()
    total, pairs = differences.sum() * 0, 0
    for k in range(len(differences)):
        for l in range(k + 1, len(differences)):  # noqa: E741
            total, pairs = total + SIZES[norm](differences[k] - differences[l]), pairs + 1
    return total / pairs if mean and pairs else total


def difference_alignment(
    embeddings: Tensor, labels: Tensor, pairs: Sequence[tuple[int, int]], difference: str, norm: str
) -> Tensor:
    """Return the mean of G over pairs of differences, those within a class and of samples without a label left out."""
    embeddings = embeddings.double()
    kept = []
    for i, j in pairs:
        if int(labels[i]) != int(labels[j]) and int(labels[i]) >= 0 and int(labels[j]) >= 0:
            signed = embeddings[i] - embeddings[j]
            kept.append({"signed": signed, "abs": signed.abs(), "distance": _length(signed).reshape(1)}[difference])
    return ctv_norm(torch.stack(kept), norm, mean=True) if kept else embeddings.sum() * 0


def contrastive(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the mean of ½ ‖z − z'‖² within classes plus that of ½ max(0, m − ‖z − z'‖²) between them, zeros left out."""
    embeddings = embeddings.double()
    terms: dict[bool, list[Tensor]] = {True: [], False: []}
    for i in range(len(embeddings)):
        for j in range(i + 1, len(embeddings)):
            if int(labels[i]) >= 0 and int(labels[j]) >= 0:
                square, same = (embeddings[i] - embeddings[j]).square().sum(), int(labels[i]) == int(labels[j])
                term = square / 2 if same else (margin - square) / 2
                if float(term.detach()) > 0:
                    terms[same].append(term)
    return sum((torch.stack(some).mean() for some in terms.values() if some), embeddings.sum() * 0)


def arc_cosine(cosine: float, depth: int) -> tuple[float, float]:
    """Return the kernel of `depth` ReLU layers at one cosine, and its slope there, by the chain rule."""
    slope = 1.0
    for _ in range(depth):
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        cosine, slope = (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi, slope * (1 - angle / math.pi)
    return cosine, slope


#: Two samples (K,) -> their similarity, on the graph.
PairKernel = Callable[[Tensor, Tensor], Tensor]


def gaussian(bandwidths: Sequence[float]) -> PairKernel:
    """Return the mean of exp(−‖p − q‖²/(2σ²)) over the bandwidths σ, as a function of two samples."""
    return lambda p, q: sum(torch.exp(-(p - q).square().sum() / (2 * s**2)) for s in bandwidths) / len(bandwidths)


def arc_cosine_of_pair(depth: int, normalize: bool = True) -> PairKernel:
    """Return the arc-cosine kernel as a function of two samples that are neither parallel nor zero."""

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        lengths = p.square().sum().sqrt() * q.square().sum().sqrt()
        cosine = (p * q).sum() / lengths
        for _ in range(depth):
            if float(cosine.detach()) > 1 - 1e-12:  # A sample with itself: its similarity is 1 and does not move.
                return p.square().sum() ** (0 if normalize else 1)
            angle = torch.arccos(cosine)
            cosine = (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi
        return cosine if normalize else cosine * lengths

    return kernel


def squared_mmd(x: Tensor, y: Tensor, kernel: PairKernel, unbiased: bool = False) -> Tensor:
    """Return mean k(x, x') + mean k(y, y') − 2 mean k(x, y) by loops over pairs; unbiased, without those of a sample itself."""
    x, y = x.double(), y.double()
    own = []
    for some in (x, y):
        n = len(some)
        pairs = [kernel(some[i], some[j]) for i in range(n) for j in range(n) if i != j or not unbiased]
        own.append(torch.stack(pairs).mean())
    return own[0] + own[1] - 2 * torch.stack([kernel(p, q) for p in x for q in y]).mean()


def windows_of_patches(image: Tensor, size: int, window: int, stride: int) -> list[Tensor]:
    """Return the patches (n, C·P·P) of each window of one image (C, H, W); windows at the far border are cut."""
    down, across = image.shape[1] - size + 1, image.shape[2] - size + 1
    windows = []
    for top in range(0, down, stride):
        for left in range(0, across, stride):
            # A window that begins where the one before it had reached the border would be a part of that one.
            if top - stride + window < down and left - stride + window < across:
                places = [(i, j) for i in range(top, min(top + window, down)) for j in range(left, min(left + window, across))]
                windows.append(torch.stack([image[:, i : i + size, j : j + size].reshape(-1) for i, j in places]))
    return windows


def random_patch_mmd(input: Tensor, target: Tensor, frequencies: Tensor, window: int, stride: int) -> Tensor:
    """Return the mean over frequencies and windows of the squared gaps of mean cosines and sines, shape (B,)."""
    gaps = torch.zeros((), dtype=torch.float64)
    angles = [F.conv2d(images.double(), frequencies.double()) for images in (input, target)]
    for wave in (torch.cos, torch.sin):
        first, second = (F.avg_pool2d(wave(some), window, stride, ceil_mode=True) for some in angles)
        gaps = gaps + (first - second).square()
    return gaps.mean((1, 2, 3))

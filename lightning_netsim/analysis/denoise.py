"""What a network makes of the labels of a data set: the average over kernel neighbors, and how much noise that takes away."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_netsim._checks import NetsimError, check_choice, expected
from lightning_netsim.analysis.borrowed import borrowed, to_device_of
from lightning_netsim.data.labels import are_binary, are_classes, class_numbers
from lightning_netsim.data.samples import Samples
from lightning_netsim.data.sources import Chunk, SampleSource
from lightning_netsim.estimators import LabelDenoising
from lightning_netsim.functional import lipschitz_constant
from lightning_netsim.functional.results import LabelDenoisingResult
from lightning_netsim.jacobian import PerSampleJacobian
from lightning_netsim.jacobian.capture import full_float32
from lightning_netsim.measurement.plan import chunk_of, memory_budget
from lightning_netsim.measurement.progress import Progress
from lightning_netsim.measurement.sample_table import SampleTable
from lightning_netsim.measurement.settings import SweepSettings, takes_settings
from lightning_netsim.measurement.sweep import FeatureReader, Sweeper

TARGETS = ("auto", "classes", "values")
# The slope of the sigmoid is at most this.
_SIGMOID_SLOPE = 1 / 4
# How far the gradient of an affine layer's outputs may be from what it is in exact arithmetic.
_AFFINE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class DenoisedLabels:
    """The labels of a data set as a network sees them.

    Attributes:
        samples: one row for each query: `sample_id`, `index`, `dataloader`, `label`, `prediction`; `denoised_label`, the class
            of largest E_k[ỹ] or its value; `label_share`, E_k[ỹ] at the given class, which negative kernels can bring
            outside [0, 1]; `denoising_factor`, `neighbor_consistency`, and `consistency_bound` where the Lipschitz constant is
            known.
        result: the tensors behind it.
        meta: what it was made with.
    """

    samples: pd.DataFrame
    result: LabelDenoisingResult
    meta: dict[str, Any]


@takes_settings("parameters", "max_samples", "memory_budget", "seed")
def denoise_labels(
    model: nn.Module,
    loader: Iterable[Any],
    reference: Iterable[Any] | None = None,
    *,
    kernel: str = "matrix",
    targets: str = "auto",
    all_pairs: bool = False,
    num_probes: int = 32,
    last_layer: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> DenoisedLabels:
    """Average the labels of a set over the kernel neighbors of every sample, as a network does that was trained on them.

    E_k[ỹ]_i = Σ_j a_ij ỹ_j, a_ij = (Σ_j K_ij)⁺ K_ij, with the kernel K of all outputs, not normalized. The factor √(Σ ‖a‖²/D)
    says what is left of independent label noise: 1 for a sample by itself, 1/√N where all are the same to the network. The
    model is put in eval mode for the time of the call and left as it was found.

    Args:
        model: a LightningModule or any module; see `read_batch` for how batches are read.
        loader: the samples that are asked about: a DataLoader, or an iterable of batches that can be iterated again.
        reference: the samples whose labels are averaged; None for those of `loader`.
        kernel: "matrix", or "outputs" for each output by itself with weights that are distributions; see `LabelDenoising`.
        targets: "classes" compares class numbers with the softmax of the outputs (the sigmoid of a single one), "values"
            compares labels with the outputs as they are; "auto" takes integers for classes, and floats that are
            all 0 or 1 beside a single output.
        all_pairs: compute the denoising factor of all pairs instead of estimating it in linear time.
        num_probes: how many random signs estimate it; memory is that of D + 2 + `num_probes` gradients.
        last_layer: the name of the affine layer that the network ends in, for the bound of the kernel "outputs"; None for the
            last linear layer, if the network ends in that.
        progress: show a progress bar.
        **settings: see `SweepSettings`.

    Returns:
        a table and the tensors behind it.

    Raises:
        ValueError: for a set without labels, labels that do not fit the outputs, or a budget that is too small.

    Source: Charpiat et al., NeurIPS 2019, section 5 (Self-denoising), and section 6.3 of the supplementary material.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8)
        >>> denoised = denoise_labels(nn.Linear(3, 2), loader, progress=False)
        >>> denoised.result.smoothed_targets.shape
        torch.Size([20, 2])
    """
    check_choice("targets", targets, TARGETS)
    if last_layer is not None and kernel != "outputs":
        raise expected("last_layer", 'None with kernel="matrix", which has no bound', repr(last_layer))
    chosen = SweepSettings(k=1, directions="all", compare_activations=False, **settings)
    estimator = LabelDenoising(kernel, all_pairs, num_probes, chosen.seed)
    move = to_device_of(model)
    asked = Samples(loader, move, chosen.max_samples, chosen.seed)
    averaged = asked if reference is None else Samples(reference, move, chosen.max_samples, chosen.seed)
    start = time.perf_counter()
    with borrowed(model, progress) as tell, full_float32():
        sweeps = _Sweeps(model, estimator, chosen, targets, last_layer, averaged.first(), tell)
        sweeps.update(averaged)
        sweeps.query(asked.source)
        result = _spread(estimator.compute(sweeps.lipschitz()), sweeps.table.rank > 0)
    meta = {
        "kernel": kernel,
        "targets": sweeps.targets,
        "num_reference": result.num_reference,
        "factor_error": result.factor_error,
        "seconds": time.perf_counter() - start,
    }
    return DenoisedLabels(_table(sweeps.table, sweeps.targets, result), result, meta)


class _Sweeps:
    """The two sweeps: over the reference set, and over the queries."""

    def __init__(
        self,
        model: nn.Module,
        estimator: LabelDenoising,
        settings: SweepSettings,
        targets: str,
        last_layer: str | None,
        first: Chunk,
        progress: Progress,
    ) -> None:
        self.estimator, self.targets = estimator, targets
        self.budget = memory_budget(settings)
        self.table = SampleTable(0.0)
        self._last_layer = last_layer
        # The layer that the network may end in, where a bound is wanted.
        self._layer: tuple[str, nn.Linear] | None = None
        if estimator.kernel == "outputs":
            linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
            if last_layer is not None and last_layer not in linear:
                raise self._not_last()
            name = next(reversed(linear), None) if last_layer is None else last_layer
            self._layer = None if name is None else (name, linear[name])
        self._norms: list[tuple[Tensor, Tensor]] = []
        reader = FeatureReader(model, settings)
        reader.prepare(first)
        few = reader.read(first)
        if targets == "auto":
            numbers = class_numbers(few.read.labels)
            classified = numbers is not None and numbers.ndim == 1
            classified = classified and (are_classes(numbers) or are_binary(numbers, few.read.outputs.shape[1]))
            self.targets = "classes" if classified else "values"
        chunk_size = chunk_of(few.features.jacobian, self.budget)
        self.sweeper = Sweeper(reader, chunk_size, seed=settings.seed, progress=progress)

    def update(self, averaged: Samples) -> None:
        """Give the reference set to the estimator."""
        checked = False
        for swept, _ in self.sweeper.sweep(averaged.source, "reference", lambda swept: None):
            jacobian = swept.features.jacobian
            if not checked and jacobian.num_samples:
                self._check_budget(jacobian, averaged.source.num_samples)
                checked = True
            wanted = _targets_of(swept.read.labels, swept.read.outputs, self.targets)
            self.estimator.update(jacobian, wanted[swept.features.valid], _fitted(jacobian, self.targets))
            self._see(jacobian)

    def query(self, source: SampleSource) -> None:
        """Ask the estimator for every query that has a gradient."""
        for swept, _ in self.sweeper.sweep(source, "queries", lambda swept: None):
            self.table.add(swept.chunk, replace(swept.read, inputs=None), swept.features)
            self.estimator.query(swept.features.jacobian, _fitted(swept.features.jacobian, self.targets))
            self._see(swept.features.jacobian)

    def lipschitz(self) -> Tensor | None:
        """Return C of each of the values that are compared with labels, shape (D,), over all samples of both sets.

        None where the network does not end in an affine layer, or in probabilities that depend on several outputs.
        """
        if not self._norms or self._layer is None or (self.targets == "classes" and self._layer[1].out_features > 1):
            return None
        activations, gradients = (torch.cat(column) for column in zip(*self._norms, strict=True))
        constant = lipschitz_constant(self._layer[1].weight.detach(), activations, gradients)
        return constant * _SIGMOID_SLOPE if self.targets == "classes" else constant

    def _check_budget(self, jacobian: PerSampleJacobian, num_samples: int | None) -> None:
        """Refuse to keep more gradients, or sums of them, than fit."""
        columns = jacobian.num_directions + 2 + self.estimator.num_probes
        needed: float = columns * jacobian.num_parameters * jacobian.outputs.element_size()
        remedy = "Choose a larger `memory_budget`, a smaller `num_probes` or fewer `parameters`."
        if self.estimator.all_pairs:
            packed = jacobian.packed(fast=True).nbytes / max(1, jacobian.num_samples)
            needed = packed * (num_samples or 0)
            remedy = 'Choose a larger `memory_budget`, a smaller `max_samples`, or kernel="matrix" without `all_pairs`.'
        if needed > self.budget:
            raise expected("memory_budget", f"at least {needed:,.0f} bytes for these gradients", f"{self.budget:,.0f}", remedy)

    def _not_last(self) -> NetsimError:
        wanted = "the name of a linear layer with a bias that gives the outputs, and whose parameters are compared"
        return expected("last_layer", wanted, repr(self._last_layer))

    def _see(self, jacobian: PerSampleJacobian) -> None:
        """Take note of ‖a‖ and ‖∇f_o‖, for the Lipschitz constant, if the network ends in the layer."""
        if self._layer is None or not jacobian.num_samples:
            return
        if _ends_in(*self._layer, jacobian):
            activations = _norms(jacobian.only([f"{self._layer[0]}.weight"]))[:, 0]
            self._norms.append((activations, _norms(jacobian)))
        elif self._last_layer is not None:
            raise self._not_last()
        else:
            self._layer = None


def _spread(result: LabelDenoisingResult, valid: Tensor) -> LabelDenoisingResult:
    """Put what was found of the valid queries among all, NaN for the others."""
    if bool(valid.all()):
        return result
    spread: dict[str, Any] = {}
    for name, value in vars(result).items():
        if isinstance(value, Tensor) and name not in ("clamped", "lipschitz"):
            spread[name] = value.new_full((len(valid), *value.shape[1:]), torch.nan)
            spread[name][valid.to(value.device)] = value
    return replace(result, **spread)


def _ends_in(name: str, layer: nn.Linear, jacobian: PerSampleJacobian) -> bool:
    """Return whether the outputs are W a + b of this layer: by their value, by ∂f/∂b = Id, and by ∂f_o/∂W = a in row o."""
    names = [f"{name}.weight", f"{name}.bias"]
    if layer.bias is None or layer.out_features != jacobian.num_directions or any(n not in jacobian.shapes for n in names):
        return False
    weight, bias = (jacobian.only([name]).gram() for name in names)
    identity = torch.eye(layer.out_features, dtype=bias.dtype, device=bias.device).expand_as(bias)
    length = weight[:, :1, :1]
    product = jacobian.only(names[:1]).dot({names[0]: layer.weight.detach().unsqueeze(0)})[..., 0] + layer.bias.detach()
    outputs = jacobian.outputs.detach()
    # What the rest of the network adds shows in the range of the outputs; a large bias only in their size.
    spread, size = outputs.amax(0) - outputs.amin(0), outputs.abs().amax(0)
    allowed = _AFFINE_TOLERANCE * spread + 10 * torch.finfo(outputs.dtype).eps * size
    return (
        torch.allclose(bias, identity, atol=_AFFINE_TOLERANCE)
        and torch.allclose(weight / length.clamp_min(torch.finfo(weight.dtype).tiny), identity, atol=_AFFINE_TOLERANCE)
        and bool(((product - outputs).abs() <= allowed).all())
    )


def _norms(jacobian: PerSampleJacobian) -> Tensor:
    """Return ‖∇f_o(x_i)‖, shape (B, D)."""
    return jacobian.gram().diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


def _targets_of(labels: Any, outputs: Tensor, kind: str) -> Tensor:
    """Return ỹ, shape (B, D).

    Raises:
        ValueError: if the labels are none of the classes, or values of another shape.
    """
    size, number = outputs.shape
    if labels is None:
        remedy = "Batches are (inputs, labels); or define `similarity_step` that returns a `SimilarityBatch` with labels."
        raise expected("labels", "one for each sample", "none", remedy)
    found = class_numbers(labels)
    if found is None:
        try:
            found = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise expected("labels", "class numbers, or values", f"a {type(labels).__name__} ({error})") from error
    if found.is_complex():
        raise expected("labels", "class numbers, or values", f"{found.dtype}")
    if kind == "values":
        values = found.unsqueeze(1) if found.ndim == 1 else found
        if values.shape != outputs.shape:
            raise expected("labels", f"values of shape ({size}, {number}) like the outputs", f"shape {tuple(found.shape)}")
        return values.to(outputs)
    remedy = 'Labels that are values, not classes, need targets="values".'
    whole = not found.is_floating_point() or bool((found == found.round()).all())
    if found.shape != (size,) or not whole:
        got = f"{found.dtype} of shape {tuple(found.shape)}" + ("" if whole else ", not all of them whole")
        raise expected("labels", f"class numbers of shape ({size},)", got, remedy)
    classes = max(2, number)
    if bool(((found < 0) | (found >= classes)).any()):
        got = f"{int(found.min())} to {int(found.max())}"
        raise expected("labels", f"class numbers within 0 to {classes - 1}", got, remedy)
    found = found.to(outputs.device)
    return found.unsqueeze(1).to(outputs) if number == 1 else F.one_hot(found.long(), number).to(outputs)


def _fitted(jacobian: PerSampleJacobian, kind: str) -> Tensor:
    """Return ŷ, what the loss compares with the labels, shape (B, D)."""
    outputs = jacobian.outputs.detach()
    if kind == "values":
        return outputs
    return outputs.sigmoid() if outputs.shape[1] == 1 else outputs.softmax(1)


def _table(table: SampleTable, kind: str, result: LabelDenoisingResult) -> pd.DataFrame:
    """Return one row for each query."""
    samples, smoothed = table.sample_set(), result.smoothed_targets.double().cpu()
    columns: dict[str, Any] = {
        "sample_id": samples.index.tolist() if samples.ids is None else samples.ids,
        "index": samples.index.numpy(),
        "dataloader": samples.dataloader.numpy(),
    }
    if samples.labels is not None:
        columns |= {"label": samples.labels, "prediction": table.predictions(are_values=kind == "values")}
    if kind == "classes":
        shares = torch.cat([1 - smoothed, smoothed], 1) if smoothed.shape[1] == 1 else smoothed
        columns["denoised_label"] = pd.array(
            [int(row.argmax()) if bool(row.isfinite().all()) else None for row in shares], "Int64"
        )
        if samples.labels is not None:
            # NaN where the label of a query is no class.
            known = [isinstance(y, (int, float)) and 0 <= y < shares.shape[1] and y == int(y) for y in samples.labels]
            rows = zip(shares.tolist(), samples.labels, known, strict=True)
            columns["label_share"] = [row[int(label)] if is_class else math.nan for row, label, is_class in rows]
    else:
        names = ["denoised_label"] if smoothed.shape[1] == 1 else [f"denoised_label_{o}" for o in range(smoothed.shape[1])]
        columns |= dict(zip(names, smoothed.T.numpy(), strict=True))
    columns["denoising_factor"] = result.factor.double().cpu().numpy()
    columns["neighbor_consistency"] = result.consistency.double().cpu().numpy()
    if result.bound is not None:
        columns["consistency_bound"] = torch.linalg.vector_norm(result.bound.double(), dim=1).cpu().numpy()
    return pd.DataFrame(columns)

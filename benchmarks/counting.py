"""Ways to count neighbors exactly: by this package, and by what torch itself offers.

Every way takes a problem and returns the soft counts N_S(x_i) = Σ_j ⟨φ(x_i), φ(x_j)⟩ of its N images among themselves, shape
(N,), with φ the normalized gradient of one output direction. O(P) memory means: a few vectors of P numbers and what a chunk
needs, whatever N.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from benchmarks.problems import Problem
from lightning_netsim.estimators import NeighborCount
from lightning_netsim.jacobian.features import GradientFeatures

# What `disagreement` may be between any two ways of counting.
TOLERANCE = 1e-4

Gradients = dict[str, Tensor]
"""For each parameter the gradients of a chunk, shape (B, *shape)."""


def disagreement(counts: Tensor, expected: Tensor) -> float:
    """Return the |ΔN| / max(1, |N|) that 99 % of the images do not exceed, or a hundredth of the largest if that is more.

    A ReLU whose input is zero up to rounding has one gradient or another, depending on the order of a sum: of 1,000 images of
    ResNet-20, one to four differ by 1e-3 between any two ways in float32, and between each and float64.
    """
    error = (counts.double() - expected.double()).abs() / expected.double().abs().clamp_min(1)
    return float(torch.maximum(error.quantile(0.99), error.max() / 100))


def plain(problem: Problem, chunk_size: int | None = None) -> Tensor:
    """Run one forward and backward pass over all images, nothing else; return the summed outputs."""
    total = torch.zeros(())
    for chunk in problem.chunks(chunk_size):
        problem.network.zero_grad()
        value = (problem.network(chunk) @ problem.direction).sum()
        value.backward()
        total += value.detach()
    problem.network.zero_grad()
    return total


def ours(problem: Problem, directions: int | str = 1, features: GradientFeatures | None = None) -> Tensor:
    """Count with this package in two sweeps and O(P·d) memory.

    Args:
        problem: the problem.
        directions: as in `GradientFeatures`.
        features: those, if they have seen the network already, which is looked at before the first batch.
    """
    features = features or GradientFeatures(problem.network, directions=directions, seed=0)
    count = NeighborCount()
    normalizations = []
    for chunk in problem.chunks():
        batch = features(chunk)
        count.update(batch)
        normalizations.append(batch.normalization)
    for chunk, known in zip(problem.chunks(), normalizations, strict=True):
        count.query(features(chunk, normalization=known))
    return count.compute().soft


def ours_stored(problem: Problem) -> Tensor:
    """Count with this package in one sweep, all gradients kept packed: the case where they fit the budget."""
    features = GradientFeatures(problem.network, directions=1, seed=0)
    count = NeighborCount()
    batches = []
    for chunk in problem.chunks():
        batches.append(features(chunk, form=True))
        count.update(batches[-1])
    for batch in batches:
        count.query(batch)
    return count.compute().soft


def sum_of(problem: Problem, sweep: Iterable[Gradients]) -> tuple[Gradients, list[Tensor]]:
    """Return the sum S of the normalized gradients, and the norms of each chunk."""
    total, norms = {name: torch.zeros_like(value) for name, value in _parameters(problem).items()}, []
    for gradients in sweep:
        norms.append(norm(gradients))
        for name, value in gradients.items():
            total[name] += torch.tensordot(norms[-1].reciprocal(), value, 1)
    return total, norms


def from_gradients(problem: Problem, sweeps: tuple[Iterable[Gradients], Iterable[Gradients]]) -> Tensor:
    """Count in two passes from the gradients of one chunk after another: their norms and sum S, then their products with S.

    Args:
        problem: the problem.
        sweeps: the gradients of all chunks, once for each pass; what makes them is the difference between the packages.
    """
    total, norms = sum_of(problem, sweeps[0])
    counts = []
    for gradients, known in zip(sweeps[1], norms, strict=True):
        products = [value.flatten(1) @ total[name].flatten() for name, value in gradients.items()]
        counts.append(torch.stack(products).sum(0) / known)
    return torch.cat(counts)


def vmap_two_pass(problem: Problem) -> Tensor:
    """Count in two passes of `vmap(grad)` and O(P) memory: only the gradients of one chunk are held."""
    return from_gradients(problem, (_vmap_chunks(problem), _vmap_chunks(problem)))


def vmap_jvp(problem: Problem) -> Tensor:
    """Count in O(P) memory by one pass of `vmap(grad)`, and one of `jvp`, the products with S in forward mode."""
    parameters, direction = _parameters(problem), problem.direction
    total, norms = sum_of(problem, _vmap_chunks(problem))
    counts = []
    for chunk, known in zip(problem.chunks(), norms, strict=True):

        def value(values: dict[str, Tensor], images: Tensor = chunk) -> Tensor:
            return (functional_call(problem.network, values, (images,)) @ direction)[:, 0]

        with torch.no_grad():
            counts.append(jvp(value, (parameters,), (total,))[1] / known)
    return torch.cat(counts)


class VmapStored:
    """Count in one pass of `vmap(grad)`, the matrix of all gradients, N·P numbers, allocated once and used again."""

    def __init__(self) -> None:
        self._stored: Tensor | None = None

    def __call__(self, problem: Problem) -> Tensor:
        """Return the counts."""
        shape = (len(problem), problem.num_parameters)
        if self._stored is None or self._stored.shape != shape:
            self._stored = torch.empty(shape)
        start = 0
        for gradients in _vmap_chunks(problem):
            values = [value.flatten(1) for value in gradients.values()]
            rows = self._stored[start : start + len(values[0])]
            start += len(rows)
            torch.cat(values, 1, out=rows)
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return self._stored @ self._stored.sum(0)


def loop(problem: Problem) -> Tensor:
    """Count in two passes of a loop over the samples, one backward pass each."""
    return from_gradients(problem, (_loop_chunks(problem), _loop_chunks(problem)))


def exact_rows(problem: Problem) -> Tensor:
    """Return the normalized gradients, shape (N, P), float64, by a loop over the samples: what all others are held to."""
    # In one piece, which goes back to the system: what is left to the allocator would spare some methods half their time.
    rows = torch.empty(len(problem), problem.num_parameters, dtype=torch.float64)
    for row, gradients in zip(rows, _loop_chunks(problem, double=True), strict=True):
        torch.cat([value.flatten() for value in gradients.values()], out=row)
        row /= torch.linalg.vector_norm(row)
    return rows


def norm(gradients: Gradients) -> Tensor:
    """Return the norm of the gradient of each image of a chunk, shape (B,)."""
    return torch.stack([value.flatten(1).square().sum(1) for value in gradients.values()]).sum(0).sqrt()


def _parameters(problem: Problem) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in problem.network.named_parameters()}


def _vmap_chunks(problem: Problem) -> Iterable[Gradients]:
    parameters, direction = _parameters(problem), problem.direction

    def value(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return (functional_call(problem.network, values, (image.unsqueeze(0),)) @ direction)[0, 0]

    for chunk in problem.chunks():
        yield vmap(grad(value), (None, 0))(parameters, chunk)


def _loop_chunks(problem: Problem, double: bool = False) -> Iterable[Gradients]:
    network, direction = problem.network, problem.direction
    if double:
        network, direction = copy.deepcopy(network).double(), direction.double()
    names, parameters = zip(*network.named_parameters(), strict=True)
    for image in problem.chunks(1):
        value = (network(image.to(direction)) @ direction).sum()
        found = torch.autograd.grad(value, parameters)
        yield {name: gradient.unsqueeze(0) for name, gradient in zip(names, found, strict=True)}

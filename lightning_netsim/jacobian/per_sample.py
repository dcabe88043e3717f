"""The per-sample Jacobian of a batch, kept in factored form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, check_tensor, expected
from lightning_netsim.jacobian.factors import AbstractFactor
from lightning_netsim.jacobian.sketch import SketchProjection

T = TypeVar("T")


class PerSampleJacobian:
    """G(x_i) = ∂(Vᵀf)(x_i)/∂θ, shape (P, d), for each sample of a batch; layers keep (u, δ) instead of the matrix.

    Made by `per_sample_jacobian` or a `JacobianOperator`. Source: Charpiat et al., NeurIPS 2019, sections 2 and 3.

    Attributes:
        outputs: f(x), shape (B, D).
        shapes: the shape of each of the parameters, by name, in the order of `materialize`.
        num_samples: B.
        num_directions: d.
        num_parameters: P.
    """

    def __init__(
        self, factors: Mapping[str, AbstractFactor], shapes: Mapping[str, torch.Size], outputs: Tensor, num_directions: int
    ) -> None:
        self._factors = dict(factors)
        self.shapes = dict(shapes)
        self.outputs = outputs
        self.num_samples = len(outputs)
        self.num_directions = num_directions
        self.num_parameters = sum(shape.numel() for shape in shapes.values())

    def __repr__(self) -> str:
        return (
            f"PerSampleJacobian(samples={self.num_samples}, directions={self.num_directions}, parameters={self.num_parameters})"
        )

    @property
    def nbytes(self) -> int:
        """Return the number of bytes kept."""
        return sum(factor.kept_bytes for factor in self._factors.values())

    def select(self, index: Tensor | slice) -> PerSampleJacobian:
        """Return the samples `index`: shape (B',), int64 or bool, or a slice, which copies nothing."""
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        place = index.to(self.outputs.device) if isinstance(index, Tensor) else index
        return self._each(lambda factor: factor.select(place), self.outputs[place])

    def only(self, names: Iterable[str]) -> PerSampleJacobian:
        """Return the gradients with respect to some of the parameters.

        Raises:
            ValueError: for a name that is none of them.
        """
        shapes = {check_choice("names", name, self.shapes): self.shapes[name] for name in names}
        factors = {name: factor for name, factor in self._factors.items() if name in shapes}
        return PerSampleJacobian(factors, shapes, self.outputs, self.num_directions)

    def split(self, groups: Sequence[Tensor]) -> list[PerSampleJacobian]:
        """Return the samples of each group, an int64 index: one Jacobian each, in one pass over memory."""
        order, sizes = torch.cat(list(groups)), [len(group) for group in groups]
        everything = len(order) == self.num_samples and torch.equal(order, torch.arange(len(order), device=order.device))
        whole = self if everything else self.select(order)
        parts = {name: [torch.split(part, sizes) for part in factor.parts] for name, factor in whole._factors.items()}
        outputs = torch.split(whole.outputs, sizes)
        return [
            PerSampleJacobian(
                {name: factor.with_parts([part[place] for part in parts[name]]) for name, factor in whole._factors.items()},
                self.shapes,
                outputs[place],
                self.num_directions,
            )
            for place in range(len(groups))
        ]

    def to(self, dtype: torch.dtype) -> PerSampleJacobian:
        """Return the same gradients in `dtype`: sums over them are then made in it."""
        return self._each(lambda factor: factor.to(dtype), self.outputs.to(dtype))

    def moved(self, device: torch.device) -> PerSampleJacobian:
        """Return the same gradients on `device`."""
        return self._each(lambda factor: factor.moved(device), self.outputs.to(device))

    def packed(self, fast: bool) -> PerSampleJacobian:
        """Return the same gradients in the form in which those of many samples are stored; it depends on shapes only.

        Args:
            fast: the form with the fastest inner products of given pairs; else that of fewest bytes.
        """
        return self._each(lambda factor: factor.packed(fast), self.outputs)

    def empty(self, num_samples: int) -> PerSampleJacobian:
        """Return room for so many samples in the same form, to be filled by `write`; what stands in it is undefined."""
        outputs = self.outputs.new_empty(num_samples, *self.outputs.shape[1:])
        return self._each(lambda factor: factor.empty(num_samples), outputs)

    def write(self, start: int, other: PerSampleJacobian) -> None:
        """Copy the samples of `other` in, from place `start` on.

        Args:
            start: the first place.
            other: gradients in the same form, see `packed`; a parameter that it lacks counts as zero.

        Raises:
            ValueError: if `other` differentiates other parameters or directions, or does not fit behind `start`.
        """
        if self.shapes != other.shapes or self.num_directions != other.num_directions:
            raise expected("other", f"gradients like {self!r}", repr(other))
        stop = start + other.num_samples
        if start < 0 or stop > self.num_samples:
            raise expected("start", f"a place with room for {other.num_samples} of {self.num_samples} samples", str(start))
        self.outputs[start:stop] = other.outputs
        for name in self._factors.keys() - other._factors.keys():
            self._factors[name].clear(start, stop)
        for name, factor in other._factors.items():
            held = self._factors.get(name)
            if held is None:  # The outputs depend on it from here on.
                held = factor.empty(self.num_samples)
                held.clear(0, self.num_samples)
            self._factors[name] = held.write(start, factor)

    @property
    def parts(self) -> list[Tensor]:
        """Return the tensors that are kept, of one parameter after the other."""
        return [part for factor in self._factors.values() for part in factor.parts]

    def detached(self) -> PerSampleJacobian:
        """Return the same gradients off the autograd graph."""
        return self._each(lambda factor: factor.detached(), self.outputs.detach())

    def finite(self) -> Tensor:
        """Return which samples have finite gradients, shape (B,), bool."""
        finite = torch.isfinite(self.outputs).all(1)
        for part in self.parts:
            finite = finite & torch.isfinite(part.detach().flatten(1).sum(1))
        return finite

    def derivative(self, motion: Sequence[Tensor | None], outputs: Tensor) -> PerSampleJacobian:
        """Return the derivative of the gradients, as `parts` move by `motion`.

        Args:
            motion: for each of `parts`, its derivative; None for zero.
            outputs: that of the outputs, shape (B, D).
        """
        remaining = iter(motion)
        moved = {name: factor.derivative([next(remaining) for _ in factor.parts]) for name, factor in self._factors.items()}
        present = {name: factor for name, factor in moved.items() if factor is not None}
        return PerSampleJacobian(present, self.shapes, outputs, self.num_directions)

    def gram(self) -> Tensor:
        """Return C(x_i) = G(x_i)ᵀ G(x_i), shape (B, d, d)."""
        return self._total(
            self._factors, (self.num_samples, self.num_directions, self.num_directions), lambda mine, _: mine.gram()
        )

    def energy(self) -> dict[str, float]:
        """Return the squared norm of the gradient in each parameter tensor, averaged over the samples."""
        traces = {name: factor.gram().diagonal(dim1=1, dim2=2).sum(1) for name, factor in self._factors.items()}
        return {name: float(trace.nanmean()) if len(trace) else 0.0 for name, trace in traces.items()}

    def inner(self, other: PerSampleJacobian) -> Tensor:
        """Return K(x_i, x'_j) = G(x_i)ᵀ G(x'_j), shape (B, B', d, d').

        Raises:
            ValueError: if `other` differentiates other parameters.
        """
        if self.shapes != other.shapes:
            raise expected("other", "a Jacobian of the same parameters", f"{len(other.shapes)} other tensors")
        shape = (self.num_samples, other.num_samples, self.num_directions, other.num_directions)
        return self._total(other._factors, shape, lambda mine, theirs: mine.inner(theirs))

    def weighted_sum(self, weight: Tensor) -> dict[str, Tensor]:
        """Return Σ_i G(x_i) weight_i: for each parameter, shape (c, *shape).

        Args:
            weight: shape (B, d, c).

        Raises:
            ValueError: if `weight` has another shape.
        """
        check_tensor("weight", weight, ndim=3, like="(B, d, c)")
        if weight.shape[:2] != (self.num_samples, self.num_directions):
            raise expected("weight", f"of shape ({self.num_samples}, {self.num_directions}, c)", f"shape {tuple(weight.shape)}")
        return {name: factor.weighted_sum(weight) for name, factor in self._factors.items()}

    def dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return G(x_i)ᵀ S for S given as a tensor of shape (c, *shape) for each parameter, shape (B, d, c).

        A parameter that `direction` does not name counts as zero.
        """
        columns = next((len(value) for value in direction.values()), 0)
        shape = (self.num_samples, self.num_directions, columns)
        return self._total(direction, shape, lambda mine, value: mine.dot(value))

    def mix(self, matrix: Tensor) -> PerSampleJacobian:
        """Return G(x_i) matrix_i: with matrix_i = M_i/√r, the gradient features φ(x_i) in factored form.

        Args:
            matrix: shape (B, d, d').
        """
        return self._each(lambda factor: factor.mix(matrix), self.outputs, matrix.shape[2])

    def row_inner(self, other: PerSampleJacobian) -> Tensor:
        """Return G(x_i)ᵀ G(x'_i) of corresponding samples, shape (B, d, d')."""
        shape = (self.num_samples, self.num_directions, other.num_directions)
        return self._total(other._factors, shape, lambda mine, theirs: mine.row_inner(theirs))

    def hold_formed(self) -> None:
        """Form the gradients of some parameters, and hold on to them, where several products to come are then cheaper."""
        for factor in self._factors.values():
            factor.hold_formed()

    def kernel_product(self, columns: Tensor) -> Tensor:
        """Return Σ_j K(x_i, x_j) columns_j for `columns` of shape (B, d, m), shape (B, d, m)."""
        return self._total(self._factors, columns.shape, lambda mine, _: mine.kernel_product(columns))

    def pull(self, own: Tensor | None, receive: Tensor, send: Tensor) -> list[Tensor | None]:
        """Return, for each of `parts`, the gradient of ⟨G, G'⟩ with G'_i = G_i own_i + Σ_j G_j send_j receive_iᵀ constant.

        Args:
            own: shape (B, d, d), or None for zeros.
            receive: shape (B, d, m).
            send: shape (B, d, m).
        """
        return [gradient for factor in self._factors.values() for gradient in factor.pull(own, receive, send)]

    def trace_inner(self, other: PerSampleJacobian) -> Tensor:
        """Return tr(G(x_i)ᵀ G(x'_j)), shape (B, B'), without the d × d' products beside the diagonal."""
        shape = (self.num_samples, other.num_samples)
        return self._total(other._factors, shape, lambda mine, theirs: mine.trace_inner(theirs))

    def trace_tile(self, rows: Tensor, other: PerSampleJacobian, samples: Tensor) -> Tensor:
        """Return tr(G(x_i)ᵀ G(x'_j)) for i in `rows` and j in `samples` of `other`, each int64, shape (r, s)."""
        rows, samples = rows.to(self.outputs.device), samples.to(other.outputs.device)
        shape = (len(rows), len(samples))
        return self._total(other._factors, shape, lambda mine, theirs: mine.trace_tile(rows, theirs, samples))

    def pair_cost(self) -> tuple[int, int]:
        """Return the multiplications for tr(GᵀG') of a pair of many samples, and those to form one sample's gradient first."""
        costs = [factor.pair_cost() for factor in self._factors.values()]
        return sum(products for products, _ in costs), sum(forming for _, forming in costs)

    def trace_dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return tr(G(x_i)ᵀ S) for S given as a tensor of shape (d, *shape) for each parameter, shape (B,)."""
        return self._total(direction, (self.num_samples,), lambda mine, value: mine.trace_dot(value))

    def sketch(self, projection: SketchProjection) -> Tensor:
        """Return the sketched gradients, shape (B, d, K): inner products are kept in expectation.

        Args:
            projection: made from `shapes`.
        """
        return self._columns(projection.widths, lambda name, factor: factor.sketch(projection, name))

    def materialize(self) -> Tensor:
        """Return the Jacobian itself, transposed, shape (B, d, P), parameters in the order of `shapes`."""
        sizes = {name: shape.numel() for name, shape in self.shapes.items()}
        return self._columns(sizes, lambda _, factor: factor.dense())

    def _each(
        self, change: Callable[[AbstractFactor], AbstractFactor], outputs: Tensor, num_directions: int | None = None
    ) -> PerSampleJacobian:
        factors = {name: change(factor) for name, factor in self._factors.items()}
        return PerSampleJacobian(factors, self.shapes, outputs, num_directions or self.num_directions)

    def _total(self, others: Mapping[str, T], shape: Sequence[int], term: Callable[[AbstractFactor, T], Tensor]) -> Tensor:
        """Return the sum of a term for each parameter that `others` have, too; zeros of `shape` if they have none."""
        total: Tensor | None = None
        for name, factor in self._factors.items():
            if name in others:
                value = term(factor, others[name])
                total = value if total is None else total + value
        return self.outputs.new_zeros(shape) if total is None else total

    def _columns(self, widths: Mapping[str, int], make: Callable[[str, AbstractFactor], Tensor]) -> Tensor:
        """Return what is made of each parameter, side by side; zeros where the outputs do not depend on it."""
        size = (self.num_samples, self.num_directions)
        parts = [
            make(name, self._factors[name]) if name in self._factors else self.outputs.new_zeros(*size, widths[name])
            for name in self.shapes
        ]
        return torch.cat(parts, 2)

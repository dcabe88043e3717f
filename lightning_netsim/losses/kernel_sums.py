"""Sums of similarities within a batch, differentiable, without the similarities of its pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import expected
from lightning_netsim.jacobian import PerSampleJacobian
from lightning_netsim.jacobian.capture import full_float32
from lightning_netsim.jacobian.feature_batches import accurate_gram, scaled_root


def kernel_sums(jacobian: PerSampleJacobian, weights: Tensor, unit: UnitGradients | None = None) -> Tensor:
    """Return Σ_j k(x_i, x_j) weights_jc for the samples of a batch, differentiable with respect to their gradients.

    With unit gradients φ = G M/√r that is ⟨φ(x_i), Σ_j weights_jc φ(x_j)⟩: the sums are formed, the (B, B) pairs are not. The
    derivative with respect to φ(x_i) is again a combination of such sums, so that the gradient of the whole, through every G
    and its normalization, takes one more pass over the factors.

    Args:
        jacobian: B samples, none of them with a zero or non-finite gradient.
        weights: shape (B, C), constant.
        unit: the unit gradients of the same samples, if they have been made.

    Returns:
        Shape (B, C).
    """
    sums: Tensor = _KernelSums.apply(unit or UnitGradients(jacobian), weights.detach(), False, *jacobian.parts)
    return sums


def kernel_energies(jacobian: PerSampleJacobian, weights: Tensor, unit: UnitGradients | None = None) -> Tensor:
    """Return Σ_ij weights_ic k(x_i, x_j) weights_jc = ‖Σ_j weights_jc φ(x_j)‖², differentiable, in half the time of the sums.

    Args:
        jacobian: as above.
        weights: shape (B, C), constant.
        unit: as above.

    Returns:
        Shape (C,).
    """
    energies: Tensor = _KernelSums.apply(unit or UnitGradients(jacobian), weights.detach(), True, *jacobian.parts)
    return energies


def pair_similarity(first: PerSampleJacobian, second: PerSampleJacobian) -> Tensor:
    """Return k(x_i, x'_i) of corresponding samples, shape (B,), differentiable.

    Args:
        first: B samples, none of them with a zero or non-finite gradient.
        second: likewise.
    """
    for jacobian in (first, second):
        jacobian.hold_formed()
    roots = [scaled_root(*accurate_gram(jacobian))[0] for jacobian in (first, second)]
    products = first.row_inner(second)
    return torch.einsum("iac,iab,ibc->i", roots[0].to(products), products, roots[1].to(products))


class UnitGradients:
    """The unit gradients φ = G M/√r of a batch, off the graph: sums of them, and derivatives of products with such sums.

    Args:
        jacobian: G.

    Attributes:
        jacobian: G off the graph.
        root: M/√r, shape (B, d, d); zero for a sample that is not usable.
        usable: whether a sample has a gradient that can be normalized, neither zero nor non-finite, shape (B,), bool.
    """

    def __init__(self, jacobian: PerSampleJacobian) -> None:
        with full_float32():
            self.jacobian = jacobian.detached()
            self.jacobian.hold_formed()
            self._gram, self._floor = accurate_gram(self.jacobian)
            root, rank = scaled_root(self._gram, self._floor)
        self.root, self.usable = root.to(self.jacobian.outputs), rank > 0

    def products(self, weights: Tensor) -> Tensor:
        """Return G_iᵀ Σ_j weights_jc φ(x_j), shape (B, d, C, d), for weights (B, C)."""
        products = self.jacobian.kernel_product(self._columns(weights))
        return products.view(*products.shape[:2], weights.shape[1], -1)

    def sums(self, products: Tensor) -> Tensor:
        """Return Σ_j weights_jc k(x_i, x_j), shape (B, C), from `products`."""
        return torch.einsum("iae,iace->ic", self.root, products)

    def pull(self, products: Tensor, receive: Tensor, send: Tensor) -> list[Tensor | None]:
        """Return, for each part of G, the derivative of Σ_i ⟨φ(x_i), V_i⟩ with V_i held constant.

        V_i = Σ_c receive_ic Σ_j send_jc φ(x_j).

        Args:
            products: those with `send`.
            receive: shape (B, C).
            send: shape (B, C).
        """
        wanted = torch.einsum("ic,iace->iae", receive, products)
        with torch.enable_grad():  # φ depends on G through its normalization too.
            gram = self._gram.detach().requires_grad_()
            total = (scaled_root(gram, self._floor)[0] * wanted).sum()
        own = torch.autograd.grad(total, gram)[0].to(wanted)
        return self.jacobian.pull(own + own.mT, self._columns(receive), self._columns(send))

    def _columns(self, weights: Tensor) -> Tensor:
        """Return the columns by which C sums of unit gradients are sums of gradients, shape (B, d, C·d)."""
        return torch.einsum("jae,jc->jace", self.root, weights).flatten(2)


class _KernelSums(torch.autograd.Function):
    """The sums above, or the energies; after the first three arguments come the parts that the factors of the Jacobian keep."""

    @staticmethod
    def forward(ctx: Any, unit: UnitGradients, weights: Tensor, as_energies: bool, *parts: Tensor) -> Tensor:
        with full_float32():
            products = unit.products(weights)
        ctx.unit, ctx.as_energies = unit, as_energies
        ctx.save_for_backward(weights, products)
        sums = unit.sums(products)
        return (weights * sums).sum(0) if as_energies else sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # Terms of the second derivative would be missing.
            remedy = "For second derivatives, use `lightning_netsim.functional` on materialized gradients."
            raise expected("create_graph", "False where a sum of similarities is differentiated", "True", remedy)
        weights, products = ctx.saved_tensors
        with full_float32():  # A backward pass may run under autocast.
            if ctx.as_energies:
                found = ctx.unit.pull(products, 2 * grad * weights, weights)
            else:  # As k is symmetric, x_i takes part in its own sums and, with its weights, in those of the others.
                products = torch.cat([products, ctx.unit.products(grad)], 2)
                found = ctx.unit.pull(products, torch.cat([grad, weights], 1), torch.cat([weights, grad], 1))
        return None, None, None, *found

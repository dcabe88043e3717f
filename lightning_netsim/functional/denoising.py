"""What a network makes of noisy labels: it averages them over its kernel neighbors.

K(x, x') = ∇f(x)ᵀ ∇f(x') is here *not* normalized: at a minimum of the squared loss Σ_j K(x_i, x_j)(ŷ_j − ỹ_j) = 0, so that
the outputs ŷ, averaged over the neighbors of a sample, are the average of their labels ỹ. With cross-entropy the same holds of
the kernel of the logits and ŷ = probabilities.

Source: Charpiat et al., NeurIPS 2019, section 5 (Self-denoising), and section 6.3 of the supplementary material.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_same_size, check_tensor, expected
from lightning_netsim.functional._precision import full_precision, to_double, upcast
from lightning_netsim.functional.kernel import default_floor


def denoising_weights(kernel: Tensor, clamp: bool = False) -> Tensor:
    """Compute the weights by which a network averages over the neighbors of a sample.

    a_ij = (Σ_j K_ij)⁺ K_ij, so that Σ_j a_ij = Id. Of a single output: k_ij / Σ_j k_ij, a distribution where no k is negative.

    Args:
        kernel: shape (Q, N, d, d), K(x_i, x_j) = G(x_i)ᵀ G(x_j), not normalized; or (Q, N) of one output.
        clamp: put negative k to 0 first; only of shape (Q, N).

    Returns:
        The shape of `kernel`; NaN for a query whose kernel is zero or not finite.

    Raises:
        NetsimError: `kernel` has another shape, or four dimensions and is to be clamped.

    Source: Charpiat et al., NeurIPS 2019, section 5.

    Example:
        >>> denoising_weights(torch.tensor([[3.0, 1.0]])).tolist()
        [[0.75, 0.25]]
    """
    matrix = _four_dimensional(kernel)
    if clamp:
        if kernel.ndim != 2:
            raise expected("clamp", "False for kernels of several outputs", "True", "Take the diagonal, output by output.")
        matrix = matrix.clamp_min(0)
    with full_precision(matrix):
        weights = sum_inverse(matrix.sum(1), matrix.dtype).unsqueeze(1) @ matrix
    return weights.reshape(kernel.shape)


def sum_inverse(total: Tensor, digits: torch.dtype) -> Tensor:
    """Return the pseudo-inverse of Σ_j K_ij, shape (..., d, d), by way of float64; NaN where that is zero or not finite.

    Singular values below 1e-6 of the largest count as zero, below 1e-12 where gradients are float64: outputs that sum to one
    have one.

    Args:
        total: shape (..., d, d).
        digits: the precision of the gradients, however precisely they were summed.
    """
    double = to_double(total)
    usable = torch.isfinite(double).all(-1).all(-1) & (double != 0).any(-1).any(-1)
    identity = torch.eye(total.shape[-1], dtype=double.dtype, device=double.device)
    inverse = torch.linalg.pinv(torch.where(usable[..., None, None], double, identity), rtol=default_floor(digits))
    return torch.where(usable[..., None, None], inverse, torch.nan).to(total)


def smooth(weights: Tensor, values: Tensor) -> Tensor:
    """Average values over the neighbors of each query: E_k[v]_i = Σ_j a_ij v_j.

    Args:
        weights: shape (Q, N, d, d) or, of one output, (Q, N), from `denoising_weights`.
        values: shape (N, d), labels or outputs of the reference set.

    Returns:
        Shape (Q, d).

    Raises:
        NetsimError: the shapes do not fit.

    Source: Charpiat et al., NeurIPS 2019, section 5.

    Example:
        >>> smooth(torch.tensor([[0.75, 0.25]]), torch.tensor([[0.0], [4.0]])).tolist()
        [[1.0]]
    """
    matrix, values = _four_dimensional(weights), upcast(check_tensor("values", values, 2, like="(N, d)"))
    if values.shape != matrix.shape[1:3]:
        raise expected("values", f"of shape {tuple(matrix.shape[1:3])} to fit `weights`", f"shape {tuple(values.shape)}")
    with full_precision(matrix):
        return torch.einsum("qnab,nb->qa", matrix, values.to(matrix))


def denoising_factor(weights: Tensor) -> Tensor:
    """Compute by how much averaging over the neighbors reduces independent noise: √(Σ_j ‖a_ij‖²_F / d).

    Independent label noise of variance σ² becomes noise of covariance σ² Σ_j a_ij a_ijᵀ; the factor is the root of its mean
    diagonal, over σ. It is 1/√N where all samples are the same to the network, 1 where each is by itself, and lies between
    where no kernel is negative; negative ones can bring it above 1.

    Args:
        weights: shape (Q, N, d, d) or (Q, N), from `denoising_weights`.

    Returns:
        Shape (Q,), at least 1/√N.

    Raises:
        NetsimError: `weights` has another shape.

    Source: Charpiat et al., NeurIPS 2019, section 5; supplementary material, section 6.3.1.

    Example:
        >>> denoising_factor(torch.full((1, 4), 0.25)).tolist()
        [0.5]
    """
    matrix = _four_dimensional(weights)
    return (matrix.square().sum((1, 2, 3)) / matrix.shape[2]).sqrt()


def neighbor_consistency(weights: Tensor, outputs: Tensor, reference: Tensor) -> Tensor:
    """Compute how far the outputs of each query are from those of its neighbors: ‖ŷ_i − Σ_j a_ij ŷ_j‖.

    Args:
        weights: shape (Q, N, d, d) or (Q, N), from `denoising_weights`.
        outputs: shape (Q, d), ŷ of the queries.
        reference: shape (N, d), ŷ of the reference set.

    Returns:
        Shape (Q,), at least 0, in the units of the outputs.

    Raises:
        NetsimError: the shapes do not fit.

    Source: Charpiat et al., NeurIPS 2019, section 5.

    Example:
        >>> neighbor_consistency(torch.tensor([[0.75, 0.25]]), torch.tensor([[3.0]]), torch.tensor([[0.0], [4.0]])).tolist()
        [2.0]
    """
    smoothed = smooth(weights, reference)
    outputs = upcast(check_tensor("outputs", outputs, 2, like="(Q, d)"))
    if outputs.shape != smoothed.shape:
        raise expected("outputs", f"of shape {tuple(smoothed.shape)} to fit `weights`", f"shape {tuple(outputs.shape)}")
    distance: Tensor = torch.linalg.vector_norm(outputs.to(smoothed) - smoothed, dim=1)
    return distance


def denoising_bound(weights: Tensor, similarity: Tensor, lipschitz: float) -> Tensor:
    """Bound how far the output of each query can be from those of its neighbors: √2 C Σ_j a_ij √(1 − k^C(x_i, x_j)).

    Of one output; it holds of |ŷ_i − Σ_j a_ij ŷ_j| for any weights that are a distribution.

    Args:
        weights: shape (Q, N), from `denoising_weights` with `clamp`.
        similarity: shape (Q, N), k^C, the cosines of the gradients.
        lipschitz: C, see `lipschitz_constant`.

    Returns:
        Shape (Q,), at least 0.

    Raises:
        NetsimError: the shapes do not fit.

    Source: Charpiat et al., NeurIPS 2019, section 5.

    Example:
        >>> denoising_bound(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.5]]), lipschitz=2.0)
        tensor([1.0000])
    """
    weights = upcast(check_tensor("weights", weights, 2, like="(Q, N)"))
    similarity = check_tensor("similarity", similarity, 2, like="(Q, N)")
    for dim in (0, 1):
        check_same_size("similarity", similarity, "weights", weights, dim)
    return 2**0.5 * lipschitz * (weights * distance_root(similarity).to(weights)).sum(1)


def distance_root(similarity: Tensor) -> Tensor:
    """Return √(1 − k), 0 where rounding has brought k above 1: the distance of two unit gradients is √2 times that."""
    return (1 - similarity).clamp_min(0).sqrt()


def lipschitz_constant(weight: Tensor, activation_norm: Tensor, gradient_norm: Tensor) -> Tensor:
    """Compute C with |f(x) − f(x')| ≤ C ‖u − u'‖ for the unit gradients u of a network that ends in an affine layer.

    C = ‖w‖ · max ‖∇f‖ · (1 + max ‖a‖), with a the input of the last layer and w its weights. For ∂f/∂w = a and ∂f/∂b = 1, so
    |f − f'| ≤ ‖w‖ ‖a − a'‖, a = ‖∇f‖ u_w, and |‖∇f‖ − ‖∇f'‖| ≤ ‖∇f‖ ‖∇f'‖ |u_b − u'_b|. The constant of the paper has
    √(Σ_i (1 + |a_i|)²) in the place of 1 + ‖a‖, which is never less.

    Args:
        weight: shape (D, h), the weights of the last layer, which has a bias and shares no parameter with another.
        activation_norm: shape (N,), ‖a(x)‖ of the samples for which it is to hold.
        gradient_norm: shape (N, D), ‖∇f_o(x)‖ with respect to all parameters.

    Returns:
        Shape (D,), C of each output, in the units of the outputs.

    Raises:
        NetsimError: the shapes do not fit.

    Source: Charpiat et al., NeurIPS 2019, supplementary material, section 6.3.2.

    Example:
        >>> lipschitz_constant(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]), torch.tensor([[2.0]])).tolist()
        [20.0]
    """
    weight = upcast(check_tensor("weight", weight, 2, like="(D, h)"))
    activation_norm = check_tensor("activation_norm", activation_norm, 1, like="(N,)")
    gradient_norm = check_tensor("gradient_norm", gradient_norm, 2, like="(N, D)")
    check_same_size("gradient_norm", gradient_norm, "activation_norm", activation_norm, 0)
    if gradient_norm.shape[1] != weight.shape[0]:
        raise expected("gradient_norm", f"of shape (N, {weight.shape[0]})", f"shape {tuple(gradient_norm.shape)}")
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return lengths * gradient_norm.amax(0).to(weight) * (1 + activation_norm.max().to(weight))


def _four_dimensional(kernel: Tensor) -> Tensor:
    """Return a kernel as (Q, N, d, d)."""
    matrix = upcast(check_tensor("kernel", kernel, (2, 4), like="(Q, N, d, d) or (Q, N)"))
    matrix = matrix[..., None, None] if matrix.ndim == 2 else matrix
    if matrix.shape[2] != matrix.shape[3]:
        raise expected("kernel", "of shape (Q, N, d, d) or (Q, N)", f"shape {tuple(kernel.shape)}")
    return matrix

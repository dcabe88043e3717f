"""The kernel of gradients: identities of the paper, the oracle, properties, and the theorems that give it its meaning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_netsim.functional import (
    inverse_root,
    kernel_matrix,
    normalized_kernel_matrix,
    orthonormal_gradients,
    pairwise_similarity,
)
from tests.oracles import dense_normalized_kernel, dense_ranks, dense_similarity, loop_jacobian

SCALARS = ["trace", "identity_distance", "identity_distance_squared", "subspace", "rotation"]


def random_jacobian(seed: int, n: int = 5, d: int = 3, p: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, p, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_orthogonal(seed: int, d: int) -> Tensor:
    return torch.linalg.qr(random_jacobian(seed, 1, d, d)[0]).Q


def network(seed: int = 0, outputs: int = 3, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Build a float64 network whose weights come from a private generator."""
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, outputs)).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2
    return model


def normalized_of(jacobian: Tensor) -> Tensor:
    kernel = kernel_matrix(jacobian)
    root, _ = inverse_root(kernel.diagonal(dim1=0, dim2=1).permute(2, 0, 1))
    return normalized_kernel_matrix(kernel, root, root)


def scalar_by_hand(name: str, matrix: Tensor, rank: float) -> float:
    """Compute one scalar of one K^C, entry by entry; `rank` is √(r r')."""
    d = len(matrix)
    trace = sum(float(matrix[a, a]) for a in range(d))
    squares = sum(float(value) ** 2 for value in matrix.flatten())
    if name == "trace":
        return trace / rank
    if name == "subspace":
        return squares / rank
    if name == "rotation":
        determinant = float(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0])
        return math.sqrt(max(squares + 2 * determinant, 0.0)) / rank
    distance2 = squares - 2 * trace + rank
    return 1 - distance2 / (2 * rank) if name.endswith("squared") else 1 - math.sqrt(max(distance2, 0.0) / rank)


# The inverse root


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_root_inverts_full_rank(dtype: torch.dtype) -> None:
    jacobian = random_jacobian(0, dtype=dtype)
    gram = jacobian @ jacobian.mT
    root, rank = inverse_root(gram)
    assert root.dtype == dtype
    assert rank.dtype == torch.int64
    assert rank.tolist() == [3] * 5
    torch.testing.assert_close(root @ gram @ root, torch.eye(3, dtype=dtype).expand(5, 3, 3))
    torch.testing.assert_close(root, root.mT)


@pytest.mark.parametrize(("dtype", "above", "below"), [(torch.float32, 2e-6, 5e-7), (torch.float64, 2e-12, 5e-13)])
def test_inverse_root_floor_is_relative_to_the_largest_eigenvalue(dtype: torch.dtype, above: float, below: float) -> None:
    for scale in (1e-6, 1.0, 1e6):
        eigenvalues = scale * torch.tensor([[1.0, above], [1.0, below]], dtype=torch.float64)
        root, rank = inverse_root(torch.diag_embed(eigenvalues).to(dtype))
        assert rank.tolist() == [2, 1]
        assert root[0, 1, 1].item() == pytest.approx((scale * above) ** -0.5, rel=1e-4)
        assert root[1, 1, 1].item() == 0


def test_inverse_root_takes_another_floor() -> None:
    gram = torch.diag(torch.tensor([1.0, 1e-3]))
    assert inverse_root(gram, floor=1e-2)[1].item() == 1
    assert inverse_root(gram, floor=1e-4)[1].item() == 2


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_inverse_root_of_zero_or_non_finite_gram_is_zero_of_rank_zero(bad: float) -> None:
    gram = torch.stack([torch.eye(2), torch.full((2, 2), bad), 4 * torch.eye(2)])
    root, rank = inverse_root(gram)
    assert rank.tolist() == [2, 0, 2]
    torch.testing.assert_close(root, torch.stack([torch.eye(2), torch.zeros(2, 2), torch.eye(2) / 2]))


def test_inverse_root_gradient_matches_finite_differences() -> None:
    jacobian = random_jacobian(3, n=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: inverse_root(g @ g.mT)[0], jacobian)


def test_inverse_root_gradient_holds_at_constant_rank_and_at_equal_eigenvalues() -> None:
    basis = random_jacobian(4, n=1, d=2)[0]

    def deficient(mix: Tensor) -> Tensor:  # Three outputs, two independent gradients: rank 2, whatever the mix.
        jacobian = mix @ basis
        return inverse_root(jacobian @ jacobian.mT)[0]

    assert torch.autograd.gradcheck(deficient, random_jacobian(5, n=1, d=3, p=2)[0].requires_grad_())
    assert torch.autograd.gradcheck(
        lambda c: inverse_root((c + c.mT) / 2)[0], (2 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    )


@pytest.mark.parametrize("scalar", SCALARS)
def test_similarity_gradient_is_finite_beside_a_sample_without_gradient(scalar: str) -> None:
    jacobian = random_jacobian(6, d=2)
    jacobian[1], jacobian[2, 0, 0] = 0, math.nan
    jacobian.requires_grad_()
    similarity = pairwise_similarity(jacobian, scalar=scalar)
    similarity[[0, 3, 4]][:, [0, 3, 4]].sum().backward()
    assert jacobian.grad is not None
    assert bool(torch.isfinite(jacobian.grad).all())
    assert bool((jacobian.grad[[0, 3, 4]] != 0).any())


# Identities (section 3 of the paper, 3.2-3.4 of the supplementary material)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_normalized_kernel_identities(d: int) -> None:
    jacobian = random_jacobian(d, n=6, d=d)
    normalized = normalized_of(jacobian)
    own = normalized.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    torch.testing.assert_close(own, torch.eye(d, dtype=torch.float64).expand(6, d, d), rtol=0, atol=1e-10)
    torch.testing.assert_close(normalized.permute(1, 0, 3, 2), normalized, rtol=0, atol=1e-10)
    assert float(normalized.abs().max()) <= 1 + 1e-10
    assert float(normalized.diagonal(dim1=-2, dim2=-1).sum(-1).abs().max()) <= d + 1e-10
    assert float(normalized.square().sum((-2, -1)).sqrt().max()) <= math.sqrt(d) + 1e-10


def test_rotation_similarity_is_invariant_to_rotations_and_the_best_over_them() -> None:
    jacobian = random_jacobian(20, d=2)
    expected = pairwise_similarity(jacobian, scalar="rotation")
    best = torch.full_like(expected, -1.0)
    for angle in torch.linspace(0, 2 * math.pi, 73, dtype=torch.float64):
        turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        turned = jacobian.clone()
        turned[2:] = turn @ jacobian[2:]
        torch.testing.assert_close(pairwise_similarity(turned, scalar="rotation"), expected, rtol=0, atol=1e-10)
        best = torch.maximum(best, pairwise_similarity(jacobian, turn @ jacobian))
    torch.testing.assert_close(best, expected, rtol=0, atol=1e-3)  # 73 angles come within 1 - cos(2.5°) of the best.
    assert bool((best <= expected + 1e-10).all())
    mirrored = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)) @ jacobian
    assert (pairwise_similarity(jacobian, mirrored, "rotation") - expected).abs().max() > 0.1
    torch.testing.assert_close(
        pairwise_similarity(jacobian, mirrored, "subspace"),
        pairwise_similarity(jacobian, scalar="subspace"),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("deficient", [False, True])
def test_scalars_against_the_oracle(scalar: str, deficient: bool) -> None:
    d = 2
    jacobian = random_jacobian(30, n=6, d=d)
    if deficient:
        jacobian[3:, 1] = -2 * jacobian[3:, 0]
    normalized, ranks = dense_normalized_kernel(jacobian), dense_ranks(jacobian)
    assert ranks == ([2, 2, 2, 1, 1, 1] if deficient else [2] * 6)
    expected = torch.tensor(
        [[scalar_by_hand(scalar, normalized[i, j], math.sqrt(ranks[i] * ranks[j])) for j in range(6)] for i in range(6)],
        dtype=torch.float64,
    )
    got = pairwise_similarity(jacobian, scalar=scalar)
    # The distance is a square root: at 0 it magnifies the rounding error of its square.
    atol = 1e-7 if scalar == "identity_distance" else 1e-10
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)
    torch.testing.assert_close(got.diagonal(), torch.ones(6, dtype=torch.float64), rtol=0, atol=atol)


def test_two_sets_of_different_size_and_one_output() -> None:
    x, y = random_jacobian(32, n=3), random_jacobian(33, n=4)
    both = dense_similarity(torch.cat([x, y]))
    torch.testing.assert_close(pairwise_similarity(x, y), both[:3, 3:], rtol=0, atol=1e-10)
    assert kernel_matrix(x, y).shape == (3, 4, 3, 3)
    cosines = torch.nn.functional.cosine_similarity(x[:, None, 0], y[None, :, 0], dim=-1)
    torch.testing.assert_close(pairwise_similarity(x[:, 0], y[:, 0]), cosines, rtol=0, atol=1e-10)
    mixed = pairwise_similarity(x.float(), y)
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, both[:3, 3:], rtol=0, atol=1e-5)


# Rank deficiency, and samples without a gradient


def test_softmax_outputs_keep_self_similarity_one() -> None:
    model = nn.Sequential(network(), nn.Softmax(dim=1))
    inputs = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = loop_jacobian(model, inputs)
    assert orthonormal_gradients(jacobian)[1].tolist() == [2] * 6
    similarity = pairwise_similarity(jacobian)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(similarity, dense_similarity(jacobian), rtol=0, atol=1e-9)
    # All samples share one range here (outputs that sum to zero), so Id is the projector on it.
    projector = torch.eye(3, dtype=torch.float64) - 1 / 3
    distance = (dense_normalized_kernel(jacobian) - projector).square().sum((-2, -1))
    squared = pairwise_similarity(jacobian, scalar="identity_distance_squared")
    torch.testing.assert_close(squared, 1 - distance / 4, rtol=0, atol=1e-9)


def test_ill_conditioned_outputs_in_float32() -> None:
    jacobian = random_jacobian(40, n=6, d=2)
    jacobian[:, 1] = jacobian[:, 0] + 5e-3 * jacobian[:, 1]  # λ_min/λ_max about 1e-5: the Gram matrix alone loses it.
    similarity = pairwise_similarity(jacobian.float())
    torch.testing.assert_close(similarity.diagonal(), torch.ones(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(similarity.double(), dense_similarity(jacobian.float()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scalar", SCALARS)
def test_a_sample_with_zero_or_nan_gradient_is_nan_and_alone(scalar: str) -> None:
    jacobian = random_jacobian(41, n=5, d=2)
    expected = pairwise_similarity(jacobian[[0, 3, 4]], scalar=scalar)
    jacobian[1], jacobian[2, 1, 3] = 0, math.nan
    similarity = pairwise_similarity(jacobian, scalar=scalar)
    assert bool(similarity[[1, 2]].isnan().all())
    assert bool(similarity[:, [1, 2]].isnan().all())
    torch.testing.assert_close(similarity[[0, 3, 4]][:, [0, 3, 4]], expected, rtol=0, atol=1e-12)
    orthonormal, rank = orthonormal_gradients(jacobian)
    assert rank.tolist() == [2, 0, 0, 2, 2]
    assert bool((orthonormal[[1, 2]] == 0).all())


# Properties

SIZES = {"seed": st.integers(0, 2**31), "n": st.integers(1, 6), "d": st.integers(1, 4)}
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


@PROPERTY
@given(**SIZES, p=st.integers(4, 12))
def test_similarity_is_a_symmetric_positive_kernel_with_ones(seed: int, n: int, d: int, p: int) -> None:
    similarity = pairwise_similarity(random_jacobian(seed, n, d, p))
    torch.testing.assert_close(similarity, similarity.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(similarity.abs().max()) <= 1 + 1e-9
    assert float(torch.linalg.eigvalsh(similarity).min()) >= -1e-9


@PROPERTY
@given(**SIZES, scale=st.floats(1e-4, 1e4), negative=st.booleans())
def test_invariance_to_rescaling_a_gradient(seed: int, n: int, d: int, scale: float, negative: bool) -> None:
    jacobian = random_jacobian(seed, n, d)
    scaled = jacobian.clone()
    scaled[0] *= -scale if negative else scale
    expected = pairwise_similarity(jacobian)
    if negative:  # The sign is not lost: the similarity to the others turns over.
        expected[0, 1:], expected[1:, 0] = -expected[0, 1:], -expected[1:, 0]
    torch.testing.assert_close(pairwise_similarity(scaled), expected, rtol=0, atol=1e-9)


@PROPERTY
@given(**SIZES, turn=st.integers(0, 2**31))
def test_invariance_to_an_orthogonal_change_of_outputs(seed: int, n: int, d: int, turn: int) -> None:
    jacobian = random_jacobian(seed, n, d)
    changed = random_orthogonal(turn, d) @ jacobian
    torch.testing.assert_close(pairwise_similarity(changed), pairwise_similarity(jacobian), rtol=0, atol=1e-9)


@PROPERTY
@given(**SIZES)
def test_permutation_equivariance(seed: int, n: int, d: int) -> None:
    jacobian = random_jacobian(seed, n, d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        pairwise_similarity(jacobian[order]), pairwise_similarity(jacobian)[order][:, order], rtol=0, atol=1e-12
    )


def test_blocks_of_samples_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    jacobian = random_jacobian(50, n=7)
    expected = orthonormal_gradients(jacobian)
    monkeypatch.setattr("lightning_netsim.functional.kernel._BLOCK_ELEMENTS", 70)  # Two samples of 33 numbers a block.
    torch.testing.assert_close(orthonormal_gradients(jacobian), expected, rtol=0, atol=1e-12)


# Errors

"""What the kernel means: transfer from one output to another, and Theorems 1 and 2 and Corollary 1 of the paper."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_netsim.functional import inverse_root, kernel_matrix, pairwise_similarity, transfer
from tests.functional.test_kernel import PROPERTY, network, random_jacobian
from tests.oracles import loop_jacobian


def flat_step(model: nn.Module, step: Tensor) -> nn.Module:
    """Return a copy of the model whose parameters are moved by the flat vector `step`."""
    moved = copy.deepcopy(model)
    start = 0
    for parameter in moved.parameters():
        parameter.data += step[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return moved


@pytest.mark.parametrize("outputs", [1, 3])
def test_transfer_predicts_the_move_of_another_output(outputs: int) -> None:
    model = network(2, outputs)
    inputs = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    jacobian = loop_jacobian(model, inputs)
    kernel = kernel_matrix(jacobian)
    matrix = transfer(kernel[1, 0], kernel[0, 0])
    direction = torch.randn(outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    errors = []
    for size in (1e-2, 1e-3, 1e-4):
        # The minimum-norm step that moves f(x) by v: G C⁻¹ v.
        step = jacobian[0].mT @ torch.linalg.solve(jacobian[0] @ jacobian[0].mT, size * direction)
        moves = (flat_step(model, step)(inputs) - model(inputs)).detach()
        errors.append(float((moves[1] - matrix @ (size * direction)).norm() / (matrix @ (size * direction)).norm()))
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)


def test_transfer_of_a_sample_to_itself_is_the_identity() -> None:
    jacobian = random_jacobian(60)
    gram = jacobian @ jacobian.mT
    torch.testing.assert_close(transfer(gram, gram), torch.eye(3, dtype=torch.float64).expand(5, 3, 3), rtol=0, atol=1e-10)


def test_transfer_of_a_rank_deficient_sample_is_the_pseudo_inverse() -> None:
    jacobian = random_jacobian(61, n=2)
    jacobian[:, 2] = jacobian[:, 0] + jacobian[:, 1]
    kernel = kernel_matrix(jacobian)
    torch.testing.assert_close(
        transfer(kernel[1, 0], kernel[0, 0]), kernel[1, 0] @ torch.linalg.pinv(kernel[0, 0], rtol=1e-10), rtol=0, atol=1e-9
    )


class Gated(nn.Module):
    """Two ReLU branches, each on its own half of the input; a gate at 0 or below silences a branch and its gradients."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.left, self.right, self.last = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(8, 1)
        self.double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        self.right.bias.data -= 20  # Dead for moderate inputs: all its activities are 0, and so is every δ below it.

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.cat([self.left(inputs[:, :2]).relu(), self.right(inputs[:, 2:]).relu()], dim=1)
        return self.last(hidden)


@PROPERTY
@given(seed=st.integers(0, 10**6), shift=st.floats(-1, 1))
def test_different_inputs_with_equal_gradients_have_equal_outputs(seed: int, shift: float) -> None:
    """Theorem 1 and Corollary 1 on pairs that differ where every δ vanishes; Theorem 2 on their activities."""
    model = Gated(seed)
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)).clamp(-2, 2)
    twin = x.clone()
    twin[:, 2:] += torch.tensor([0.5 + abs(shift), shift], dtype=torch.float64)
    jacobian = loop_jacobian(model, torch.cat([x, twin]))
    assert not torch.equal(x, twin)
    assert torch.equal(jacobian[0], jacobian[1])
    assert float(pairwise_similarity(jacobian)[0, 1]) == pytest.approx(1, abs=1e-12)
    assert torch.equal(model(x), model(twin))
    assert torch.equal(model.left(x[:, :2]), model.left(twin[:, :2]))  # The useful activities agree (Theorem 2) ...
    assert not torch.equal(model.right(x[:, 2:]), model.right(twin[:, 2:]))  # ... the useless ones need not.


@PROPERTY
@given(seed=st.integers(0, 10**6), outputs=st.integers(1, 3), relu=st.booleans(), distance=st.floats(1e-3, 3))
def test_similarity_bounds_the_difference_of_outputs(seed: int, outputs: int, relu: bool, distance: float) -> None:
    """Corollary 1 with its constant: k = 1 asks for equal outputs, and outputs that differ keep k away from 1.

    The last layer f = W a + b puts M and M ⊗ a into the orthonormal gradients, M = C^(-1/2); their squared distance is
    2d (1 - k). Hence ‖f - f'‖ ≤ ‖W‖ ‖a - a'‖ ≤ ‖W‖ (1 + ‖a'‖) √(2d (1 - k)) / ‖M‖_F.
    """
    model = network(seed, outputs, nn.ReLU if relu else nn.Tanh)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(1, 4, dtype=torch.float64, generator=generator)
    pair = torch.cat([x, x + distance * torch.randn(1, 4, dtype=torch.float64, generator=generator)])
    jacobian = loop_jacobian(model, pair)
    gap = 1 - float(pairwise_similarity(jacobian)[0, 1])
    with torch.no_grad():
        difference = float((model(pair[0]) - model(pair[1])).norm())
        activity = float(model[:-1](pair[1]).norm())
        weight = float(torch.linalg.matrix_norm(model[-1].weight, ord=2))
    root = inverse_root(jacobian[0] @ jacobian[0].T)[0]
    bound = (difference * float(root.norm()) / (weight * (1 + activity))) ** 2 / (2 * outputs)
    assert gap >= bound - 1e-14
    if difference > 1e-4:
        assert gap > 1e-13


def test_without_a_bias_similarity_one_does_not_imply_equal_outputs() -> None:
    """Show that Corollary 1 needs its premise, an affine last layer."""
    model = nn.Linear(1, 1, bias=False).double()
    inputs = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    assert float(pairwise_similarity(loop_jacobian(model, inputs))[0, 1]) == pytest.approx(1, abs=1e-12)
    assert not torch.equal(model(inputs)[0], model(inputs)[1])

"""What cannot be compared: samples that are left out, batches without a pair, labels that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim import NetsimError
from lightning_netsim.functional import pairwise_similarity
from lightning_netsim.jacobian import JacobianOperator, PerSampleJacobian
from lightning_netsim.losses import (
    AbstractSimilarityLoss,
    DensityLoss,
    GradientBatch,
    GroupSimilarityLoss,
    InvarianceLoss,
    MinibatchSimilarityLoss,
    PairSimilarityLoss,
    TangentLoss,
)
from tests import cases

LABELED: dict[str, Callable[[], AbstractSimilarityLoss]] = {
    "pair": PairSimilarityLoss,
    "group": GroupSimilarityLoss,
    "minibatch": MinibatchSimilarityLoss,
}
ALL: dict[str, Callable[[], AbstractSimilarityLoss]] = {
    **LABELED,
    "density": lambda: DensityLoss(0.4),
    "density sum": lambda: DensityLoss(0.4, "sum"),
    "invariance": lambda: InvarianceLoss(lambda x: x.flip(-1)),
    "tangent": lambda: TangentLoss(torch.ones_like),
}


def network(bias: bool = True) -> nn.Sequential:
    """Build a network that has, without biases, no gradient at x = 0."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).double()


def batch_of(model: nn.Module, inputs: Tensor, labels: Tensor | None = None, directions: Any = "all") -> GradientBatch:
    return GradientBatch(JacobianOperator(model, directions=directions, create_graph=True), inputs, labels)


def differentiated(criterion: AbstractSimilarityLoss, model: nn.Module, batch: GradientBatch) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    value = criterion(batch)
    value.backward()
    return value.detach(), torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0])


def test_the_similarity_of_all_pairs() -> None:
    model, inputs = network(), torch.randn(5, 4).double()
    batch = batch_of(model, inputs)
    wanted = pairwise_similarity(batch.jacobian.materialize())
    close(batch.similarity(), wanted, 1e-10)
    assert batch.similarity().requires_grad
    assert torch.equal(batch.outputs, model(inputs))


def test_gradients_are_computed_when_asked_for_and_once() -> None:
    operator, calls = JacobianOperator(network(), create_graph=True), []

    def compute() -> PerSampleJacobian:
        calls.append(1)
        return operator(torch.randn(5, 4).double())

    batch = GradientBatch(operator, None, torch.zeros(5).long(), compute)
    assert not calls
    GroupSimilarityLoss()(batch), PairSimilarityLoss()(batch)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("tangent", "minibatch")])
def test_samples_without_a_gradient_are_as_if_absent(kind: str) -> None:
    model, inputs = network(bias=False), torch.randn(7, 4).double()
    inputs[[1, 4]] = 0
    batch, kept = batch_of(model, inputs, LABELS), [0, 2, 3, 5, 6]
    assert batch.usable.nonzero().flatten().tolist() == kept
    found = differentiated(ALL[kind](), model, batch)
    wanted = differentiated(ALL[kind](), model, batch_of(model, inputs[kept], LABELS[kept]))
    for got, right in zip(found, wanted, strict=True):
        close(got, right)
    assert wanted[1].any()


@pytest.mark.parametrize("kind", ALL)
def test_samples_that_are_nan_are_as_if_absent(kind: str) -> None:
    model, inputs = network(), torch.randn(7, 4).double()
    inputs[1], inputs[4] = torch.nan, torch.inf
    kept = [0, 2, 3, 5, 6]
    found = differentiated(ALL[kind](), model, batch_of(model, inputs, LABELS))
    wanted = differentiated(ALL[kind](), model, batch_of(model, inputs[kept], LABELS[kept]))
    for got, right in zip(found, wanted, strict=True):
        close(got, right)


def test_a_transform_that_breaks_a_sample_leaves_out_its_pair() -> None:
    model, inputs = network(bias=False), torch.randn(5, 4).double()

    def transform(x: Tensor) -> Tensor:
        return torch.cat([x[:2] * 0, x[2:].flip(1)])

    found = differentiated(InvarianceLoss(transform, per_sample=False), model, batch_of(model, inputs))
    wanted = differentiated(InvarianceLoss(lambda x: x.flip(0)), model, batch_of(model, inputs[2:]))
    for got, right in zip(found, wanted, strict=True):
        close(got, right)


NO_PAIR: dict[str, tuple[list[str], Tensor, Tensor]] = {
    "one sample": (list(LABELED), torch.randn(1, 4), torch.tensor([3])),
    "no label twice": (list(LABELED), torch.randn(4, 4), torch.arange(4)),
    "zero gradients": ([*LABELED, "density", "density sum", "invariance"], torch.zeros(4, 4), torch.zeros(4).long()),
    "one gradient that is not zero": (list(LABELED), torch.tensor([[0.0] * 4, [1.0] * 4]), torch.zeros(2).long()),
}


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, (kinds, *_) in NO_PAIR.items() for kind in kinds])
def test_where_nothing_can_be_compared_there_is_a_zero_with_a_graph(case: str, kind: str) -> None:
    _, inputs, labels = NO_PAIR[case]
    model = network(bias=False)
    value, gradient = differentiated(ALL[kind](), model, batch_of(model, inputs.double(), labels))
    assert value.shape == ()
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_of_nothing_but_nan_is_a_zero_with_a_graph(kind: str) -> None:
    model = network()
    inputs = torch.full((4, 4), torch.nan).double()
    value, gradient = differentiated(ALL[kind](), model, batch_of(model, inputs, torch.zeros(4).long()))
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize("directions", ["all", 1])
@pytest.mark.parametrize("kind", ALL)
def test_gradients_that_do_not_depend_on_the_parameters_still_have_a_graph(kind: str, directions: Any) -> None:
    """A linear model, or the last layer above features that are frozen: the criterion is a constant."""
    model, inputs = nn.Linear(4, 3).double(), torch.randn(4, 4).double()
    value, gradient = differentiated(ALL[kind](), model, batch_of(model, inputs, torch.tensor([0, 0, 1, 1]), directions))
    assert bool(value.isfinite())
    assert not gradient.any()


def test_density_needs_no_label_and_takes_one_sample() -> None:
    model = network()
    value, gradient = differentiated(DensityLoss(0.4), model, batch_of(model, torch.randn(1, 4).double()))
    assert float(value) == pytest.approx(0.36)
    close(gradient, torch.zeros_like(gradient))


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "missing": (None, "but got none"),
    "numbers that are not whole": (torch.zeros(5), r"but got shape \(5,\) of torch.float32"),
    "too few": (torch.zeros(4).long(), r"but got shape \(4,\) of torch.int64"),
    "a list": ([0, 0, 1, 1, 1], "but got list"),
}


@pytest.mark.parametrize("fault", BAD_LABELS)
@pytest.mark.parametrize("kind", LABELED)
def test_labels_that_do_not_fit_are_refused_in_one_sentence(kind: str, fault: str) -> None:
    labels, got = BAD_LABELS[fault]
    wanted = r"Expected `labels` to be the group of each sample, whole numbers of shape \(5,\), "
    with pytest.raises(NetsimError, match=wanted + got) as caught:
        LABELED[kind]()(batch_of(network(), torch.randn(5, 4).double(), labels))
    assert "\n" not in str(caught.value)


TRANSFORMS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "fewer samples": (lambda x: x[:3], False),
    "no tensor": (lambda x: None, False),
    "another shape": (lambda x: x[..., :2], False),
    "another shape of each sample": (lambda x: x[:2], True),
    "no tensor for each sample": (lambda x: 1.0, True),
}


@pytest.mark.parametrize("fault", TRANSFORMS)
def test_a_transform_that_changes_the_shape_is_refused_in_one_sentence(fault: str) -> None:
    transform, per_sample = TRANSFORMS[fault]
    model = nn.Sequential(cases.Lambda(lambda x: x.mean(1, keepdim=True)), nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs = torch.tensor([[1.0], [-1.0], [2.0], [3.0]]) * torch.randn(4, 4).abs()
    with pytest.raises(NetsimError, match="Expected `transform` to be") as caught:
        InvarianceLoss(transform, per_sample)(batch_of(model, inputs.double()))
    assert "\n" not in str(caught.value)


def test_a_transform_of_single_samples_needs_one_tensor() -> None:
    model, inputs = cases.build("keywords")
    batch = GradientBatch(JacobianOperator(model, create_graph=True), inputs)
    with pytest.raises(NetsimError, match=r"Expected `inputs` to be one tensor, .* but got dict. Pass `per_sample=False`"):
        InvarianceLoss(lambda x: x)(batch)
    loss = InvarianceLoss(lambda both: {"a": both["a"] * 2, "b": both["b"]}, per_sample=False)(batch)
    assert -1 <= float(loss.detach()) < 0


def test_a_transform_is_drawn_anew_for_each_sample() -> None:
    seen: list[tuple[int, ...]] = []

    def transform(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x + torch.randn(())

    InvarianceLoss(transform)(batch_of(network(), torch.randn(3, 4).double()))
    assert seen == [(4,)] * 3
    seen.clear()
    InvarianceLoss(transform, per_sample=False)(batch_of(network(), torch.randn(3, 4).double()))
    assert seen == [(3, 4)]


def test_samples_with_a_negative_label_belong_to_no_group() -> None:
    model, inputs = network(), torch.randn(7, 4).double()
    labels = torch.tensor([0, 0, -1, 1, 1, -1, -100])
    kept = [0, 1, 3, 4]
    for make in LABELED.values():
        found = differentiated(make(), model, batch_of(model, inputs, labels))
        wanted = differentiated(make(), model, batch_of(model, inputs[kept], labels[kept]))
        for got, right in zip(found, wanted, strict=True):
            close(got, right)


@pytest.mark.parametrize("kind", ALL)
def test_an_empty_batch_is_a_zero_with_a_graph(kind: str) -> None:
    model = network()
    loss = ALL[kind]()(batch_of(model, torch.randn(0, 4).double(), torch.zeros(0).long()))
    assert float(loss.detach()) == 0
    assert loss.requires_grad

"""Every criterion, its value and its gradient by the parameters, against double back-propagation sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim.data.trees import map_leaves
from lightning_netsim.jacobian import JacobianOperator, factors
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
from tests import cases, oracles

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}


def _image_network() -> cases.Case:
    """The kinds of layers of the networks that are trained on images."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.PReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.PReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    return model, torch.randn(6, 1, 8, 8)


class Reader(nn.Module):
    """Tokens, attention between them, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(torch.tanh(h).mean(1))


def _reader() -> cases.Case:
    return Reader(), torch.tensor([[1, 2, 2, 0], [3, 4, 1, 6], [0, 5, 5, 3], [2, 1, 6, 0], [4, 4, 1, 3]])


EXTRA = {"image_network": _image_network, "reader": _reader}
MODELS: dict[str, Any] = {
    "image_network": "all",
    "mlp_10": 2,
    "conv2d_dilation_stride": "all",
    "conv2d_depthwise": "contrast",
    "conv2d_same": 1,
    "transposed2d": "all",
    "layer_norm": 2,
    "rms_norm": "contrast",
    "batch_norm": "all",
    "reader": "contrast",
    "embedding": "all",
    "attention": "all",
    "transformer_layer": 1,
    "lstm": "all",
    "shared_parameter": "all",
    "called_twice": "all",
    "bare_parameter": "all",
    "weight_norm": "all",
    "keywords": "target",
    "softmax": "all",
    "unused_and_frozen": 1,
}
#: On one network, every kind of direction.
EVERY_DIRECTION = [("image_network", directions) for directions in (1, 2, "contrast", "target")]

Criterion = Callable[[Tensor, Tensor], Tensor]
CRITERIA: dict[str, tuple[Callable[[], AbstractSimilarityLoss], Criterion]] = {
    "pair": (PairSimilarityLoss, oracles.pair_criterion),
    "group": (GroupSimilarityLoss, oracles.group_criterion),
    "minibatch": (MinibatchSimilarityLoss, oracles.minibatch_criterion),
    "density": (lambda: DensityLoss(0.3), lambda j, _: oracles.density_criterion(j, 0.3, 0.3, mean=True)),
    "density sum": (lambda: DensityLoss(0.9, "sum"), lambda j, _: oracles.density_criterion(j, 0.9, 0.9, mean=False)),
    "density range": (lambda: DensityLoss([0.4, 0.41]), lambda j, _: oracles.density_criterion(j, 0.4, 0.41, mean=True)),
}


def build(name: str, dtype: torch.dtype) -> cases.Case:
    if name in EXTRA:
        torch.manual_seed(1)
        model, inputs = EXTRA[name]()
    else:
        model, inputs = cases.build(name)
    cast = map_leaves(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    return model.to(dtype).eval(), cast


def make_labels(size: int) -> Tensor:
    """Return labels of which one has three samples or more, and one may have a single sample."""
    return torch.tensor([1, 0, 1, 1, 0, 2, 2])[:size] if size > 5 else torch.tensor([1, 0, 1, 1, 0])[:size]


def projection(directions: Any, num_outputs: int) -> oracles.Projection | None:
    if directions in ("contrast", "target"):
        return {"contrast": oracles.contrast, "target": oracles.target}[directions]
    if directions == "all":
        return None
    matrix = JacobianOperator(nn.Linear(1, 1), directions=directions).directions.matrix(num_outputs)
    assert matrix is not None
    return lambda outputs, _: outputs @ matrix


def size_of(inputs: Any) -> int:
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def flat(gradients: Iterable[Tensor | None], parameters: Iterable[Tensor]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])


def differentiate(value: Tensor, parameters: list[Tensor]) -> Tensor:
    if not value.requires_grad:
        return flat([None] * len(parameters), parameters)
    return flat(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True), parameters)


Answer = tuple[Tensor, Tensor]


@cache
def answers(name: str, directions: Any, chosen: tuple[str, ...] | None = None) -> dict[str, Answer]:
    """Return value and gradient of every criterion by double back-propagation."""
    model, inputs = build(name, torch.float64)
    labels = make_labels(size_of(inputs))
    with torch.no_grad():
        num_outputs = oracles._call(model, inputs).shape[1]
    jacobian = oracles.differentiable_jacobian(model, inputs, labels, projection(directions, num_outputs), chosen)
    parameters, found = [p for p in model.parameters() if p.requires_grad], {}
    for kind, (_, criterion) in CRITERIA.items():
        value = criterion(jacobian, labels)
        found[kind] = (value.detach(), differentiate(value, parameters))
    return found


def check(found: Answer, wanted: Answer, tolerance: float) -> None:
    """Hold value and gradient to a relative tolerance; a gradient that vanishes may do so up to rounding."""
    torch.testing.assert_close(found[0].detach().double(), wanted[0], rtol=tolerance, atol=tolerance)
    error, scale = float((found[1] - wanted[1]).norm()), float(wanted[1].norm())
    assert error <= tolerance * max(scale, 1e-3), f"relative error {error / max(scale, 1e-3):.1e} of the gradient"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("name", "directions"), [*MODELS.items(), *EVERY_DIRECTION])
def test_values_and_gradients(name: str, directions: Any, dtype: torch.dtype) -> None:
    model, inputs = build(name, dtype)
    labels, parameters = make_labels(size_of(inputs)), [p for p in model.parameters() if p.requires_grad]
    operator = JacobianOperator(model, directions=directions, create_graph=True)
    batch, wanted = GradientBatch(operator, inputs, labels), answers(name, directions)
    for kind, (make, _) in CRITERIA.items():
        value = make()(batch)
        assert value.shape == ()
        assert value.dtype == dtype
        check((value, differentiate(value, parameters)), wanted[kind], TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("chosen", "directions", "wanted"),
    [
        # Under the last layer alone, every output has the same gradient in a place of its own: C has d equal eigenvalues, and k
        # is that of any one direction.
        (("6",), "all", 1),
        (("6",), 2, 1),
        (("6",), "contrast", "contrast"),
        (("3", "4"), "all", "all"),
        (("0.weight",), 2, 2),
    ],
)
@pytest.mark.parametrize("kind", [kind for kind in CRITERIA if kind != "minibatch"])
def test_chosen_parameters(kind: str, chosen: tuple[str, ...], directions: Any, wanted: Any) -> None:
    model, inputs = build("image_network", torch.float64)
    names = tuple(name for name, _ in model.named_parameters() if any(name.startswith(part) for part in chosen))
    operator = JacobianOperator(model, directions=directions, parameters=chosen, create_graph=True)
    value = CRITERIA[kind][0]()(GradientBatch(operator, inputs, make_labels(len(inputs))))
    found = (value, differentiate(value, list(model.parameters())))
    check(found, answers("image_network", wanted, names)[kind], 1e-8)


@pytest.mark.parametrize("name", ["image_network", "layer_norm", "reader", "shared_parameter"])
def test_gradients_formed_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_CACHED_BYTES", {"cpu": 1})
    model, inputs = build(name, torch.float64)
    operator = JacobianOperator(model, directions=MODELS[name], create_graph=True)
    batch = GradientBatch(operator, inputs, make_labels(len(inputs)))
    for kind, (make, _) in CRITERIA.items():
        value = make()(batch)
        check((value, differentiate(value, list(model.parameters()))), answers(name, MODELS[name])[kind], 1e-8)


def test_every_criterion_in_any_order_from_one_batch() -> None:
    """What one criterion forms and keeps must not change the next."""
    model, inputs = build("image_network", torch.float64)
    operator, labels = JacobianOperator(model, create_graph=True), make_labels(len(inputs))
    batch = GradientBatch(operator, inputs, labels)
    for kind in [*CRITERIA, *reversed(CRITERIA)]:
        value = CRITERIA[kind][0]()(batch)
        check((value, differentiate(value, list(model.parameters()))), answers("image_network", "all")[kind], 1e-8)


@pytest.mark.parametrize("directions", ["all", 1])
@pytest.mark.parametrize("name", ["image_network", "layer_norm", "conv2d_same", "attention"])
def test_invariance(name: str, directions: Any) -> None:
    model, inputs = build(name, torch.float64)
    wanted_model, parameters = build(name, torch.float64)[0], list(model.parameters())

    def transform(x: Tensor) -> Tensor:
        return 0.8 * x.flip(-1) + 0.1

    with torch.no_grad():
        project = projection(directions, model(inputs).shape[1])
    first = oracles.differentiable_jacobian(wanted_model, inputs, project=project)
    second = oracles.differentiable_jacobian(wanted_model, transform(inputs), project=project)
    value = -oracles.pair_similarities(first, second).mean()
    wanted = (value.detach(), differentiate(value, list(wanted_model.parameters())))
    operator = JacobianOperator(model, directions=directions, create_graph=True)
    for per_sample in (True, False):
        found = InvarianceLoss(transform, per_sample)(GradientBatch(operator, inputs))
        check((found, differentiate(found, parameters)), wanted, 1e-8)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["image_network", "conv2d_groups_2", "batch_norm", "rms_norm", "mlp_2"])
def test_tangent(name: str, dtype: torch.dtype) -> None:
    model, inputs = build(name, torch.float64)
    operators = [lambda x: torch.ones_like(x), lambda x: x.flip(-1) - x]
    terms = [oracles.tangent_jacobian(model, inputs, e(inputs)).square().sum() / len(inputs) for e in operators]
    value = (terms[0] + terms[1]) / 2
    wanted = (value.detach(), differentiate(value, list(model.parameters())))
    model, inputs = build(name, dtype)
    batch = GradientBatch(JacobianOperator(model, create_graph=True), inputs)
    for criteria in (TangentLoss(operators)(batch), (TangentLoss(operators[0])(batch) + TangentLoss(operators[1])(batch)) / 2):
        found = (criteria, differentiate(criteria, list(model.parameters())))
        scale = max(1.0, float(wanted[0]))
        check((found[0] / scale, found[1] / scale), (wanted[0] / scale, wanted[1] / scale), TOLERANCES[dtype])


def test_tangent_of_a_labeled_direction() -> None:
    model, inputs = build("mlp_10", torch.float64)
    labels = make_labels(len(inputs))
    wanted = oracles.tangent_jacobian(model, inputs, torch.ones_like(inputs), labels, oracles.contrast).square().sum() / 7
    operator = JacobianOperator(model, directions="contrast", create_graph=True)
    found = TangentLoss(torch.ones_like)(GradientBatch(operator, inputs, labels))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


def test_the_gradient_reaches_grad_and_leaves_the_task_alone() -> None:
    model, inputs = build("image_network", torch.float32)
    batch = GradientBatch(JacobianOperator(model, create_graph=True), inputs, make_labels(len(inputs)))
    task = nn.functional.cross_entropy(model(inputs), make_labels(len(inputs)))
    alone = differentiate(task, list(model.parameters()))
    (task + 0.5 * GroupSimilarityLoss()(batch)).backward()
    found = flat([p.grad for p in model.parameters()], model.parameters())
    wanted = alone + 0.5 * answers("image_network", "all")["group"][1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


ALL: dict[str, Callable[[], AbstractSimilarityLoss]] = {
    **{kind: make for kind, (make, _) in CRITERIA.items()},
    "invariance": lambda: InvarianceLoss(lambda x: x.flip(-1)),
    "tangent": lambda: TangentLoss(torch.ones_like),
}


def computed(kind: str, model: nn.Module, inputs: Tensor) -> Tensor:
    return ALL[kind]()(GradientBatch(JacobianOperator(model, create_graph=True), inputs, make_labels(len(inputs))))


@pytest.mark.parametrize("kind", ALL)
def test_autocast_around_does_not_cost_digits(kind: str) -> None:
    model, inputs = build("image_network", torch.float32)
    wanted = computed(kind, model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = computed(kind, model, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    gradients = [differentiate(value, list(model.parameters())) for value in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ALL)
def test_values_without_a_graph(kind: str, surroundings: Callable[[], Any]) -> None:
    model, inputs = build("image_network", torch.float64)
    wanted = computed(kind, model, inputs)
    with surroundings():
        found = computed(kind, model, inputs)
    torch.testing.assert_close(found.item(), wanted.item(), rtol=1e-10, atol=0)

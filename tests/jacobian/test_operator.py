"""The operator: the path that each parameter takes, faults that its check must catch, harmlessness, and clear refusals."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_netsim.jacobian import JacobianOperator, layers, per_sample_jacobian
from lightning_netsim.jacobian.factors import AbstractFactor
from lightning_netsim.jacobian.paths import Ownership, is_known_layer
from tests import cases, oracles
from tests.jacobian.shared import SMALL, close, oracle

LAYER, MODULE_VMAP, MODULE_LOOP, MODEL_VMAP = "layer", "module_vmap", "module_loop", "model_vmap"
#: The parameters that are not factored from their layer, by the start of their name, and what serves them instead.
METHODS: dict[str, dict[str, str]] = {
    "tied_through_function": {"embed.weight": MODEL_VMAP},
    "shared_parameter": {"first.weight": MODEL_VMAP},
    "bare_parameter": {"1.token": MODULE_VMAP, "1.scale": MODULE_VMAP},
    "bare_parameter_on_root": {"token": MODEL_VMAP, "scale": MODEL_VMAP},
    "weight_norm": {"0.": MODULE_VMAP},
    "spectral_norm": {"0.": MODULE_VMAP},
    "attention": {"attention.": MODULE_VMAP},
    "attention_time_first": {"attention.": MODEL_VMAP},
    "transformer_layer": {"0.self_attn.": MODULE_VMAP},
    "lstm": {"rnn.": MODULE_VMAP},
    "gru": {"rnn.": MODULE_LOOP},
    "time_first": {"first.": MODEL_VMAP},
    "time_first_square": {"first.": MODEL_VMAP},
    "subclassed": {"2.": MODULE_VMAP},
    "vit": {
        "class_token": MODEL_VMAP,
        "encoder.pos_embedding": MODULE_VMAP,
        "encoder.layers.encoder_layer_0.self_attention.": MODULE_VMAP,
        "encoder.layers.encoder_layer_1.self_attention.": MODULE_VMAP,
    },
}


@pytest.mark.parametrize("name", cases.CASES)
def test_each_parameter_takes_the_cheapest_path_that_is_right(name: str) -> None:
    model, inputs = cases.build(name)
    operator = JacobianOperator(model)
    operator.prepare(inputs)
    exceptions = METHODS.get(name, {})
    for parameter in operator.ownership.parameters:
        wanted = next((method for start, method in exceptions.items() if parameter.startswith(start)), LAYER)
        assert operator.ownership.path(parameter).method.name.lower() == wanted, parameter
    assert sum(operator.ownership.methods().values()) == len(operator.ownership.parameters)


def test_a_module_is_a_known_layer_if_it_does_nothing_beside_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    watched = nn.Linear(3, 2)
    watched.register_forward_pre_hook(lambda module, args: None)
    parent = nn.Linear(3, 2)
    parent.child = nn.Linear(2, 2)
    extended = nn.Linear(3, 2)
    extended.scale = nn.Parameter(torch.ones(1))
    known = [nn.Linear(3, 2), cases.Subclassed(3, 2), nn.InstanceNorm2d(3, affine=True)]
    others = [Doubled(3, 2), cases.LowRank(3, 2), weight_norm(nn.Linear(3, 2)), nn.Bilinear(3, 2, 2), watched, parent, extended]
    assert [is_known_layer(module) for module in (*known, *others)] == [True] * len(known) + [False] * len(others)
    assert Ownership(cases.build("shared_parameter")[0]).path("first.weight").method.name == "MODEL_VMAP"


def _factors(change: Callable[[str, AbstractFactor], AbstractFactor | None]) -> Callable[..., layers.Factors]:
    """Return a function for linear layers whose right factors are changed, or left out where nothing is returned."""

    def planted(module: nn.Linear, inputs: Tensor, deltas: Tensor) -> layers.Factors:
        changed = {name: change(name, factor) for name, factor in layers.linear(module, inputs, deltas).items()}
        return {name: factor for name, factor in changed.items() if factor is not None}

    return planted


def _cannot_be_done(name: str, factor: AbstractFactor) -> AbstractFactor:
    raise ValueError("cannot be done")


FAULTS = {
    "half": _factors(lambda _, factor: factor.mix(0.5 * torch.eye(2).expand(len(factor.parts[0]), 2, 2))),
    "no weight": _factors(lambda name, factor: None if name == "weight" else factor),
    "no bias": _factors(lambda name, factor: None if name == "bias" else factor),
    # Each sample has the gradient of its neighbor: the sum over the batch is right, the samples are not.
    "wrong axis": _factors(lambda _, factor: factor.select(torch.arange(len(factor.parts[0])).roll(1))),
    "an error": _factors(_cannot_be_done),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_moves_the_parameter_to_a_path_that_is_right(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = cases.build("mlp_2")
    monkeypatch.setitem(layers.KNOWN_LAYERS, nn.Linear, FAULTS[fault])
    operator = JacobianOperator(model)
    close(operator(inputs).materialize(), oracle("mlp_2"))
    names = {"no weight": ["weight"], "no bias": ["bias"]}.get(fault, ["weight", "bias"])
    moved = {name for name in operator.ownership.parameters if operator.ownership.path(name).method.name != "LAYER"}
    # The gradient of the last bias is the same for every sample: there, a wrong axis is not wrong.
    right = {"4.bias"} if fault == "wrong axis" else set()
    assert moved == {f"{layer}.{name}" for layer in (0, 2, 4) for name in names} - right


def test_the_last_path_always_exists() -> None:
    model, inputs = cases.build("tied_through_function")
    operator = JacobianOperator(model)
    names = list(operator.ownership.parameters)
    for name in names:
        while operator.ownership.demote(name):
            pass
    close(operator(inputs).materialize(), oracle("tied_through_function"))
    assert operator.ownership.methods() == {"model_loop": len(names)}


class Snapshot:
    """Everything that must be as before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = [tensor.detach().clone() for tensor in model.state_dict().values()]
        self.versions = [tensor._version for tensor in [*model.parameters(), *model.buffers()]]
        self.gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.flags = [p.requires_grad for p in model.parameters()]
        self.modes = [module.training for module in model.modules()]
        self.hooks = [len(module._forward_hooks) for module in model.modules()]
        self.torch_state, self.python_state = torch.get_rng_state(), random.getstate()
        self.fast_path = torch.backends.mha.get_fastpath_enabled()

    def check(self) -> None:
        after = Snapshot(self.model)
        for before, now in zip(self.tensors, after.tensors, strict=True):
            assert torch.equal(before, now)
        for before, now in zip(self.gradients, after.gradients, strict=True):
            assert (before is None and now is None) or torch.equal(before, now)
        for name in ("versions", "flags", "modes", "hooks", "python_state", "fast_path"):
            assert getattr(self, name) == getattr(after, name), name
        assert torch.equal(self.torch_state, after.torch_state)


@pytest.mark.parametrize("name", ["inplace_relu", "attention", "gru", "bare_parameter_on_root"])
def test_nothing_is_left_behind(name: str) -> None:
    model, inputs = cases.build(name)
    parameters = list(model.parameters())
    parameters[0].grad = torch.randn_like(parameters[0])
    parameters[-1].requires_grad_(False)
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.MultiheadAttention, nn.Dropout)):
            module.eval()
    snapshot = Snapshot(model)
    result = per_sample_jacobian(model, inputs)
    result.gram(), result.weighted_sum(torch.ones(result.num_samples, result.num_directions, 1))
    snapshot.check()


def test_half_precision_models_give_float32() -> None:
    model, inputs = cases.build("mlp_2")
    result = per_sample_jacobian(model.bfloat16(), inputs.bfloat16())
    wanted = oracles.loop_jacobian(model.float(), inputs.bfloat16().float())
    assert result.gram().dtype == torch.float32
    close(result.materialize(), wanted, 0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_outputs_of_another_precision_than_the_parameters(dtype: torch.dtype) -> None:
    linear, inputs = nn.Linear(4, 2), torch.randn(5, 4)
    result = per_sample_jacobian(nn.Sequential(linear, cases.Lambda(lambda x: x.to(dtype))), inputs)
    assert result.outputs.dtype == torch.float32
    close(result.materialize(), oracles.loop_jacobian(linear, inputs))


def test_randomness_in_the_forward_pass_is_followed_by_the_factored_path() -> None:
    dropout = cases.Lambda(lambda x: nn.functional.dropout(x, 0.5, training=True))
    model, inputs = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), dropout, nn.Linear(64, 2)), torch.randn(6, 4)
    operator = JacobianOperator(model)
    operator.prepare(inputs)
    assert operator.ownership.methods() == {"layer": 4}
    torch.manual_seed(5)
    result = operator(inputs)
    torch.manual_seed(5)
    outputs = model(inputs)
    assert torch.equal(result.outputs, outputs)
    for row in range(6):
        gradients = torch.autograd.grad(outputs[row, 1], list(model.parameters()), retain_graph=True)
        close(result.materialize()[row, 1], torch.cat([g.flatten() for g in gradients]))


@pytest.mark.parametrize("name", ["mlp_2", "conv2d", "gru", "attention_time_first", "bare_parameter_on_root", "time_first"])
def test_samples_that_are_not_finite_do_not_decide_the_paths(name: str) -> None:
    model, inputs = cases.build(name)
    reference = JacobianOperator(model)
    reference.prepare(inputs)
    some = inputs.clone()
    some[1] = torch.nan
    keep = torch.arange(len(inputs)) != 1
    for batch in (some, torch.full_like(inputs, torch.nan)):
        operator = JacobianOperator(model)
        result = operator(batch)
        assert bool(result.gram()[1].isnan().all())
        close(operator(inputs).materialize(), oracle(name))
        assert operator.ownership.methods() == reference.ownership.methods()
    close(reference(some).materialize()[keep], oracle(name)[keep])


@pytest.mark.parametrize(
    "name", ["mlp_2", "positions", "conv2d", "conv2d_small_output", "conv2d_depthwise", "transposed2d", "embedding", "gru"]
)
def test_no_sample_left(name: str) -> None:
    model, inputs = cases.build(name)
    result = per_sample_jacobian(model, inputs)
    empty = result.select(torch.zeros(len(inputs), dtype=torch.bool))
    d, p = result.num_directions, result.num_parameters
    total = empty.weighted_sum(torch.zeros(0, d, 3))
    assert all(value.shape == (3, *result.shapes[name]) and not value.any() for name, value in total.items())
    found = empty.gram(), empty.materialize(), empty.inner(result), empty.trace_inner(empty), empty.dot(total)
    assert [value.shape for value in found] == [(0, d, d), (0, d, p), (0, len(inputs), d, d), (0, 0), (0, d, 3)]
    assert empty.kernel_product(torch.zeros(0, d, 4)).shape == (0, d, 4)


def _mixing(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(cases.Lambda(function), nn.Linear(4, 2), nn.Tanh())


def test_mixing_is_found_beside_a_nan() -> None:
    inputs = torch.randn(8, 4)
    inputs[1] = torch.nan  # It reaches one sample more, not all of them.
    with pytest.raises(ValueError, match=r"outputs that change by .* when half of the batch is taken away"):
        JacobianOperator(_mixing(lambda x: x + x.roll(1, 0)))(inputs)


def _then(function: Callable[[Tensor], Any]) -> nn.Module:
    """Return a linear layer whose output is changed."""
    return nn.Sequential(nn.Linear(4, 2), cases.Lambda(function))


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a tuple": (
        lambda: _then(lambda x: (x, x)),
        {},
        r"`outputs` to be a floating-point tensor of shape \(B, D\), but got tuple\. Define `similarity_step`",
    ),
    "no gradient": (
        lambda: _then(lambda x: x.detach()),
        {},
        "Expected `outputs` to be differentiable, but got no gradient. Remove `detach",
    ),
    "batch norm in train mode": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train(),
        {},
        r"batch norm `1` using batch statistics. Call `model.eval\(\)`",
    ),
    "mixed samples": (
        lambda: _mixing(lambda x: x - x.mean(0)),
        {},
        r"outputs that change by [\d.]+% when half of the batch is taken away",
    ),
    "no trainable parameter": (
        lambda: nn.Linear(4, 2).requires_grad_(False),
        {},
        "at least one trainable parameter, but got none. Set `requires_grad`",
    ),
    "unknown parameter": (lambda: nn.Linear(4, 2), {"parameters": "head"}, "names of trainable parameters .* but got 'head'"),
    "frequency-scaled gradients": (
        lambda: nn.Sequential(nn.Embedding(9, 4, scale_grad_by_freq=True), cases.Lambda(lambda x: x.mean(1)), nn.Linear(4, 2)),
        {},
        "a gradient of `0.weight` that no method reproduces",
    ),
    "not a module": (lambda: torch.tanh, {}, "Expected `model` to be a torch.nn.Module, but got builtin"),
    "another model": (
        lambda: nn.Linear(4, 2),
        {"forward": nn.Linear(4, 2)},
        "Expected `forward` to be a function that runs the modules of `model`",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refusals_are_one_clear_sentence(fault: str) -> None:
    make, arguments, message = REFUSED[fault]
    inputs = torch.randint(0, 3, (6, 5)) if fault.startswith("frequency") else torch.randn(6, 4)
    with pytest.raises(ValueError, match=message) as caught:
        per_sample_jacobian(make(), inputs, **arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Expected `")


def test_chosen_parameters() -> None:
    model, inputs = cases.build("mlp_2")
    result = per_sample_jacobian(model, inputs, parameters=["0", "4.bias"])
    assert list(result.shapes) == ["0.weight", "0.bias", "4.bias"]
    close(result.materialize(), oracles.loop_jacobian(model, inputs, parameters=result.shapes))
    # "0" is a module, not the start of a name.
    deep = nn.Sequential(*[nn.Linear(3, 3) for _ in range(11)])
    assert list(per_sample_jacobian(deep, torch.randn(2, 3), parameters="1").shapes) == ["1.weight", "1.bias"]


def test_a_forward_of_the_users_choice() -> None:
    model, inputs = cases.build("mlp_2")
    result = per_sample_jacobian(model, inputs, forward=lambda x: model(2 * x)[:, :1])
    close(result.materialize(), oracles.loop_jacobian(model, inputs, forward=lambda m, x: m(2 * x)[:, :1]))


def test_preparing_looks_at_no_more_than_eight_samples() -> None:
    model, seen = nn.Linear(4, 2), Counter[int]()

    def forward(x: Tensor) -> Tensor:
        seen[len(x)] += 1
        return model(x)

    operator = JacobianOperator(model, forward)
    operator.prepare(torch.randn(50, 4))
    assert max(seen) == 8
    seen.clear()
    operator(torch.randn(50, 4))
    assert seen == {50: 1}


@pytest.mark.parametrize("pixels", [28, 56])
def test_a_coarse_sum_in_the_reference_is_no_reason_to_refuse(pixels: int) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    operator = JacobianOperator(nn.Sequential(*layers, nn.Linear(32, 10)), directions=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.prepare(torch.randn(8, 3, pixels, pixels))
    assert operator.ownership.methods() == {"layer": 6}


@pytest.mark.parametrize(("name", "create_graph"), [*((name, True) for name in SMALL), ("conv2d", False), ("gru", False)])
def test_a_pass_that_somebody_else_runs_gives_the_same(name: str, create_graph: bool) -> None:
    model, inputs = cases.build(name)
    operator = JacobianOperator(model, create_graph=create_graph)
    operator.prepare(inputs)
    with operator.watch() as calls:
        outputs = oracles._call(model, inputs)
    with torch.no_grad():
        oracles._call(model, inputs)  # What follows does not disturb it.
    assert not any(module._forward_hooks for module in model.modules()) or name == "hooked"
    found = operator.read(calls, outputs, inputs)
    close(found.materialize().detach(), oracle(name))
    assert torch.equal(found.outputs, outputs)
    assert found.outputs.requires_grad == create_graph
    assert create_graph or not any(part.requires_grad for part in found.parts)


@pytest.mark.parametrize("name", ["prelu", "attention", "transformer_layer"])
def test_a_watched_pass_shares_its_graph_with_the_task(name: str) -> None:
    model, inputs = cases.build(name)
    labels = torch.tensor([0, 1, 1, 0, 1])
    operator = JacobianOperator(model, directions="contrast", create_graph=True)
    operator.prepare(inputs, labels)
    with operator.watch() as calls:
        outputs = model(inputs)
    energy = operator.read(calls, outputs, inputs, labels).gram().sum()
    (nn.functional.cross_entropy(outputs, labels) + energy).backward()
    found = [parameter.grad for parameter in model.parameters()]
    again = operator(inputs, labels).gram().sum() + nn.functional.cross_entropy(model(inputs), labels)
    for got, wanted in zip(found, torch.autograd.grad(again, list(model.parameters())), strict=True):
        assert got is not None
        close(got, wanted)


def test_nothing_is_left_behind_by_an_error_in_a_watched_pass() -> None:
    model, inputs = cases.build("attention")
    operator = JacobianOperator(model)
    operator.prepare(inputs)
    snapshot = Snapshot(model)
    try:
        with operator.watch():
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyError
    except KeyError:
        snapshot.check()


def test_a_pass_without_a_graph_cannot_be_read() -> None:
    model, inputs = cases.build("mlp_2")
    operator = JacobianOperator(model)
    operator.prepare(inputs)
    with operator.watch() as calls, torch.no_grad():
        outputs = model(inputs)
    with pytest.raises(ValueError, match="Expected `outputs` to be differentiable, but got no gradient"):
        operator.read(calls, outputs, inputs)
    with operator.watch() as calls:
        outputs = model(inputs)
    with pytest.raises(ValueError, match=r"Expected `outputs` to be a floating-point tensor of shape \(B, D\)"):
        operator.read(calls, outputs[:, 0], inputs)

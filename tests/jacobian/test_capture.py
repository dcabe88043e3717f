"""Differentiating whatever surrounds: inference mode and what a model cached in it, autocast, compiled models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim.jacobian import JacobianOperator, per_sample_jacobian
from lightning_netsim.jacobian.capture import full_float32, watch
from tests import cases, oracles
from tests.jacobian.shared import close


@pytest.fixture(autouse=True)
def _compiler_reset() -> Iterator[None]:
    yield
    torch.compiler.reset()


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["mlp_2", "inplace_relu", "embedding", "attention", "gru", "bare_parameter_on_root"])
def test_whatever_context_surrounds(name: str, context: str) -> None:
    model, inputs = cases.build(name)
    wanted = per_sample_jacobian(model, inputs)
    with CONTEXTS[context]():
        inputs = inputs.clone()  # An inference tensor under inference mode.
        assert inputs.is_inference() == (context == "inference")
        result = per_sample_jacobian(model, inputs)
    assert result.gram().dtype == torch.float32
    assert not result.gram().requires_grad
    close(result.materialize(), wanted.materialize(), 1e-6)


class Masked(nn.Module):
    """Hands attention a mask that it keeps, and keeps factors that the backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)
        self.mask: Tensor | None = None
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            self.kept["factors"] = torch.tensor([1.0, 0.0, 2.0, 3.0])
        return self.head(self.attention(x, x, x, attn_mask=self.mask)[0].mean(1) * self.kept["factors"])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("steps", [3, 5])
def test_what_a_model_cached_in_inference_mode(steps: int, inside: bool) -> None:
    # With as many steps as samples, the mask looks like a part of the batch.
    model, inputs = Masked(), torch.randn(5, steps, 4)
    wanted = oracles.loop_jacobian(model, inputs)
    with torch.inference_mode():
        model(inputs)
    with torch.inference_mode() if inside else nullcontext():
        close(per_sample_jacobian(model, inputs).materialize(), wanted)


@pytest.mark.parametrize("name", ["mlp_2", "attention", "gru"])
@pytest.mark.parametrize("how", ["module", "function"])
def test_compiled_models(name: str, how: str) -> None:
    model, inputs = cases.build(name)
    wanted = per_sample_jacobian(model, inputs).gram()
    compiled: nn.Module = model
    if how == "module":
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    before = compiled(inputs)
    operator = JacobianOperator(compiled)
    close(operator(inputs).gram(), wanted)
    assert operator.ownership.methods()["layer"] >= 2
    torch.testing.assert_close(compiled(inputs), before)


def test_an_argument_that_is_overwritten_after_the_call_is_noticed() -> None:
    layer, inputs = nn.Linear(4, 2), torch.randn(5, 4)
    with watch([layer]) as calls:
        for number in range(2):
            layer(inputs)
            inputs += number
    assert [call.arguments_unchanged() for call in calls[layer]] == [False, False]
    with watch([layer]) as calls:
        layer(input=inputs)
    assert calls[layer][0].arguments_unchanged()


def test_full_precision_is_as_before_after_the_block() -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        with full_float32():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

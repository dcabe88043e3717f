"""Sweeps: the same chunks each time, smaller ones when memory runs out, in the precision that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim.data.sources import Chunk
from lightning_netsim.measurement.measure import measure_similarity
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.measurement.sweep import FeatureReader
from tests.measuring import check_counts, classifier, source


class Cramped(nn.Module):
    """Runs out of memory with more than so many samples at a time."""

    def __init__(self, most: int, message: str = "[enforce fail] DefaultCPUAllocator: can't allocate memory") -> None:
        super().__init__()
        self.net, self.most, self.message = classifier(), most, message

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise RuntimeError(self.message)
        return self.net(x)


@pytest.mark.parametrize("plan", ["store", "sketch", "reiterate"])
def test_when_memory_runs_out_chunks_are_halved(plan: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs = torch.randn(40, 6)
    settings = SweepSettings(k=3, plan=plan, projection_dim=60, chunk_size=32)
    model = Cramped(7)
    wanted = measure_similarity(model.net, source(inputs, 20), settings=settings)
    result = _measured_after_preparation(model, source(inputs, 20), settings)
    check_counts(result.counts.soft, wanted.counts.soft.double())
    assert torch.equal(result.neighbors.index, wanted.neighbors.index)
    assert result.plan["chunk_size"] == 5
    assert "Out of memory with 20 samples at a time: going on with 10." in caplog.text
    assert "Out of memory with 10 samples at a time: going on with 5." in caplog.text


def _measured_after_preparation(model: Cramped, batches: Any, settings: SweepSettings) -> Any:
    """Measure with a model that is cramped only once the plan is made."""
    most, model.most = model.most, 1000

    def announced(text: str) -> None:
        model.most = most

    return measure_similarity(model, batches, settings=settings, announce=announced)


def test_one_sample_that_does_not_fit_is_an_error_and_so_is_any_other() -> None:
    settings = SweepSettings(k=3)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        _measured_after_preparation(Cramped(0), source(torch.randn(40, 6), 20), settings)
    with pytest.raises(RuntimeError, match="something else"):
        _measured_after_preparation(Cramped(3, "something else"), source(torch.randn(40, 6), 20), settings)


@pytest.mark.parametrize("precision", ["float32", "inherit"])
def test_autocast_reaches_the_forward_pass_only_where_it_is_inherited(precision: str) -> None:
    seen: list[torch.dtype] = []
    model = classifier()
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    inputs = torch.randn(40, 6)
    exact = measure_similarity(model, source(inputs, 20), settings=SweepSettings(k=3)).counts.soft
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = measure_similarity(model, source(inputs, 20), settings=SweepSettings(k=3, precision=precision))
    assert set(seen) == {torch.float32 if precision == "float32" else torch.bfloat16}
    assert result.counts.soft.dtype == torch.float32
    difference = float((result.counts.soft - exact).abs().max())
    assert (difference < 1e-3) == (precision == "float32")
    assert difference < 0.5


def test_a_chunk_is_read_once_with_all_that_belongs_to_it() -> None:
    model, inputs = classifier(), torch.randn(6, 6)
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    reader = FeatureReader(model, SweepSettings())
    chunk = Chunk(inputs, torch.arange(6))
    reader.prepare(chunk)
    calls.clear()
    swept = reader.read(chunk, activations=True)
    assert calls == [6]
    again = reader.read(chunk, swept.features.normalization)
    assert torch.equal(swept.features.inner(again.features), swept.features.inner(swept.features))
    assert torch.equal(swept.read.outputs, model(inputs))
    assert not swept.read.outputs.requires_grad  # It would keep the graph of every chunk.
    assert swept.activations is not None
    torch.testing.assert_close(swept.activations.vectors(), torch.nn.functional.normalize(model[:4](inputs)))
    assert again.activations is None
    assert swept.name == (0, 6)
    assert swept.valid_ids.tolist() == list(range(6))

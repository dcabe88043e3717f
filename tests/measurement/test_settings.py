"""Settings: stated once, shown by every way in, checked before anything is measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from lightning_netsim import SimilarityMonitor, analyze, denoise_labels, find_neighbors, find_transfer
from lightning_netsim.analysis.verbs import NetsimTrainer
from lightning_netsim.measurement.settings import SweepSettings

EVERY = {field.name for field in fields(SweepSettings)} - {"chunk_size"}
WAYS_IN: list[tuple[Callable[..., Any], set[str]]] = [
    (analyze, EVERY),
    (SimilarityMonitor, EVERY),
    (find_neighbors, {"k", "directions", "parameters", "max_samples", "render", "class_names", "seed"}),
    (find_transfer, {"k", "parameters", "max_samples", "render", "class_names", "seed"}),
    (denoise_labels, {"parameters", "max_samples", "memory_budget", "seed"}),
    (NetsimTrainer.neighbors, {"k", "directions", "max_samples"}),
    (NetsimTrainer.transfer, {"k", "max_samples"}),
]


@pytest.mark.parametrize(("way_in", "settings"), WAYS_IN, ids=lambda value: getattr(value, "__qualname__", ""))
def test_every_way_in_shows_its_settings(way_in: Callable[..., Any], settings: set[str]) -> None:
    parameters = inspect.signature(way_in).parameters
    defaults = {field.name: field.default for field in fields(SweepSettings)}
    assert {name for name in parameters if name in EVERY} >= settings
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    text = inspect.getdoc(way_in) or ""
    for name in settings:
        assert parameters[name].default == defaults[name]
        assert parameters[name].annotation is not inspect.Parameter.empty
        assert text.count(f"\n    {name}: ") == 1
    assert "**settings" not in text


def test_what_is_no_setting_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"analyze\(\) got an unexpected keyword argument 'neighbors'"):
        analyze(nn.Linear(2, 2), [], neighbors=3)
    with pytest.raises(TypeError, match=r"find_neighbors\(\) got an unexpected keyword argument 'plan'"):
        find_neighbors(nn.Linear(2, 2), [], [0], plan="store")
    with pytest.raises(TypeError, match=r"SimilarityMonitor\(\) got an unexpected keyword argument 'chunk_size'"):
        SimilarityMonitor(chunk_size=3)


def test_settings_arrive() -> None:
    monitor = SimilarityMonitor(7, thresholds=[0.5], class_names=("a", 1), every_n_epochs=2)
    assert monitor.settings == SweepSettings(k=7, thresholds=(0.5,), class_names=["a", "1"])
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
    found = analyze(nn.Linear(3, 2), torch.utils.data.DataLoader(data, 5), k=3, max_samples=8, powers=[2], progress=False)
    assert (found.meta["k"], found.meta["num_samples"]) == (3, 8)
    assert "power_count_2" in found.samples


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "Expected `k` to be a positive int"),
        ({"projection_dim": -3}, "Expected `projection_dim` to be a positive int, but got -3"),
        ({"plan": "stored"}, "but got 'stored'. Did you mean 'store'?"),
        ({"precision": "half"}, "Expected `precision` to be one of 'float32', 'inherit', but got 'half'"),
        ({"chunk_size": 0}, "Expected `chunk_size` to be a positive int"),
        ({"memory_budget": 0}, "Expected `memory_budget` to be a positive number, but got 0. It is a number of bytes"),
        ({"memory_budget": -1.0}, "Expected `memory_budget` to be a positive number"),
        ({"directions": "some"}, "Expected `directions` to be one of"),
        ({"thresholds": (2.0,)}, "Expected `thresholds` to be numbers within"),
        ({"powers": (-1.0,)}, "Expected `powers` to be numbers within"),
        ({"index_factory": "Flatt"}, "Expected `index_factory`"),
    ],
)
def test_settings_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        SweepSettings(**arguments)
    assert message in str(caught.value)

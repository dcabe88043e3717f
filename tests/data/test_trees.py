"""Nested batches: structure, size, samples, copies."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_netsim.data import trees


class Pair(NamedTuple):
    left: Any
    right: Any


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping of its own kind, like a tokenizer's."""

    def __init__(self, data: Any = None, encoding: Any = None) -> None:
        super().__init__(data or {})
        self.encoding = encoding


class Strange(dict):  # type: ignore[type-arg]
    """A mapping whose constructor takes something else."""

    def __init__(self, *, size: int) -> None:
        super().__init__(size=torch.zeros(size))


BATCH = {
    "x": torch.arange(6.0).view(3, 2),
    "more": [torch.arange(3), Pair(torch.ones(3, 1), None)],
    "text": ["a", "b", "c"],
    "k": 5,
}


def test_map_leaves_keeps_the_structure() -> None:
    doubled = trees.map_leaves(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, BATCH)
    assert list(doubled) == list(BATCH)
    assert isinstance(doubled["more"][1], Pair)
    assert torch.equal(doubled["more"][0], torch.tensor([0, 2, 4]))
    assert doubled["text"] == ["a", "b", "c"]
    assert BATCH["k"] == doubled["k"] == 5
    assert len(trees.leaves(BATCH)) == 6  # A column of texts is one leaf.
    assert [tuple(tensor.shape) for tensor in trees.tensors(BATCH)] == [(3, 2), (3,), (3, 1)]


@pytest.mark.parametrize("mapping", [OrderedDict, Encoding])
def test_mappings_keep_their_type(mapping: type) -> None:
    mapped = trees.map_leaves(lambda leaf: leaf + 1, mapping({"a": torch.zeros(2)}))
    assert type(mapped) is mapping
    assert torch.equal(mapped["a"], torch.ones(2))
    assert trees.map_leaves(len, Strange(size=4)) == {"size": 4}  # It cannot be made again.


@pytest.mark.parametrize(
    ("tree", "size"),
    [
        (BATCH, 3),
        (torch.zeros(4, 2), 4),
        ((torch.tensor(1.0), torch.zeros(2)), 2),
        (["a", "b"], None),
        (None, None),
        ({}, None),
    ],
)
def test_batch_size(tree: Any, size: int | None) -> None:
    assert trees.batch_size(tree) == size


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([1, 2])])
def test_take(index: slice | Tensor) -> None:
    taken = trees.take({**BATCH, "scale": torch.ones(2), "scalar": torch.tensor(3.0)}, index, 3)
    assert torch.equal(taken["x"], torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    assert torch.equal(taken["more"][0], torch.tensor([1, 2]))
    assert taken["text"] == ["b", "c"]
    assert taken["scale"].shape == (2,)
    assert (taken["k"], float(taken["scalar"])) == (5, 3.0)


def test_concatenate_undoes_take() -> None:
    parts = [trees.take(BATCH, slice(0, 1), 3), trees.take(BATCH, slice(1, 3), 3)]
    joined = trees.concatenate(parts, [1, 2])
    assert joined is not None
    assert torch.equal(joined["x"], BATCH["x"])
    assert torch.equal(joined["more"][1].left, BATCH["more"][1].left)
    assert joined["text"] == BATCH["text"]
    assert joined["k"] == 5
    assert trees.concatenate([BATCH], [3]) is BATCH


def test_concatenate_refuses_what_does_not_fit() -> None:
    assert trees.concatenate([torch.zeros(2, 3), torch.zeros(2, 4)], [2, 2]) is None
    assert trees.concatenate([[torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]], [2, 2]) is None


def test_detached_copies_are_normal_tensors() -> None:
    with torch.inference_mode():
        inputs = torch.ones(3)
        copied = trees.detached({"x": inputs, "y": torch.ones(2), "n": 3})
        on_cpu = trees.detached(inputs, torch.device("cpu"))
    assert not copied["x"].is_inference()
    assert not on_cpu.is_inference()
    assert copied["n"] == 3
    copied["x"] += 1
    assert inputs.tolist() == [1, 1, 1]
    weight = torch.ones(2, requires_grad=True)
    assert not trees.detached([weight * 2])[0].requires_grad


def test_moved() -> None:
    moved = trees.moved({"x": torch.ones(2), "n": 3}, torch.device("meta"))
    assert moved["x"].device.type == "meta"
    assert moved["n"] == 3

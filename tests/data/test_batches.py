"""Reading a batch: what goes to the model, what is compared, and what is said where it cannot be read."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim.data.batches import (
    SimilarityBatch,
    as_column,
    find_outputs,
    find_views,
    read_batch,
    split_batch,
)

X, Y = torch.randn(3, 4), torch.tensor([2, 0, 1])
LOGITS = torch.randn(3, 2)


class Echo(nn.Module):
    """Returns what it is told to, and remembers what it was called with."""

    def __init__(self, result: Any = LOGITS) -> None:
        super().__init__()
        self.result = result
        self.seen: Any = None

    def forward(self, x: Any) -> Any:
        self.seen = x
        return self.result


class Keywords(Echo):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        self.seen = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.result


class Anything(Echo):
    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        self.seen = inputs
        return self.result


@pytest.mark.parametrize("batch", [X, (X,), [X], (X, Y), [X, Y], (X, Y, "more")])
def test_a_sequence_is_inputs_labels_and_more(batch: Any) -> None:
    model = Echo()
    read = read_batch(model, batch)
    assert model.seen is X
    assert read.outputs is LOGITS
    assert read.labels is (None if isinstance(batch, Tensor) or len(batch) == 1 else Y)
    assert read.ids is None
    assert read.inputs is X


PAIR, TEXTS, NUMBERS = (torch.ones(3, 1), X), ["one", "two", "three"], [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("inputs", "shown"), [(PAIR, PAIR[0]), (TEXTS, TEXTS), (NUMBERS, None)])
def test_inputs_go_to_the_model_as_they_are_and_what_a_person_can_look_at_is_shown(inputs: Any, shown: Any) -> None:
    model = Echo()
    assert read_batch(model, (inputs, Y)).inputs is shown
    assert model.seen is inputs


@pytest.mark.parametrize(
    ("mapping", "label", "name"),
    [
        (dict, "label", "id"),
        (dict, "labels", "ids"),
        (UserDict, "target", "sample_id"),
        (dict, "targets", "index"),
        (dict, "y", "idx"),
    ],
)
def test_a_mapping_loses_labels_and_ids_and_goes_as_keywords(mapping: type, label: str, name: str) -> None:
    model = Anything()
    read = read_batch(model, mapping({"input_ids": X, label: Y, name: ["a", "b", "c"], "extra": 1}))
    assert set(model.seen) == {"input_ids", "extra"}
    assert read.labels is Y
    assert read.ids == ["a", "b", "c"]
    assert read.inputs is X


def test_a_mapping_is_restricted_to_what_forward_takes() -> None:
    model = Keywords()
    text = ["one", "two", "three"]
    read = read_batch(model, {"text": text, "input_ids": X, "attention_mask": Y, "token_type_ids": Y})
    assert model.seen == {"input_ids": X, "attention_mask": Y}
    assert read.labels is None
    assert read.inputs == text  # The first thing that a person can look at.


def test_a_mapping_of_which_forward_takes_nothing_is_refused_with_its_keys() -> None:
    with pytest.raises(
        ValueError, match=r"a key that `forward` takes \(input_ids, attention_mask\), but got the keys \['image', 'pixels'\]"
    ) as e:
        read_batch(Keywords(), {"pixels": X, "image": X, "label": Y})
    assert "similarity_step" in str(e.value)


@dataclass
class Output:
    """An object as language models return it."""

    logits: Any
    hidden: Any = None


Named = namedtuple("Named", ["logits", "features"])


@pytest.mark.parametrize(
    "result",
    [
        LOGITS,
        Output(LOGITS, torch.randn(3, 5)),
        {"features": torch.randn(3, 5), "logits": LOGITS},
        Named(LOGITS, torch.randn(3, 5)),
        (LOGITS, torch.randn(3, 5, 5), None),
        [torch.randn(3), LOGITS],
        {"scores": LOGITS, "loss": torch.tensor(1.0), "labels": torch.ones(3, 2).long()},
    ],
)
def test_the_outputs_are_logits_or_the_only_candidate(result: Any) -> None:
    assert find_outputs(result) is LOGITS
    assert read_batch(Echo(result), X).outputs is LOGITS


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            torch.randn(3),
            r"`outputs` to be a floating-point tensor of shape \(B, D\), but got torch.float32 \(3,\). Use `unsqueeze",
        ),
        (torch.randn(3, 2, 2), r"but got torch.float32 \(3, 2, 2\)"),
        (Y[:, None], r"but got torch.int64 \(3, 1\)"),
        (Output(torch.randn(3, 5, 2)), r"but got torch.float32 \(3, 5, 2\)"),
        ((LOGITS, LOGITS), r"exactly one among its results, but got \{0: torch.float32 \(3, 2\), 1: torch.float32 \(3, 2\)\}"),
        (
            {"a": LOGITS, "b": LOGITS, "c": None},
            r"but got \{a: torch.float32 \(3, 2\), b: torch.float32 \(3, 2\), c: NoneType\}",
        ),
        ({"loss": torch.tensor(1.0)}, r"but got \{loss: torch.float32 \(\)\}. Define `similarity_step"),
        (Output(None), r"but got \{Output\}"),
        (None, r"but got \{NoneType\}"),
    ],
)
def test_other_outputs_are_refused_with_what_was_seen(result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_batch(Echo(result), X)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"label": Y, "ids": Y},
            r"a mapping with inputs for the model, but got the keys \['ids', 'label'\]. Define `similarity_step",
        ),
        ({}, r"but got the keys \[\]"),
        ((), r"\(inputs, labels, ...\), but got an empty tuple"),
        ([], r"\(inputs, labels, ...\), but got an empty list"),
    ],
)
def test_a_batch_without_inputs_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_batch(batch)


class Says(Echo):
    """Says itself what is compared."""

    def similarity_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = (batch, batch_idx)
        return self.result


def test_similarity_step_has_the_first_word() -> None:
    wanted = SimilarityBatch(LOGITS, labels=Y, ids=["a", "b", "c"], inputs=X)
    model = Says(wanted)
    batch = object()
    assert read_batch(model, batch, 7) is wanted
    assert model.seen == (batch, 7)
    with pytest.raises(ValueError, match="`similarity_step` to be a method that returns a SimilarityBatch, but got Tensor"):
        read_batch(Says(LOGITS), X)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (None, None),
        (Y, [2, 0, 1]),
        (Y[:, None], [2, 0, 1]),
        (torch.tensor([0.5, 1.5, 2.0]), [0.5, 1.5, 2.0]),
        (("a", "b", "c"), ["a", "b", "c"]),
        ([torch.tensor(1), torch.tensor([2]), 3], [1, 2, 3]),
        (torch.ones(3, 2), None),
        ([{}, {}, {}], None),
        (torch.tensor(3), None),
        (5, None),
    ],
)
def test_columns(values: Any, wanted: list[Any] | None) -> None:
    assert as_column(values, 3, "labels") == wanted


@pytest.mark.parametrize("values", [Y[:2], ["a"], torch.ones(4, 2)])
def test_a_column_of_another_length_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected `labels` to be 3 values, one for each sample, but got {len(values)}"):
        as_column(values, 3, "labels")


@pytest.mark.parametrize(
    ("inputs", "count"),
    [
        ([torch.zeros(3, 2), torch.ones(3, 2)], 2),
        ((torch.zeros(3, 2),) * 4, 4),
        ([torch.zeros(3, 2)], 0),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], 0),
        ([torch.zeros(3, 2), "text"], 0),
        (torch.zeros(2, 3), 0),
        ({"a": torch.zeros(3), "b": torch.zeros(3)}, 0),
    ],
)
def test_views_are_several_tensors_of_one_shape(inputs: Any, count: int) -> None:
    assert len(find_views(inputs)) == count

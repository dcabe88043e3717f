"""What is compared: read a batch of any usual form, run the model on it, and find outputs, labels and ids."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_netsim._checks import expected

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
ID_KEYS = ("id", "ids", "sample_id", "sample_ids", "index", "idx")
_REMEDY = "Define `similarity_step(batch, batch_idx)` that returns a `SimilarityBatch`."


@dataclass(frozen=True, eq=False)
class SimilarityBatch:
    """What a `similarity_step` returns: the outputs to compare, and what is known of the samples.

    Attributes:
        outputs: shape (B, D), on the autograd graph.
        labels: shape (B,) or any sequence of B labels; None if there are none.
        ids: B names of the samples (strings or integers); None for the position in the data set.
        inputs: what to show of the samples, first dimension B; None if there is nothing to show.
    """

    outputs: Tensor
    labels: Tensor | Sequence[Any] | None = None
    ids: Tensor | Sequence[Any] | None = None
    inputs: Any = None


@runtime_checkable
class HasSimilarityStep(Protocol):
    """A module that says itself what is compared."""

    def similarity_step(self, batch: Any, batch_idx: int) -> SimilarityBatch:
        """Run the model on a batch."""
        ...


def read_batch(model: nn.Module, batch: Any, batch_idx: int = 0) -> SimilarityBatch:
    """Run `model` on `batch` and return what is compared.

    If the model defines `similarity_step(batch, batch_idx)`, that is called. Otherwise a tuple or list is
    (inputs, labels, ...); a mapping loses its label and id keys and goes to the model as keywords, restricted to what its
    `forward` takes; anything else goes to the model as it is. Of what the model returns, the attribute or key `logits` is
    compared, or the only (B, D) tensor in it.

    Raises:
        ValueError: if no such tensor is found; the message lists what was seen.
    """
    if isinstance(model, HasSimilarityStep):
        result = model.similarity_step(batch, batch_idx)
        if not isinstance(result, SimilarityBatch):
            raise expected("similarity_step", "a method that returns a SimilarityBatch", type(result).__name__)
        return result
    inputs, labels, ids = split_batch(batch)
    return SimilarityBatch(find_outputs(run_model(model, inputs)), labels, ids, _shown(inputs))


def run_model(model: nn.Module, inputs: Any, remedy: str = _REMEDY) -> Any:
    """Return what a model returns for the inputs of a batch: those of a mapping as keywords that its `forward` takes."""
    if not isinstance(inputs, Mapping):
        return model(inputs)
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return model(**inputs)
    taken = {key: value for key, value in inputs.items() if key in parameters}
    if not taken:
        wanted = f"a mapping with a key that `forward` takes ({', '.join(parameters)})"
        raise expected("batch", wanted, f"the keys {sorted(map(str, inputs))}", remedy)
    return model(**taken)


def find_views(inputs: Any) -> list[Tensor]:
    """Return the views of a batch, where its inputs are several tensors of one shape, each with a view of every sample."""
    if not isinstance(inputs, (tuple, list)) or len(inputs) < 2:
        return []
    views = [view for view in inputs if isinstance(view, Tensor)]
    return views if len(views) == len(inputs) and len({view.shape for view in views}) == 1 else []


def split_batch(batch: Any, remedy: str = _REMEDY) -> tuple[Any, Any, Any]:
    """Return (inputs, labels, ids) of a batch; None for what it does not have.

    Raises:
        ValueError: if nothing is left for the model.
    """
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
        ids = next((batch[key] for key in ID_KEYS if key in batch), None)
        inputs = {key: value for key, value in batch.items() if key not in LABEL_KEYS and key not in ID_KEYS}
        if not inputs:
            raise expected("batch", "a mapping with inputs for the model", f"the keys {sorted(map(str, batch))}", remedy)
        return inputs, labels, ids
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise expected("batch", "(inputs, labels, ...)", f"an empty {type(batch).__name__}", remedy)
        return batch[0], batch[1] if len(batch) > 1 else None, None
    return batch, None, None


def find_outputs(result: Any, remedy: str = _REMEDY) -> Tensor:
    """Return the (B, D) tensor to compare in what a model returned; where there is not one, say what helps."""
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    outputs = result if isinstance(result, Tensor) else logits
    if isinstance(outputs, Tensor):
        if outputs.ndim != 2 or not outputs.is_floating_point():
            remedy = f"Use `unsqueeze(1)` for a single output. Otherwise: {remedy}"
            raise expected("outputs", "a floating-point tensor of shape (B, D)", _describe(outputs), remedy)
        return outputs
    parts: dict[Any, Any] = dict(result) if isinstance(result, Mapping) else {}
    if isinstance(result, (tuple, list)):
        parts = dict(enumerate(result))
    tensors = [value for value in parts.values() if isinstance(value, Tensor)]
    candidates = [tensor for tensor in tensors if tensor.ndim == 2 and tensor.is_floating_point()]
    if len(candidates) == 1:
        return candidates[0]
    seen = ", ".join(f"{key}: {_describe(value)}" for key, value in parts.items()) or type(result).__name__
    raise expected("model", "one that returns a (B, D) tensor, or exactly one among its results", f"{{{seen}}}", remedy)


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _shown(inputs: Any) -> Any:
    """Return what a person can look at: the inputs themselves, or the first tensor or column of several."""
    if not isinstance(inputs, (Mapping, tuple, list)) or _is_text(inputs):
        return inputs
    values: list[Any] = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    return next((value for value in values if isinstance(value, Tensor) or _is_text(value)), None)


def _is_text(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and len(values) > 0 and all(isinstance(value, str) for value in values)


def as_column(values: Tensor | Sequence[Any] | None, size: int, name: str) -> list[Any] | None:
    """Return labels or ids as a list of `size` plain values; None if there are none, or if they are arrays (masks, boxes).

    Raises:
        ValueError: if there are not `size` of them.
    """
    if not isinstance(values, (Tensor, Sequence)) or (isinstance(values, Tensor) and values.ndim == 0):
        return None
    if len(values) != size:
        raise expected(name, f"{size} values, one for each sample", f"{len(values)}")
    if isinstance(values, Tensor):
        flat = values.detach().flatten(1) if values.ndim > 1 else values.detach().unsqueeze(1)
        return list(flat[:, 0].cpu().tolist()) if flat.shape[1] == 1 else None
    column = [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in values]
    return column if all(isinstance(value, (str, int, float, bool)) for value in column) else None

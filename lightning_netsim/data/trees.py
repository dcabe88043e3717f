"""Nested batches: read their size, and take some of their samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import expected


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to every leaf of nested tuples, lists and mappings, keeping the structure.

    A list of plain values (strings, numbers) is one leaf: it is a column of the batch.
    """
    if isinstance(tree, Mapping):
        mapped = {key: map_leaves(function, value) for key, value in tree.items()}
        if type(tree) is dict:
            return mapped
        try:
            # Mappings with a constructor of their own (a tokenizer's BatchEncoding) are still mappings to the model.
            return type(tree)(mapped)  # type: ignore[call-arg]
        except TypeError:
            return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(function, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        is_column = len(tree) > 0 and all(isinstance(value, (str, bytes, int, float, bool)) for value in tree)
        return function(tree) if is_column else type(tree)(map_leaves(function, value) for value in tree)
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of `tree` in order."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of `tree`."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def batch_size(tree: Any) -> int | None:
    """Return the size of dimension 0 of the first tensor with dimensions in `tree`, or None if there is none."""
    return next((tensor.shape[0] for tensor in tensors(tree) if tensor.ndim > 0), None)


def take(tree: Any, index: slice | Tensor, size: int) -> Any:
    """Take the samples `index` of every tensor and column in `tree` that has `size` of them; leave the rest as it is."""

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size:
            return leaf[index if isinstance(index, slice) else index.to(leaf.device)]
        if isinstance(leaf, (list, tuple)) and len(leaf) == size:
            positions = range(size)[index] if isinstance(index, slice) else index.tolist()
            return type(leaf)(leaf[position] for position in positions)
        return leaf

    return map_leaves(pick, tree)


def concatenate(batches: list[Any], sizes: list[int]) -> Any | None:
    """Join batches of the same structure along their samples; None where their tensors or columns do not fit together.

    Args:
        batches: the batches.
        sizes: the number of samples of each.
    """
    if len(batches) == 1:
        return batches[0]
    columns = [leaves(batch) for batch in batches]
    if len({len(column) for column in columns}) > 1:
        return None
    joined: list[Any] = []
    for parts in zip(*columns, strict=True):
        is_column = all(isinstance(part, (list, tuple)) and len(part) == size for part, size in zip(parts, sizes, strict=True))
        if is_column:
            joined.append([value for part in parts for value in part])
        elif all(isinstance(part, Tensor) and part.shape[:1] == (size,) for part, size in zip(parts, sizes, strict=True)):
            if len({part.shape[1:] for part in parts}) > 1:
                return None
            joined.append(torch.cat(parts))
        else:
            joined.append(parts[0])
    remaining = iter(joined)
    return map_leaves(lambda leaf: next(remaining), batches[0])


def moved(tree: Any, device: torch.device) -> Any:
    """Return `tree` with every tensor on `device`."""
    return map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def floating_pairs(tree: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """Return each floating-point tensor in `tree` with that of the same place in `other`.

    Raises:
        ValueError: if there is none of the same shape.
    """
    if isinstance(tree, Mapping):
        places = [(value, other.get(key) if isinstance(other, Mapping) else None) for key, value in tree.items()]
    elif isinstance(tree, (tuple, list)):
        others = list(other) if isinstance(other, (tuple, list)) else []
        places = list(zip(tree, [*others, *(None for _ in tree)], strict=False))
    elif isinstance(tree, Tensor) and tree.is_floating_point():
        if not isinstance(other, Tensor) or other.shape != tree.shape or not other.is_floating_point():
            got = f"{other.dtype} {tuple(other.shape)}" if isinstance(other, Tensor) else type(other).__name__
            raise expected("direction", f"a floating-point tensor of shape {tuple(tree.shape)} where the inputs have one", got)
        return [(tree, other)]
    else:
        return []
    return [pair for value, opposite in places for pair in floating_pairs(value, opposite)]


def detached(tree: Any, device: torch.device | None = None) -> Any:
    """Copy every tensor in `tree`, off the graph and outside inference mode, to `device` where one is given."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        kept = leaf.detach()
        return kept.clone() if device is None or kept.device == device else kept.to(device)

    with torch.inference_mode(False):
        return map_leaves(copy, tree)

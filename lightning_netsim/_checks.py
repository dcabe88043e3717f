"""Check the input of every public function, in one grammar.

Each message reads "Expected `name` to be ..., but got ...", followed by the remedy where there is one. Checks run once, at
the public boundary, as early as the fault can be known.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor


class NetsimError(ValueError):
    """Bad input to `lightning_netsim`: the message says what was expected, what came, and what to change."""


def expected(name: str, wanted: str, got: object, remedy: str = "") -> NetsimError:
    """Return the error "Expected `name` to be `wanted`, but got `got`. `remedy`" for the caller to raise."""
    message = f"Expected `{name}` to be {wanted}, but got {got}."
    return NetsimError(f"{message} {remedy}" if remedy else message)


def check_positive_int(name: str, value: object, remedy: str = "") -> int:
    """Return `value` if it is an int of at least 1 (a bool is not an int here)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise expected(name, "a positive int", repr(value), remedy)
    return value


def check_seed(name: str, value: object) -> int:
    """Return `value` if it is an int that any generator of random numbers takes."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise expected(name, "an int from 0 to 2^31 - 1", repr(value))
    return value


def check_positive_number(name: str, value: object, remedy: str = "") -> float:
    """Return `value` as a float if it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise expected(name, "a positive number", repr(value), remedy)
    return float(value)


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` if it is one of the strings `choices`; the message names the closest one."""
    options = list(choices)
    if isinstance(value, str) and value in options:
        return value
    close = difflib.get_close_matches(str(value), options, n=1)
    remedy = f"Did you mean {close[0]!r}?" if close else ""
    raise expected(name, "one of " + ", ".join(map(repr, options)), repr(value), remedy)


def check_layer(name: str, layer: str, layers: Iterable[str]) -> str:
    """Return `layer` if it is one of `layers`, the names of the modules in a model; the message names the closest ones."""
    names = [each for each in layers if each]
    if layer in names:
        return layer
    ending = [each for each in names if each.rpartition(".")[2] == layer.rpartition(".")[2]]
    near = list(dict.fromkeys([*ending, *difflib.get_close_matches(layer, names, n=5)])) or names[:8]
    listed = ", ".join(map(repr, near[:8])) + (", ..." if len(near) < len(names) else "")
    raise expected(name, "the name of a module in the model", repr(layer), f"There are {listed}.")


def check_numbers(name: str, values: Iterable[float], low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
    """Return `values` as a tuple of floats if each lies within [`low`, `high`]."""
    numbers = tuple(float(value) for value in values)
    for number in numbers:
        if not low <= number <= high:
            raise expected(name, f"numbers within [{low:g}, {high:g}]", f"{number:g}")
    return numbers


def check_tensor(name: str, value: object, ndim: int | Sequence[int] | None = None, like: str = "") -> Tensor:
    """Return `value` if it is a floating-point tensor with one of the numbers of dimensions in `ndim`."""
    wanted = "a floating-point tensor" + (f" of shape {like}" if like else "")
    if not isinstance(value, Tensor):
        raise expected(name, wanted, type(value).__name__)
    if not value.is_floating_point():
        raise expected(name, wanted, f"dtype {value.dtype}")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and value.ndim not in allowed:
        raise expected(name, wanted, f"shape {tuple(value.shape)}")
    return value


def check_same_size(name: str, value: Tensor, other_name: str, other: Tensor, dim: int) -> None:
    """Raise unless `value` and `other` have the same size along `dim`."""
    if value.shape[dim] != other.shape[dim]:
        raise expected(
            name,
            f"of the same size as `{other_name}` along dimension {dim} ({other.shape[dim]})",
            f"shape {tuple(value.shape)}",
        )


def check_finite(name: str, value: Tensor) -> Tensor:
    """Return `value` if every entry is finite."""
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise expected(name, "finite", f"{bad} non-finite of {value.numel()} entries")
    return value


def check_labels(name: str, labels: object, size: int) -> Tensor:
    """Return `labels` if it is a vector with one whole number for each of `size` samples."""
    wanted = f"a tensor of {size} class numbers, one for each sample"
    if not isinstance(labels, Tensor):
        raise expected(name, wanted, type(labels).__name__)
    if labels.shape != (size,) or labels.is_floating_point() or labels.is_complex():
        raise expected(name, wanted, f"{labels.dtype} of shape {tuple(labels.shape)}")
    return labels


def check_embeddings(name: str, embeddings: object) -> Tensor:
    """Return `embeddings` if it is a finite floating-point matrix with one row for each sample."""
    return check_finite(name, check_tensor(name, embeddings, 2, like="(B, h)"))


def check_neighbors_fit(k: int, num_reference: int, includes_self: bool) -> int:
    """Return `k` if a set of `num_reference` samples has `k` neighbors to give (itself excluded if it is in the set)."""
    check_positive_int("k", k)
    available = num_reference - int(includes_self)
    if k > available:
        raise expected(
            "k",
            f"at most {available}, the number of other samples in the reference set",
            str(k),
            "Choose a smaller `k` or more samples.",
        )
    return k


def check_writable(name: str, directory: str | os.PathLike[str]) -> Path:
    """Return `directory` as a path if it exists or can be made, and a file can be written into it."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".netsim-write-check-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise expected(name, "a writable directory", f"{str(path)!r} ({reason})", "Choose another directory.") from error
    return path

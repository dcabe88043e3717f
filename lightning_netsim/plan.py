"""What is measured, within which bounds, and how: store all features, or sweep twice with sketched ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lightning_netsim._checks import check_choice, check_positive_int, check_positive_number, expected
from lightning_netsim.estimators import NeighborCount
from lightning_netsim.index import NeighborIndex
from lightning_netsim.jacobian import Directions, PerSampleJacobian
from lightning_netsim.jacobian.directions import DirectionsLike

PLANS = ("auto", "store", "sketch")
_BUDGET_SHARE = 1 / 4
# Beyond this many samples in a chunk nothing gets faster; on a CPU it leaves the cache.
_MAX_CHUNK = {"cpu": 64, "cuda": 512}
_CHUNK_SHARE = 1 / 4
# Factors, what the backward pass holds, and formed gradients of one layer: estimated, in multiples of the factors.
_WORKING_COPIES = 4
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class SweepSettings:
    """What is measured and within which bounds; each is explained where it is an argument of `SimilarityMonitor`.

    Raises:
        ValueError: for a value out of range, or an index that faiss cannot build.
    """

    k: int = 10
    directions: DirectionsLike = "auto"
    parameters: str | Iterable[str] = "trainable"
    thresholds: tuple[float, ...] = ()
    powers: tuple[float, ...] = ()
    projection_dim: int = 4096
    index_factory: str = "Flat"
    memory_budget: float | None = None
    chunk_size: int | None = None
    compare_activations: bool = True
    activation_layer: str | None = None
    plan: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int("k", self.k)
        check_positive_int("projection_dim", self.projection_dim)
        check_choice("plan", self.plan, PLANS)
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)
        if self.memory_budget is not None:
            check_positive_number("memory_budget", self.memory_budget, "It is a number of bytes.")
        Directions(self.directions, self.seed)
        NeighborCount(self.thresholds, self.powers)
        if self.index_factory != "Flat":
            NeighborIndex(max(16, self.projection_dim), self.index_factory)


@dataclass(frozen=True)
class SweepPlan:
    """How a measurement is computed.

    Attributes:
        kind: "store" keeps the exact features of all samples, one sweep; "sketch" keeps sketched ones and sweeps twice, with
            exact counts and audited neighbors.
        chunk_size: samples differentiated at a time.
        num_features: K, the numbers kept for each sample.
        bytes: what they take, with the index over them.
        num_directions: d.
        num_parameters: P.
        seconds: the expected time; None where the number of samples is not known.
    """

    kind: str
    chunk_size: int
    num_features: int
    bytes: int
    num_directions: int
    num_parameters: int
    seconds: float | None = None

    def describe(self, num_samples: int | None) -> str:
        """Return one sentence for the user."""
        many = "an unknown number of" if num_samples is None else f"{num_samples:,}"
        size = f"{self.bytes / 2**20:,.0f} MiB" if num_samples is not None else f"{self.bytes / 2**10:,.0f} KiB a sample"
        time = "" if self.seconds is None else f", about {_duration(self.seconds)}"
        how = {
            "store": f"one sweep, exact features stored ({size})",
            "sketch": f"two sweeps, exact counts, {self.num_features:,} sketched features a sample ({size})",
        }[self.kind]
        return (
            f"{many} samples, {self.num_directions} direction{'s' * (self.num_directions > 1)}, {self.num_parameters:,} "
            f"parameters: {how}{time}."
        )


def memory_budget(settings: SweepSettings) -> float:
    """Return the bytes that features may take: as set, or a quarter of the free main memory."""
    return settings.memory_budget or psutil.virtual_memory().available * _BUDGET_SHARE


def make_plan(
    settings: SweepSettings, jacobian: PerSampleJacobian, num_samples: int | None, sketch_width: int, device: torch.device
) -> SweepPlan:
    """Choose the plan from the Jacobian of a few samples.

    Args:
        settings: the bounds.
        jacobian: of a few samples, after its Gram has been formed.
        num_samples: samples whose features are kept, both sets together; None if not known.
        sketch_width: numbers for each sample and direction in the sketch.
        device: where gradients are computed.

    Raises:
        ValueError: if not even sketched features fit, or hard and power counts are asked for and stored features do not fit.
    """
    budget, directions, parameters = memory_budget(settings), jacobian.num_directions, jacobian.num_parameters
    exact = directions * parameters
    # A vector stands in the store and in the index.
    stored_bytes, sketched_bytes = (
        2 * _FLOAT_BYTES * width * (num_samples or 1) for width in (exact, directions * sketch_width)
    )
    fits = num_samples is not None and stored_bytes <= budget
    kind = settings.plan if settings.plan != "auto" else "store" if fits or exact <= directions * sketch_width else "sketch"
    if kind == "store" and stored_bytes > budget:
        raise expected("memory_budget", f"at least {stored_bytes:,} bytes to store all features", f"{budget:,.0f}", _SMALLER)
    if kind == "sketch" and (settings.thresholds or settings.powers):
        raise expected(
            "memory_budget",
            f"at least {stored_bytes:,} bytes for hard and power counts, which need all features",
            f"{budget:,.0f}",
            _SMALLER,
        )
    if kind == "sketch" and sketched_bytes > budget:
        raise expected("memory_budget", f"at least {sketched_bytes:,} bytes for sketched features", f"{budget:,.0f}", _SMALLER)
    width = exact if kind == "store" else directions * sketch_width
    per_sample = _WORKING_COPIES * jacobian.nbytes / max(1, jacobian.num_samples) + 2 * _FLOAT_BYTES * max(
        width, directions * _largest(jacobian)
    )
    room = _chunk_room(budget, device)
    chunk = settings.chunk_size or max(1, min(_MAX_CHUNK.get(device.type, 128), int(room / per_sample)))
    return SweepPlan(kind, chunk, width, stored_bytes if kind == "store" else sketched_bytes, directions, parameters)


_SMALLER = "Choose a larger `memory_budget`, a smaller `max_samples`, fewer `directions`, or fewer `parameters`."


def _largest(jacobian: PerSampleJacobian) -> int:
    return max(shape.numel() for shape in jacobian.shapes.values())


def _chunk_room(budget: float, device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * _CHUNK_SHARE
    return budget * _CHUNK_SHARE


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_record(plan: SweepPlan, methods: dict[str, int], budget: float) -> dict[str, Any]:
    """Return the plan as plain values for a record."""
    return {
        "kind": plan.kind,
        "chunk_size": plan.chunk_size,
        "num_features": plan.num_features,
        "bytes": plan.bytes,
        "memory_budget": int(budget),
        "expected_seconds": plan.seconds,
        "methods": methods,
    }

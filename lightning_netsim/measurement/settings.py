"""What is measured, and within which bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_netsim._checks import check_choice, check_numbers, check_positive_int, check_positive_number
from lightning_netsim.estimators.index import NeighborIndex
from lightning_netsim.jacobian import Directions
from lightning_netsim.jacobian.directions import DirectionsLike

PLANS = ("auto", "store", "sketch", "reiterate")

PRECISIONS = ("float32", "inherit")


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
    projection_dim: int = 2048
    index_factory: str = "Flat"
    memory_budget: float | None = None
    chunk_size: int | None = None
    compare_activations: bool = True
    activation_layer: str | None = None
    plan: str = "auto"
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int("k", self.k)
        check_positive_int("projection_dim", self.projection_dim)
        check_choice("plan", self.plan, PLANS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)
        if self.memory_budget is not None:
            check_positive_number("memory_budget", self.memory_budget, "It is a number of bytes.")
        Directions(self.directions, self.seed)
        check_numbers("thresholds", self.thresholds, -1.0, 1.0)
        check_numbers("powers", self.powers, 1e-6)
        if self.index_factory != "Flat":
            NeighborIndex(max(16, self.projection_dim), self.index_factory)

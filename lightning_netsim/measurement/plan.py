"""How a measurement is computed: the cheapest of three ways that keep to the memory budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import psutil
import torch

from lightning_netsim._checks import expected
from lightning_netsim.jacobian import PerSampleJacobian
from lightning_netsim.measurement.settings import SweepSettings

#: Samples of a tile of all pairs, and of what processes exchange at a time.
TILE = 512
#: Queries whose exact rows are computed to measure the recall.
AUDITED_QUERIES = 64
_BUDGET_SHARE = 1 / 4
# Beyond this many samples in a chunk nothing gets faster; on a CPU it leaves the cache.
_MAX_CHUNK = {"cpu": 64, "cuda": 512}
_CHUNK_SHARE = 1 / 4
# Factors, what the backward pass holds, and formed gradients of one layer: estimated, in multiples of the factors.
_WORKING_COPIES = 4
_FLOAT_BYTES = 4
# To compare its candidates, a query is multiplied with about so many samples, and as many are read, and formed where they are
# not stored so, for each query: measured on MNIST, 10,000 images.
_COMPARED_WITH = 200
_READ_FOR_EACH = 6
# Forming a gradient takes as long as so many times its multiplications in a large product: measured with one shape.
_FORMING_COST = 2.5
# Another plan has to be so many times as fast as comparing all pairs to be chosen: what is exact is worth that, and the choice
# then depends less on how busy the machine was when the costs were measured.
_ALL_PAIRS_WORTH = 1.3
# A rate is that of the fastest of so many goes: on a busy machine most are slowed down.
_REPEATS = 12
# Rows so long leave the cache, and a copy of some of them is new memory every time.
_COPIED_NUMBERS = 2**19


@dataclass(frozen=True)
class SetSizes:
    """How many samples are compared.

    Attributes:
        queries: Q; None if unknown.
        reference: N; None if unknown.
        same: whether the two are one set.
        processes: W, how many share the work: features are divided among them, each has the whole index.
    """

    queries: int | None
    reference: int | None
    same: bool
    processes: int = 1

    @property
    def swept(self) -> int | None:
        """Return the samples of both sets together; None if unknown."""
        if self.queries is None or self.reference is None:
            return None
        return self.queries if self.same else self.queries + self.reference

    @property
    def pairs(self) -> float:
        """Return the pairs that have to be compared; of one set, each once, but for those of a tile on the diagonal."""
        queries, reference = self.queries or 0, self.reference or 0
        return queries * min(reference, (reference + TILE) / 2) if self.same else queries * reference


@dataclass(frozen=True)
class Probe:
    """What a few samples tell about the costs.

    Attributes:
        num_directions: d.
        num_parameters: P.
        packed: for each form (fast or not), what one sample takes.
        working_bytes: what one sample takes while it is differentiated.
        sketch_dim: K, the width of a sketch.
        first: seconds a sample, in the first sweep: gradients, normalization and sum.
        sketch: seconds a sample, for sketching it.
        again: seconds a sample, in a later sweep: gradients and product with the sum.
    """

    num_directions: int
    num_parameters: int
    packed: dict[bool, PackedCost]
    working_bytes: float
    sketch_dim: int
    first: float = 0.0
    sketch: float = 0.0
    again: float = 0.0


@dataclass(frozen=True)
class PackedCost:
    """What one packed sample costs.

    Attributes:
        bytes: its size.
        products: multiplications for the inner product of a pair.
        forming: multiplications to form its gradients before that, where they are not stored formed.
        seconds: the time to pack it.
    """

    bytes: float
    products: float
    forming: float
    seconds: float = 0.0

    @classmethod
    def of(cls, packed: PerSampleJacobian, seconds: float) -> PackedCost:
        """Return the cost of one of the samples of a packed Jacobian, all of which took `seconds`."""
        if packed.num_samples == 0:  # The first samples of a set may all be left out.
            products = packed.num_directions * packed.num_parameters
            return cls(_FLOAT_BYTES * products, products, 0)
        products, forming = packed.pair_cost()
        return cls(packed.nbytes / packed.num_samples, products, forming, seconds / packed.num_samples)


@dataclass(frozen=True)
class SweepPlan:
    """How a measurement is computed.

    Attributes:
        kind: "store" compares all pairs of stored features; "sketch" stores features too, but compares only the candidates
            that a sketch finds; "reiterate" stores those of some queries at a time and sweeps again for each lot. Counts are
            exact in all three.
        chunk_size: samples differentiated at a time.
        fast: whether features are packed for speed rather than for size.
        num_stored: samples whose exact features are in memory at a time.
        num_features: K, the numbers of a sketch, or of a stored sample where none is made.
        bytes: what features and index take at most; of one sample, where their number is unknown.
        num_sweeps: how often the samples are differentiated.
        num_directions: d.
        num_parameters: P.
        seconds: the expected time; None where the number of samples is not known.
    """

    kind: str
    chunk_size: int
    fast: bool
    num_stored: int
    num_features: int
    bytes: int
    num_sweeps: int
    num_directions: int
    num_parameters: int
    seconds: float | None = None

    def describe(self, num_samples: int | None) -> str:
        """Return one sentence for the user."""
        many = "an unknown number of" if num_samples is None else f"{num_samples:,}"
        size = f"{self.bytes / 2**20:,.0f} MiB"
        how = {
            "store": f"one sweep, exact features stored ({size}), all pairs compared",
            "sketch": f"one sweep, exact features stored ({size}), candidates from {self.num_features:,} sketched features "
            "compared exactly",
            "reiterate": f"{self.num_sweeps} sweeps, exact features of {self.num_stored:,} samples at a time ({size}), "
            f"candidates from {self.num_features:,} sketched features compared exactly",
        }[self.kind]
        lasting = ""
        if self.seconds is not None:
            minutes = self.seconds / 60
            lasting = f"{max(self.seconds, 1):.0f} s" if minutes < 1.5 else f"{minutes:.0f} min"
            lasting = f", about {lasting if minutes < 90 else f'{minutes / 60:.1f} h'}"
        return (
            f"{many} samples, {self.num_directions} direction{'s' * (self.num_directions > 1)}, {self.num_parameters:,} "
            f"parameters: {how}{lasting}."
        )

    def as_record(self, chunk_size: int, methods: dict[str, int], budget: float) -> dict[str, Any]:
        """Return the plan as plain values.

        Args:
            chunk_size: that which was used in the end: where memory ran out, it was halved.
            methods: how many parameters are differentiated by each method.
            budget: bytes that features may take.
        """
        return {
            "kind": self.kind,
            "chunk_size": chunk_size,
            "num_features": self.num_features,
            "num_stored": self.num_stored,
            "num_sweeps": self.num_sweeps,
            "bytes": self.bytes,
            "memory_budget": int(budget),
            "expected_seconds": self.seconds,
            "methods": methods,
        }


def memory_budget(settings: SweepSettings, device: torch.device | None = None) -> float:
    """Return the bytes that features may take: as set, or a quarter of what is free where they are kept."""
    if settings.memory_budget is not None:
        return settings.memory_budget
    if device is not None and device.type == "cuda":
        return _BUDGET_SHARE * float(torch.cuda.mem_get_info(device)[0])
    return _BUDGET_SHARE * float(psutil.virtual_memory().available)


def make_plan(
    settings: SweepSettings, probe: Probe, sizes: SetSizes, rates: Rates, budget: float, device: torch.device
) -> SweepPlan:
    """Choose the cheapest plan that fits.

    Args:
        settings: the bounds.
        probe: the costs of one sample.
        sizes: how many there are.
        rates: what the device does in a second.
        budget: bytes that features may take in all processes together.
        device: where gradients are computed.

    Raises:
        ValueError: if no plan, or not the one asked for, fits into the budget; with the smallest budget that would do.
    """
    costs = _Costs(probe, sizes, rates)
    wanted = {settings.plan} if settings.plan != "auto" else {"store", "sketch", "reiterate"}
    if settings.plan == "auto" and settings.index_factory != "Flat":
        wanted.remove("store")  # Who chooses an index wants to have it searched.
    plans = [plan for plan in costs.plans() if plan.kind in wanted]
    fitting = [plan for plan in plans if plan.bytes <= budget]
    if not plans:
        remedy = 'Use plan="reiterate" or "auto".'
        raise expected("plan", "one for a set of unknown size", repr(settings.plan), remedy)
    if not fitting:
        smallest = min(plan.bytes for plan in plans)
        remedy = "Choose a larger `memory_budget`, a smaller `max_samples`, fewer `directions`, or fewer `parameters`."
        raise expected("memory_budget", f"at least {smallest:,} bytes for these features", f"{budget:,.0f}", remedy)

    def worth(plan: SweepPlan) -> tuple[bool, float]:
        return plan.seconds is None, (plan.seconds or 0) / (_ALL_PAIRS_WORTH if plan.kind == "store" else 1)

    chosen = min(fitting, key=worth)
    if chosen.kind == "reiterate":
        chosen = costs.reiterate(chosen.fast, costs.largest_lot(chosen.fast, budget))
    per_sample = _WORKING_COPIES * probe.working_bytes + probe.packed[chosen.fast].bytes
    chunk = settings.chunk_size or _chunk(per_sample, budget / sizes.processes, device)
    seconds = None if chosen.seconds is None else chosen.seconds / sizes.processes
    return replace(chosen, chunk_size=chunk, seconds=seconds)


def chunk_of(jacobian: PerSampleJacobian, budget: float) -> int:
    """Return how many samples may be differentiated at a time where nothing else is kept of them.

    Args:
        jacobian: of some samples.
        budget: bytes.
    """
    return _chunk(_WORKING_COPIES * jacobian.nbytes / max(1, jacobian.num_samples), budget, jacobian.outputs.device)


def _chunk(bytes_per_sample: float, budget: float, device: torch.device) -> int:
    most = _MAX_CHUNK.get(device.type, 128)
    return max(1, min(most, int(budget * _CHUNK_SHARE / max(1.0, bytes_per_sample))))


@dataclass(frozen=True)
class _Costs:
    """Bytes and seconds of every plan; chunk sizes are yet to be set."""

    probe: Probe
    sizes: SetSizes
    rates: Rates

    def plans(self) -> Iterator[SweepPlan]:
        """Yield every plan in every form, the one that sweeps again with as few queries at a time as can be."""
        probe, sizes, stored = self.probe, self.sizes, self.sizes.swept
        for fast, cost in probe.packed.items():
            if stored is not None:
                forming = (1 + stored / TILE) * _FORMING_COST * cost.forming
                seconds = stored * (probe.first + cost.seconds + forming / self.rates.products)
                seconds += sizes.pairs * cost.products / self.rates.products
                width = int(cost.bytes / _FLOAT_BYTES)
                yield self._plan("store", fast, stored, width, cost.bytes * stored, 1, seconds)
                seconds = stored * (probe.first + cost.seconds) + self._search_seconds(cost)
                size = (cost.bytes + self._index_bytes) * stored
                yield self._plan("sketch", fast, stored, probe.sketch_dim, size, 1, seconds)
            few = AUDITED_QUERIES if sizes.queries is None else min(AUDITED_QUERIES, sizes.queries)
            yield self.reiterate(fast, few)

    def reiterate(self, fast: bool, lot: int) -> SweepPlan:
        """Return the plan that keeps the exact features of `lot` queries at a time, and of as many that come next."""
        probe, cost, swept, queries = self.probe, self.probe.packed[fast], self.sizes.swept, self.sizes.queries
        size = self._index_bytes * (swept or 1) + 2 * lot * cost.bytes
        if swept is None or queries is None:
            return self._plan("reiterate", fast, lot, probe.sketch_dim, size, 2, None)
        sweeps = 1 + math.ceil(queries / lot)
        seconds = swept * probe.first + (sweeps - 1) * swept * probe.again + self._search_seconds(cost)
        return self._plan("reiterate", fast, lot, probe.sketch_dim, size, sweeps, seconds)

    def largest_lot(self, fast: bool, budget: float) -> int:
        """Return how many queries at a time fit, in lots of equal size."""
        room = int((budget - self._index_bytes * (self.sizes.swept or 1)) / (2 * self.probe.packed[fast].bytes))
        queries = self.sizes.queries
        if queries is None:
            return max(1, room)
        return max(1, math.ceil(queries / math.ceil(queries / max(1, min(room, queries)))))

    def _plan(
        self, kind: str, fast: bool, stored: int, width: int, size: float, sweeps: int, seconds: float | None
    ) -> SweepPlan:
        probe = self.probe
        return SweepPlan(kind, 0, fast, stored, width, int(size), sweeps, probe.num_directions, probe.num_parameters, seconds)

    @property
    def _index_bytes(self) -> float:
        """Return the bytes of a sketch, which stands in the index and beside it, in every process."""
        return 2 * _FLOAT_BYTES * self.probe.sketch_dim * self.sizes.processes

    def _search_seconds(self, cost: PackedCost) -> float:
        """Return the seconds for sketching, searching, comparing the candidates and the audit."""
        queries, reference, rates = self.sizes.queries or 0, self.sizes.reference or 0, self.rates
        search = queries * reference * self.probe.sketch_dim / rates.products
        compared = queries * (_COMPARED_WITH * cost.products / rates.products + _READ_FOR_EACH * cost.bytes / rates.bytes)
        audit = min(AUDITED_QUERIES, queries) * reference * cost.products / rates.products
        forming = (_READ_FOR_EACH * queries + reference) * _FORMING_COST * cost.forming / rates.products
        return (self.sizes.swept or 0) * self.probe.sketch + search + compared + audit + forming


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        products: multiplications of a large matrix product.
        bytes: bytes of scattered rows that are copied.
    """

    products: float
    bytes: float


@lru_cache(maxsize=4)
def measure_rates(device: torch.device) -> Rates:
    """Measure what a device does in a second; it takes some tenths of one, once in a process."""
    left = torch.ones(512, 4096, device=device)
    rows = torch.ones(48, _COPIED_NUMBERS, device=device)
    index = torch.arange(0, 48, 3, device=device)
    products = _fastest(lambda: left @ left.mT, device)
    copied = _fastest(lambda: rows.index_select(0, index), device)
    return Rates(512 * 512 * 4096 / products, len(index) * _COPIED_NUMBERS * rows.element_size() / copied)


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-6)

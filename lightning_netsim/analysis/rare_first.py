"""Draw the samples of a data set by how many others a network took for similar to them: the rare ones first."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lightning_netsim._checks import check_positive_int, expected
from lightning_netsim.records.record import Record, newest_record


class RareFirstSampler(Sampler[int]):
    """Draw samples without replacement, those with a low soft count N_S first.

    Among the samples that are left, sample i is drawn next with probability w_i / Σ_j w_j, w_i = max(N_S(x_i), 1)^(-power).
    That is the ascending order of log E_i + power · log max(N_S(x_i), 1), with E_i from the exponential distribution of rate 1
    (Efraimidis and Spirakis, Weighted random sampling with a reservoir, Information Processing Letters, 2006).

    The order depends on `seed` and the number of the epoch alone. Each iteration is of the next epoch, from epoch 0 on, unless
    `set_epoch` names another: a plain loop over a loader gets a new order each time, and Lightning, which calls `set_epoch`
    before each epoch, finds the order of every epoch again when it resumes from a checkpoint.

    Two cases need a line in `train_dataloader`, as in `lightning_netsim/demos/images.py`:

    - In several processes, Lightning wraps the sampler in a `DistributedSamplerWrapper`, which gives each process every n-th
      of the drawn samples, and repeats the first ones if their number is no multiple of n. Which samples are drawn stays
      right, but for training it shuffles their order, and with it what is first. Wrap the sampler as
      `DistributedSamplerWrapper(sampler, shuffle=False)` (from `lightning.fabric.utilities.distributed`): Lightning leaves
      that alone.
    - The workers of a loader (`num_workers` > 0) ask for samples before Lightning names the epoch of a resumed fit. Call
      `sampler.set_epoch(self.trainer.current_epoch)`.

    Within an epoch, `state_dict` holds how many samples were drawn; workers draw some batches ahead, which the
    `StatefulDataLoader` of torchdata takes into account and a plain loader does not.

    Args:
        counts: N_S(x_i) of each sample of the data set, in its order, shape (N,). A count that is not finite (the sample was
            left out, or not measured) is replaced by the median of the others.
        num_samples: how many samples an epoch has, in [1, N]; None for N, which makes an epoch an order of the data set.
        power: how much rare samples are preferred, in [0, ∞]: the default is the ascending order of the counts, in which equal
            ones are shuffled; 0 is a uniform shuffle. Counts of one data set may lie close together: on 719 digits, 534 to
            648, the rank correlation of position and count is 0.04 at 1, 0.14 at 4, 0.47 at 16.
        seed: seed of the orders.

    Raises:
        ValueError: if `counts` is not 1-D or has no finite entry, or an argument is out of its range.

    Source: Charpiat et al., NeurIPS 2019, section 4.2 of the supplementary material, which proposes that online learning visit
    regions of few neighbors first.

    Example:
        >>> counts = [100.0, 1.0, 10.0]
        >>> sampler = RareFirstSampler(counts)
        >>> next(iter(sampler))
        1
        >>> resumed = RareFirstSampler(counts)
        >>> resumed.load_state_dict(sampler.state_dict())
        >>> list(resumed), list(resumed)
        ([2, 0], [1, 2, 0])
    """

    def __init__(
        self, counts: Tensor | Iterable[float], num_samples: int | None = None, power: float = math.inf, seed: int = 0
    ) -> None:
        super().__init__()
        found = _read_counts(counts)
        ranked = found[found.isfinite()].sort().values
        if not len(ranked):
            raise expected("counts", "finite for one sample at least", f"{len(found)} non-finite entries")
        median = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
        self.counts = torch.where(found.isfinite(), found, median)
        self.num_samples = len(self.counts) if num_samples is None else check_positive_int("num_samples", num_samples)
        if self.num_samples > len(self.counts):
            wanted = f"at most {len(self.counts)}, the number of samples"
            raise expected("num_samples", wanted, str(num_samples), "A sample is drawn once in an epoch.")
        if isinstance(power, bool) or not isinstance(power, (int, float)) or not power >= 0:
            raise expected("power", "a number within [0, inf]", repr(power))
        self.power = float(power)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise expected("seed", "an int", repr(seed))
        self.seed = seed
        self._epoch = 0
        self._position = 0
        # Where the next iteration begins in its epoch: not at 0 only after `load_state_dict`.
        self._start = 0
        # What the orders depend on; the counts go in as a checksum.
        self._identity: dict[str, Any] = {
            "dataset_size": len(self.counts),
            "counts": zlib.crc32(self.counts.numpy().tobytes()),
            "num_samples": self.num_samples,
            "power": self.power,
            "seed": self.seed,
        }

    @classmethod
    def from_record(cls, path: str | os.PathLike[str], dataset_size: int, **settings: Any) -> RareFirstSampler:
        """Return the sampler for the soft counts that a run wrote to disk.

        Samples that were not measured (`max_samples` of the monitor) get the median count. Of a run that validated on several
        loaders, only the samples of the first are read.

        Args:
            path: the directory of a record, or a run's log directory, of which the newest record is taken.
            dataset_size: the number N of samples of the data set that is drawn from; the counts must be of its samples.
            settings: `num_samples`, `power` and `seed` of the sampler.

        Raises:
            ValueError: if there is no record, no count in it, or its samples cannot be those of the data set.
        """
        check_positive_int("dataset_size", dataset_size)
        record = newest_record(path)
        measured = record.samples[record.samples["dataloader"] == 0]
        index = torch.tensor(measured["index"].to_numpy(), dtype=torch.int64)
        found = torch.tensor(measured["soft_count"].to_numpy(), dtype=torch.float64)
        if not bool(found.isfinite().any()):
            raise expected("path", "a record with soft counts", f"{str(record.path)!r}, which has none")
        _check_same_data_set(index, dataset_size, record)
        counts = torch.full((dataset_size,), math.nan, dtype=torch.float64)
        counts[index] = found
        return cls(counts, **settings)

    def order(self, epoch: int) -> Tensor:
        """Return the samples of an epoch in the order in which they are drawn, shape (num_samples,), int64."""
        # One seed of both: their sum would give epoch 1 of seed 0 the order of epoch 0 of seed 1.
        mixed = hashlib.sha256(f"{self.seed} {_check_epoch('epoch', epoch)}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
        if math.isinf(self.power):
            shuffled = torch.randperm(len(self.counts), generator=generator)
            return shuffled[self.counts[shuffled].argsort(stable=True)][: self.num_samples]
        waiting = torch.empty_like(self.counts).exponential_(generator=generator)
        return (waiting.log() + self.power * self.counts.clamp(min=1).log()).argsort()[: self.num_samples]

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of an epoch; if that is the epoch of a state just loaded, of the rest of it."""
        if _check_epoch("epoch", epoch) != self._epoch:
            self._start = 0
        self._epoch, self._position = epoch, self._start

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        return self._draw(start)

    def _draw(self, start: int) -> Iterator[int]:
        # This runs at the first draw, not at `iter`: Lightning makes the iterator of a resumed fit before it sets the epoch.
        if self._position and not start:
            self._epoch += 1  # an earlier iteration has begun this epoch, and was left
        epoch = self._epoch
        for position, index in enumerate(self.order(epoch)[start:].tolist(), start + 1):
            ended = position == self.num_samples
            self._epoch, self._position = (epoch + 1, 0) if ended else (epoch, position)
            yield index

    def state_dict(self) -> dict[str, Any]:
        """Return where the sampler stands, in plain numbers: after the last sample of an epoch, at the start of the next."""
        return {"epoch": self._epoch, "position": self._position, **self._identity}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make the next iteration the rest of the epoch that was interrupted; whole epochs follow.

        Raises:
            ValueError: if `state_dict` is of a sampler with other counts or settings, or of none.
        """
        if not isinstance(state_dict, Mapping) or not {"epoch", "position", *self._identity} <= state_dict.keys():
            raise expected("state_dict", "what `RareFirstSampler.state_dict` returned", repr(state_dict))
        for name, own in self._identity.items():
            if state_dict[name] != own:
                remedy = "Resume with the data set, the counts and the settings of the interrupted run."
                raise expected(f"state_dict[{name!r}]", f"{own!r}, as in this sampler", repr(state_dict[name]), remedy)
        epoch, position = (_check_epoch(f"state_dict[{name!r}]", state_dict[name]) for name in ("epoch", "position"))
        if position >= self.num_samples:
            raise expected("state_dict['position']", f"less than {self.num_samples}, the samples of an epoch", str(position))
        self._epoch, self._position, self._start = epoch, position, position


def _read_counts(counts: Tensor | Iterable[float]) -> Tensor:
    """Return a copy of `counts` on the CPU, shape (N,), float64."""
    wanted = "a 1-D tensor, array, Series or sequence of numbers, one for each sample"
    if isinstance(counts, Tensor):
        if counts.is_complex():
            raise expected("counts", wanted, f"dtype {counts.dtype}")
        values = counts.detach().to("cpu", torch.float64, copy=True)
    else:
        plain = counts.to_numpy() if hasattr(counts, "to_numpy") else counts
        try:
            values = torch.tensor(plain, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise expected("counts", wanted, f"{type(counts).__name__} ({error})") from error
    if values.ndim != 1 or not len(values):
        raise expected("counts", wanted, f"shape {tuple(values.shape)}")
    return values


def _check_epoch(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise expected(name, "an int of at least 0", repr(value))
    return value


def _check_same_data_set(index: Tensor, dataset_size: int, record: Record) -> None:
    """Raise if the samples that were measured cannot be those of a data set of `dataset_size` samples.

    A subset that the monitor takes is random: the first samples alone, all of them, are a smaller data set.
    """
    beyond = int(index.max()) >= dataset_size or int(index.min()) < 0
    smaller = len(index) < dataset_size and torch.equal(index.sort().values, torch.arange(len(index)))
    if beyond or smaller:
        got = f"{dataset_size}: counts of another data set, in {str(record.path)!r}"
        remedy = "Count the samples that are to be drawn: let the run validate on them."
        wanted = f"{len(index)}" if smaller else f"at least {int(index.max()) + 1}"
        raise expected("dataset_size", f"{wanted}, as the counts have it", got, remedy)

"""Go through samples chunk by chunk with their gradient features: the same chunks, noise and normalization in every sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_netsim._checks import expected
from lightning_netsim.data.batches import SimilarityBatch, read_batch, split_batch
from lightning_netsim.data.sources import Chunk, SampleSource
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch, GradientFeatureBatch, Normalization
from lightning_netsim.jacobian.features import ActivationFeatures, GradientFeatures
from lightning_netsim.measurement.progress import Progress
from lightning_netsim.measurement.settings import SweepSettings

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Sweeper:
    """Turn the chunks of a source into gradient features, as often as it is gone through.

    Where a chunk does not fit into memory, it is halved, and so are all that follow.

    Args:
        model: the network, in eval mode.
        settings: what is measured.
        progress: told about the work as it goes on.

    Attributes:
        chunk_size: samples differentiated at a time; set by the plan.
        forms: whether gradients are formed at once; set by the plan.
        gradients: the features.
        activations: those of activations.
        watches_activations: whether these are read in passing; only the first sweep needs them.
    """

    def __init__(self, model: nn.Module, settings: SweepSettings, progress: Progress | None = None) -> None:
        self.model, self.settings = model, settings
        self.progress = progress or (lambda stage, done, total: None)
        self.chunk_size = 1
        self.forms = False
        self.gradients = GradientFeatures(model, self._forward, settings.directions, settings.parameters, settings.seed)
        self._autocast = _surrounding_autocast(model) if settings.precision == "inherit" else nullcontext()
        self.activations = ActivationFeatures(model, self._forward, settings.activation_layer)
        self.watches_activations = settings.compare_activations and self.activations.is_possible
        self._seen: list[Tensor] = []
        self._read: SimilarityBatch | None = None
        self._size = 0
        self._batch_idx = 0

    def features(self, chunk: Chunk, normalization: Normalization | None = None) -> GradientFeatureBatch:
        """Return the gradient features of a chunk.

        Args:
            chunk: the samples.
            normalization: theirs, if an earlier sweep has found it.
        """
        self._batch_idx, self._size, self._read = chunk.batch_idx, len(chunk.index), None
        # The same noise for the same samples in every sweep.
        torch.manual_seed(self.settings.seed + int(chunk.index[0]))
        return self.gradients(chunk.batch, self._labels(chunk), normalization, self.forms)

    def prepare(self, chunk: Chunk) -> None:
        """Check the model on a few samples."""
        self._batch_idx, self._size, self._read = chunk.batch_idx, len(chunk.index), None
        self.gradients.prepare(chunk.batch, self._labels(chunk))

    def read(self, chunk: Chunk) -> SimilarityBatch:
        """Return what was read of the chunk whose features were taken last.

        Raises:
            ValueError: if its outputs are not one row for each sample.
        """
        if self._read is None or len(self._read.outputs) != len(chunk.index):
            got = "none" if self._read is None else str(len(self._read.outputs))
            raise expected("outputs", f"one row for each of the {len(chunk.index)} samples of the batch", got)
        return self._read

    def read_activations(self) -> DenseFeatureBatch:
        """Return the activations of the chunk whose features were taken last."""
        return self.activations.read(self._seen)

    def sweep(
        self,
        source: SampleSource,
        stage: str,
        compute: Callable[[Chunk, GradientFeatureBatch], T],
        known: dict[tuple[int, int], Normalization] | None = None,
    ) -> Iterator[tuple[Chunk, GradientFeatureBatch, T]]:
        """Yield every chunk of a source with its features and what is computed from them.

        Args:
            source: the samples.
            stage: what the progress is told.
            compute: may be called again for a part of the same chunk when memory runs out, so it must not change anything.
            known: the normalizations of the chunks of this source; those that are missing are put in.
        """
        done = 0
        known = {} if known is None else known
        torch.manual_seed(self.settings.seed)  # A data set may draw random numbers too.
        for whole in source:
            waiting = list(whole.split(self.chunk_size))
            while waiting:
                chunk, *rest = waiting.pop(0).split(self.chunk_size)
                waiting[:0] = rest
                try:
                    features = self.features(chunk, known.get(_name(chunk)))
                    computed = compute(chunk, features)
                except RuntimeError as error:
                    if not _is_out_of_memory(error):
                        raise
                    waiting[:0] = self._halve(chunk, error)
                    continue
                known[_name(chunk)] = features.normalization
                done += len(chunk.index)
                self.progress(stage, done, source.num_samples)
                yield chunk, features, computed

    def _halve(self, chunk: Chunk, error: RuntimeError) -> list[Chunk]:
        """Return a chunk in smaller pieces, and go on with pieces of this size."""
        size = len(chunk.index)
        self.chunk_size = max(1, min(size, self.chunk_size) // 2)
        pieces = list(chunk.split(self.chunk_size))
        if len(pieces) == 1:
            raise error
        logger.warning("Out of memory with %d samples at a time: going on with %d.", size, self.chunk_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return pieces

    def _forward(self, batch: Any) -> Tensor:
        # Of the runs for one chunk, the first with all of its samples: some paths also run the model on single samples.
        if self._read is not None and len(self._read.outputs) == self._size:
            with self._autocast:
                return read_batch(self.model, batch, self._batch_idx).outputs
        with ExitStack() as stack:
            stack.enter_context(self._autocast)
            self._seen = stack.enter_context(self.activations.watch()) if self.watches_activations else []
            self._read = read_batch(self.model, batch, self._batch_idx)
        return self._read.outputs

    def _labels(self, chunk: Chunk) -> Tensor | None:
        if self.settings.directions != "target":
            return None
        labels = split_batch(chunk.batch)[1]
        return labels if isinstance(labels, Tensor) else None


def _surrounding_autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context with the autocast that surrounds this call; it may be entered many times."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device))


def _name(chunk: Chunk) -> tuple[int, int]:
    """Return what tells a chunk from the others of its source: its first sample and its size."""
    return int(chunk.index[0]), len(chunk.index)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that memory has run out; on a CPU it has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)

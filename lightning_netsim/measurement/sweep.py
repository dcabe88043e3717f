"""Go through samples chunk by chunk with their gradient features: the same chunks, noise and normalization in every sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
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

#: What tells a chunk from the others of its source: its first sample and its size.
ChunkName = tuple[int, int]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Swept:
    """One chunk as a sweep gives it.

    Attributes:
        chunk: the samples.
        features: their gradient features.
        read: what the model made of them, off the graph, with labels, names and what to show.
        activations: theirs; None where they are not wanted.
    """

    chunk: Chunk
    features: GradientFeatureBatch
    read: SimilarityBatch
    activations: DenseFeatureBatch | None = None

    @property
    def name(self) -> ChunkName:
        """Return what tells the chunk from the others of its source."""
        return name_of(self.chunk)

    @property
    def valid_ids(self) -> Tensor:
        """Return the positions of the samples with a usable gradient, shape (V,)."""
        return self.chunk.index[self.features.valid.cpu()]


def name_of(chunk: Chunk) -> ChunkName:
    """Return what tells a chunk from the others of its source."""
    return int(chunk.index[0]), len(chunk.index)


class FeatureReader:
    """Run a model on chunks of samples: gradient features, outputs and activations from one forward pass.

    Args:
        model: the network, in eval mode.
        settings: what is measured.

    Attributes:
        gradients: the gradient features.
        has_activations: whether activations are wanted, and there is a layer to take them from.
    """

    def __init__(self, model: nn.Module, settings: SweepSettings) -> None:
        self._model, self._settings = model, settings
        self._autocast = _surrounding_autocast(model) if settings.precision == "inherit" else nullcontext()
        self._activations = ActivationFeatures(model, self._forward, settings.activation_layer)
        self.gradients = GradientFeatures(model, self._forward, settings.directions, settings.parameters, settings.seed)
        self.has_activations = settings.compare_activations and self._activations.is_possible
        # Of the chunk that is being read, inside `read` and `prepare` only.
        self._chunk: Chunk | None = None
        self._watches = False
        self._found: SimilarityBatch | None = None
        self._seen: list[Tensor] = []

    def prepare(self, chunk: Chunk) -> None:
        """Check the model on a few samples."""
        self._run(chunk, False, lambda labels: self.gradients.prepare(chunk.batch, labels))

    def read(
        self, chunk: Chunk, normalization: Normalization | None = None, form: bool = False, activations: bool = False
    ) -> Swept:
        """Read one chunk.

        Args:
            chunk: the samples.
            normalization: theirs, if an earlier sweep has found it.
            form: whether gradients are formed at once; see `GradientFeatures`.
            activations: whether activations are read in passing.

        Raises:
            ValueError: if the outputs are not one row for each sample, or the model or the batch cannot be compared.
        """
        # The same noise for the same samples in every sweep.
        torch.manual_seed(self._settings.seed + int(chunk.index[0]))
        features, found, seen = self._run(
            chunk, activations, lambda labels: self.gradients(chunk.batch, labels, normalization, form)
        )
        if found is None or len(found.outputs) != len(chunk.index):
            got = "none" if found is None else str(len(found.outputs))
            raise expected("outputs", f"one row for each of the {len(chunk.index)} samples of the batch", got)
        read = replace(found, outputs=found.outputs.detach())
        return Swept(chunk, features, read, self._activations.read(seen) if activations else None)

    def _run(
        self, chunk: Chunk, watches: bool, function: Callable[[Tensor | None], T]
    ) -> tuple[T, SimilarityBatch | None, list[Tensor]]:
        """Call a function that runs the model on a chunk; return its result, and what was read and seen meanwhile."""
        labels = split_batch(chunk.batch)[1] if self._settings.directions == "target" else None
        self._chunk, self._watches, self._found, self._seen = chunk, watches, None, []
        try:
            result = function(labels if isinstance(labels, Tensor) else None)
            return result, self._found, self._seen
        finally:
            self._chunk, self._found, self._seen = None, None, []

    def _forward(self, batch: Any) -> Tensor:
        chunk = self._chunk
        if chunk is None:
            raise RuntimeError("The model is run through `read` and `prepare` only.")
        with ExitStack() as stack:
            stack.enter_context(self._autocast)
            # Of the runs for one chunk, the first with all of its samples: some paths also run the model on single samples.
            if self._found is not None and len(self._found.outputs) == len(chunk.index):
                return read_batch(self._model, batch, chunk.batch_idx).outputs
            self._seen = stack.enter_context(self._activations.watch()) if self._watches else []
            self._found = read_batch(self._model, batch, chunk.batch_idx)
        return self._found.outputs


class Sweeper:
    """Go through the chunks of a source, as often as it is wanted.

    Where a chunk does not fit into memory, it is halved, and so are all that follow.

    Args:
        reader: reads each chunk.
        chunk_size: samples differentiated at a time.
        form: whether gradients are formed at once; see `GradientFeatures`.
        seed: what a data set may draw by.
        progress: told about the work as it goes on.

    Attributes:
        chunk_size: as given, or what fits into memory.
    """

    def __init__(
        self, reader: FeatureReader, chunk_size: int, form: bool = False, seed: int = 0, progress: Progress | None = None
    ) -> None:
        self.reader, self.chunk_size = reader, chunk_size
        self._form, self._seed, self._progress = form, seed, progress

    def sweep(
        self,
        source: SampleSource,
        stage: str,
        compute: Callable[[Swept], T],
        known: Mapping[ChunkName, Normalization] | None = None,
        activations: bool = False,
    ) -> Iterator[tuple[Swept, T]]:
        """Yield every chunk of a source with what is computed from it.

        Args:
            source: the samples.
            stage: what the progress is told.
            compute: may be called again for a part of the same chunk when memory runs out, so it must not change anything.
            known: normalizations of chunks that an earlier sweep has found.
            activations: whether activations are read in passing.
        """
        done = 0
        torch.manual_seed(self._seed)  # A data set may draw random numbers too.
        for whole in source:
            waiting = list(whole.split(self.chunk_size))
            while waiting:
                chunk, *rest = waiting.pop(0).split(self.chunk_size)
                waiting[:0] = rest
                try:
                    swept = self.reader.read(chunk, (known or {}).get(name_of(chunk)), self._form, activations)
                    computed = compute(swept)
                except RuntimeError as error:
                    # On a CPU, the error of memory that has run out has no class of its own.
                    if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)):
                        raise
                    waiting[:0] = self._halve(chunk, error)
                    continue
                done += len(chunk.index)
                if self._progress is not None:
                    self._progress(stage, done, source.num_samples)
                yield swept, computed

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


def _surrounding_autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context with the autocast that surrounds this call; it may be entered many times."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device))

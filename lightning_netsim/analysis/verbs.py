"""The verbs of the command line that answer for single samples of a saved checkpoint: `neighbors` and `transfer`."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_netsim._checks import check_writable, expected
from lightning_netsim.analysis.neighbors import NeighborAnswer, answer_neighbors
from lightning_netsim.analysis.transfer import TransferAnswer, answer_transfer
from lightning_netsim.data.samples import Move, Samples, check_positions
from lightning_netsim.measurement.settings import SweepSettings, takes_settings
from lightning_netsim.records.record import META_FILE

SetName = Literal["train", "val", "test", "predict"]

_STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}
_NAMED_DIFFERENCES = 3


class NetsimTrainer(Trainer):
    """Lightning's Trainer, with two methods that train nothing but answer for single samples.

    Both take model and data module as `fit` does, load a checkpoint, print the answer and write it where that is asked for.

    Attributes:
        answer: the last answer.
    """

    answer: NeighborAnswer | TransferAnswer | None = None

    @takes_settings("k", "directions", "max_samples")
    def neighbors(  # noqa: D417  `takes_settings` tells what the others are
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        query: int | list[int] | str | None = None,
        ckpt_path: str | None = None,
        set: SetName = "val",
        reference: SetName | None = None,
        directions: int | str = "auto",
        output: str | None = None,
        weights_only: bool | None = None,
        **settings: Any,
    ) -> None:
        """Find the exact neighbors and neighbor counts of a few samples, in one sweep.

        Args:
            model: the network.
            datamodule: the data; None for the loaders of the model.
            query: positions of the samples in their data set, separated by commas: 3,17.
            ckpt_path: the checkpoint to load; by default the network is taken as the configuration makes it.
            set: where the samples are.
            reference: where their neighbors are sought; by default the same set.
            output: a directory for tables and figure, new or of an earlier answer.
            weights_only: false loads a checkpoint that holds more than tensors and plain values, and has to be trusted.
            **settings: see `SweepSettings`.
        """
        positions, directory = _positions(query), _output(output)
        chosen = SweepSettings(directions=directions, compare_activations=False, **settings)
        asked, compared = self._open(model, datamodule, set, reference or set, ckpt_path, weights_only, chosen.max_samples)
        answer = answer_neighbors(
            model,
            asked,
            compared,
            check_positions("query", positions, asked.source.extent),
            chosen,
            same=reference in (None, set),
            context={"stage": set, "reference": reference or set, "class_names": _class_names(datamodule, asked)},
            progress=self.progress_bar_callback is not None,
        )
        self._give(answer, directory)

    @takes_settings("k", "max_samples")
    def transfer(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        query: int | list[int] | str | None = None,
        ckpt_path: str | None = None,
        set: SetName = "val",
        reference: SetName | None = None,
        change: list[float] | None = None,
        directions: Literal["all", "change"] = "all",
        output: str | None = None,
        weights_only: bool | None = None,
        **settings: Any,
    ) -> None:
        """Predict what else moves if a sample is corrected, in one sweep.

        Args:
            model: the network.
            datamodule: the data; None for the loaders of the model.
            query: position of the sample in its data set.
            ckpt_path: the checkpoint to load; by default the network is taken as the configuration makes it.
            set: where the sample is.
            reference: the set whose moves are predicted; by default the same.
            change: how its outputs are to move, one number for each; by default from the strongest other class towards the
                label.
            directions: all moves its outputs so and not otherwise; change leaves open what does not lie along the change.
            output: a directory for table and figure, new or of an earlier answer.
            weights_only: false loads a checkpoint that holds more than tensors and plain values, and has to be trusted.
            **settings: see `SweepSettings`; k is how many samples stand in each list.
        """
        positions, directory = _positions(query), _output(output)
        if len(positions) > 1:
            raise expected("query", "the position of one sample", f"{len(positions)}")
        chosen = SweepSettings(compare_activations=False, **settings)
        asked, compared = self._open(model, datamodule, set, reference or set, ckpt_path, weights_only, chosen.max_samples)
        answer = answer_transfer(
            model,
            asked,
            compared,
            check_positions("query", positions, asked.source.extent)[0],
            chosen,
            change=change,
            directions=directions,
            same=reference in (None, set),
            context={"reference": reference or set, "class_names": _class_names(datamodule, asked)},
            progress=self.progress_bar_callback is not None,
        )
        self._give(answer, directory)

    def _open(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        set: SetName,
        reference: SetName,
        ckpt_path: str | None,
        weights_only: bool | None,
        max_samples: int | None,
    ) -> tuple[Samples, Samples]:
        """Bring model and data to where `validate` has them before its first batch; return both sets."""
        parts = [part for part in (datamodule, model) if part is not None]
        for part in parts:
            part.trainer = self
            part.prepare_data()
        for stage in sorted({_STAGES[set], _STAGES[reference]}):
            for part in parts:
                part.setup(stage)
        model.configure_model()
        if ckpt_path is None:
            print("netsim: no ckpt_path: the network is as its configuration makes it.", file=sys.stderr)
        else:
            _load_checkpoint(model, ckpt_path, weights_only)
        self.precision_plugin.convert_module(model).to(self.strategy.root_device)
        return self._samples(model, datamodule, set), self._samples(model, datamodule, reference, max_samples)

    def _samples(
        self, model: LightningModule, datamodule: LightningDataModule | None, name: str, max_samples: int | None = None
    ) -> Samples:
        """Return a set of the data module, or of the model where that serves it."""
        hook = f"{name}_dataloader"
        owner = _owner(hook, model, datamodule)
        if not is_overridden(hook, owner):
            raise expected("set", f"one that model or data module serve by `{hook}`", repr(name))
        loaders = getattr(owner, hook)()
        if isinstance(loaders, CombinedLoader):
            loaders = loaders.flattened
        loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        return Samples(loaders, self._move(model, datamodule), max_samples)

    def _move(self, model: LightningModule, datamodule: LightningDataModule | None) -> Move:
        """Return the function that brings a batch to the model, through the hooks that the user may have overridden."""
        device, convert = self.strategy.root_device, self.precision_plugin.convert_input
        hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        before, to_device, after = (getattr(_owner(hook, model, datamodule), hook) for hook in hooks)

        def move(batch: Any, number: int) -> Any:
            return after(to_device(before(convert(batch), number), device, number), number)

        return move

    def _give(self, answer: NeighborAnswer | TransferAnswer, directory: Path | None) -> None:
        self.answer = answer
        if not self.is_global_zero:
            return
        print(answer)
        if directory is not None:
            print(f"Written to {answer.save(directory)}")


def _owner(hook: str, model: LightningModule, datamodule: LightningDataModule | None) -> Any:
    """Return whose hook counts: that of the data module, where it has one of its own."""
    return datamodule if datamodule is not None and is_overridden(hook, datamodule) else model


def _positions(query: int | list[int] | str | None) -> list[int]:
    """Return the positions that were given on the command line or in a file."""
    if query is None:
        raise expected("query", "positions of samples, separated by commas", "none", "Add --query 3,17.")
    parts = query.split(",") if isinstance(query, str) else [query] if isinstance(query, int) else query
    try:
        return [int(part) for part in parts]
    except ValueError as error:
        raise expected("query", "positions of samples, integers separated by commas", repr(query)) from error


def _output(directory: str | None) -> Path | None:
    """Return where to write, if that is possible and nothing else lies there."""
    if directory is None:
        return None
    path = Path(directory)
    if path.is_dir() and any(path.iterdir()) and not (path / META_FILE).is_file():
        raise expected("output", "a new directory or one of an earlier answer", f"{directory!r} with other files")
    return check_writable("output", path)


def _class_names(datamodule: LightningDataModule | None, asked: Samples) -> list[str] | None:
    names = getattr(datamodule, "class_names", None) or getattr(asked.dataset, "classes", None)
    return None if names is None else [str(name) for name in names]


def _load_checkpoint(model: LightningModule, path: str, weights_only: bool | None) -> None:
    """Load the weights of a checkpoint into a model whose parameters it has to fit.

    Raises:
        ValueError: if there is no such file, it is no checkpoint, or it is one of another architecture.
    """
    wanted = "a checkpoint that Lightning wrote"
    if not Path(path).is_file():
        raise expected("ckpt_path", wanted, f"{path!r}, which does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only is not False)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is cut short"
        remedy = (
            "If it holds more than weights and you trust it, add --weights_only false." if weights_only is not False else ""
        )
        raise expected("ckpt_path", wanted, f"{path!r}, which cannot be read ({reason.rstrip('.')})", remedy) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise expected("ckpt_path", wanted, f"{path!r}, which has no `state_dict`")
    model.on_load_checkpoint(checkpoint)  # It may change the state.
    state = checkpoint["state_dict"]
    differences = _differences(model.state_dict(), state, model.strict_loading)
    if differences:
        named = "; ".join(differences[:_NAMED_DIFFERENCES])
        more = len(differences) - _NAMED_DIFFERENCES
        named += f"; and {more} more" if more > 0 else ""
        remedy = "Give the configuration of its run: config.yaml in the log directory."
        raise expected("ckpt_path", "a checkpoint of this model", f"{path!r}, which differs: {named}", remedy)
    model.load_state_dict(state, strict=model.strict_loading)


def _differences(own: Mapping[str, Any], other: Mapping[str, Any], strict: bool) -> list[str]:
    """Return in what two states differ, in the order of the model."""

    def shape(state: Mapping[str, Any], name: str) -> str:
        if name not in state:
            return "missing"
        return str(tuple(state[name].shape)) if isinstance(state[name], Tensor) else "there"

    names = [name for name in dict.fromkeys([*own, *other]) if strict or (name in own and name in other)]
    pairs = [(name, shape(own, name), shape(other, name)) for name in names]
    return [f"`{name}` is {one} in the model and {two} in the checkpoint" for name, one, two in pairs if one != two]

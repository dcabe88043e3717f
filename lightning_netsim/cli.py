"""Train and evaluate from YAML files, and ask about single samples: `netsim fit --config configs/digits.yaml`."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

# A YAML file may name a class without its module once that module is imported: `ImageClassifier`, `SimilarityMonitor`.
from lightning_netsim import __version__, callbacks, demos  # noqa: F401
from lightning_netsim._checks import NetsimError
from lightning_netsim.verbs import NetsimTrainer

_VERBS = ("neighbors", "transfer")


def _read_number(value: Any) -> numbers.Number:
    """Return a number of a configuration; what is none is refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Number):
        raise ValueError(f"{value!r} is not a number")
    return value


# What transforms of torchvision are annotated with, and jsonargparse could otherwise not write into `config.yaml`.
register_type(numbers.Number, serializer=lambda number: number, deserializer=_read_number, fail_already_registered=False)


class NetsimCLI(LightningCLI):
    """Wire any LightningModule and LightningDataModule to the Trainer, with the classes of this package at hand.

    Classes of this package and of Lightning go by their short name, all others by their import path. The configuration of
    each run is kept as `config.yaml` in its log directory.
    """

    def __init__(self, trainer_class: Any = NetsimTrainer, **kwargs: Any) -> None:
        super().__init__(
            trainer_class=trainer_class,
            parser_kwargs={"prog": "netsim", "description": __doc__, "version": f"lightning_netsim {__version__}"},
            save_config_kwargs={"overwrite": True},
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the methods of the trainer that are commands, and those of their arguments that are no options."""
        return {
            **LightningCLI.subcommands(),
            **{verb: {"model", "datamodule"} for verb in _VERBS},
        }

    def _parse_ckpt_path(self) -> None:
        """Leave a configuration as it is where a single sample is asked for.

        Lightning puts the hyperparameters of a checkpoint in the place of the given ones, so that a checkpoint of another
        network would load, and fail on the data; here it is refused.
        """
        if self.config.get("subcommand") not in _VERBS:
            super()._parse_ckpt_path()

    def after_instantiate_classes(self) -> None:
        """Let loggers that number their runs settle on one number, so that each run lies in one directory.

        Each takes the first number without a directory when it is first asked; asked later, the second logger would find
        the directory of the first.
        """
        for logger in self.trainer.loggers:
            if isinstance(logger, (CSVLogger, TensorBoardLogger)):
                _ = logger.version


def main(args: Sequence[str] | None = None) -> NetsimCLI:
    """Run one command and return the CLI with the model, data module and trainer that it made.

    Bad input ends the process with its one sentence instead of a traceback.

    Args:
        args: what follows the program's name on the command line; by default that of the process.

    Raises:
        SystemExit: if the arguments do not parse, or the input is bad.
    """
    try:
        return NetsimCLI(args=args)
    except NetsimError as error:
        raise SystemExit(f"netsim: {error}") from error

"""Train and evaluate from YAML files, ask about single samples, and review what a run found.

`netsim fit --config configs/digits.yaml`, then `netsim review runs/digits/version_0`.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

# A YAML file may name a class without its module once that module is imported: `ImageClassifier`, `SimilarityMonitor`.
from lightning_netsim import __version__, callbacks, demos  # noqa: F401
from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.review import review
from lightning_netsim.analysis.verbs import NetsimTrainer

_VERBS = ("neighbors", "transfer")
#: Verbs that take the directory of a run instead of a configuration.
_RUN_VERBS = {"review": review}


def _read_number(value: Any) -> numbers.Number:
    """Return a number of a configuration; what is none is refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Number):
        raise ValueError(f"{value!r} is not a number")
    return value


# What transforms of torchvision are annotated with, and jsonargparse could otherwise not write into `config.yaml`.
register_type(numbers.Number, serializer=lambda number: number, deserializer=_read_number, fail_already_registered=False)


_EPILOG = "About a run that was measured, without a configuration: netsim review RUN_DIR (see netsim review --help)."


class NetsimCLI(LightningCLI):
    """Wire any LightningModule and LightningDataModule to the Trainer, with the classes of this package at hand.

    Classes of this package and of Lightning go by their short name, all others by their import path. The configuration of
    each run is kept as `config.yaml` in its log directory.
    """

    def __init__(self, trainer_class: Any = NetsimTrainer, **kwargs: Any) -> None:
        super().__init__(
            trainer_class=trainer_class,
            parser_kwargs={
                "prog": "netsim",
                "description": __doc__,
                "epilog": _EPILOG,
                "version": f"lightning_netsim {__version__}",
            },
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


def _ask_run(verb: str, words: Sequence[str]) -> None:
    """Run a verb with the directory of a run and its options."""
    function = _RUN_VERBS[verb]
    parser = ArgumentParser(prog=f"netsim {verb}", description=(function.__doc__ or "").partition("\n\n    Args:")[0])
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    function(**parser.parse_args(list(words)).as_dict())


def main(args: Sequence[str] | None = None) -> NetsimCLI | None:
    """Run one command and return the CLI with the model, data module and trainer that it made; None for a verb about a run.

    Bad input ends the process with its one sentence instead of a traceback.

    Args:
        args: what follows the program's name on the command line; by default that of the process.

    Raises:
        SystemExit: if the arguments do not parse, or the input is bad.
    """
    words = sys.argv[1:] if args is None else list(args)
    try:
        if words and words[0] in _RUN_VERBS:
            _ask_run(words[0], words[1:])
            return None
        return NetsimCLI(args=args)
    except NetsimError as error:
        raise SystemExit(f"netsim: {error}") from error

"""Losses that say which embeddings belong together: the contrastive loss, and those of pytorch-metric-learning."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_netsim._checks import check_choice, check_positive_number, expected
from lightning_netsim.functional.contrastive import contrastive_loss
from lightning_netsim.losses.criterion import AbstractEmbeddingLoss, public_path


class ContrastiveLoss(AbstractEmbeddingLoss):
    """Compute ½ ‖z − z'‖² for pairs of one class and ½ max(0, m − ‖z − z'‖²) for the others, see `contrastive_loss`.

    Args:
        margin: m > 0, of the squared distance.

    Raises:
        NetsimError: for a margin that is not positive.

    Source: Lepetit, Deep Learning and Computer Vision (lecture, 2021), embeddings and siamese networks.

    Example:
        >>> import torch
        >>> ContrastiveLoss(margin=1.0)(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0])).item()
        0.5
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = check_positive_number("margin", margin)

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return contrastive_loss(embeddings, labels, self.margin)


class MetricLearningLoss(AbstractEmbeddingLoss):
    """Compute any criterion that is called as (embeddings, labels), or with a miner as (embeddings, labels, indices_tuple).

    Nearly all of pytorch-metric-learning are called so. What the criterion learns itself, as "ProxyAnchorLoss" its proxies, are
    parameters of this module.

    Args:
        loss: the name of a class in ``pytorch_metric_learning.losses``, for example "NTXentLoss", "SupConLoss", "NPairsLoss",
            "TripletMarginLoss" or "ProxyAnchorLoss"; or a criterion that is made already.
        loss_args: the arguments of that class; a loss with proxies needs ``num_classes`` and ``embedding_size``. A distance or
            reducer is an object, or {"class_path": ..., "init_args": {...}}.
        miner: what chooses the pairs or triplets: the name of a class in ``pytorch_metric_learning.miners``, for example
            "MultiSimilarityMiner" or "TripletMarginMiner", or a miner that is made already. None takes all.
        miner_args: the arguments of that class.

    Raises:
        NetsimError: pytorch-metric-learning is not installed, has no class of that name, or does not take the arguments;
            later, for labels beyond ``num_classes``.

    Source: https://kevinmusgrave.github.io/pytorch-metric-learning/

    Example:
        >>> loss = MetricLearningLoss("ProxyAnchorLoss", {"num_classes": 2, "embedding_size": 3})
        >>> [parameter.shape for parameter in loss.parameters()]
        [torch.Size([2, 3])]
    """

    def __init__(
        self,
        loss: str | Callable[..., Any],
        loss_args: dict[str, Any] | None = None,
        miner: str | Callable[..., Any] | None = None,
        miner_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._arguments = {"loss": loss, "loss_args": loss_args, "miner": miner, "miner_args": miner_args}
        self.loss = _made("loss", loss, loss_args)
        if miner is None and miner_args:
            raise expected("miner_args", "given with a `miner`", f"{miner_args!r} without one")
        self.miner = None if miner is None else _made("miner", miner, miner_args)
        # Some losses keep a statistic under this name, which is 0 between calls.
        number = (loss_args or {}).get("num_classes") or getattr(self.loss, "num_classes", None)
        self._num_classes = number if isinstance(number, int) and number > 0 else None

    @property
    def num_classes(self) -> int | None:
        """Return how many classes have a proxy; None where the loss has no proxies."""
        return self._num_classes

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.num_classes is not None and len(labels) and int(labels.max()) >= self.num_classes:
            wanted = f"whole numbers below the {self.num_classes} classes that the loss has proxies for"
            raise expected("labels", wanted, f"a label {int(labels.max())}", "Set `num_classes` in `loss_args`.")
        if not len(embeddings):
            return embeddings.sum() * 0
        mined = () if self.miner is None else (self.miner(embeddings, labels),)
        term: Tensor = self.loss(embeddings, labels, *mined)
        return term + embeddings.sum() * 0  # On the graph also where the criterion found nothing to compare.

    def config(self) -> dict[str, Any]:
        return {"class_path": public_path(type(self)), "init_args": dict(self._arguments)}

    def extra_repr(self) -> str:
        return ""


# Losses of pytorch-metric-learning that want more than (embeddings, labels).
_OTHER_CALLS = ("VICRegLoss", "SelfSupervisedLoss", "CrossBatchMemory", "MultipleLosses")


def _part(value: Any) -> Any:
    """Return an argument, made from its class and arguments where a file gives these, as for a distance or a reducer."""
    if not isinstance(value, Mapping) or "class_path" not in value:
        return value
    package, _, kind = str(value["class_path"]).rpartition(".")
    arguments = {key: _part(each) for key, each in value.get("init_args", {}).items()}
    return getattr(importlib.import_module(package), kind)(**arguments)


def _made(name: str, what: str | Callable[..., Any], arguments: dict[str, Any] | None) -> Callable[..., Any]:
    """Return a loss or miner, made from the name of its class where that is what is given."""
    if not isinstance(what, str):
        if not callable(what) or isinstance(what, type):
            got = f"the class {what.__name__}" if isinstance(what, type) else repr(what)
            raise expected(name, "the name of a class, or an object that takes (embeddings, labels)", got)
        if arguments:
            raise expected(f"{name}_args", f"given with the name of a class as `{name}`", f"{arguments!r} beside an object")
        return what
    plural = "losses" if name == "loss" else "miners"
    try:
        room = importlib.import_module(f"pytorch_metric_learning.{plural}")
    except ModuleNotFoundError as error:
        remedy = "Run `pip install 'lightning-netsim[metric-learning]'`."
        raise expected(name, "one of pytorch-metric-learning, which has to be installed", repr(what), remedy) from error
    kinds = {key: kind for key, kind in vars(room).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    # What others derive from, or wrap, and what takes other arguments than (embeddings, labels).
    kinds = {key: kind for key, kind in kinds.items() if not key.startswith(("Base", "Generic")) and key not in _OTHER_CALLS}
    kind = kinds[check_choice(name, what, sorted(kinds))]
    parts = {key: _part(value) for key, value in (arguments or {}).items()}
    try:
        made: Callable[..., Any] = kind(**parts)
    except (TypeError, KeyError) as error:
        got = f"{arguments or {}!r} ({type(error).__name__}: {error})"
        raise expected(f"{name}_args", f"the arguments of {what}", got) from error
    return made

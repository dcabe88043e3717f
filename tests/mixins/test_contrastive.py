"""Embeddings are those that the step's own pass puts out; the loss on them, and its parameters, are trained with the module."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_netsim import NetsimError
from lightning_netsim.losses import ContrastiveLoss, GroupSimilarityLoss, MetricLearningLoss
from lightning_netsim.mixins import ContrastiveMixin
from tests.mixins.modules import CLASSES, Embedded, Encoder, Plain, TrainedEncoder, batch, gradients, loader, trainer

PROXIES = {"num_classes": CLASSES, "embedding_size": CLASSES}


def proxies() -> MetricLearningLoss:
    torch.manual_seed(1)
    return MetricLearningLoss("ProxyAnchorLoss", PROXIES)


def views(size: int = 6) -> tuple[list[Tensor], Tensor]:
    first, labels = batch(size)
    return [first, first + 0.1 * batch(size, seed=2)[0]], labels


def view_loader(size: int = 12) -> DataLoader[Any]:
    (first, second), labels = views(size)
    samples = [([a, b], label) for a, b, label in zip(first, second, labels, strict=True)]
    return DataLoader(samples, batch_size=6)  # type: ignore[arg-type]


class Part(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Spy(ContrastiveLoss):
    """Remember the labels that the criterion is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.seen.append(labels)
        return super().compute(embeddings, labels)


def test_step_is_the_loss_plus_the_criterion_of_the_outputs() -> None:
    module = Embedded(contrastive_weight=0.3)
    inputs, labels = batch()
    loss = module.training_step((inputs, labels), 0)
    outputs = module.net(inputs)
    wanted = F.cross_entropy(outputs, labels) + 0.3 * ContrastiveLoss()(outputs, labels)
    torch.testing.assert_close(loss, wanted)
    expected = gradients(module, wanted)
    for name, gradient in gradients(module, loss).items():
        torch.testing.assert_close(gradient, expected[name])
    assert module.forwards == 1


def test_embeddings_of_a_named_layer_are_as_they_were_before_what_follows_in_place() -> None:
    module = Embedded(contrastive_layer="net.0")
    module.net[1] = nn.ReLU(inplace=True)
    inputs, labels = batch()
    before = module.net[0](inputs)
    assert bool((before < 0).any())
    wanted = F.cross_entropy(module.net(inputs), labels) + ContrastiveLoss()(before, labels)
    torch.testing.assert_close(module.training_step((inputs, labels), 0), wanted)


def test_maps_of_a_layer_are_one_vector_for_each_sample() -> None:
    class Maps(TrainedEncoder):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.Flatten())

    module = Maps(contrastive_layer="net.1")
    inputs, labels = batch()
    torch.testing.assert_close(module.training_step((inputs, labels), 0), ContrastiveLoss()(module.net(inputs), labels))


def test_a_pass_without_gradients_is_not_seen() -> None:
    class Teaching(ContrastiveMixin, Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self(batch[0].flip(0))
            return super().training_step(batch, batch_idx)

    module = Teaching()
    torch.testing.assert_close(module.training_step(batch(), 0), Embedded().training_step(batch(), 0))


def test_a_module_without_a_step_is_trained_by_the_term() -> None:
    module = TrainedEncoder()
    inputs, labels = batch()
    torch.testing.assert_close(module.training_step((inputs, labels), 0), ContrastiveLoss()(module.net(inputs), labels))
    before = deepcopy(module.net[0].state_dict())
    trainer(max_epochs=2).fit(module, loader())
    assert all(not torch.equal(before[name], value) for name, value in module.net[0].state_dict().items())


def test_views_in_a_batch_and_views_in_a_step_are_the_same() -> None:
    class Calling(ContrastiveMixin, Encoder):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sum(self(view).sum() * 0 for view in batch[0])  # type: ignore[return-value]

    both, labels = views()
    criterion = MetricLearningLoss("NTXentLoss", {"temperature": 0.2})
    for kind in (TrainedEncoder, Calling):
        for source, wanted in (("batch", labels), ("instance", torch.arange(6))):
            module: Any = kind(contrastive_criterion=criterion, contrastive_labels=source)
            embeddings = torch.cat([module.net(view) for view in both])
            torch.testing.assert_close(module.training_step((both, labels), 0), criterion(embeddings, wanted.repeat(2)))
    unlabeled: Any = TrainedEncoder(contrastive_labels="instance")
    assert unlabeled.training_step((both,), 0) == unlabeled.training_step((both, labels), 0)


def test_samples_without_a_label_are_left_out() -> None:
    (inputs, labels), module = batch(), TrainedEncoder()
    unlabeled = labels.clone()
    unlabeled[:4] = -1
    wanted = ContrastiveLoss()(module.net(inputs[4:]), labels[4:])
    torch.testing.assert_close(module.training_step((inputs, unlabeled), 0), wanted)


def test_a_step_where_the_term_is_not_due_adds_a_zero_that_can_be_differentiated() -> None:
    module = TrainedEncoder(contrastive_weight=[(0, 0.0), (10, 1.0)])
    loss = module.training_step(batch(), 0)
    assert float(loss) == 0
    assert not any(gradient.any() for gradient in gradients(module, loss).values())


def test_clusters_of_the_epoch_before_are_labels() -> None:
    spy = Spy()
    module = TrainedEncoder(contrastive_criterion=spy, contrastive_labels=3)
    trainer(max_epochs=2).fit(module, view_loader())
    first = [labels.tolist() for labels in spy.seen[:2]]
    assert first == [[*range(6)] * 2] * 2  # Each sample is a class of its own.
    assert len(torch.stack(spy.seen[2:]).unique()) > 1
    module.trainer = None
    both, labels = views()
    both[1] = both[1].flip(0)  # Views that differ much: the mean of both belongs to a cluster.
    means = sum(F.normalize(module.net(view), dim=1) for view in both)
    module.contrastive_clusters.epoch = 0  # No refresh: each of three samples is a center.
    module.contrastive_clusters.centers = F.normalize(means[[0, 2, 5]], dim=1).detach()
    module.training_step((both, labels), 0)
    assert len(set(spy.seen[-1].tolist())) > 1
    wanted = (means @ module.contrastive_clusters.centers.mT).argmax(1)  # type: ignore[operator, union-attr]
    assert spy.seen[-1].tolist() == [*wanted.tolist(), *wanted.tolist()]


def test_single_views_are_only_collected_in_the_first_epoch(caplog: pytest.LogCaptureFixture) -> None:
    spy = Spy()
    with caplog.at_level("INFO"):
        trainer(max_epochs=2).fit(TrainedEncoder(contrastive_criterion=spy, contrastive_labels=3), loader())
    assert caplog.text.count("only collects embeddings") == 1
    assert [len(labels) for labels in spy.seen] == [0, 0, 6, 6]


class Known(TrainedEncoder):
    """A module whose optimizer knows all parameters."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Grouped(TrainedEncoder):
    """A module that has put the parameters of its criterion into a group."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net.parameters()}, {"params": self.contrastive_criterion.parameters(), "lr": 5.0}]
        return {"optimizer": torch.optim.SGD(groups, lr=0.1)}


class Scheduled(TrainedEncoder):
    """A module whose rate follows a schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]


@pytest.mark.parametrize(
    ("kind", "rate", "groups"),
    [
        (TrainedEncoder, None, [(0.1, 5)]),
        (Known, None, [(0.1, 5)]),
        (Grouped, None, [(0.1, 4), (5.0, 1)]),
        (Scheduled, None, [(0.1, 5)]),
        (TrainedEncoder, 2.0, [(0.1, 4), (2.0, 1)]),
        (Known, 2.0, [(0.1, 4), (2.0, 1)]),
    ],
)
def test_proxies_are_trained_though_the_optimizer_was_not_told(kind: Any, rate: float | None, groups: Any) -> None:
    module = kind(contrastive_criterion=proxies(), contrastive_learning_rate=rate)
    before = module.contrastive_criterion.loss.proxies.detach().clone()
    fitting = trainer()
    fitting.fit(module, loader())
    assert not torch.equal(module.contrastive_criterion.loss.proxies, before)
    assert [(group["lr"], len(group["params"])) for group in fitting.optimizers[0].param_groups] == groups


def replaced() -> Any:
    module = TrainedEncoder(contrastive_criterion=proxies(), contrastive_learning_rate=1.0)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    return module


class Stepping(Embedded):
    """A module that must not be run."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("a step was run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Scheduled(contrastive_criterion=proxies(), contrastive_learning_rate=1.0),
            "`contrastive_learning_rate` to be None beside .* `configure_optimizers` instead",
        ),
        (
            lambda: TrainedEncoder(contrastive_learning_rate=1.0),
            "`contrastive_learning_rate` to be None for a criterion",
        ),
        (replaced, "where `configure_optimizers` has been replaced"),
        (lambda: Stepping(contrastive_layer="net.9"), "`contrastive_layer` to be the name of a module .* There are .*'net.0'"),
    ],
)
def test_what_cannot_be_trained_is_said_before_it_begins(make: Any, message: str) -> None:
    with pytest.raises(NetsimError, match=message):
        trainer().fit(make(), loader())


@pytest.mark.parametrize("kind", ["clusters", "proxies"])
def test_a_resumed_run_goes_on_with_clusters_and_proxies(kind: str, tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> tuple[TrainedEncoder, Any]:
        arguments = {"contrastive_labels": 3} if kind == "clusters" else {"contrastive_criterion": proxies()}
        module, fitting = TrainedEncoder(**arguments), trainer(max_epochs=epochs)
        fitting.fit(module, view_loader() if kind == "clusters" else loader(), **options)
        return module, fitting

    whole, _ = fit(3)
    _, first = fit(2)
    first.save_checkpoint(tmp_path / "last.ckpt")
    again, _ = fit(3, ckpt_path=tmp_path / "last.ckpt")
    for name, value in again.named_parameters():
        assert torch.equal(value, whole.get_parameter(name))


def test_half_precision() -> None:
    class Watching(ContrastiveLoss):
        def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            assert embeddings.dtype == torch.float32
            assert not torch.is_autocast_enabled("cpu")
            return super().compute(embeddings, labels)

    fitting = trainer(precision="bf16-mixed")
    fitting.fit(Embedded(contrastive_criterion=Watching()), loader())
    assert torch.isfinite(fitting.callback_metrics["netsim/contrastive_loss"])


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ({}, (batch()[0],), r"`labels` to be the class of each sample, but got none. .*'instance'"),
        ({}, (batch()[0], batch()[1][:6]), r"`labels` to be a tensor of 12 class numbers.*shape \(6,\)"),
        ({}, (batch()[0], ["a"] * 12), "the class of each sample, but got a list without whole numbers"),
        ({"contrastive_labels": "instance"}, batch(), r"`batch` to be several views .*, but got one. .*\[first views, second"),
        ({"contrastive_layer": "spare"}, batch(), "a module that the training step calls, but got 'spare', which it does not"),
        ({"contrastive_layer": "both"}, batch(), "Name the layer that puts out one tensor by `contrastive_layer="),
        ({"contrastive_layer": "first"}, batch(), "one or more rows for each sample, but got 7 rows from a batch of 12"),
        (
            {"contrastive_criterion": lambda embeddings, labels: embeddings.sum(1)},
            batch(),
            r"`contrastive_criterion` to be one that returns a scalar, but got shape \(12,\)",
        ),
    ],
)
def test_steps_without_what_the_term_needs(arguments: dict[str, Any], given: Any, message: str) -> None:
    class Parts(TrainedEncoder):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.spare, self.first, self.both = Part(lambda x: x), Part(lambda x: x[:7]), Part(lambda x: {"a": x, "b": x})

        def forward(self, x: Tensor) -> Tensor:
            embeddings = super().forward(x)
            self.first(embeddings), self.both(embeddings)
            return embeddings

    with pytest.raises(NetsimError, match=message):
        Parts(**arguments).training_step(given, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contrastive_labels": "klusters"}, "`contrastive_labels` to be 'batch', 'instance', or a number of clusters"),
        ({"contrastive_layer": 3}, "`contrastive_layer` to be the name of a module"),
        ({"contrastive_criterion": ContrastiveLoss}, "but got the class ContrastiveLoss"),
        ({"contrastive_criterion": GroupSimilarityLoss()}, "which is of gradients. Give it to `SimilarityMixin`"),
        ({"contrastive_learning_rate": -1.0}, "`contrastive_learning_rate` to be a positive number"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message):
        TrainedEncoder(**arguments)

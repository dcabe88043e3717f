"""Embeddings are those that the step's own pass puts out; the loss on them, and its parameters, are trained with the module."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import NetsimError
from lightning_netsim.losses import ContrastiveLoss, DifferenceAlignmentLoss, GroupSimilarityLoss, MetricLearningLoss
from lightning_netsim.mixins import ContrastiveMixin, DifferenceAlignmentMixin, SimilarityMixin
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


def test_embeddings_of_a_named_layer() -> None:
    module = Embedded(contrastive_layer="net.0")
    inputs, labels = batch()
    wanted = F.cross_entropy(module.net(inputs), labels) + ContrastiveLoss()(module.net[0](inputs), labels)
    torch.testing.assert_close(module.training_step((inputs, labels), 0), wanted)


def test_what_follows_a_layer_in_place_does_not_change_its_embeddings() -> None:
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


def test_a_class_of_its_own_with_a_step_keeps_it() -> None:
    class Base(ContrastiveMixin):
        """Only more defaults."""

    class Mine(Base, Plain):
        """A module with a step."""

    inputs, labels = batch()
    module = Mine()
    wanted = F.cross_entropy(module.net(inputs), labels) + ContrastiveLoss()(module.net(inputs), labels)
    torch.testing.assert_close(module.training_step((inputs, labels), 0), wanted)


def test_the_term_is_nothing_where_it_is_not_due() -> None:
    module = TrainedEncoder(contrastive_weight=0.0)
    loss = module.training_step(batch(), 0)
    assert loss == 0
    assert loss.requires_grad


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


def test_views_need_no_labels() -> None:
    module = TrainedEncoder(contrastive_labels="instance")
    both, labels = views()
    assert module.training_step((both,), 0) == module.training_step((both, labels), 0)


def test_clusters_of_the_epoch_before_are_labels() -> None:
    spy = Spy()
    module = TrainedEncoder(contrastive_criterion=spy, contrastive_labels=3)
    trainer(max_epochs=3).fit(module, view_loader())
    first = [labels.tolist() for labels in spy.seen[:2]]
    assert first == [[*range(6)] * 2] * 2  # Each sample is a class of its own.
    later = torch.stack(spy.seen[2:])
    assert later.max() < 3
    assert torch.equal(later[:, :6], later[:, 6:])  # Views of a sample share its cluster.
    assert len(later.unique()) > 1


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_resumed_run_goes_on_with_the_clusters(epochs: int, tmp_path: Path) -> None:
    whole = TrainedEncoder(contrastive_labels=3)
    trainer(max_epochs=3).fit(whole, view_loader())
    part = TrainedEncoder(contrastive_labels=3)
    first = trainer(max_epochs=epochs)
    first.fit(part, view_loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = TrainedEncoder(contrastive_labels=3)
    trainer(max_epochs=3).fit(again, view_loader(), ckpt_path=tmp_path / "last.ckpt")
    for name, value in whole.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value)


def test_single_views_are_only_collected_in_the_first_epoch(caplog: pytest.LogCaptureFixture) -> None:
    spy = Spy()
    with caplog.at_level("INFO"):
        trainer(max_epochs=2).fit(TrainedEncoder(contrastive_criterion=spy, contrastive_labels=3), loader())
    assert caplog.text.count("only collects embeddings") == 1
    assert [len(labels) for labels in spy.seen] == [0, 0, 6, 6]


def test_an_output_that_is_not_a_number_and_no_embedding_does_no_harm() -> None:
    class Two(TrainedEncoder):
        def forward(self, x: Tensor) -> Any:
            return {"maps": super().forward(x).view(-1, 3, 1, 1) * torch.nan, "others": super().forward(x)}

    loss = Two(contrastive_layer="net.0").training_step(batch(), 0)
    assert torch.isfinite(loss)


def test_a_criterion_that_is_no_scalar() -> None:
    with pytest.raises(NetsimError, match=r"`contrastive_criterion` to be one that returns a scalar, but got shape \(12,\)"):
        TrainedEncoder(contrastive_criterion=lambda embeddings, labels: embeddings.sum(1)).training_step(batch(), 0)


def test_proxies_are_trained_though_the_optimizer_was_not_told() -> None:
    module = TrainedEncoder(contrastive_criterion=proxies())
    before = module.contrastive_criterion.loss.proxies.detach().clone()  # type: ignore[union-attr]
    fitting = trainer()
    fitting.fit(module, loader())
    assert not torch.equal(module.contrastive_criterion.loss.proxies, before)  # type: ignore[union-attr]
    [group] = fitting.optimizers[0].param_groups
    assert len(group["params"]) == 5


def test_proxies_at_their_own_rate() -> None:
    class Known(TrainedEncoder):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for kind in (TrainedEncoder, Known):
        fitting = trainer()
        fitting.fit(kind(contrastive_criterion=proxies(), contrastive_learning_rate=2.0), loader())
        groups = fitting.optimizers[0].param_groups
        assert [(group["lr"], len(group["params"])) for group in groups] == [(0.1, 4), (2.0, 1)]


def test_a_group_that_the_module_has_given_is_kept() -> None:
    class Grouped(TrainedEncoder):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net.parameters()}, {"params": self.contrastive_criterion.parameters(), "lr": 5.0}]
            return {"optimizer": torch.optim.SGD(groups, lr=0.1)}

    fitting = trainer()
    fitting.fit(Grouped(contrastive_criterion=proxies()), loader())
    assert [(group["lr"], len(group["params"])) for group in fitting.optimizers[0].param_groups] == [(0.1, 4), (5.0, 1)]


class Scheduled(TrainedEncoder):
    """A module whose rate follows a schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=20)]


def test_proxies_follow_the_schedule_of_the_module() -> None:
    module = Scheduled(contrastive_criterion=proxies())
    fitting = trainer(max_epochs=2)
    fitting.fit(module, loader())
    assert len(fitting.optimizers[0].param_groups[0]["params"]) == 5


def test_a_rate_of_their_own_beside_a_schedule_is_refused() -> None:
    module = Scheduled(contrastive_criterion=proxies(), contrastive_learning_rate=1.0)
    with pytest.raises(NetsimError, match=r"`contrastive_learning_rate` to be None beside .* `configure_optimizers` instead"):
        trainer().fit(module, loader())


def test_training_goes_on_with_the_proxies_of_a_checkpoint(tmp_path: Path) -> None:
    whole = TrainedEncoder(contrastive_criterion=proxies())
    trainer(max_epochs=2).fit(whole, loader())
    part = TrainedEncoder(contrastive_criterion=proxies())
    first = trainer(max_epochs=1)
    first.fit(part, loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = TrainedEncoder(contrastive_criterion=proxies())
    trainer(max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


class Saved(ContrastiveMixin, Plain):
    """A module that saves its hyperparameters."""

    def __init__(self, width: int = 5, **kwargs: Any) -> None:
        super().__init__(width=width, **kwargs)
        self.save_hyperparameters()


def test_a_checkpoint_knows_the_criterion(tmp_path: Path) -> None:
    fitting = trainer()
    fitting.fit(Saved(width=7, contrastive_criterion=proxies(), contrastive_labels="batch"), loader())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    again = Saved.load_from_checkpoint(tmp_path / "last.ckpt")
    assert type(again.contrastive_criterion.loss).__name__ == "ProxyAnchorLoss"  # type: ignore[union-attr]
    assert again.net[0].out_features == 7


def test_a_function_has_to_be_given_again(tmp_path: Path) -> None:
    def criterion(embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings.square().mean()

    module = Saved(contrastive_criterion=criterion)
    inputs, labels = batch()
    wanted = F.cross_entropy(module.net(inputs), labels) + module.net(inputs).square().mean()
    torch.testing.assert_close(module.training_step((inputs, labels), 0), wanted)
    fitting = trainer()
    fitting.fit(module, loader())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(NetsimError, match=r"`contrastive_criterion` to be given again"):
        Saved.load_from_checkpoint(tmp_path / "last.ckpt")
    Saved.load_from_checkpoint(tmp_path / "last.ckpt", contrastive_criterion=criterion)


def test_mixins_stack() -> None:
    class Everything(SimilarityMixin, DifferenceAlignmentMixin, ContrastiveMixin, Plain):
        """All terms at once."""

    module = Everything(similarity_weight=0.2, alignment_weight=0.3, contrastive_weight=0.4)
    only = dict.fromkeys(("similarity_weight", "alignment_weight", "contrastive_weight"), 0.0)
    plain = Plain().training_step(batch(), 0)
    parts = [Everything(**{**only, name: weight}) for name, weight in zip(only, (0.2, 0.3, 0.4), strict=True)]
    wanted = plain + sum(part.training_step(batch(), 0) - plain for part in parts)
    torch.testing.assert_close(module.training_step(batch(), 0), wanted)


def test_terms_are_logged() -> None:
    class Both(DifferenceAlignmentMixin, ContrastiveMixin, Plain):
        """Two terms."""

    fitting = trainer()
    fitting.fit(Both(contrastive_weight=[(0, 0.0), (10, 1.0)]), loader())
    names = {"netsim/contrastive_loss", "netsim/contrastive_weight", "netsim/alignment_loss", "train_loss"}
    assert names <= fitting.callback_metrics.keys()


def test_half_precision() -> None:
    class Watching(ContrastiveLoss):
        def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            assert embeddings.dtype == torch.float32
            assert not torch.is_autocast_enabled("cpu")
            return super().compute(embeddings, labels)

    fitting = trainer(precision="bf16-mixed")
    fitting.fit(Embedded(contrastive_criterion=Watching()), loader())
    assert torch.isfinite(fitting.callback_metrics["netsim/contrastive_loss"])


def test_an_unknown_layer_is_said_before_training() -> None:
    class Stepping(Embedded):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("a step was run")

    with pytest.raises(NetsimError, match=r"`contrastive_layer` to be the name of a module .* 'net.9'. There are .*'net.0'"):
        trainer().fit(Stepping(contrastive_layer="net.9"), loader())


def test_a_layer_that_is_not_called() -> None:
    module = Embedded(contrastive_layer="spare")
    module.spare = nn.Linear(2, 2)
    with pytest.raises(NetsimError, match="a module that the training step calls, but got 'spare', which it does not"):
        module.training_step(batch(), 0)


def test_rows_that_do_not_fit_the_samples() -> None:
    class Doubling(ContrastiveMixin, Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0][:7]).sum()

    with pytest.raises(NetsimError, match="one or more rows for each sample, but got 7 rows from a batch of 12"):
        Doubling().training_step(batch(), 0)


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        ("batch", (batch()[0],), r"`labels` to be the class of each sample, but got none. .*'instance'"),
        ("batch", (batch()[0], batch()[0]), r"`labels` to be a tensor of 12 class numbers"),
        ("batch", (batch()[0], batch()[1][:6]), r"`labels` to be a tensor of 12 class numbers.*shape \(6,\)"),
        ("batch", (batch()[0], batch()[1][:5]), r"`labels` to be a tensor of 12 class numbers.*shape \(5,\)"),
        ("batch", (batch()[0], ["a"] * 12), r"the class of each sample, but got a list without whole numbers"),
        ("batch", (batch()[0], batch()[1].float()), r"`labels` to be a tensor of 12 class numbers"),
        ("instance", batch(), r"`batch` to be several views of each sample, but got one. .*\[first views, second views\]"),
    ],
)
def test_missing_labels_and_views(labels: str, given: Any, message: str) -> None:
    with pytest.raises(NetsimError, match=message):
        TrainedEncoder(contrastive_labels=labels).training_step(given, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contrastive_labels": "klusters"}, "`contrastive_labels` to be 'batch', 'instance', or a number of clusters"),
        ({"contrastive_labels": 1}, "a number of clusters from 2, but got 1"),
        ({"contrastive_labels": 2.5}, "a number of clusters from 2, but got 2.5"),
        ({"contrastive_layer": 3}, "`contrastive_layer` to be the name of a module"),
        ({"contrastive_criterion": ContrastiveLoss}, "but got the class ContrastiveLoss"),
        ({"contrastive_criterion": GroupSimilarityLoss()}, "which is of gradients. Give it to `SimilarityMixin`"),
        ({"contrastive_learning_rate": -1.0}, "`contrastive_learning_rate` to be a positive number"),
        ({"contrastive_weight": "much"}, "`contrastive_weight` to be a number"),
        ({"contrastive_criterion": 3}, "`contrastive_criterion` to be a module of"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message):
        TrainedEncoder(**arguments)


def test_embeddings_that_are_not_finite() -> None:
    module = TrainedEncoder()
    nn.init.constant_(module.net[2].bias, torch.inf)
    with pytest.raises(NetsimError, match="`embeddings` to be finite"):
        module.training_step(batch(), 0)


def test_unlabeled_samples_are_left_out() -> None:
    inputs, labels = batch()
    labels[:4] = -1
    module = TrainedEncoder()
    expected = ContrastiveLoss()(module.net(inputs[4:]), labels[4:])
    torch.testing.assert_close(module.training_step((inputs, labels), 0), expected)


def test_one_class_and_one_sample_add_nothing_that_is_not_finite() -> None:
    for size in (1, 3):
        module = TrainedEncoder(contrastive_criterion=MetricLearningLoss("NPairsLoss"))
        loss = module.training_step((batch(size)[0], torch.zeros(size, dtype=torch.long)), 0)
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in module.net.parameters())


def test_a_copy_of_the_module_trains_alike() -> None:
    module = Embedded(contrastive_criterion=proxies())
    copy = deepcopy(module)
    torch.testing.assert_close(copy.training_step(batch(), 0), module.training_step(batch(), 0))


def test_the_mixin_stands_left() -> None:
    with pytest.raises(NetsimError, match="a class with DifferenceAlignmentMixin left of Plain"):
        type("Wrong", (Plain, DifferenceAlignmentMixin), {})


def test_data_sets_of_tensors_work_as_they_are() -> None:
    data = DataLoader(TensorDataset(batch()[0], batch()[1].unsqueeze(1)), batch_size=6)  # Labels as a column.
    trainer().fit(TrainedEncoder(contrastive_criterion=ContrastiveLoss(2.0)), data)


def test_difference_alignment_alone_is_no_training() -> None:
    class Aligning(DifferenceAlignmentMixin, Encoder):
        """A module without a step, and without a loss to learn by."""

    with pytest.raises(Exception, match="training_step"):
        trainer().fit(Aligning(alignment_criterion=DifferenceAlignmentLoss()), loader())


def test_a_rate_for_a_criterion_without_parameters() -> None:
    with pytest.raises(NetsimError, match="`contrastive_learning_rate` to be None for a criterion without parameters"):
        trainer().fit(TrainedEncoder(contrastive_learning_rate=1.0), loader())


def test_a_rate_where_the_optimizer_is_replaced() -> None:
    module = TrainedEncoder(contrastive_criterion=proxies(), contrastive_learning_rate=1.0)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(NetsimError, match="where `configure_optimizers` has been replaced"):
        trainer().fit(module, loader())


def test_criteria_of_the_module_itself_are_its_own_affair() -> None:
    class Own(ContrastiveMixin, Plain):
        def __init__(self, criterion: Any = None, class_weight: Any = None, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.save_hyperparameters()

    loss, weight = nn.CrossEntropyLoss(), torch.ones(3)
    module = Own(criterion=loss, class_weight=weight)
    assert isinstance(module.hparams["criterion"], nn.CrossEntropyLoss)
    assert torch.equal(module.hparams["class_weight"], weight)


def test_an_output_without_one_matrix_of_embeddings_names_the_remedy() -> None:
    class Two(TrainedEncoder):
        def forward(self, x: Tensor) -> Any:
            return {"first": super().forward(x), "second": super().forward(x)}

    with pytest.raises(NetsimError, match="Name the layer that puts out one tensor by `contrastive_layer="):
        Two().training_step(batch(), 0)

"""The differences between the classes of a batch are aligned, beside whatever loss trains the embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_netsim import NetsimError
from lightning_netsim.losses import DifferenceAlignmentLoss
from lightning_netsim.mixins import ContrastiveMixin, DifferenceAlignmentMixin
from tests.mixins.modules import Aligned, Encoder, Plain, batch, gradients, loader, trainer

ALL = DifferenceAlignmentLoss(pairs="all")


def test_step_is_the_loss_plus_the_term() -> None:
    module = Aligned(alignment_criterion=ALL, alignment_weight=0.7)
    inputs, labels = batch()
    loss = module.training_step((inputs, labels), 0)
    outputs = module.net(inputs)
    wanted = F.cross_entropy(outputs, labels) + 0.7 * ALL(outputs, labels)
    torch.testing.assert_close(loss, wanted)
    expected = gradients(module, wanted)
    for name, gradient in gradients(module, loss).items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_named_layer_and_labels_by_instance() -> None:
    module = Aligned(alignment_criterion=ALL, alignment_layer="net.0", alignment_labels="instance")
    inputs, labels = batch()
    wanted = F.cross_entropy(module.net(inputs), labels) + ALL(module.net[0](inputs))
    torch.testing.assert_close(module.training_step((inputs, labels), 0), wanted)
    assert not torch.isclose(ALL(module.net[0](inputs)), ALL(module.net[0](inputs), labels))


def test_the_spread_of_distances_falls() -> None:
    class Learner(DifferenceAlignmentMixin, ContrastiveMixin, Encoder):
        """Embeddings, aligned."""

    def spread(weight: float) -> Tensor:
        module = Learner(alignment_weight=weight)
        trainer(max_epochs=60).fit(module, loader(size=48, batch_size=24))
        with torch.no_grad():
            inputs, labels = batch(48)
            return ALL(module.net(inputs), labels)

    assert spread(3.0) < 0.7 * spread(0.0)


def test_clusters_of_the_epoch_before_are_labels() -> None:
    seen: list[Tensor] = []

    def criterion(embeddings: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return embeddings.sum() * 0

    module = Aligned(alignment_criterion=criterion, alignment_labels=4)
    trainer(max_epochs=2).fit(module, loader())
    assert seen[0].tolist() == [*range(6)]
    assert seen[-1].max() < 4


def test_every_second_step() -> None:
    class Noting(Aligned):
        terms: list[float]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.terms.append(float(outputs["loss"]))

    modules = []
    for weight in (0.0, 1e-12):  # Not seen in the loss, but in what is logged.
        module = Noting(alignment_weight=weight, alignment_every_n_steps=2)
        module.terms = []
        fitting = trainer()
        fitting.fit(module, loader(size=24))
        modules.append((module, fitting.callback_metrics))
    assert modules[0][0].terms == pytest.approx(modules[1][0].terms)
    assert "netsim/alignment_loss" not in modules[0][1]
    assert "netsim/alignment_loss" in modules[1][1]


class Unlabeled(DifferenceAlignmentMixin, Plain):
    """A module that needs no labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).sum()


def test_bad_input() -> None:
    with pytest.raises(NetsimError, match="`alignment_labels` to be 'batch', 'instance', or a number of clusters"):
        Aligned(alignment_labels="none")
    with pytest.raises(NetsimError, match=r"'net\.7'\. There are"):
        trainer().fit(Aligned(alignment_layer="net.7"), loader())
    with pytest.raises(NetsimError, match=r"`labels` to be the class of each sample.*`alignment_labels`"):
        Unlabeled().training_step((batch()[0],), 0)

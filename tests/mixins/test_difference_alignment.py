"""The differences between the classes of a batch are aligned, beside whatever loss trains the embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_netsim import NetsimError
from lightning_netsim.losses import DifferenceAlignmentLoss
from tests.mixins.modules import Aligned, batch, gradients

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


def test_bad_input() -> None:
    with pytest.raises(NetsimError, match="`alignment_labels` to be 'batch', 'instance', or a number of clusters"):
        Aligned(alignment_labels="none")

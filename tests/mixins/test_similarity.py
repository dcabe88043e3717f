"""The gradients that a mixin sees are those of the module's own pass, and where that would be wrong, of a right one."""

from __future__ import annotations

import logging
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_netsim import JacobianOperator, NetsimError, SimilarityBatch
from lightning_netsim.losses import (
    DensityLoss,
    GradientBatch,
    GroupSimilarityLoss,
    InvarianceLoss,
    TangentLoss,
)
from lightning_netsim.mixins import SimilarityMixin
from tests.mixins.modules import Plain, Regularized, batch, gradients, loader, trainer

CRITERIA = [GroupSimilarityLoss(), DensityLoss(0.5), InvarianceLoss(lambda x: x.roll(1)), TangentLoss(torch.ones_like)]


def expected_step(module: Any, criterion: Any, directions: Any = "contrast", weight: float = 0.1) -> Tensor:
    """Return the loss of a step, from the network alone."""
    images, labels = batch()
    operator = JacobianOperator(module.net, directions=directions, create_graph=True)
    return F.cross_entropy(module.net(images), labels) + weight * criterion(GradientBatch(operator, images, labels))


def assert_same_gradients(module: Any, loss: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    wanted = gradients(module, expected)
    for name, gradient in gradients(module, loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: type(criterion).__name__)
def test_step_is_the_loss_plus_the_criterion_of_the_network(criterion: Any) -> None:
    module = Regularized(criterion=criterion)
    loss = module.training_step(batch(), 0)
    directions = 1 if isinstance(criterion, (DensityLoss, InvarianceLoss, TangentLoss)) else "contrast"
    assert_same_gradients(module, loss, expected_step(module, criterion, directions))


def test_the_forward_pass_of_the_step_is_used() -> None:
    module = Regularized()
    module.training_step(batch(), 0)
    looked_at = module.forwards
    for _ in range(3):
        module.training_step(batch(), 0)
    assert module.forwards == looked_at + 3


def test_dropout_is_that_of_the_step() -> None:
    module = Regularized(dropout=0.5, similarity_weight=1.0, criterion=lambda batch: batch.outputs.square().mean())
    module.training_step(batch(), 0)
    torch.manual_seed(5)
    loss = module.training_step(batch(), 1)
    torch.manual_seed(5)
    images, labels = batch()
    outputs = module.net(images)
    torch.testing.assert_close(loss, F.cross_entropy(outputs, labels) + outputs.square().mean())


def test_looking_at_the_model_leaves_random_numbers_and_buffers_as_they_were() -> None:
    class Noisy(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.rand_like(x))

    class RegularizedNoisy(SimilarityMixin, Noisy):
        """The same, regularized."""

    states = []
    for module in (Noisy(dropout=0.5), RegularizedNoisy(dropout=0.5)):
        torch.manual_seed(5)
        module.training_step(batch(), 0)
        states.append(torch.rand(1))
    assert torch.equal(*states)
    drawn = []
    for module in (Plain(norm=True, dropout=0.5), Regularized(norm=True, dropout=0.5)):
        torch.manual_seed(5)
        module.training_step(batch(), 0)
        drawn.append(torch.rand(1))
        assert int(module.net[1].num_batches_tracked) == 1
    assert torch.equal(*drawn), "a second pass draws no dropout"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_transformer_trains_with_its_dropout(dropout: float, caplog: pytest.LogCaptureFixture) -> None:
    class Encoder(SimilarityMixin, Plain):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.encoder(x.unsqueeze(1) * torch.arange(1, 4).view(1, 3, 1)).mean(1))

    module = Encoder()
    with caplog.at_level(logging.INFO):
        torch.manual_seed(5)
        loss = module.training_step(batch(), 0)
    assert ("would draw other dropout" in caplog.text) == (dropout > 0)
    assert all(part.training for part in module.modules())
    images, labels = batch()
    torch.manual_seed(5)
    own = F.cross_entropy(module(images), labels)
    module.eval()
    term = GroupSimilarityLoss()(
        GradientBatch(JacobianOperator(module, directions="contrast", create_graph=True), images, labels)
    )
    assert_same_gradients(module, loss, own + 0.1 * term)


class OtherCall(SimilarityMixin, Plain):
    """A module whose step does not call it on the inputs of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class TwoCalls(SimilarityMixin, Plain):
    """A module whose step calls it twice."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self(batch[0] + 1)
        return loss


class Says(SimilarityMixin, Plain):
    """A module that says what is compared."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["points"]), batch["kind"])

    def similarity_step(self, batch: Any, batch_idx: int) -> SimilarityBatch:
        self.log("similarity_step", 1.0)
        return SimilarityBatch(self.net(batch["points"]), labels=batch["kind"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherCall, "does not call the module once"),
        (TwoCalls, "does not call the module once"),
        (Says, "`similarity_step` says"),
    ],
)
def test_otherwise_a_second_pass_is_run_and_said_once(kind: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    module = kind()
    given: Any = dict(zip(("points", "kind"), batch(), strict=True)) if kind is Says else batch()
    with caplog.at_level(logging.INFO):
        for number in range(2):
            assert_same_gradients(module, module.training_step(given, number), expected_step(module, GroupSimilarityLoss()))
    [said] = [record.message for record in caplog.records if "second forward pass" in record.message]
    assert reason in said


def test_train_mode_batch_norm_is_frozen_for_the_criterion_alone() -> None:
    module = Regularized(norm=True)
    norm = module.net[1]
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    plain = Plain(norm=True)
    plain.load_state_dict(module.state_dict())
    loss = module.training_step(batch(), 0)
    images, labels = batch()
    expected = F.cross_entropy(plain.net(images), labels)
    torch.testing.assert_close(norm.running_mean, plain.net[1].running_mean)
    assert norm.training
    assert all(part.training for part in module.modules())
    # The step moves the running statistics before the criterion is computed from them.
    module.net.eval()
    operator = JacobianOperator(module.net, directions="contrast", create_graph=True)
    term = GroupSimilarityLoss()(GradientBatch(operator, images, labels))
    torch.testing.assert_close(loss, expected + 0.1 * term, rtol=1e-5, atol=1e-5)


def test_batch_norm_without_running_statistics_is_refused() -> None:
    module = Regularized()
    module.net[1] = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh())
    with pytest.raises(NetsimError, match=r"batch norm `net\.1\.0` using batch statistics"):
        module.training_step(batch(), 0)


def test_gradients_under_autocast_are_those_of_float32() -> None:
    module = Regularized(similarity_weight=100.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(batch(), 0)
        images, labels = batch()
        own = F.cross_entropy(module.net(images), labels)
    term = expected_step(module, GroupSimilarityLoss(), weight=1.0) - F.cross_entropy(module.net(images), labels)
    torch.testing.assert_close((loss - own) / 100, term, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_trains_in_other_precisions(precision: Any) -> None:
    fitting = trainer(max_epochs=2, precision=precision)
    fitting.fit(Regularized(), loader())
    assert -1.01 <= float(fitting.callback_metrics["netsim/similarity_loss"]) < 0


class Attentive(SimilarityMixin, Plain):
    """A module whose attention is fused by default."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.net[0](x.unsqueeze(1) * torch.arange(1, 4).view(1, 3, 1)).unsqueeze(1)
        return self.net[1:](F.scaled_dot_product_attention(rows, rows, rows).mean((1, 2)))


def test_attention_is_run_by_the_kernel_that_can_be_differentiated_twice() -> None:
    (images, labels), module = batch(), Attentive()
    loss = module.training_step((images, labels), 0)
    operator = JacobianOperator(module, directions="contrast", create_graph=True)
    term = GroupSimilarityLoss()(GradientBatch(operator, images, labels))
    assert_same_gradients(module, loss, F.cross_entropy(module(images), labels) + 0.1 * term)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_run_eagerly(in_place: bool, caplog: pytest.LogCaptureFixture) -> None:
    module, expected = Regularized(), Regularized()
    if in_place:
        module.net.compile(backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    with caplog.at_level(logging.INFO):
        loss = module.training_step(batch(), 0)
    wanted = gradients(expected, expected.training_step(batch(), 0))
    for name, gradient in gradients(module, loss).items():
        torch.testing.assert_close(gradient, wanted[name.replace("_orig_mod.", "")], rtol=1e-5, atol=1e-6)
    assert "compiled code cannot be differentiated twice" in caplog.text


def test_a_compiled_module_is_refused() -> None:
    with pytest.raises(NetsimError, match=r"an uncompiled module .* torch.compile\(self.network\)"):
        trainer().fit(torch.compile(Regularized(), backend="eager"), loader())


def test_missing_labels_are_said_with_the_remedy() -> None:
    class Unlabeled(SimilarityMixin, Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

    with pytest.raises(NetsimError, match=r"`labels` to be the group of each sample.* Give the batch as \(inputs, labels\)"):
        Unlabeled().training_step(batch()[0], 0)
    assert torch.isfinite(Unlabeled(criterion=DensityLoss(0.5)).training_step(batch()[0], 0))
    assert torch.isfinite(Unlabeled(criterion=InvarianceLoss(lambda x: -x)).training_step(batch()[0], 0))


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_without_pairs_adds_a_zero_on_the_graph(size: int) -> None:
    module = Regularized()
    loss = module.training_step(batch(size), 0)
    images, labels = batch(size)
    torch.testing.assert_close(loss, F.cross_entropy(module.net(images), labels))
    assert all(gradient is not None for gradient in gradients(module, loss).values())


def test_chosen_parameters_alone_are_compared() -> None:
    module = Regularized(similarity_parameters=["net.3"])
    images, labels = batch()
    loss = module.training_step((images, labels), 0)
    operator = JacobianOperator(module.net, directions="contrast", parameters=["3"], create_graph=True)
    term = GroupSimilarityLoss()(GradientBatch(operator, images, labels))
    assert_same_gradients(module, loss, F.cross_entropy(module.net(images), labels) + 0.1 * term)
    with pytest.raises(NetsimError, match="`parameters` to be"):
        Regularized(similarity_parameters=["nowhere"]).training_step(batch(), 0)


def test_parameters_that_are_unfrozen_are_compared_from_then_on() -> None:
    module = Regularized(similarity_weight=1.0)
    module.net[0].requires_grad_(False)
    module.training_step(batch(), 0)
    module.net[0].requires_grad_(True)
    loss = module.training_step(batch(), 1)
    assert_same_gradients(module, loss, expected_step(module, GroupSimilarityLoss(), weight=1.0))


@pytest.mark.parametrize("copied", [deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_compares_its_own_parameters(copied: Any) -> None:
    module = Regularized(similarity_weight=1.0)
    module.training_step(batch(), 0)
    copy = copied(module)
    with torch.no_grad():
        copy.net[0].weight.mul_(2)
    assert_same_gradients(copy, copy.training_step(batch(), 0), expected_step(copy, GroupSimilarityLoss(), weight=1.0))


class PseudoLabels(SimilarityMixin, Plain):
    """A module whose step calls it without a graph first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self(batch[0])
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_pass_without_a_graph_is_not_the_one_that_is_trained_by() -> None:
    module = PseudoLabels()
    assert_same_gradients(module, module.training_step(batch(), 0), expected_step(module, GroupSimilarityLoss()))


class AnyLabels(SimilarityMixin, Plain):
    """A module that takes labels as a vector, a column or rows with a single one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1].squeeze(1) if batch[1].shape[1:] == (1,) else batch[1])


def test_labels_of_another_form_are_said_as_they_are() -> None:
    images, labels = batch()
    module = AnyLabels(similarity_directions=1)
    with pytest.raises(NetsimError, match=r"`labels` to be the group of each sample.* got shape \(12, 3\) of torch.float32"):
        module.training_step((images, F.one_hot(labels, 3).float()), 0)
    column = module.training_step((images, labels.unsqueeze(1)), 0)
    torch.testing.assert_close(column, module.training_step((images, labels), 0))


def test_a_first_batch_of_nan_does_not_end_the_look_at_the_model() -> None:
    class Shared(SimilarityMixin, Plain):
        """A module that uses a layer's weight once more, beside the layer."""

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + F.linear(torch.tanh(self.net[0](x)), self.net[3].weight)

    module, fresh = Shared(), Shared()
    images, labels = batch()
    module.training_step((images * torch.nan, labels), 0)
    torch.testing.assert_close(module.training_step((images, labels), 1), fresh.training_step((images, labels), 0))


def test_a_step_that_changes_its_inputs_first_is_told_the_remedy() -> None:
    class Flattening(SimilarityMixin, Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0].flatten(1)), batch[1])

    images, labels = batch()
    with pytest.raises(NetsimError, match=r"`forward` to be a function of the inputs.*RuntimeError.*`similarity_step\(batch"):
        Flattening().training_step((images.view(12, 2, 2), labels), 0)

"""What every mixin does to a training step, whatever its term."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_netsim import NetsimError
from lightning_netsim.losses import DensityLoss, GroupSimilarityLoss, InvarianceLoss
from lightning_netsim.mixins import SimilarityMixin
from tests.mixins.modules import OutputNorm, Plain, Regularized, batch, loader, trainer


def added(module: Any, weight: float = 0.5) -> float:
    """Return by how much the training step's loss exceeds that of the plain step, in units of the known term."""
    images, labels = batch()
    plain = nn.functional.cross_entropy(module.net(images), labels)
    result = module.training_step((images, labels), 0)
    loss = result["loss"] if isinstance(result, dict) else result
    return float((loss - plain) / (weight * module.net(images).square().mean()))


def test_a_step_that_extends_a_regularized_one_is_regularized_once() -> None:
    class Extended(Regularized):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "more": 7}

    class Inherited(Extended):
        pass

    for kind in (Extended, Inherited):
        module = kind(criterion=OutputNorm(), similarity_weight=0.5)
        assert added(module) == pytest.approx(1)
        assert module.training_step(batch(), 0)["more"] == 7


def test_a_module_without_a_training_step_is_left_to_lightning() -> None:
    class Nothing(SimilarityMixin):
        def configure_optimizers(self) -> None: ...

    assert Nothing.training_step is LightningModule.training_step


def test_the_wrong_order_of_bases_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(
        NetsimError, match=r"SimilarityMixin left of Plain, but got Plain, SimilarityMixin. Write `class Wrong\(Sim"
    ):

        class Wrong(Plain, SimilarityMixin):
            pass

    class Beside:
        """A class that is no module may stand anywhere."""

    class Right(Beside, SimilarityMixin, Plain):
        pass

    assert added(Right(criterion=OutputNorm(), similarity_weight=0.5)) == pytest.approx(1)


def test_manual_optimization_is_refused_where_it_is_switched_on() -> None:
    class Manual(SimilarityMixin):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class ManualClass(Regularized):
        automatic_optimization = False

    for run in (Manual, lambda: ManualClass().training_step(batch(), 0)):
        with pytest.raises(
            NetsimError, match=r"`automatic_optimization` to be True .* compute a criterion of `lightning_netsim.losses`"
        ):
            run()
    assert Regularized().automatic_optimization


@pytest.mark.parametrize(
    ("every", "weight", "steps"), [(1, 0.1, [0, 1, 2, 3]), (3, 0.1, [0, 3]), (1, [[1, 0.0], [3, 1.0]], [2, 3])]
)
def test_the_term_is_computed_and_logged_where_it_is_due(every: int, weight: Any, steps: list[int]) -> None:
    seen: list[int] = []

    class Noting(OutputNorm):
        def compute(self, batch: Any) -> Tensor:
            seen.append(module.global_step)
            return super().compute(batch)

    module = Regularized(criterion=Noting(), similarity_every_n_steps=every, similarity_weight=weight)
    fitting = trainer(max_epochs=2)
    fitting.fit(module, loader())
    assert seen == steps
    logged = fitting.callback_metrics
    assert logged["netsim/similarity_loss"] > 0
    assert logged.get("netsim/similarity_weight") == (None if weight == 0.1 else 1.0)
    assert "train_loss" in logged


def test_weight_zero_leaves_the_run_as_it_was() -> None:
    plain, muted = Plain(dropout=0.3), Regularized(dropout=0.3, similarity_weight=0.0)
    for module in (plain, muted):
        torch.manual_seed(3)
        trainer(max_epochs=2).fit(module, loader())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, muted.state_dict()[name])


def test_hyperparameters_and_checkpoints_keep_the_criterion(tmp_path: Path) -> None:
    criterion = DensityLoss([0.1, 0.2], "sum")
    module = Regularized(width=7, criterion=criterion, similarity_weight=[[0, 0.5], [9, 0.0]], similarity_directions=2)
    assert module.hparams["width"] == 7
    fitting = trainer()
    fitting.fit(module, loader())
    fitting.save_checkpoint(tmp_path / "module.ckpt")
    again = Regularized.load_from_checkpoint(tmp_path / "module.ckpt")
    assert repr(again.similarity_criterion) == "DensityLoss(target=[0.1, 0.2], reduction='sum')"
    assert again.hparams == module.hparams
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_bad_arguments_are_refused_when_the_module_is_made() -> None:
    for wrong, message in (
        ({"criterion": 3}, "`criterion` to be a module of `lightning_netsim.losses`"),
        ({"criterion": OutputNorm}, "`criterion` to be a module of .*, but got the class OutputNorm"),
        ({"similarity_weight": "much"}, "`similarity_weight` to be a number"),
        ({"similarity_every_n_steps": 0}, "`similarity_every_n_steps` to be a positive int"),
        ({"similarity_directions": "both"}, "`directions` to be one of"),
    ):
        with pytest.raises(NetsimError, match=message):
            Regularized(**wrong)
    assert isinstance(Regularized().similarity_criterion, GroupSimilarityLoss)


def test_validation_by_the_training_step_adds_nothing() -> None:
    class Validated(Regularized):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    module = Validated(criterion=OutputNorm(), similarity_weight=0.5)
    trainer(num_sanity_val_steps=2).fit(module, loader(), loader())
    with torch.no_grad():
        assert added(Validated(criterion=OutputNorm(), similarity_weight=0.5)) == pytest.approx(0)


@pytest.mark.parametrize("result", [None, {"outputs": 1}])
def test_a_step_that_is_skipped_or_without_a_loss_is_left_to_lightning(result: Any) -> None:
    class Lossless(SimilarityMixin, Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self(batch[0])
            return result

    assert Lossless().training_step(batch(), 0) == result


@pytest.mark.parametrize(
    ("options", "name", "lost"),
    [
        ({"criterion": InvarianceLoss(lambda x: -x)}, "criterion", "<lambda>"),
        ({"criterion": lambda batch: batch.outputs.sum()}, "criterion", "<lambda>"),
        ({"similarity_weight": lambda step: 0.1}, "similarity_weight", "<lambda>"),
    ],
)
def test_what_a_checkpoint_cannot_hold_has_to_be_given_again(
    options: dict[str, Any], name: str, lost: str, tmp_path: Path
) -> None:
    module = Regularized(**options)
    fitting = trainer(limit_train_batches=0)
    fitting.fit(module, loader())
    fitting.save_checkpoint(tmp_path / "module.ckpt")
    with pytest.raises(NetsimError, match=f"Expected `{name}` to be given again.*{lost}.*load_from_checkpoint"):
        Regularized.load_from_checkpoint(tmp_path / "module.ckpt")
    again = Regularized.load_from_checkpoint(tmp_path / "module.ckpt", **options)
    assert torch.equal(again.net[0].weight, module.net[0].weight)

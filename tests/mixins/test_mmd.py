"""Features of two domains, or of a latent and its prior, are matched beside whatever loss trains a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_netsim import NetsimError
from lightning_netsim.losses import ContrastiveLoss, MMDLoss
from lightning_netsim.mixins import ContrastiveMixin, DifferenceAlignmentMixin, MMDMixin, SimilarityMixin
from tests.mixins.modules import Plain, batch, gradients, loader, trainer

FIXED = MMDLoss(bandwidths=[0.5, 2.0])


class Adapted(MMDMixin, Plain):
    """A classifier of points that matches the features of another domain."""


def domains(shift: float = 1.0, sizes: tuple[int, int] = (12, 7)) -> dict[str, Any]:
    return {"source": batch(sizes[0]), "target": (batch(sizes[1], seed=2)[0] + shift,)}


def wanted_loss(module: Plain, pair: dict[str, Any], weight: float, layer: nn.Module) -> Tensor:
    (inputs, labels), (others,) = pair["source"], pair["target"]
    plain = F.cross_entropy(module.net(inputs), labels)
    return plain + weight * FIXED(layer(inputs), layer(others))


def test_step_is_the_loss_of_the_source_plus_the_discrepancy() -> None:
    module = Adapted(mmd_criterion=FIXED, mmd_weight=0.7, mmd_layer="net.0")
    loss = module.training_step(domains(), 0)
    wanted = wanted_loss(module, domains(), 0.7, module.net[0])
    torch.testing.assert_close(loss, wanted)
    expected = gradients(module, wanted)
    for name, gradient in gradients(module, loss).items():
        torch.testing.assert_close(gradient, expected[name])


def test_targets_may_have_labels_or_be_bare_and_keys_other_names() -> None:
    module = Adapted(mmd_criterion=FIXED)
    pair = domains()
    wanted = wanted_loss(module, pair, 1.0, module.net)
    others = pair["target"][0]
    for target in (others, [others, torch.zeros(len(others), dtype=torch.int64)], (others,)):
        torch.testing.assert_close(module.training_step({"source": pair["source"], "target": target}, 0), wanted)
    renamed = Adapted(mmd_criterion=FIXED, mmd_domains=["photos", "drawings"])
    torch.testing.assert_close(renamed.training_step({"photos": pair["source"], "drawings": others}, 0), wanted)


def test_the_step_gets_the_source_alone_whether_or_not_the_term_is_due() -> None:
    class Noting(Adapted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen = batch
            return super().training_step(batch, batch_idx)

    for weight in (0.0, 1.0):
        module = Noting(mmd_weight=weight)
        pair = domains()
        module.training_step(pair, 0)
        assert module.seen is pair["source"]
    module = Noting(mmd_every_n_steps=2)
    fitting = trainer(max_steps=2)
    fitting.fit(module, {"source": loader(), "target": loader(8, 4)})
    assert fitting.global_step == 2
    assert module.forwards == 3  # The target is run in one of both steps.
    assert "netsim/mmd_loss" in fitting.callback_metrics


class Both(Plain):
    """A classifier whose own step runs both domains."""

    together = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (inputs, labels), (others,) = batch["source"], batch["target"]
        if self.together:
            outputs = self(torch.cat([inputs, others]))[: len(inputs)]
        else:
            outputs = self(inputs)
            self(others)
        return F.cross_entropy(outputs, labels)


@pytest.mark.parametrize("together", [True, False])
def test_a_step_may_run_both_domains_itself(together: bool) -> None:
    class Adapting(MMDMixin, Both):
        """The same, matched."""

    module = Adapting(mmd_criterion=FIXED, mmd_whole_batch=True, mmd_layer="net.0")
    module.together = together
    torch.testing.assert_close(module.training_step(domains(), 0), wanted_loss(module, domains(), 1.0, module.net[0]))
    assert module.forwards == (1 if together else 2)


def test_a_step_that_runs_one_domain_of_both_is_said() -> None:
    class Half(MMDMixin, Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["source"], batch_idx)

    with pytest.raises(NetsimError, match="each of 12 samples of the source and 7 of the target, but got 12 rows"):
        Half(mmd_whole_batch=True).training_step(domains(), 0)


def test_a_latent_is_matched_to_its_prior() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def criterion(features: Tensor, samples: Tensor) -> Tensor:
        seen.append((features, samples))
        return FIXED(features, samples)

    inputs, labels = batch()
    for prior in ("normal", "uniform"):
        module = Adapted(mmd_criterion=criterion, mmd_prior=prior, mmd_layer="net.0", mmd_weight=0.3)
        loss = module.training_step((inputs, labels), 0)
        features, samples = seen[-1]
        torch.testing.assert_close(features, module.net[0](inputs))
        assert samples.shape == features.shape
        torch.testing.assert_close(loss, F.cross_entropy(module.net(inputs), labels) + 0.3 * FIXED(features, samples))
        module.training_step((inputs, labels), 1)
        assert not torch.equal(seen[-1][1], samples)  # Drawn anew.
        again = Adapted(mmd_criterion=criterion, mmd_prior=prior, mmd_layer="net.0")
        again.training_step((inputs, labels), 0)
        assert torch.equal(seen[-1][1], samples)
    again.training_step(batch(1000), 1)
    samples = seen[-1][1]
    assert samples.abs().max() <= 1
    torch.testing.assert_close(samples.std(), torch.tensor(1 / 3).sqrt(), atol=0.03, rtol=0)


def test_processes_draw_different_samples_and_leave_the_global_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def criterion(features: Tensor, samples: Tensor) -> Tensor:
        seen.append(samples)
        return features.sum() * 0

    for rank in (0, 1):
        module = Adapted(mmd_criterion=criterion, mmd_prior="normal")
        monkeypatch.setattr(Adapted, "global_rank", rank)
        state = torch.get_rng_state()
        module.training_step(batch(), 0)
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*seen)


def test_a_prior_by_a_function() -> None:
    module = Adapted(mmd_criterion=FIXED, mmd_prior=lambda number, width: torch.ones(2 * number, width))
    inputs, labels = batch()
    outputs = module.net(inputs)
    wanted = F.cross_entropy(outputs, labels) + FIXED(outputs, torch.ones(24, 3))
    torch.testing.assert_close(module.training_step((inputs, labels), 0), wanted)
    wrong = Adapted(mmd_prior=lambda number, width: torch.ones(number, width + 1))
    with pytest.raises(
        NetsimError, match=r"`mmd_prior` to be a function that returns samples of width 3, but got shape \(12, 4\)"
    ):
        wrong.training_step((inputs, labels), 0)


def test_mixins_stack_and_the_others_see_the_source() -> None:
    class Everything(SimilarityMixin, DifferenceAlignmentMixin, ContrastiveMixin, MMDMixin, Plain):
        """All terms at once."""

    def step(*weights: float) -> Tensor:
        names = ("similarity_weight", "alignment_weight", "contrastive_weight", "mmd_weight")
        return Everything(**dict(zip(names, weights, strict=True))).training_step(domains(), 0)

    plain = F.cross_entropy(Plain().net(domains()["source"][0]), domains()["source"][1])
    parts = [step(0.2, 0, 0, 0), step(0, 0.3, 0, 0), step(0, 0, 0.4, 0), step(0, 0, 0, 0.5)]
    assert all(part != plain for part in parts)
    torch.testing.assert_close(step(0.2, 0.3, 0.4, 0.5), plain + sum(part - plain for part in parts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mmd_domains": ["source", "source"]}, "`mmd_domains` to be two different keys"),
        ({"mmd_prior": "gaussian"}, "`mmd_prior` to be one of 'normal', 'uniform'"),
        ({"mmd_prior": "normal", "mmd_whole_batch": True}, "`mmd_whole_batch` to be False with `mmd_prior`"),
        ({"mmd_criterion": 3}, "`mmd_criterion` to be `lightning_netsim.losses.MMDLoss`"),
        ({"mmd_criterion": ContrastiveLoss()}, "ContrastiveLoss, which is of something else"),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message):
        Adapted(**options)


def test_batches_without_both_domains_are_refused() -> None:
    module = Adapted()
    remedy = r"Let `train_dataloader` return \{'source': loader, 'target': other_loader\}\."
    for wrong, got in [(batch(), "a tuple"), ({"source": batch()}, r"\{source: tuple\}")]:
        with pytest.raises(NetsimError, match=f"but got {got}. {remedy}"):
            module.training_step(wrong, 0)
    with pytest.raises(NetsimError, match="Let the shorter loader begin again"):
        module.training_step({"source": batch(), "target": None}, 0)
    with pytest.raises(NetsimError, match=r"the keys \['a'\]\. Run both .* `mmd_whole_batch=True`"):
        module.training_step({"source": batch(), "target": {"a": torch.zeros(3, 4)}}, 0)
    with pytest.raises(NetsimError, match="`y` to be one or more samples"):
        module.training_step({"source": batch(), "target": (torch.zeros(0, 4),)}, 0)


def test_modules_without_forward_are_refused_before_training() -> None:
    class Bare(MMDMixin, LightningModule):
        def __init__(self) -> None:
            super().__init__(mmd_layer="net")
            self.net = nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("a step was run")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(NetsimError, match=r"`forward` to be defined.*mmd_whole_batch=True"):
        trainer().fit(Bare(), {"source": loader(), "target": loader()})

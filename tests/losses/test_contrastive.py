"""Losses of embeddings as modules: the same numbers as pytorch-metric-learning, and what they say of bad input."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor, nn

from lightning_netsim import NetsimError
from lightning_netsim.losses import ContrastiveLoss, MetricLearningLoss
from tests import oracles
from tests.functional.common import check, random

PROXIES = {"num_classes": 5, "embedding_size": 3}
LOSSES: dict[str, dict[str, Any] | None] = {
    "NTXentLoss": {"temperature": 0.2},
    "SupConLoss": None,
    "TripletMarginLoss": {"margin": 0.4},
    "NPairsLoss": {},
    "ProxyAnchorLoss": PROXIES,
    "ContrastiveLoss": {"neg_margin": 0.7},
}
MINERS: dict[str, dict[str, Any] | None] = {
    "MultiSimilarityMiner": {"epsilon": 0.2},
    "TripletMarginMiner": {"margin": 0.3},
    "BatchHardMiner": None,
}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return random(seed, 15, 3).requires_grad_(), torch.arange(15) % 5


def seeded(make: Callable[[], Any]) -> Any:
    """Return what is made from a fixed random state: proxies are drawn."""
    torch.manual_seed(1)
    return make()


@pytest.mark.parametrize("miner", [None, *MINERS])
@pytest.mark.parametrize("name", LOSSES)
def test_a_criterion_is_what_it_is_without_the_adapter(name: str, miner: str | None) -> None:
    x, labels = batch(2)
    arguments, miner_args = LOSSES[name], None if miner is None else MINERS[miner]
    criterion = seeded(lambda: MetricLearningLoss(name, arguments, miner, miner_args))
    bare = seeded(lambda: getattr(losses, name)(**(arguments or {})))
    mined = None if miner is None else getattr(miners, miner)(**(miner_args or {}))(x, labels)
    wanted = bare(x, labels, mined)
    assert float(wanted.detach()) > 0
    check(criterion(x, labels), wanted, x)
    assert [float(p.detach().sum()) for p in criterion.parameters()] == [float(p.detach().sum()) for p in bare.parameters()]


def test_what_a_criterion_learns_are_its_parameters() -> None:
    x, labels = batch(3)
    criterion = MetricLearningLoss("ProxyAnchorLoss", PROXIES)
    names = [name for name, _ in criterion.named_parameters()]
    assert names == list(criterion.state_dict()) == ["loss.proxies"]
    before = criterion.loss.proxies.detach().clone()  # type: ignore[union-attr, operator]
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    first = criterion(x.float(), labels)
    first.backward()
    optimizer.step()
    assert not torch.equal(before, criterion.loss.proxies)  # type: ignore[arg-type, union-attr]
    assert float(criterion(x.float(), labels).detach()) < float(first.detach())
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(x, labels), criterion(x, labels))


class Counted(nn.Module):
    """A criterion and a miner that no library has: the mean square of the chosen samples, the chosen being the first ones."""

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        return embeddings[: 4 if indices_tuple is None else indices_tuple].square().mean()


def test_an_object_instead_of_a_name() -> None:
    x, labels = batch(4)
    check(MetricLearningLoss(Counted())(x, labels), x[:4].square().mean(), x)
    check(MetricLearningLoss(Counted(), miner=lambda embeddings, labels: 7)(x, labels), x[:7].square().mean(), x)
    library = losses.NTXentLoss(temperature=0.3)
    check(MetricLearningLoss(library)(x, labels), library(x, labels), x)
    proxies = losses.ProxyAnchorLoss(**PROXIES)
    assert next(MetricLearningLoss(proxies).parameters()) is proxies.proxies


@pytest.mark.parametrize("name", LOSSES)
def test_samples_without_a_label_are_left_out(name: str) -> None:
    x, labels = batch(5)
    labels[[0, 4, 5, 13]] = torch.tensor([-1, -2, -1, -1])
    criterion, known = MetricLearningLoss(name, LOSSES[name], "MultiSimilarityMiner"), labels >= 0
    found = criterion(x, labels)
    check(found, criterion(x[known], labels[known]), x)
    assert not torch.autograd.grad(found, x)[0][~known].any()


PAIRLESS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "no sample": lambda x: (x[:0], torch.zeros(0).long()),
    "one sample": lambda x: (x[:1], torch.zeros(1).long()),
    "no label": lambda x: (x, torch.full((15,), -1)),
    "all different": lambda x: (x, None),
}


@pytest.mark.parametrize("miner", [None, "MultiSimilarityMiner"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("ProxyAnchorLoss", "ContrastiveLoss")])
@pytest.mark.parametrize("case", PAIRLESS)
def test_a_batch_without_pairs_gives_a_zero_with_a_graph(case: str, name: str, miner: str | None) -> None:
    x, _ = batch(7)
    loss = MetricLearningLoss(name, LOSSES[name], miner)(*PAIRLESS[case](x))
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("labels", [torch.zeros(0).long(), torch.full((15,), -1)], ids=["no sample", "no label"])
def test_a_criterion_is_not_asked_about_nothing(labels: Tensor) -> None:
    x, _ = batch(7)
    for criterion in (MetricLearningLoss(Counted()), MetricLearningLoss("ProxyAnchorLoss", PROXIES)):
        loss = criterion(x[: len(labels)], labels)
        assert float(loss.detach()) == 0
        loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_criterion_that_finds_nothing_may_return_a_constant() -> None:
    x, labels = batch(8)
    loss = MetricLearningLoss(lambda embeddings, labels: torch.zeros(()))(x, labels)
    loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_the_contrastive_loss_of_siamese_networks() -> None:
    x, labels = random(10, 9, 3).requires_grad_(), torch.tensor([0, 1, 0, 2, -1, 1, 1, 2, -1])
    criterion = ContrastiveLoss(margin=5.0)
    check(criterion(x, labels), oracles.contrastive(x, labels, 5.0), x)
    assert float(criterion(x * 0, labels).detach()) == 2.5
    # Without labels, all are pushed apart.
    check(criterion(x), oracles.contrastive(x, torch.arange(9), 5.0), x)


def test_a_missing_package_is_said_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_metric_learning.losses", "pytorch_metric_learning.miners"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(NetsimError, match=r"Expected `loss` .* pytorch-metric-learning, .* but got 'NTXentLoss'") as caught:
        MetricLearningLoss("NTXentLoss")
    assert "pip install 'lightning-netsim[metric-learning]'" in str(caught.value)


@pytest.mark.parametrize("name", ["ProxyNCALoss", "NormalizedSoftmaxLoss"])
def test_losses_whose_number_of_classes_is_a_statistic(name: str) -> None:
    loss = MetricLearningLoss(name, {"num_classes": 4, "embedding_size": 3})
    assert torch.isfinite(loss(random(0, 8, 3), torch.arange(8) % 4))
    with pytest.raises(NetsimError, match="below the 4 classes"):
        loss(random(0, 8, 3), torch.arange(8))


def test_distances_and_reducers_from_a_file() -> None:
    distance = {"class_path": "pytorch_metric_learning.distances.LpDistance", "init_args": {"power": 2}}
    loss = MetricLearningLoss("TripletMarginLoss", {"distance": distance})
    assert loss.loss.distance.power == 2  # type: ignore[union-attr]
    x, labels = batch(3)
    wanted = losses.TripletMarginLoss(distance=LpDistance(power=2))(x, labels)
    torch.testing.assert_close(loss(x, labels), wanted)
    assert loss.config()["init_args"]["loss_args"] == {"distance": distance}

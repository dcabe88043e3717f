"""The whole measurement against the float64 oracle: all plans, any chunks, one set or two, and everything around it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_netsim.data.sources import from_loader
from lightning_netsim.measurement.measure import measure_similarity
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from tests import cases, oracles
from tests.measuring import Dead, check_counts, classifier, loader, measure, oracle, source, whole

PLANS = ["store", "sketch", "reiterate"]

NAMES = [
    "mlp_1",
    "mlp_2",
    "mlp_10",
    "softmax",
    "batch_norm",
    "embedding",
    "lstm",
    "attention_time_first",
    "tied_through_function",
    "bare_parameter_on_root",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "resnet18")),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_soft_counts_are_exact_by_every_plan(name: str, plan: str) -> None:
    result = measure(name, plan=plan, projection_dim=1000)
    wanted = oracle(name)
    assert result.plan["kind"] == plan
    check_counts(result.counts.soft, wanted.sum(1))
    assert result.counts.num_reference == len(wanted)
    assert result.num_left_out == 0
    assert result.compares_with_itself
    assert result.sweep_disagreement is not None
    assert result.sweep_disagreement < 1e-5


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["mlp_1", "mlp_10", "conv2d_one_channel", "gru", "embedding"])
def test_neighbors_are_the_sorted_rows(name: str, plan: str) -> None:
    # Of so few samples, every one is a candidate.
    result, wanted = measure(name, k=3, plan=plan, projection_dim=60), oracle(name).clone().fill_diagonal_(-2)
    order = wanted.argsort(1, descending=True)[:, :3]
    assert torch.equal(result.neighbors.index, order)
    torch.testing.assert_close(result.neighbors.similarity.double(), wanted.gather(1, order), rtol=0, atol=1e-5)
    assert result.neighbors.recall == 1.0
    assert result.similarity_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("size", "chunk_size"), [(1, 64), (7, 1), (4, 2)])
def test_chunks_do_not_matter(size: int, chunk_size: int, plan: str) -> None:
    settings = {"plan": plan, "projection_dim": 80}
    result = measure("mlp_2", size, chunk_size=chunk_size, **settings)
    whole = measure("mlp_2", 7, chunk_size=64, **settings)
    torch.testing.assert_close(result.counts.soft, whole.counts.soft, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.norm, whole.norm)
    assert result.predictions == whole.predictions
    torch.testing.assert_close(result.neighbors.similarity, whole.neighbors.similarity, rtol=0, atol=1e-5)
    assert torch.equal(result.neighbors.index, whole.neighbors.index)
    assert result.neighbors.recall == pytest.approx(whole.neighbors.recall)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["mlp_2", "gru"])
def test_queries_apart_from_the_reference(name: str, plan: str) -> None:
    model, inputs = cases.build(name)
    settings = SweepSettings(k=2, directions="all", plan=plan, projection_dim=1000)
    result = measure_similarity(model, source(inputs[:2]), source(inputs[2:]), settings)
    wanted = oracle(name)[:2, 2:]
    check_counts(result.counts.soft, wanted.sum(1))
    assert not result.compares_with_itself
    assert result.sweep_disagreement is None
    assert result.counts.num_reference == len(inputs) - 2
    assert len(result.queries.index) == 2
    assert len(result.reference.index) == len(inputs) - 2
    assert result.neighbors.recall is not None
    order = wanted.argsort(1, descending=True)[:, :2]
    assert torch.equal(result.neighbors.index, order)
    torch.testing.assert_close(result.neighbors.similarity.double(), wanted.gather(1, order), rtol=0, atol=1e-5)
    assert bool((result.neighbors.similarity.abs() <= 1 + 1e-5).all())


def many(plan: str, number: int = 150, **settings: Any) -> SimilarityResult:
    """Measure so many samples that not all are candidates."""
    torch.manual_seed(1)
    inputs = torch.randn(number, 6)
    chosen = SweepSettings(**{"k": 5, "directions": "all", "plan": plan, "projection_dim": 90, **settings})
    return measure_similarity(classifier(), from_loader(loader(inputs), whole), settings=chosen)


def shared(left: SimilarityResult, right: SimilarityResult) -> float:
    """Return the share of neighbors that two tables have in common."""
    pairs = zip(left.neighbors.index.tolist(), right.neighbors.index.tolist(), strict=True)
    return sum(len(set(one) & set(other)) for one, other in pairs) / left.neighbors.index.numel()


@pytest.mark.parametrize("plan", ["sketch", "reiterate"])
def test_candidates_are_compared_exactly_and_audited(plan: str) -> None:
    exact, ranked = many("store"), many(plan, projection_dim=30)
    recall = shared(exact, ranked)
    assert recall > 0.95
    assert ranked.neighbors.recall == pytest.approx(recall, abs=0.03)
    assert ranked.similarity_error == pytest.approx(0, abs=1e-6)
    agree = ranked.neighbors.index == exact.neighbors.index
    difference = (ranked.neighbors.similarity - exact.neighbors.similarity)[agree]
    assert float(difference.abs().max()) < 1e-5
    check_counts(ranked.counts.soft, exact.counts.soft.double())


def test_the_audit_measures_the_recall_against_the_exact_table() -> None:
    # At most 64 samples: all of them are audited. A sketch this narrow misses some.
    exact = many("store", 64, k=5)
    for seed in range(20):
        poor = many("sketch", 64, k=5, projection_dim=6 * 2, seed=seed, index_factory="HNSW2")
        assert poor.neighbors.recall == pytest.approx(shared(exact, poor))
        if poor.neighbors.recall < 1:
            return
    pytest.fail("No audited table missed a neighbor: the comparison shows nothing.")


def test_a_set_of_several_tiles_is_compared_with_itself_as_with_another() -> None:
    inputs, settings = torch.randn(600, 6), {"plan": "store", "directions": 1, "thresholds": (0.5,)}
    alone = measure_similarity(classifier(), source(inputs, 100), settings=SweepSettings(k=4, **settings))
    apart = measure_similarity(classifier(), source(inputs, 100), source(inputs, 100), SweepSettings(k=5, **settings))
    torch.testing.assert_close(alone.neighbors.similarity, apart.neighbors.similarity[:, 1:], rtol=0, atol=1e-5)
    assert float((alone.counts.hard[0.5] - apart.counts.hard[0.5]).abs().sum()) <= 2  # Up to rounding at the threshold.


def test_in_several_sweeps_every_lot_is_ranked() -> None:
    exact = many("store")
    # The index and the features of 64 samples, twice: three lots.
    once = many("reiterate")
    assert once.plan["num_sweeps"] == 2
    budget = once.plan["bytes"] - 2 * 80 * (once.plan["bytes"] / (2 * 150 + 150))
    result = many("reiterate", memory_budget=budget)
    assert result.plan["num_sweeps"] > 2
    assert shared(exact, result) > 0.95
    assert result.neighbors.recall == pytest.approx(shared(exact, result), abs=0.03)
    check_counts(result.counts.soft, exact.counts.soft.double())


class Noisy(nn.Module):
    """Noise in the forward pass, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x + 0.5 * torch.randn_like(x))))


class Augmented(Dataset[Tensor]):
    """Draws from the global random numbers whenever a sample is read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((6,), index / 10) + 0.5 * torch.randn(6)


def test_both_sweeps_see_the_same_noise() -> None:
    settings = SweepSettings(k=3, plan="reiterate", projection_dim=60)
    inputs = torch.randn(20, 6)
    result = measure_similarity(Noisy().eval(), source(inputs, 4), settings=settings)
    assert result.sweep_disagreement is not None
    assert result.sweep_disagreement < 1e-5
    again = measure_similarity(classifier(), from_loader(DataLoader(Augmented(), 4), whole), settings=settings)
    assert again.sweep_disagreement is not None
    assert again.sweep_disagreement < 1e-5


class Changing(Augmented):
    """A data set that draws from a generator of its own, which no sweep sets back."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((6,), index / 10) + 0.5 * torch.randn(6, generator=self.generator)


def test_data_that_differ_between_the_sweeps_show() -> None:
    settings = SweepSettings(k=3, plan="reiterate", projection_dim=60)
    result = measure_similarity(classifier(), from_loader(DataLoader(Changing(), 4), whole), settings=settings)
    assert result.sweep_disagreement is not None
    assert result.sweep_disagreement > 1e-3


@pytest.mark.parametrize("plan", PLANS)
def test_random_states_and_the_model_stay_as_they_are(plan: str) -> None:
    model, inputs = Noisy().eval(), torch.randn(12, 6)
    model.first.weight.grad = torch.ones_like(model.first.weight)
    saved = [tensor.clone() for tensor in model.state_dict().values()]
    states = torch.get_rng_state(), random.getstate()
    measure_similarity(model, source(inputs, 4), settings=SweepSettings(k=3, plan=plan, projection_dim=60))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(before, now) for before, now in zip(saved, model.state_dict().values(), strict=True))
    assert torch.equal(model.first.weight.grad, torch.ones_like(model.first.weight))
    assert model.last.weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("plan", PLANS)
def test_in_inference_mode(plan: str) -> None:
    model, inputs = cases.build("mlp_2")
    settings = SweepSettings(k=2, plan=plan, projection_dim=80)
    with torch.inference_mode():
        result = measure_similarity(model, source(inputs.clone(), 3), settings=settings)
    check_counts(result.counts.soft, oracle("mlp_2").sum(1))


@pytest.mark.parametrize("apart", [False, True])
def test_hard_and_power_counts(apart: bool) -> None:
    model, inputs = cases.build("mlp_2")
    settings = SweepSettings(k=2, directions="all", thresholds=(0.2, 0.9), powers=(2.0,), plan="store")
    reference = source(inputs[3:]) if apart else None
    result = measure_similarity(model, source(inputs[:3] if apart else inputs), reference, settings)
    wanted = oracle("mlp_2")[:3, 3:] if apart else oracle("mlp_2")
    for tau in (0.2, 0.9):
        assert result.counts.hard[tau].tolist() == (wanted >= tau).sum(1).tolist()
    torch.testing.assert_close(result.counts.power[2.0].double(), wanted.clamp_min(0).square().sum(1), rtol=0, atol=1e-5)
    assert result.counts.hard_error == {0.2: 0.0, 0.9: 0.0}
    assert result.counts.power_error == {2.0: 0.0}


@pytest.mark.parametrize("plan", ["sketch", "reiterate"])
def test_hard_and_power_counts_from_sketches_say_how_far_off_they_are(plan: str) -> None:
    thresholds, powers = (0.5, 0.9), (2.0,)
    exact = many("store", 300, thresholds=thresholds, powers=powers)
    estimated = many(plan, 300, thresholds=thresholds, powers=powers, projection_dim=60)
    for name in ("hard", "power"):
        counts, truth = getattr(estimated.counts, name), getattr(exact.counts, name)
        for key, error in getattr(estimated.counts, f"{name}_error").items():
            off = counts[key] - truth[key]
            assert error == pytest.approx(float(off.square().mean().sqrt()), rel=0.5)
            assert abs(float(off.mean())) < 0.5 * error + 0.02 * float(truth[key].mean())
            assert 0 < error < 0.5 * float(truth[key].mean())


@pytest.mark.parametrize("plan", ["sketch", "reiterate"])
def test_where_every_query_is_audited_estimated_counts_have_the_right_sum(plan: str) -> None:
    settings: dict[str, Any] = {"thresholds": (0.5,), "powers": (2.0,)}
    exact, estimated = many("store", 64, **settings), many(plan, 64, projection_dim=30, **settings)
    assert float(estimated.counts.hard[0.5].sum()) == float(exact.counts.hard[0.5].sum())
    assert float(estimated.counts.power[2.0].sum()) == pytest.approx(float(exact.counts.power[2.0].sum()), rel=1e-4)
    assert estimated.counts.hard_error[0.5] > 0


@pytest.mark.parametrize("plan", PLANS)
def test_as_many_neighbors_as_samples_are_refused(plan: str) -> None:
    with pytest.raises(ValueError, match=r"Expected `k` to be at most 6, the number of other samples .* but got 7"):
        measure("mlp_2", k=7, plan=plan, projection_dim=80)
    assert measure("mlp_2", k=6, plan=plan, projection_dim=80).neighbors.index.shape == (7, 6)


def test_of_another_set_all_samples_may_be_neighbors() -> None:
    model, inputs = cases.build("mlp_2")
    result = measure_similarity(model, source(inputs[:4]), source(inputs[4:]), SweepSettings(k=3))
    assert result.neighbors.index.sort(1).values.tolist() == [[0, 1, 2]] * 4
    with pytest.raises(ValueError, match="Expected `k` to be at most 3"):
        measure_similarity(model, source(inputs[:4]), source(inputs[4:]), SweepSettings(k=4))


@pytest.mark.parametrize("plan", ["auto", *PLANS])
def test_a_budget_that_is_too_small(plan: str) -> None:
    with pytest.raises(ValueError, match=r"Expected `memory_budget` to be at least .* Choose a larger `memory_budget`"):
        measure("mlp_10", plan=plan, memory_budget=100, projection_dim=80)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("size", [1, 4])
def test_left_out_samples_are_counted_and_the_others_go_on(size: int, plan: str, apart: bool) -> None:
    model, inputs = Dead(), torch.rand(9, 3) + 0.1
    inputs[0], inputs[4], inputs[5] = -1.0, torch.nan, -2.0
    bad = [0, 4, 5]
    settings = SweepSettings(k=3, directions="all", plan=plan, projection_dim=30)
    result = measure_similarity(model, source(inputs, size), source(inputs, size) if apart else None, settings)
    wanted = oracles.dense_similarity(oracles.loop_jacobian(model, inputs))
    good = [row for row in range(9) if row not in bad]
    assert result.num_left_out == (6 if apart else 3)
    assert result.counts.num_reference == 6
    check_counts(result.counts.soft[good], wanted[good].nansum(1))
    assert bool(result.counts.soft[bad].isnan().all())
    assert bool((result.neighbors.index[bad] == -1).all())
    assert bool(result.neighbors.similarity[bad].isnan().all())
    assert not set(result.neighbors.index[good].flatten().tolist()) & {-1, *bad}
    assert result.rank[bad].tolist() == [0, 0, 0]
    if not apart:
        assert result.sweep_disagreement is not None
        assert result.sweep_disagreement < 1e-5

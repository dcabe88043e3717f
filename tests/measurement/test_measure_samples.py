"""What a measurement says of its samples, tells as it goes on, and refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_netsim.data.batches import SimilarityBatch
from lightning_netsim.data.sources import from_batches, from_loader
from lightning_netsim.measurement.measure import check_model, measure_similarity
from lightning_netsim.measurement.settings import SweepSettings
from tests import cases, oracles
from tests.measuring import check_counts, classifier, loader, measure, source, whole


class Step(nn.Module):
    """A model that says itself what is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def similarity_step(self, batch: Any, batch_idx: int) -> SimilarityBatch:
        inputs, labels, ids = batch
        return SimilarityBatch(self.net(inputs)[:, :2], labels, ids, inputs.view(-1, 1, 2, 3))


def test_labels_ids_predictions_and_pictures() -> None:
    model, inputs = Step(), torch.randn(8, 6)
    labels, ids = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0]), [f"sample {row}" for row in range(8)]
    batches = [(inputs[:5], labels[:5], ids[:5]), (inputs[5:], labels[5:], ids[5:])]
    result = measure_similarity(model, from_batches(batches), settings=SweepSettings(k=2, chunk_size=2))
    assert result.queries.labels == labels.tolist()
    assert result.queries.ids == ids
    assert result.predictions == model.net(inputs)[:, :2].argmax(1).tolist()
    assert result.queries.index.tolist() == list(range(8))
    assert result.queries.dataloader.tolist() == [0] * 8
    assert result.queries.shown is not None
    torch.testing.assert_close(torch.stack(result.queries.shown), inputs.view(-1, 1, 2, 3))
    jacobian = oracles.loop_jacobian(model, inputs, forward=lambda m, x: m.net(x)[:, :2])
    check_counts(result.counts.soft, oracles.dense_similarity(jacobian, 1e-6).sum(1))
    torch.testing.assert_close(result.norm.double(), jacobian.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


def test_labels_serve_as_directions() -> None:
    model, inputs = classifier(), torch.randn(9, 6)
    labels = torch.tensor([0, 1, 2] * 3)
    settings = SweepSettings(k=2, directions="target")
    result = measure_similarity(model, from_loader(loader(inputs, labels, 4), whole), settings=settings)
    wanted = oracles.loop_jacobian(model, inputs)[torch.arange(9), labels].unsqueeze(1)
    assert result.num_directions == 1
    check_counts(result.counts.soft, oracles.dense_similarity(wanted, 1e-6).sum(1))


@pytest.mark.parametrize("plan", ["store", "sketch", "reiterate"])
def test_a_subset_keeps_the_positions_of_its_samples(plan: str) -> None:
    model, inputs = classifier(), torch.randn(30, 6)
    queries = from_loader(loader(inputs), whole, max_samples=4, seed=4)
    settings = SweepSettings(k=3, directions="all", plan=plan, projection_dim=60)
    result = measure_similarity(model, queries, settings=settings)
    chosen = result.queries.index
    assert len(chosen) == 4
    assert int(chosen.min()) > 3  # No position is the row of a sample.
    similarity = oracles.dense_similarity(oracles.loop_jacobian(model, inputs[chosen]), 1e-6)
    check_counts(result.counts.soft, similarity.sum(1))
    order = similarity.fill_diagonal_(-2).argsort(1, descending=True)[:, :3]
    assert torch.equal(result.neighbors.index, chosen[order])
    assert result.neighbors.recall == 1


@pytest.mark.parametrize("plan", ["store", "sketch", "reiterate"])
@pytest.mark.parametrize("apart", [False, True])
def test_activation_neighbors(apart: bool, plan: str) -> None:
    model, inputs = classifier(), torch.randn(20, 6)
    other = torch.randn(15, 6)
    settings = SweepSettings(k=3, plan=plan, projection_dim=200)
    result = measure_similarity(model, source(inputs, 6), source(other, 6) if apart else None, settings)
    unit = nn.functional.normalize(model[:4](inputs), dim=1)
    similarity = unit @ (nn.functional.normalize(model[:4](other), dim=1) if apart else unit).mT
    if not apart:
        similarity.fill_diagonal_(-2)
    assert result.activation_neighbors is not None
    torch.testing.assert_close(result.activation_neighbors.similarity, similarity.topk(3).values.detach())


def test_activations_only_where_wanted_and_possible() -> None:
    assert measure("mlp_2").activation_neighbors is None
    assert measure("mlp_2", compare_activations=True).activation_neighbors is not None

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    assert measure_similarity(Bare(), source(torch.randn(6, 6)), settings=SweepSettings(k=2)).activation_neighbors is None


def test_progress_and_the_plan_are_told() -> None:
    model, inputs = cases.build("mlp_2")
    told: list[tuple[str, int, int | None]] = []
    said: list[str] = []
    queries = from_loader(DataLoader(inputs, 3), whole)
    measure_similarity(
        model,
        queries,
        settings=SweepSettings(k=2, plan="reiterate", projection_dim=80),
        progress=lambda *what: told.append(what),
        announce=said.append,
    )
    swept = [[(stage, done, 7) for done in (3, 6, 7)] for stage in ("features", "neighbors")]
    assert told == [*swept[0], ("search", 7, 7), *swept[1]]
    assert len(said) == 1
    assert said[0].startswith("7 samples, 2 directions, ")


def test_seconds_notes_and_methods_are_recorded() -> None:
    result = measure("softmax")
    assert result.seconds > 0
    assert any("logits" in note for note in result.notes)
    assert result.plan["methods"] == {"layer": 6}
    assert measure("mlp_2").notes == ()


def test_render_makes_the_pictures() -> None:
    model, inputs = cases.build("mlp_2")
    result = measure_similarity(model, source(inputs), settings=SweepSettings(k=2, render=lambda x: f"{float(x[0]):.3f}"))
    assert result.queries.shown == [f"{float(x[0]):.3f}" for x in inputs]


def test_outputs_of_another_length_than_the_batch_are_refused() -> None:
    class Pooled(Step):
        def similarity_step(self, batch: Any, batch_idx: int) -> SimilarityBatch:
            return SimilarityBatch(self.net(batch[::2]))

    with pytest.raises(ValueError, match="Expected `outputs` to be one row for each of the 4 samples of the batch, but got 2"):
        measure_similarity(Pooled(), source(torch.randn(8, 6), 4), settings=SweepSettings(k=2))


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `loader` to be one that gives at least one batch, but got none"):
        measure_similarity(classifier(), from_batches([]), settings=SweepSettings(k=2))


@pytest.mark.parametrize("prefix", [nn.Identity, lambda: nn.BatchNorm1d(6)])
def test_check_model_raises_what_the_measurement_would(prefix: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(prefix(), classifier()).train()
    state = torch.get_rng_state()
    batch = (torch.randn(5, 6), torch.zeros(5))
    torch.set_rng_state(state)
    if isinstance(model[0], nn.Identity):
        check_model(model, batch, 0, SweepSettings(k=2))
        assert torch.equal(torch.get_rng_state(), state)
    else:
        with pytest.raises(ValueError, match="batch norm `0` using batch statistics"):
            check_model(model, batch, 0, SweepSettings(k=2))


@pytest.mark.parametrize(("directions", "said"), [("auto", True), ("all", False), (4, False)])
def test_what_auto_leaves_out_is_said(directions: str | int, said: bool) -> None:
    model, inputs = cases.build("mlp_10")
    announced: list[str] = []
    settings = SweepSettings(k=2, directions=directions)
    measure_similarity(model, from_batches([inputs]), settings=settings, announce=announced.append)
    assert ("Of 10 outputs, 4 random directions are compared" in announced[0]) == said

"""The measurement without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_netsim import analyze, load_run
from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.analyze import SimilarityAnalysis
from lightning_netsim.records.record import record_directory
from tests.callbacks.runs import Data, Network, fit
from tests.oracles import dense_similarity, loop_jacobian

SAMPLES, FEATURES, CLASSES = 18, 5, 3


def data(size: int = SAMPLES, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % CLASSES
    return TensorDataset(torch.randn(size, FEATURES, generator=generator) + labels[:, None], labels)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def batches(dataset: TensorDataset, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    return [tuple(tensor[i : i + size] for tensor in dataset.tensors) for i in range(0, len(dataset), size)]


def kernel(model: nn.Module, queries: TensorDataset, reference: TensorDataset | None = None) -> Tensor:
    """Return the exact similarities of queries with each other or with a reference set."""
    inputs = [queries.tensors[0], *([] if reference is None else [reference.tensors[0]])]
    similarity = dense_similarity(loop_jacobian(model, torch.cat(inputs)))
    return similarity if reference is None else similarity[: len(queries), len(queries) :]


def quiet(model: nn.Module, loader: Any, reference: Any = None, **options: Any) -> SimilarityAnalysis:
    return analyze(model, loader, reference, **{"k": 4, "directions": "all", "progress": False, **options})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def analysis(model: nn.Module) -> SimilarityAnalysis:
    return quiet(model, DataLoader(data(), batch_size=7), class_names=["ant", "bee", "cat"])


LOADERS = {
    "in order": lambda: DataLoader(data(), batch_size=7),
    "shuffled": lambda: DataLoader(data(), batch_size=7, shuffle=True),
    "list of batches": lambda: batches(data()),
    "workers": lambda: DataLoader(data(), batch_size=9, num_workers=1),
}


@pytest.mark.parametrize("name", LOADERS)
def test_tables_are_exact_for_every_kind_of_loader(name: str, model: nn.Module) -> None:
    found = quiet(model, LOADERS[name]())
    similarity = kernel(model, data())
    assert found.samples["index"].tolist() == list(range(SAMPLES))
    assert found.samples["label"].tolist() == data().tensors[1].tolist()
    np.testing.assert_allclose(found.samples["soft_count"], similarity.sum(1), atol=1e-3)
    np.testing.assert_allclose(found.samples["neighbor_fraction"], similarity.mean(1), atol=1e-4)
    wanted = similarity.fill_diagonal_(-2).topk(4).indices.tolist()
    assert found.neighbors.pivot(index="index", columns="rank", values="neighbor").to_numpy().tolist() == wanted
    assert found.meta["recall"] == 1.0


def test_gradient_norms_and_ranks_are_those_of_the_jacobian(analysis: SimilarityAnalysis, model: nn.Module) -> None:
    jacobian = loop_jacobian(model, data().tensors[0])
    np.testing.assert_allclose(analysis.samples["gradient_norm"], jacobian.flatten(1).norm(dim=1), rtol=1e-5)
    assert (analysis.samples["rank"] == CLASSES).all()
    assert analysis.meta["directions"] == {"kind": "all", "count": CLASSES, "seed": 0}


def test_another_set_is_searched(model: nn.Module) -> None:
    queries, reference = data(6), data(15, seed=2)
    found = quiet(model, DataLoader(queries, batch_size=4), DataLoader(reference, batch_size=4, shuffle=True))
    similarity = kernel(model, queries, reference)
    np.testing.assert_allclose(found.samples["soft_count"], similarity.sum(1), atol=1e-3)
    wanted = similarity.topk(4)
    np.testing.assert_allclose(found.neighbors["similarity"], wanted.values.flatten(), atol=1e-5)
    assert found.neighbors["neighbor"].tolist() == wanted.indices.flatten().tolist()
    assert found.neighbors["neighbor_label"].tolist() == reference.tensors[1][wanted.indices.flatten()].tolist()
    assert (found.meta["reference"], found.meta["num_reference"]) == ("other", 15)


def test_a_set_as_its_own_reference_counts_each_sample_as_its_neighbor(model: nn.Module) -> None:
    loader = DataLoader(data(), batch_size=7)
    found = quiet(model, loader, DataLoader(data(), batch_size=5))
    alone = quiet(model, loader)
    np.testing.assert_allclose(found.samples["soft_count"], alone.samples["soft_count"], atol=1e-4)
    nearest = found.neighbors[found.neighbors["rank"] == 1]
    assert nearest["neighbor"].tolist() == nearest["index"].tolist()


def test_a_subset_is_measured(model: nn.Module) -> None:
    found = quiet(model, DataLoader(data(), batch_size=4), max_samples=9, k=3)
    index = found.samples["index"].tolist()
    assert len(set(index)) == 9
    assert index != list(range(9))
    part = kernel(model, TensorDataset(*(tensor[index] for tensor in data().tensors)))
    np.testing.assert_allclose(found.samples["soft_count"], part.sum(1), atol=1e-3)
    assert set(found.neighbors["neighbor"]) <= set(index)
    both = quiet(model, DataLoader(data(), batch_size=4), DataLoader(data(15, seed=2), batch_size=4), max_samples=9, k=3)
    assert (both.meta["num_samples"], both.meta["num_reference"]) == (9, 9)


def test_a_part_of_the_parameters_and_of_the_directions(model: nn.Module) -> None:
    loader = DataLoader(data(), batch_size=7)
    assert quiet(model, loader, parameters=["2"]).meta["parameters"] == ["2"]
    last = loop_jacobian(model, data().tensors[0], parameters=["2.weight", "2.bias"])
    np.testing.assert_allclose(
        quiet(model, loader, parameters=["2"]).samples["soft_count"], dense_similarity(last).sum(1), atol=1e-3
    )
    one = quiet(model, loader, directions=1, seed=5)
    assert one.meta["directions"] == {"kind": "random", "count": 1, "seed": 5}


class Restless(nn.Module):
    """Draw random numbers, count calls and keep statistics in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        torch.rand(3), np.random.rand()  # noqa: NPY002
        return self.net(x)


def test_model_and_random_numbers_are_left_as_they_were() -> None:
    model = Restless().train()
    model.net[1].eval()
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    loader = DataLoader(data(), batch_size=7, shuffle=True, generator=(generator := torch.Generator().manual_seed(2)))
    drawn = generator.get_state()
    quiet(model, loader)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.calls == 0
    assert torch.equal(model.net[0].weight.grad, torch.ones_like(model.net[0].weight))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(generator.get_state(), drawn)
    with pytest.raises(NetsimError, match=r"`k`"):
        quiet(model, loader, k=SAMPLES)
    assert [module.training for module in model.modules()] == modes
    assert model.calls == 0


def test_it_is_eval_mode_that_is_measured() -> None:
    model = Restless()
    found = quiet(model, DataLoader(data(), batch_size=7))
    np.testing.assert_allclose(found.samples["soft_count"], kernel(model.net.eval(), data()).sum(1), atol=1e-3)


def test_a_trained_module_that_logs_in_forward_is_analyzed(tmp_path: Path) -> None:
    _, module, _ = fit(tmp_path, None, max_epochs=1)
    assert isinstance(module, Network)
    calls = len(module.calls)
    found = quiet(module, Data().val_dataloader(), directions="auto")
    assert len(found.samples) == 22
    assert len(module.calls) == calls


def test_the_summary_is_what_print_shows(analysis: SimilarityAnalysis) -> None:
    assert str(analysis) == analysis.summary()
    assert "Five most isolated samples" in analysis.summary()
    assert repr(analysis) == f"SimilarityAnalysis({SAMPLES} samples, k=4, recall=1.0)"


def test_a_record_is_saved_and_loaded(analysis: SimilarityAnalysis, tmp_path: Path) -> None:
    place = analysis.save(tmp_path / "mine")
    loaded = load_run(place)
    pd.testing.assert_frame_equal(loaded.samples[list(analysis.samples.columns)], analysis.samples)
    pd.testing.assert_frame_equal(loaded.neighbors, analysis.neighbors)
    assert loaded.meta["class_names"] == ["ant", "bee", "cat"]
    assert loaded.result is None
    assert repr(loaded) == repr(analysis)
    assert isinstance(loaded.plot_counts(), Figure)
    assert isinstance(loaded.plot_neighbors(), Figure)
    assert "Most isolated" in loaded._repr_html_()


@pytest.mark.parametrize("folder", ["", "netsim"])
def test_the_newest_record_of_a_run_is_loaded(folder: str, analysis: SimilarityAnalysis, tmp_path: Path) -> None:
    root = tmp_path / folder
    for epoch in (2, 10, 9):
        analysis.record.meta["epoch"] = epoch
        analysis.save(record_directory(root, epoch, 3 * epoch))
    assert load_run(tmp_path).meta["epoch"] == 10
    assert load_run(str(root / "epoch=9-step=27")).meta["epoch"] == 9


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match=r"`path`.*does not exist"):
        load_run(tmp_path / "absent")
    with pytest.raises(NetsimError, match=r"a record.*without meta\.json"):
        load_run(tmp_path)


def test_progress_and_plan_are_shown_on_demand(model: nn.Module, capsys: Any) -> None:
    quiet(model, batches(data()))
    assert capsys.readouterr() == ("", "")
    analyze(model, DataLoader(data(), batch_size=7), k=4)
    said = capsys.readouterr()
    assert said.out == ""
    assert "netsim: 18 samples, 3 directions, 57 parameters: one sweep" in said.err
    assert "netsim features" in said.err


@pytest.mark.parametrize("left", [0, 1, 3])
def test_fewer_usable_samples_than_neighbors_are_listed_as_they_are(left: int, model: nn.Module) -> None:
    inputs, labels = (tensor.clone() for tensor in data().tensors)
    inputs[left:] = float("nan")
    found = quiet(model, DataLoader(TensorDataset(inputs, labels), batch_size=7), thresholds=[0.5])
    assert found.meta["num_left_out"] == SAMPLES - left
    assert len(found.neighbors) == left * max(left - 1, 0)
    assert found.samples["soft_count"].notna().sum() == left
    assert "Samples left out" in found.summary()
    assert isinstance(found.plot_counts(), Figure)
    assert isinstance(found.plot_neighbors(), Figure)
    assert found._repr_html_()


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("loader", "options", "words"),
    [
        (lambda: DataLoader(data(), batch_size=7), {"k": SAMPLES}, "`k`.*at most 17"),
        (lambda: DataLoader(data(), batch_size=7), {"directions": 4}, "`directions`"),
        (lambda: DataLoader(data(), batch_size=7), {"parameters": "head"}, "`parameters`"),
        (lambda: (batch for batch in batches(data())), {}, "`loader`.*again.*list of the batches"),
        (lambda: [], {}, "`loader`.*at least one batch"),
        (lambda: DataLoader(Empty(), batch_size=2), {}, "`loader`.*at least one batch"),
        (lambda: DataLoader(data(), batch_size=7), {"memory_budget": 100.0}, "`memory_budget`"),
        (lambda: [{"label": torch.arange(3)}], {}, r"`batch`.*\['label'\]"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(loader: Any, options: dict[str, Any], words: str, model: nn.Module) -> None:
    with pytest.raises(NetsimError, match=words) as error:
        quiet(model, loader(), **options)
    assert "\n" not in str(error.value)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(NetsimError, match="trainable parameter"):
        quiet(nn.Flatten(), DataLoader(data(), batch_size=7))

"""Exact neighbors and counts of a few samples, against rows of the dense kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import SimilarityBatch, analyze, find_neighbors, load_run
from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.neighbors import NeighborAnswer
from tests import cases
from tests.callbacks.runs import Batches, Points
from tests.oracles import dense_similarity, loop_jacobian

SAMPLES, FEATURES = 23, 5


def data(size: int = SAMPLES, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    return TensorDataset(torch.randn(size, FEATURES, generator=generator) + labels[:, None], labels)


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, outputs))


def ask(model: nn.Module, loader: Any, queries: Any, *more: Any, **options: Any) -> NeighborAnswer:
    return find_neighbors(model, loader, queries, *more, **{"k": 4, "directions": "all", "progress": False, **options})


def exact(model: nn.Module, queries: Tensor, reference: Tensor) -> Tensor:
    """Return the similarities of queries to the reference samples, float64."""
    jacobian = loop_jacobian(model.eval(), torch.cat([queries, reference]))
    return dense_similarity(jacobian)[: len(queries), len(queries) :]


def check(answer: NeighborAnswer, similarity: Tensor, own: list[int] | None, k: int) -> None:
    """Hold an answer to the exact rows; `own` are the columns of the queries themselves."""
    torch.testing.assert_close(torch.tensor(answer.samples["soft_count"]), similarity.sum(1), rtol=0, atol=1e-4)
    if own is not None:
        similarity = similarity.clone()
        similarity[torch.arange(len(own)), own] = -2
    order = similarity.argsort(1, descending=True)[:, :k]
    assert answer.neighbors["neighbor"].tolist() == order.flatten().tolist()
    torch.testing.assert_close(
        torch.tensor(answer.neighbors["similarity"]), similarity.gather(1, order).flatten(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("outputs", "batch_size"), [(1, 23), (3, 7), (10, 1)])
def test_of_its_own_set(outputs: int, batch_size: int) -> None:
    model, inputs = network(outputs), data().tensors[0]
    answer = ask(model, DataLoader(data(), batch_size, shuffle=True), [17, 3])
    assert answer.samples["index"].tolist() == [3, 17]
    assert answer.samples["label"].tolist() == [0, 2]
    check(answer, exact(model, inputs[[3, 17]], inputs), [3, 17], 4)
    assert answer.meta["recall"] == 1.0
    assert answer.meta["num_samples"] == 2
    assert answer.meta["num_reference"] == SAMPLES


def test_of_another_set() -> None:
    model, reference = network(), data(30, seed=2)
    answer = ask(model, DataLoader(data(), 8), [0, 22], DataLoader(reference, 11), k=30)
    check(answer, exact(model, data().tensors[0][[0, 22]], reference.tensors[0]), None, 30)
    neighbors = answer.neighbors
    assert neighbors["neighbor_label"].tolist() == [index % 3 for index in neighbors["neighbor"]]
    subset = ask(model, DataLoader(data(), 8), [3, 17], max_samples=10)
    assert subset.meta["num_reference"] == 10
    assert subset.neighbors["neighbor"].nunique() <= 10


def test_random_directions_give_the_rows_of_analyze() -> None:
    model, loader = network(10), DataLoader(data(), 8)
    whole = analyze(model, loader, k=5, directions=2, progress=False, compare_activations=False)
    answer = ask(model, loader, [4, 9, 20], k=5, directions=2)
    columns = ["index", "rank", "neighbor"]
    expected = whole.neighbors[whole.neighbors["index"].isin([4, 9, 20])]
    assert answer.neighbors[columns].to_numpy().tolist() == expected[columns].to_numpy().tolist()
    rows = whole.samples.set_index("index").loc[[4, 9, 20]]
    for column in ("soft_count", "neighbor_fraction", "gradient_norm"):
        assert answer.samples[column].tolist() == pytest.approx(rows[column].tolist(), abs=1e-4)
    assert answer.samples["prediction"].tolist() == rows["prediction"].tolist()
    assert answer.meta["directions"]["count"] == 2


@pytest.mark.parametrize("name", ["conv2d", "lstm", "tied_through_function"])
def test_any_layer(name: str) -> None:
    model, inputs = cases.build(name)
    loader = [(inputs[:3],), (inputs[3:],)]
    answer = ask(model, loader, [1], k=2)
    check(answer, exact(model, inputs[[1]], inputs), [1], 2)


def test_positions_go_on_from_one_loader_to_the_next() -> None:
    model, first, second = network(), data(9), data(6, seed=4)
    answer = ask(model, [DataLoader(first, 4), DataLoader(second, 4)], [2, 11])
    inputs = torch.cat([first.tensors[0], second.tensors[0]])
    check(answer, exact(model, inputs[[2, 11]], inputs), [2, 11], 4)
    assert answer.samples["dataloader"].tolist() == [0, 1]


def test_a_stream_of_batches() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    answer = ask(model, Batches(), [2, 20])
    inputs = Points().points
    check(answer, exact(model, inputs[[2, 20]], inputs), [2, 20], 4)
    with pytest.raises(NetsimError, match="from 0 to 21, but got 22"):
        ask(model, Batches(), [22])


def test_one_sweep() -> None:
    class Counting(Points):
        reads = 0

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            Counting.reads += 1
            return super().__getitem__(index)

    ask(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), DataLoader(Counting(200), 50), [2, 20], k=3)
    # The sweep, the first batch to look at the model with, the queries, and what is listed.
    assert Counting.reads <= 200 + 50 + 2 + 2 * 3


def test_samples_without_a_gradient_are_left_out() -> None:
    inputs = data().tensors[0].clone()
    inputs[[5, 8]] = 0
    model = nn.Linear(FEATURES, 2, bias=False)
    answer = ask(model, DataLoader(TensorDataset(inputs), 6), [3, 5])
    assert answer.neighbors["index"].unique().tolist() == [3]
    assert not answer.neighbors["neighbor"].isin([5, 8]).any()
    assert answer.samples["soft_count"].isna().tolist() == [False, True]
    assert answer.samples["rank"].tolist() == [2, 0]
    assert answer.meta["num_left_out"] == 2
    assert answer.meta["num_reference"] == SAMPLES - 2
    assert "left out: its gradient is zero or not finite" in str(answer)
    apart = ask(model, DataLoader(TensorDataset(inputs), 6), [3, 5], DataLoader(TensorDataset(inputs[6:]), 6))
    assert apart.meta["num_left_out"] == 2  # A query, and a sample of the other set.
    nothing = ask(model, DataLoader(TensorDataset(inputs), 6), [5])
    assert len(nothing.neighbors) == 0
    assert isinstance(nothing.plot(), Figure)


class Named(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 2)
        self.calls: list[int] = []

    def similarity_step(self, batch: Any, batch_idx: int) -> SimilarityBatch:
        self.calls.append(batch_idx)
        self.log("seen", 1.0)
        names = [f"image-{int(10 * value)}" for value in batch[0][:, 0]]
        kinds = ["cat" if label else "dog" for label in batch[1]]
        return SimilarityBatch(self.layer(batch[0]), kinds, names, names)


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = Named().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    answer = ask(model, DataLoader(data(), 8), [3])
    assert model.training
    assert model.calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert answer.samples["label"].tolist() == ["dog"]
    assert answer.samples["sample_id"].tolist()[0].startswith("image-")
    assert set(answer.neighbors["neighbor_label"]) <= {"cat", "dog"}


def test_it_is_shown_and_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    answer = ask(model, DataLoader(Points(), 8), [2, 20], class_names=["ant", "bee", "cow"])
    text = str(answer)
    assert "2 samples, compared exactly with 22 of the loader · outputs: all (3)" in text
    assert "Sample 2 · label cow · predicted" in text
    assert text.count("rank neighbor similarity label") == 2
    neighbor, similarity = answer.neighbors["neighbor"][0], answer.neighbors["similarity"][0]
    assert f" 1{neighbor:9d}{similarity:11.4f} " in text
    assert "1 sample, compared" in str(ask(model, DataLoader(Points(), 8), [2]))
    path = answer.save(tmp_path / "answer")
    assert {file.name for file in path.iterdir()} == {"samples.parquet", "neighbors.parquet", "meta.json", "neighbors.png"}
    assert load_run(path).neighbors.equals(answer.neighbors)
    assert answer.pictures.queries is not None
    assert answer.pictures.queries(2) is not None
    assert answer.pictures.reference is not None
    assert answer.pictures.reference(int(neighbor)) is not None


@pytest.mark.parametrize(
    ("queries", "options", "complaint"),
    [
        ([23], {}, "`queries` to be positions of samples in the data set, from 0 to 22, but got 23"),
        ([3, 3], {}, "`queries` to be different positions, but got 3 more than once"),
        (["3"], {}, "`queries` to be positions of samples in the data set, integers from 0, but got '3'"),
        ([], {}, "`queries` to be at least one position"),
        ([3], {"k": 23}, "`k` to be at most 22, the number of other samples in the reference set, but got 23"),
        ([3], {"k": 0}, "`k` to be a positive int"),
        ([3], {"k": 10, "max_samples": 10}, "`k` to be at most 9"),
        ([3], {"directions": "some"}, "`directions` to be one of"),
        ([3], {"parameters": "nowhere"}, "`parameters` to be"),
    ],
)
def test_bad_input_is_named(queries: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NetsimError, match=complaint):
        ask(network(), DataLoader(data(), 8), queries, **options)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_noise_of_the_model_is_the_same_each_time() -> None:
    model = nn.Sequential(Noise(), nn.Linear(FEATURES, 2))
    first = ask(model, DataLoader(data(), 8), [3])
    torch.rand(7)
    assert ask(model, DataLoader(data(), 8), [3]).neighbors.equals(first.neighbors)


def test_samples_that_see_each_other_are_refused_whatever_is_asked() -> None:
    class Centered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(NetsimError, match="does not depend on the rest of the batch"):
        ask(Centered(FEATURES, 2), DataLoader(data(), 8), [3])


@pytest.mark.gpu
def test_on_the_device() -> None:
    model, inputs = network(), data().tensors[0]
    similarity = exact(model, inputs[[3, 17]], inputs)
    check(ask(model.cuda(), DataLoader(data(), 8), [3, 17]), similarity, [3, 17], 4)


def test_autocast_around_the_call_changes_nothing() -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(6, 2), TensorDataset(torch.randn(20, 6))
    plain = find_neighbors(model, DataLoader(data, 8), [3, 17], k=5, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        surrounded = find_neighbors(model, DataLoader(data, 8), [3, 17], k=5, progress=False)
    assert surrounded.samples["soft_count"].equals(plain.samples["soft_count"])
    assert surrounded.neighbors["similarity"].equals(plain.neighbors["similarity"])

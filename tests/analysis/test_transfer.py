"""What else moves, against the dense kernel in float64 and against small steps that are really taken."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import find_transfer, per_sample_jacobian, transfer
from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.transfer import TransferAnswer
from tests import cases
from tests.callbacks.runs import Points
from tests.oracles import loop_jacobian

SAMPLES, FEATURES = 23, 5


def data(size: int = SAMPLES, classes: int = 3, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % classes
    return TensorDataset(torch.randn(size, FEATURES, generator=generator) + labels[:, None], labels)


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, outputs)).eval()


def ask(model: nn.Module, loader: Any, query: Any, *more: Any, **options: Any) -> TransferAnswer:
    return find_transfer(model, loader, query, *more, progress=False, **options)


def exact(model: nn.Module, queries: Tensor, others: Tensor, change: Tensor) -> Tensor:
    """Return K(x', x) C(x)⁺ v for the one query x and all others x', shape (N, D), float64."""
    jacobian = loop_jacobian(model, torch.cat([queries, others]))
    gram = jacobian[0] @ jacobian[0].T
    return jacobian[1:] @ jacobian[0].T @ torch.linalg.pinv(gram, rcond=1e-6) @ change.double()


def by_index(answer: TransferAnswer) -> pd.DataFrame:
    return answer.samples.sort_values("index").set_index("index")


def margins(values: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the value of the label less that of the strongest other output."""
    rows = []
    for value, output, label in zip(values, outputs, labels, strict=True):
        others = [c for c in range(len(output)) if c != label]
        rows.append(value[label] - value[max(others, key=lambda c: output[c])])
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [23, 4])
def test_it_is_the_transfer_of_the_paper(batch_size: int) -> None:
    model, (inputs, labels) = network(), data().tensors
    answer = ask(model, DataLoader(data(), batch_size, shuffle=True), 7)
    outputs = model(inputs).detach()
    other = max((c for c in range(3) if c != labels[7]), key=lambda c: outputs[7, c])
    change = torch.zeros(3)
    change[labels[7]], change[other] = 0.5**0.5, -(0.5**0.5)
    assert answer.meta["change"] == pytest.approx(change.tolist())
    moves = exact(model, inputs[[7]], inputs, change)
    keep = torch.arange(SAMPLES) != 7
    table = by_index(answer)
    assert table.index.tolist() == keep.nonzero().squeeze(1).tolist()
    assert table["label"].tolist() == labels[keep].tolist()
    assert table["prediction"].tolist() == outputs.argmax(1)[keep].tolist()
    expected = {
        "moved": moves.norm(dim=1),
        "along": moves @ change.double(),
        "margin": margins(outputs, outputs, labels),
        "margin_change": margins(moves, outputs, labels),
    }
    for column, values in expected.items():
        torch.testing.assert_close(torch.tensor(table[column].tolist()), values[keep].float(), rtol=1e-4, atol=1e-5)
    assert answer.samples["moved"].is_monotonic_decreasing
    torch.testing.assert_close(moves[7], change.double())
    assert answer.meta["along"] == pytest.approx(1, abs=1e-5)
    kernel = per_sample_jacobian(model, inputs).inner(per_sample_jacobian(model, inputs[[7]]))
    by_function = transfer(kernel[:, 0], kernel[7, 0]) @ change
    torch.testing.assert_close(by_function.double(), moves, rtol=1e-4, atol=1e-5)


LAYERS = "conv2d lstm transformer_layer tied_through_function unused_and_frozen"


@pytest.mark.parametrize("name", LAYERS.split())
def test_any_layer(name: str) -> None:
    model, inputs = cases.build(name)
    change = torch.linspace(-1, 2, loop_jacobian(model, inputs).shape[1])
    answer = ask(model, [(inputs[:3],), (inputs[3:],)], 1, change)
    moves = exact(model, inputs[[1]], inputs, change)
    found = by_index(answer)
    keep = [i for i in range(len(inputs)) if i != 1]
    assert found["moved"].tolist() == pytest.approx(moves.norm(dim=1)[keep].tolist(), rel=1e-3)
    assert found["along"].tolist() == pytest.approx((moves @ change.double() / (change @ change))[keep].tolist(), abs=1e-4)
    assert "margin" not in found


def test_a_small_step_moves_the_outputs_as_predicted() -> None:
    model, inputs = network().double(), data().tensors[0].double()
    loader = DataLoader(TensorDataset(inputs, data().tensors[1]), 8)
    answer = ask(model, loader, 7, reference=loader)
    assert answer.samples["index"].nunique() == SAMPLES
    found = by_index(answer)
    errors = []
    for size in (1e-2, 5e-3, 2.5e-3):
        stepped = copy.deepcopy(model)
        with torch.no_grad():
            for name, step in answer.step.items():
                stepped.get_parameter(name).add_(size * step)
        moves = (stepped(inputs) - model(inputs)).detach() / size
        along = moves @ torch.tensor(answer.meta["change"]).double()
        errors.append(float((along - torch.tensor(found["along"].to_numpy())).abs().max()))
        torch.testing.assert_close(moves.norm(dim=1), torch.tensor(found["moved"].to_numpy()), rtol=0.02, atol=0.02)
    assert errors[0] > 1e-6, "nothing to see: the network is linear"
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_the_step_is_the_least_one() -> None:
    model, inputs = network().double(), data().tensors[0].double()
    answer = ask(model, DataLoader(TensorDataset(inputs, data().tensors[1])), 7)
    [jacobian] = loop_jacobian(model, inputs[[7]])
    step = torch.cat([answer.step[name].flatten() for name, _ in model.named_parameters()])
    change = torch.tensor(answer.meta["change"]).double()
    torch.testing.assert_close(jacobian @ step, change, rtol=1e-5, atol=1e-6)
    # The least solution lies in the span of the gradients.
    torch.testing.assert_close(torch.linalg.pinv(jacobian) @ (jacobian @ step), step)
    assert answer.meta["length"] == pytest.approx(float(step.norm()))
    assert answer.meta["length"] ** 2 == pytest.approx(
        float(change @ torch.linalg.inv(jacobian @ jacobian.T) @ change), rel=1e-4
    )


def test_other_outputs_may_be_left_open() -> None:
    model, inputs = network(10), data().tensors[0]
    change = torch.randn(10)
    everything, along = (ask(model, [inputs], 7, change, [inputs], directions=name) for name in ("all", "change"))
    unit = change.double() / change.norm()
    jacobian = torch.einsum("bdp,d->bp", loop_jacobian(model, inputs), unit)
    expected = jacobian @ jacobian[7] / jacobian[7].square().sum()
    found = by_index(along)
    assert found["along"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert found["along"][7] == pytest.approx(1, abs=1e-5)
    assert found["moved"][7] > 1.001 * float(change.norm())
    assert by_index(everything)["moved"][7] == pytest.approx(float(change.norm()), rel=1e-4)
    assert along.meta["length"] < everything.meta["length"]


@pytest.mark.parametrize("labels", [True, False])
def test_a_single_output_is_moved_upwards(labels: bool) -> None:
    model, dataset = network(1), data(classes=2)
    inputs, truth = dataset.tensors
    answer = ask(model, DataLoader(dataset if labels else TensorDataset(inputs), 8), 7, k=3)
    moves = exact(model, inputs[[7]], inputs, torch.ones(1))[:, 0]
    keep = [i for i in range(SAMPLES) if i != 7]
    found = by_index(answer)
    assert answer.meta["change"] == [1.0]
    assert found["along"].tolist() == pytest.approx(moves[keep].tolist(), abs=1e-4)
    if labels:
        assert found["margin_change"].tolist() == pytest.approx((moves * (2 * truth - 1))[keep].tolist(), abs=1e-4)
        assert found["margin"].tolist() == pytest.approx((model(inputs)[:, 0] * (2 * truth - 1))[keep].tolist(), abs=1e-4)
        assert list(answer.tables) == ["Moved most", "Margins that fall most", "Margins that grow most"]
        falling = answer.tables["Margins that fall most"]["margin_change"].tolist()
        assert falling == sorted(value for value in found["margin_change"] if value < 0)[:3]
    else:
        assert list(found.columns) == ["moved", "along"]
        assert list(answer.tables) == ["Moved most", "Moved most against v", "Moved most along v"]
        assert answer.tables["Moved most along v"]["along"].is_monotonic_decreasing
    assert len(answer.tables["Moved most"]) == 3


def test_labels_that_are_no_classes_have_no_margin() -> None:
    inputs = data().tensors[0]
    answer = ask(network(1), DataLoader(TensorDataset(inputs, torch.randn(SAMPLES, 1)), 8), 7)
    assert list(answer.samples.columns) == ["index", "label", "prediction", "moved", "along"]
    assert ask(network(), DataLoader(TensorDataset(inputs, inputs), 8), 7, [1, 0, 0]).meta["label"] is None


def test_of_another_set() -> None:
    model, reference = network(), data(30, seed=2)
    answer = ask(model, DataLoader(data(), 8), 7, [0.0, 2.0, 0.0], DataLoader(reference, 7))
    moves = exact(model, data().tensors[0][[7]], reference.tensors[0], torch.tensor([0.0, 2.0, 0.0]))
    assert by_index(answer)["moved"].tolist() == pytest.approx(moves.norm(dim=1).tolist(), abs=1e-4)
    assert len(ask(model, DataLoader(data(), 8), 7, reference=DataLoader(reference, 7), max_samples=5).samples) == 5


def test_outputs_that_depend_on_each_other() -> None:
    model = nn.Sequential(network(), nn.Softmax(1))
    within = ask(model, DataLoader(data(), 8), 7)
    assert within.meta["along"] == pytest.approx(1, abs=1e-3)
    assert "depend on each other" not in str(within)
    beyond = ask(model, DataLoader(data(), 8), 7, [1, 0, 0])
    assert beyond.meta["along"] == pytest.approx(2 / 3, abs=1e-3)  # the part of (1, 0, 0) whose sum is 0
    assert "it moves by 0.667 of v only" in str(beyond)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(36, 3), nn.BatchNorm1d(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log("seen", 1.0)
        return self.norm(self.layer(x.flatten(1)))


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = Module().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        answer = ask(model, DataLoader(Points(), 8), 3)
    assert len(answer.samples) == len(Points()) - 1
    assert model.training
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_noise_of_the_model_is_the_same_each_time() -> None:
    model = nn.Sequential(Noise(), nn.Linear(FEATURES, 2))
    first = ask(model, DataLoader(data(), 8), 7, [1, 0])
    torch.rand(7)
    assert ask(model, DataLoader(data(), 8), 7, [1, 0]).samples.equals(first.samples)
    assert first.meta["along"] == pytest.approx(1, abs=1e-5)  # The step and the prediction saw the same noise.


def test_samples_that_see_each_other_are_refused() -> None:
    class Centered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(NetsimError, match="does not depend on the rest of the batch"):
        ask(Centered(FEATURES, 2), DataLoader(data(), 8), 7, [1, 0])


def test_it_is_shown_and_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    answer = ask(model, DataLoader(Points(), 8), 2, k=4, class_names=["ant", "bee", "cow"])
    text = str(answer)
    assert text.startswith("What else moves if sample 2 is corrected (label cow, prediction ")
    assert "cow by +0.707" in text
    assert "It was applied to 21 samples of the loader" in text
    for title, table in answer.tables.items():
        assert title in text
        assert len(table) <= 4
    assert max(map(len, text.splitlines())) <= 100
    assert isinstance(answer.plot(), Figure)
    assert all(thumbnails is not None for thumbnails in answer.pictures)
    path = answer.save(tmp_path / "answer")
    assert {file.name for file in path.iterdir()} == {"transfer.parquet", "meta.json", "transfer.png"}
    assert pd.read_parquet(path / "transfer.parquet").equals(answer.samples)
    assert json.loads((path / "meta.json").read_text(encoding="utf-8"))["query"] == 2
    nothing = ask(model, [torch.eye(36)[:1], torch.zeros(1, 36)], 0, [1.0, 0.0, 0.0], parameters="1.weight")
    assert set(nothing.step) == {"1.weight"}
    assert nothing.samples["moved"].tolist() == [0.0]
    assert "none" in str(nothing)
    assert isinstance(nothing.plot(), Figure)


@pytest.mark.parametrize(
    ("query", "options", "complaint"),
    [
        (23, {}, "`query` to be positions of samples in the data set, from 0 to 22, but got 23"),
        ("3", {}, "`query` to be positions of samples in the data set, integers from 0, but got '3'"),
        (3, {"change": [1.0, 2.0]}, r"`change` to be a vector of 3 numbers, finite and not all 0, but got \[1.0, 2.0\]"),
        (3, {"change": [0.0, 0.0, 0.0]}, "`change` to be a vector of 3 numbers"),
        (3, {"change": torch.tensor([1.0, 0.0, torch.nan])}, "`change` to be a vector of 3 numbers"),
        (3, {"directions": "auto"}, "`directions` to be one of 'all', 'change', but got 'auto'"),
        (3, {"k": 0}, "`k` to be a positive int"),
    ],
)
def test_bad_input_is_named(query: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NetsimError, match=complaint):
        ask(network(), DataLoader(data(), 8), query, **options)


def test_what_cannot_be_corrected() -> None:
    unlabeled = DataLoader(TensorDataset(data().tensors[0]), 8)
    with pytest.raises(
        NetsimError, match="`change` to be a vector of 3 numbers, since the sample has no label among the classes 0 to 2"
    ):
        ask(network(), unlabeled, 3)
    still = nn.Linear(FEATURES, 2, bias=False)
    with pytest.raises(NetsimError, match="`query` to be a sample that can be moved, but got 0, whose gradient is zero"):
        ask(still, [torch.zeros(1, FEATURES), torch.ones(1, FEATURES)], 0, [1.0, 0.0])


@pytest.mark.gpu
def test_on_the_device() -> None:
    model, loader = network(), DataLoader(data(), 8)
    here, there = ask(model, loader, 7), ask(copy.deepcopy(model).cuda(), loader, 7)
    assert by_index(there)["moved"].tolist() == pytest.approx(by_index(here)["moved"].tolist(), abs=1e-4)

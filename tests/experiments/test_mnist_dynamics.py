from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments import mnist_dynamics
from experiments.mnist_dynamics import Labeled, Run
from lightning_netsim import JacobianOperator
from lightning_netsim.losses import GradientBatch

SMALL = ["--quick", "--seeds", "2", "--batch-sizes", "2", "--test-images", "40", "--threads", "1"]


def random_images(number: int = 120) -> Labeled:
    """Noise that differs by class, so that something can be learned."""
    labels = torch.arange(number) % 10
    return torch.rand(number, 1, 28, 28) + labels[:, None, None, None] / 10, labels


def random_loss(network: str, variant: str, weight: float, size: int = 3) -> Tensor:
    model = mnist_dynamics.make_network(network, seed=0).double()
    operator = JacobianOperator(model, directions="contrast", create_graph=True)
    images = torch.rand(2 * size, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return mnist_dynamics.batch_loss(operator, images, torch.full((2 * size,), 4), variant, weight)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist_dynamics, "load_images", lambda *_: (random_images(), random_images(40)))
    monkeypatch.setattr(mnist_dynamics, "STEPS", (1, 3))
    monkeypatch.setattr(mnist_dynamics, "CHOICE_STEPS", (1, 3))


def test_quick_run_prints_its_figures_draws_a_picture_and_can_be_resumed(
    few_images: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = mnist_dynamics.main([*SMALL, "--out", str(tmp_path)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == figures
    assert set(last) == {"seeds", "accuracy", "difference", "weights", "settings", "seconds"}
    for size, weights in last["weights"].items():
        assert set(last["accuracy"]["paper"][size]) == {"baseline", *weights}
        assert set(last["difference"]["paper"][size]) == set(weights)
        for cells in last["accuracy"]["paper"][size].values():
            assert set(cells) == {"1", "3", "early"}
            assert all(set(cell) == {"mean", "sd", "se"} for cell in cells.values())
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.csv", "mnist_dynamics.png"}

    path = tmp_path / "accuracy.csv"
    rows = pd.read_csv(path)
    rows.loc[0, "step_3"] = -1000.0  # Not trained again, so that it shows in the mean.
    rows.drop(index=[3]).to_csv(path, index=False)
    resumed = mnist_dynamics.main([*SMALL, "--resume", "--out", str(tmp_path)])
    assert len(pd.read_csv(path)) == len(rows)
    assert resumed["accuracy"]["paper"]["2"]["baseline"]["3"]["mean"] < -400
    for variant in mnist_dynamics.WEIGHTS[16]:
        assert resumed["accuracy"]["paper"]["2"][variant] == last["accuracy"]["paper"]["2"][variant]


def test_means_and_differences_are_those_of_the_seeds() -> None:
    values = {"baseline": [10.0, 20.0, 30.0], "ours": [13.0, 21.0, 35.0], "cosine": [9.0, 20.0, 30.0]}
    rows = [
        {"network": "paper", "batch_size": 2, "variant": variant, "seed": seed, "step_10": value, "step_20": value + 2}
        for variant, some in values.items()
        for seed, value in enumerate(some)
    ]
    found = mnist_dynamics.summarize(pd.DataFrame(rows).sample(frac=1, random_state=0), steps=(10, 20))
    assert found["seeds"] == {"paper": {"2": 3}}
    assert found["accuracy"]["paper"]["2"]["baseline"]["10"] == {"mean": 20.0, "sd": 10.0, "se": 5.77}
    assert found["accuracy"]["paper"]["2"]["baseline"]["early"]["mean"] == 21.0
    assert found["difference"]["paper"]["2"]["ours"]["20"] == {"mean": 3.0, "se": 1.15, "t": 2.6, "wins": 3}
    assert found["difference"]["paper"]["2"]["cosine"]["early"] == {"mean": -0.33, "se": 0.33, "t": -1.0, "wins": 0}


def test_weights_are_ranked_on_validation_images(
    few_images: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mnist_dynamics, "TRIED_WEIGHTS", {"cosine": (0.1, 1.0)})
    options = ["--choose-weights", "--seeds", "1", "--batch-sizes", "1", "--threads", "1", "--out", str(tmp_path)]
    figures = mnist_dynamics.main(options)
    assert list(figures["validation_accuracy"]["1"]["cosine"]) == ["0.1", "1"]
    assert "by weight" in capsys.readouterr().out


def test_variants_of_a_seed_start_alike_and_see_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}

    def watched(operator: JacobianOperator, images: Tensor, labels: Tensor, variant: str, weight: float) -> Tensor:
        parameters = [parameter.detach().clone() for parameter in operator.model.parameters()]
        seen.setdefault(variant, []).extend([images, labels, *(parameters if not seen.get(variant) else [])])
        return actual(operator, images, labels, variant, weight)

    actual = mnist_dynamics.batch_loss
    monkeypatch.setattr(mnist_dynamics, "batch_loss", watched)
    images = random_images()
    for variant in ("baseline", *mnist_dynamics.CRITERIA):
        mnist_dynamics.train(Run("paper", 2, variant, 1.0, 5, 3, 40), images, images, [3])
    for variant in mnist_dynamics.CRITERIA:
        assert len(seen[variant]) == len(seen["baseline"])
        assert all(torch.equal(a, b) for a, b in zip(seen[variant], seen["baseline"], strict=True))


def test_batches_hold_images_of_one_class_unless_mixed() -> None:
    labels = torch.arange(200) % 10
    drawn = list(mnist_dynamics.draw_batches(labels, 6, steps=30, seed=0))
    assert all(len(index) == 6 and len(labels[index].unique()) == 1 for index in drawn)
    assert len({int(labels[index[0]]) for index in drawn}) > 5
    mixed = mnist_dynamics.draw_batches(labels, 6, steps=30, seed=0, mixed=True)
    assert sum(len(labels[index].unique()) > 1 for index in mixed) > 25


@pytest.mark.parametrize(("variant", "opposite"), [("cosine", "released"), ("ours", "ours_opposite")])
def test_opposite_variants_differ_in_the_sign_alone(variant: str, opposite: str) -> None:
    plain = random_loss("paper", "baseline", 0)
    terms = [random_loss("paper", name, 0.7) - plain for name in (variant, opposite)]
    assert abs(float(terms[0].detach())) > 0.1
    torch.testing.assert_close(terms[0], -terms[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", list(mnist_dynamics.NETWORKS))
def test_released_term_is_the_cosine_of_the_mean_gradients_of_the_masked_log_probabilities(network: str) -> None:
    found = random_loss(network, "released", 1.0) - random_loss(network, "baseline", 0)
    model = mnist_dynamics.make_network(network, seed=0).double()
    images = torch.rand(6, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.full((10,), -1 / 9, dtype=torch.float64)
    mask[4] = 1
    means = []
    for half in images.split(3):
        value = (model(half).log_softmax(1) * mask).sum(1).mean()
        means.append(torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))]))
    expected = means[0] @ means[1] / (means[0].norm() * means[1].norm())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-8)


def test_two_images_make_one_criterion_of_three() -> None:
    terms = [random_loss("paper", variant, 1.0, size=1) for variant in ("pair", "cosine", "ours")]
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms[0], terms[2], rtol=1e-9, atol=1e-12)


def test_pairs_join_the_two_halves() -> None:
    model = mnist_dynamics.make_network("paper", seed=0).double()
    operator = JacobianOperator(model, directions="contrast", create_graph=True)
    batch = GradientBatch(operator, torch.rand(6, 1, 28, 28, dtype=torch.float64), torch.full((6,), 4))
    similarity = batch.similarity().detach()
    expected = -(similarity[0, 3] + similarity[1, 4] + similarity[2, 5]) / 3
    torch.testing.assert_close(mnist_dynamics.pair_criterion(batch).detach(), expected, rtol=1e-9, atol=1e-12)


def test_images_to_measure_on_are_never_trained_on(data_dir: Path) -> None:
    training, validation = mnist_dynamics.load_images(str(data_dir), True, 50)
    assert len(training[1]) == 50_000
    assert len(validation[1]) == 50
    assert not (training[0].flatten(1)[:, 200:600] == validation[0][0].flatten()[200:600]).all(1).any()
    again = mnist_dynamics.load_images(str(data_dir), False, 50)
    assert torch.equal(training[1], again[0][1])
    assert not torch.equal(validation[0], again[1][0])

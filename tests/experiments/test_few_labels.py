from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments import few_labels, few_labels_training
from experiments.few_labels_training import SCHEDULES, Data, Setting, Term, Training, criterion
from lightning_netsim import JacobianOperator
from lightning_netsim.losses import GradientBatch, InvarianceLoss

SMALL = ["--quick", "--steps", "4", "--search-steps", "2", "--threads", "1"]
SPLIT = ("labeled", "unlabeled", "validation", "test")


class _NumberedImages:
    """In place of MNIST: the images of the training set show their place, those of the test set minus one minus their place."""

    def __init__(self, data_dir: str) -> None:
        pass

    def load_sets(self) -> tuple[TensorDataset, TensorDataset]:
        return tuple(
            TensorDataset(places.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), places.abs() % 10)
            for places in (torch.arange(60_000), -1 - torch.arange(10_000))
        )


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setattr(few_labels_training, "MNISTDataModule", _NumberedImages)
    return Data.load("", validation=2000, test=10_000)


@pytest.fixture
def random_data() -> Data:
    images, labels = torch.rand(8000, 1, 28, 28), torch.arange(8000) % 10
    held_out = (images[:20], labels[:20], images[:20])
    return Data((images, labels), held_out, held_out)


def _places(images: Tensor) -> set[int]:
    return {int(place) for place in images[:, 0, 0, 0]}


def test_no_image_has_two_roles(numbered: Data) -> None:
    labeled, unlabeled = numbered.choose(seed=3, per_class=10)
    roles = [
        set(labeled.flatten().tolist()),
        set(unlabeled.tolist()),
        _places(numbered.validation[0]),
        _places(numbered.test[0]),
    ]
    assert [len(role) for role in roles] == [100, few_labels_training.UNLABELED, 2000, 10_000]
    assert len(set.union(*roles)) == sum(len(role) for role in roles)
    assert min(roles[2]) >= few_labels_training.POOL > max(roles[0] | roles[1])
    assert max(roles[3]) < 0, "what is judged last are test images"


def test_labeled_images_are_as_many_of_each_class_and_fewer_are_among_more(numbered: Data) -> None:
    ten, two = (numbered.choose(seed=3, per_class=number)[0] for number in (10, 2))
    assert torch.equal(numbered.train[1][ten], torch.arange(10).unsqueeze(1).expand(10, 10))
    assert torch.equal(ten[:, :2], two)
    assert not torch.equal(ten, numbered.choose(seed=4, per_class=10)[0])


def test_all_settings_of_a_seed_see_the_same_images_in_the_same_form_from_the_same_weights(random_data: Data) -> None:
    terms = (Term("probabilities", 1.0), Term("invariance", 0.1, directions="fresh"))
    settings = (Setting(), Setting("labeled", terms), Setting("unlabeled", terms))
    trainings = [Training(setting, random_data, seed=5, per_class=10, steps=4) for setting in settings]
    other = Training(Setting(), random_data, seed=6, per_class=10, steps=4)
    for name, value in trainings[0].network.state_dict().items():
        assert all(torch.equal(value, training.network.state_dict()[name]) for training in trainings)
        assert not torch.equal(value, other.network.state_dict()[name])
    for training in trainings:
        training.run()
        assert torch.equal(training.labeled, trainings[0].labeled)
        assert torch.equal(training.draws.get_state(), trainings[0].draws.get_state()), "what else is drawn is drawn elsewhere"


def test_a_run_is_the_same_each_time_and_leaves_the_global_generator(random_data: Data) -> None:
    setting = Setting("unlabeled", (Term("contrastive", 0.1, directions="fresh"),))
    before = torch.get_rng_state()
    first, second = (Training(setting, random_data, seed=5, per_class=2, steps=3).run() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("kind", few_labels.WEIGHTS)
@pytest.mark.parametrize("images", ["labeled", "unlabeled"])
def test_every_term_changes_what_is_learned(kind: str, images: str, random_data: Data) -> None:
    plain, other = (
        Training(Setting(images, terms), random_data, seed=5, per_class=2, steps=2).run() for terms in ((), (Term(kind, 1.0),))
    )
    moved = [(left - right).abs().max() for left, right in zip(plain.parameters(), other.parameters(), strict=True)]
    assert max(moved) > 1e-4
    assert all(torch.isfinite(parameter).all() for parameter in other.parameters())


def test_invariance_of_two_halves_is_the_criterion_of_the_library() -> None:
    network, images, moved = few_labels_training.SmallNetwork(), torch.rand(6, 1, 28, 28), torch.rand(6, 1, 28, 28)
    operator = JacobianOperator(network, directions=1, create_graph=True)
    generator = torch.Generator()
    found = criterion(Term("invariance", 1.0), GradientBatch(operator, torch.cat([images, moved])), generator)
    expected = InvarianceLoss(lambda _: moved, per_sample=False)(GradientBatch(operator, images))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_one_side_moves_only_the_second_view() -> None:
    network, images = few_labels_training.SmallNetwork(), torch.rand(6, 1, 28, 28, requires_grad=True)
    operator = JacobianOperator(network, directions=1, create_graph=True)
    term = Term("invariance", 1.0, stop=True)
    (gradient,) = torch.autograd.grad(criterion(term, GradientBatch(operator, images), torch.Generator()), images)
    assert float(gradient[:3].abs().max()) == 0 < float(gradient[3:].abs().max())


def test_maps_of_scale_zero_change_nothing() -> None:
    images, generator = torch.rand(5, 1, 28, 28), torch.Generator().manual_seed(0)
    torch.testing.assert_close(few_labels_training.transform(images, few_labels_training.draw_maps(5, generator, 0.0)), images)
    assert (few_labels_training.transform(images, few_labels_training.draw_maps(5, generator)) - images).abs().max() > 0.1


def test_schedules() -> None:
    factors = {name: [Term("group", 2.0, name).factor(done) for done in (0.0, 0.25, 0.5)] for name in SCHEDULES}
    assert factors == {"constant": [2, 2, 2], "up": [0, 1, 2], "down": [2, 1.5, 1], "early": [2, 0, 0]}


def test_search_goes_from_the_best_so_far() -> None:
    asked = []

    def judge(setting: Setting) -> float:
        (term,) = setting.terms
        asked.append(str(term))
        return -abs(term.weight - 0.25) + 0.01 * (term.layers == "first")

    axes = [
        few_labels.vary("weight", (0.1, 0.3, 1.0)),
        few_labels.vary("layers", ("last", "first")),
        few_labels.rescale(0.5, 2),
    ]
    best = few_labels.search(Setting("unlabeled", (Term("group", 0.0),)), axes, judge)
    assert str(best) == "unlabeled: group 0.3 first"
    assert asked == [
        "group 0.1",
        "group 0.3",
        "group 1",
        "group 0.3 last",
        "group 0.3 first",
        "group 0.15 first",
        "group 0.6 first",
    ]


def test_differences_are_taken_seed_by_seed() -> None:
    table = pd.DataFrame({"seed": [0, 1], "clean": [0.5, 0.7], "transformed": [0.3, 0.5]})
    better = table.assign(clean=table["clean"] + 0.1)
    found = few_labels.compare({"a": table, "b": better}, {"b": ["a"]})
    assert found["a"]["clean"] == {"mean": 0.6, "sd": pytest.approx(0.1414), "se": 0.1}
    assert found["b"]["minus a"]["clean"] == {"mean": 0.1, "sd": 0.0, "se": 0.0}
    assert found["b"]["minus a"]["mean"]["mean"] == 0.05


def test_quick_run_prints_its_figures_and_repeats_no_run(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--data-dir", str(data_dir), "--out", str(tmp_path)]
    figures = few_labels.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    both = figures["best_on_validation"]["labeled"][2]
    assert both in ("labeled: logits + invariance", "labeled: probabilities + invariance")
    names = {"augmentation", "labeled: logits", "unlabeled: invariance", both}
    for key in ("accuracy", "setting", "validation", "cost"):
        assert names <= figures[key].keys()
    row = figures["accuracy"][both]
    assert "minus augmentation" in row
    assert row["clean"].keys() == {"mean", "sd", "se"}
    assert "augmentation" in figures["accuracy_with_fewer"]
    assert {path.name for path in tmp_path.iterdir()} == {"few_labels.png", "runs.csv"}
    log = (tmp_path / "runs.csv").read_text()
    again = few_labels.main(arguments)
    assert (tmp_path / "runs.csv").read_text() == log
    assert again["accuracy"] == figures["accuracy"]

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments import metric_learning, metric_learning_training
from experiments.metric_learning import Log, gain
from experiments.metric_learning_training import (
    DIGITS,
    FORMS,
    LOSSES,
    OMNIGLOT,
    VALIDATION,
    Omniglot,
    Run,
    Split,
    Training,
    count_distances,
    split_digits,
    thin,
    train,
)
from lightning_netsim._checks import NetsimError
from lightning_netsim.losses import DifferenceAlignmentLoss

ALPHABETS = 7


def _classes(part: tuple[torch.Tensor, torch.Tensor]) -> set[int]:
    return set(part[1].tolist())


def _archive(path: Path, characters: int) -> None:
    """Write alphabets of drawings: a black bar of another height for each character, on white."""
    with zipfile.ZipFile(path, "w") as archive:
        for alphabet in range(ALPHABETS):
            for character in range(characters):
                for drawing in range(4):
                    picture = Image.new("1", (105, 105), 1)
                    picture.paste(0, (10 * drawing, 0, 105, 15 * (1 + character)))
                    with archive.open(f"{path.stem}/alphabet{alphabet}/character{character:02}/{drawing}.png", "w") as file:
                        picture.save(file, format="PNG")


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    (tmp_path / "omniglot").mkdir()
    _archive(tmp_path / "omniglot" / "images_background.zip", 4)
    _archive(tmp_path / "omniglot" / "images_evaluation.zip", 3)
    return tmp_path


@pytest.fixture
def digits() -> Split:
    return split_digits(0)


def few_digits(seed: int) -> Split:
    return Split(*((images[:120], labels[:120]) for images, labels in split_digits(seed)))


def _run(loss: str = "npair", form: str = "none", weight: float = 0.0, seed: int = 0, steps: int = 2) -> Run:
    return Run(DIGITS, loss, form, weight, 1e-3, steps, seed)


def test_no_digit_is_both_seen_and_unseen() -> None:
    splits = [split_digits(seed) for seed in range(12)]
    for split in splits:
        assert len(_classes(split.seen)) == len(_classes(split.unseen)) == 5
        assert not _classes(split.seen) & _classes(split.unseen)
        assert len(split.seen[0]) + len(split.unseen[0]) == 1797
    assert len({frozenset(_classes(split.seen)) for split in splits}) > 6, "the classes are drawn by the seed"


def test_no_character_is_both_seen_and_unseen_and_none_is_chosen_by_that_is_judged_last(drawings: Path) -> None:
    characters = Omniglot.load(str(drawings))
    final, validation = characters.split(OMNIGLOT), characters.split(VALIDATION)
    assert len(_classes(final.seen)) == ALPHABETS * 4
    assert len(_classes(final.unseen)) == ALPHABETS * 3
    assert not _classes(final.seen) & _classes(final.unseen)
    assert _classes(validation.seen) | _classes(validation.unseen) == _classes(final.seen)
    assert not _classes(validation.seen) & _classes(validation.unseen)
    alphabets = {label // 4 for label in _classes(validation.seen)}, {label // 4 for label in _classes(validation.unseen)}
    assert [len(some) for some in alphabets] == [ALPHABETS - 5, 5], "whole alphabets are held out"


def test_drawings_are_averaged_over_areas_with_ink_as_one(drawings: Path) -> None:
    images, labels = Omniglot.load(str(drawings)).background
    assert images.shape == (ALPHABETS * 4 * 4, 1, 28, 28)
    third = images[(labels == 2).nonzero()[0, 0], 0]
    torch.testing.assert_close(third.mean(), torch.tensor(45 / 105), rtol=0, atol=1e-3)
    assert third[:12].min() == 1
    assert third[12:].max() == 0


def test_missing_drawings_are_named(tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match=r"Expected `--data-dir` to be a directory with omniglot/images_background.zip"):
        metric_learning.main(["--quick", "--data", OMNIGLOT, "--data-dir", str(tmp_path), "--out", str(tmp_path)])


def test_all_arms_of_a_seed_start_alike_and_see_the_same_images(digits: Split) -> None:
    trainings = [Training(_run("npair"), digits), Training(_run("npair", "distance", 1.0), digits)]
    trainings.append(Training(_run("triplet", "signed", 0.1), digits))
    other = Training(_run(seed=1), digits)
    for name, value in trainings[0].network.state_dict().items():
        assert all(torch.equal(value, training.network.state_dict()[name]) for training in trainings)
    assert not torch.equal(trainings[0].network[0].weight, other.network[0].weight)
    for training in trainings:
        training.step()
    places = [training.draw() for training in trainings]
    assert all(torch.equal(places[0], some) for some in places)
    assert trainings[0].labels[places[0]].bincount().tolist() == [8] * 5
    assert not torch.equal(places[0], other.draw())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_every_alignment_changes_the_network(loss: str, digits: Split) -> None:
    weights = []
    for form, weight in (("none", 0.0), *((form, 1.0) for form in FORMS)):
        training = Training(_run(loss, form, weight), digits)
        training.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in training.network.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in Training(_run(loss), digits).network.parameters()])
    for place, some in enumerate(weights):
        assert all((some - other).abs().max() > 1e-4 for other in [start, *weights[:place]])


def test_sharp_control_is_the_cross_entropy_of_similarities_over_the_temperature() -> None:
    first, second = torch.randn(2, 4, 6, dtype=torch.float64)
    similarity = torch.nn.functional.cosine_similarity(first.unsqueeze(1), second, dim=2)
    wanted = torch.nn.functional.cross_entropy(similarity / 0.1, torch.arange(4))
    found = metric_learning_training.make_loss("npair_sharp", 4)(torch.cat([first, second]), torch.arange(4).repeat(2))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_first_form_is_the_default_of_the_library() -> None:
    assert next(iter(FORMS)) == "distance"
    default = DifferenceAlignmentLoss()
    assert FORMS["distance"] == {"difference": default.difference, "norm": default.norm}


def test_a_run_is_the_same_each_time_and_leaves_the_global_generator(digits: Split) -> None:
    before = torch.get_rng_state()
    first, second = (train(_run("proxy_anchor", "distance", 1.0), digits) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second


def test_distances_are_counted_between_classes_only() -> None:
    images = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]).view(3, 1, 1, 2)
    found = count_distances(torch.nn.Flatten(), (images, torch.tensor([0, 0, 1])))
    assert sum(found["counts"]) == 2, "the distance 0 within a class is left out"
    assert found["mean"] == pytest.approx(2**0.5, abs=1e-4)
    assert found["sd"] == 0


def test_thinning_keeps_whole_classes() -> None:
    labels = torch.tensor([3, 3, 5, 8, 8, 9, 12])
    images, kept = thin((torch.arange(7.0), labels), 2)
    assert kept.tolist() == [3, 3, 8, 8, 12]
    assert images.tolist() == [0, 1, 3, 4, 6]


def test_gain_is_taken_seed_by_seed_in_points() -> None:
    alone = [{"recall@1": value} for value in (0.5, 0.7, 0.9)]
    better = [{"recall@1": value} for value in (0.52, 0.70, 0.94)]
    # Differences 2, 0 and 4: a deviation of 2 over the root of 3.
    assert gain(better, alone) == {"mean": 2.0, "se": 1.15, "wins": 2}
    assert gain(better[:1], alone[:1])["se"] == 0
    with pytest.raises(ValueError, match="longer"):
        gain(better[:2], alone)


def test_log_repeats_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(metric_learning, "train", lambda run, split: asked.append(run) or {"recall@1": 0.5})
    for _ in range(2):
        log = Log(tmp_path / "runs.jsonl", lambda data, seed: split_digits(seed))
        assert [log.result(_run(seed=seed))["recall@1"] for seed in (0, 1, 0)] == [0.5] * 3
    assert asked == [_run(seed=0), _run(seed=1)]


def test_tiny_run_prints_its_figures_and_repeats_no_run(
    drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_learning_training, "POINTS", dict.fromkeys((DIGITS, OMNIGLOT, VALIDATION), 1))
    monkeypatch.setattr(metric_learning, "split_digits", few_digits)
    out = tmp_path / "out"
    arguments = ["--quick", "--steps", "2", "2", "--seeds", "2", "1", "1", "--data-dir", str(drawings), "--out", str(out)]
    figures = metric_learning.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    for name in ("npair", "proxy", "contrastive", "triplet"):
        for key in (f"{name}_gain", f"omniglot_{name}_gain", f"omniglot_{name}_gain_chosen"):
            assert isinstance(figures[key], float)
            assert figures[f"{key}_se"] >= 0
    rows = {data: [(row["loss"], row["form"]) for row in some] for data, some in figures["rows"].items()}
    wanted = [(loss, form) for loss in LOSSES for form in ("none", "distance")]
    assert rows == {DIGITS: wanted, VALIDATION: wanted, OMNIGLOT: wanted}
    assert figures["reference"][DIGITS]["untrained"].keys() == set(metric_learning.RECALLS)
    assert 0 < figures["reference"][DIGITS]["pixels"]["recall@1"] <= 100
    images = {f"metric_learning_{name}.png" for name in ("curves", "distances", "weights")}
    assert {path.name for path in out.iterdir()} == {"runs.jsonl"} | images
    log = (out / "runs.jsonl").read_text()
    again = metric_learning.main(arguments)
    assert (out / "runs.jsonl").read_text() == log
    assert again["rows"] == figures["rows"]

"""Wrong labels, near-duplicates, noisy rounds, copies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments import augmentation_denoises, noisy_rounds
from experiments.augmentation_denoises import SETTINGS, Copies, exact_law, moments, shared_factor, slope, turned
from experiments.noisy_rounds import NOISE, UPDATES, WRONG, Problem, Round, error, gains, moved, observation
from experiments.noisy_targets import Kernel, seeded
from lightning_netsim import analyze


@pytest.fixture
def digits() -> tuple[Tensor, Tensor]:
    """In place of MNIST: bars of several sizes and random brightness in the middle."""
    images = torch.zeros(3000, 1, 28, 28)
    for place, image in enumerate(images):
        length = 3 + place % 6
        image[0, 14 - length : 14 + length, 11:17] = 0.2 + 0.8 * torch.rand(2 * length, 6)
    return images, torch.arange(3000) % 10


def test_the_true_displacement_moves_the_outline_back(digits: tuple[Tensor, Tensor]) -> None:
    problem = Problem.make("displacement", digits, 50, seed=3)
    picture, outline = problem.inputs[:, :1], problem.inputs[:, 1:]
    expected = torch.nn.functional.max_pool2d(picture, 3, stride=1, padding=1) - picture
    assert torch.equal(moved(outline, problem.truth.long()), expected)
    assert problem.truth.abs().max() == noisy_rounds.REACH


def test_planted_noise_has_the_size_that_is_said_and_depends_on_the_seed(digits: tuple[Tensor, Tensor]) -> None:
    displaced, classes = (Problem.make(task, digits, 1500, seed=3) for task in noisy_rounds.TASKS)
    assert error(displaced.labels, displaced.truth) == pytest.approx(NOISE, rel=0.05)
    assert error(classes.labels, classes.truth) == pytest.approx(WRONG, abs=0.03)
    assert not torch.equal(displaced.labels, Problem.make("displacement", digits, 1500, seed=4).labels)
    assert torch.equal(displaced.labels, Problem.make("displacement", digits, 1500, seed=3).labels)


@pytest.mark.parametrize("task", noisy_rounds.TASKS)
def test_labels_are_replaced_by_what_the_update_says(task: str, digits: tuple[Tensor, Tensor]) -> None:
    problem = Problem.make(task, digits, 40, seed=0)
    now = Round(problem, problem, problem.labels, epochs=1, seed=0)
    whole = now.kernel.jacobian.materialize().double()
    pairs = torch.einsum("iap,jbp->ijab", whole, whole)
    weights = torch.linalg.solve(pairs.sum(1).unsqueeze(1), pairs)
    rows = problem.labels.double() if task == "displacement" else torch.eye(problem.outputs)[problem.labels].double()
    averaged = torch.einsum("ijab,jb->ia", weights, rows)
    torch.testing.assert_close(now.average.smoothed_targets.double(), averaged, atol=1e-3, rtol=1e-3)
    factor = (weights.square().sum((1, 2, 3)) / problem.outputs).sqrt()
    torch.testing.assert_close(now.average.factor.double(), factor, rtol=0.5, atol=0, msg="by 32 probes")
    assert (now.kernel.nearest(5) == torch.arange(40).unsqueeze(1)).any(1).all(), "a sample is its own neighbor"
    similarity = now.kernel.features.inner(now.kernel.features)
    torch.testing.assert_close(now.neighbors, similarity.mean(1), msg="counted by the normalized kernel")
    assert torch.equal(now.relabel("kept"), problem.labels)
    assert torch.equal(now.relabel("output"), now.outputs if task == "displacement" else now.outputs.argmax(1))
    assert {now.relabel(update).dtype for update in UPDATES} == {problem.labels.dtype}


def test_the_observation_is_tested_by_seed_and_over_rounds() -> None:
    rows = []
    for errors, neighbors in (([3, 2, 0.5, 0.5], [0.3, 0.6, 0.3]), ([3, 1, 0.5, 0.25], [0.4, 0.5, 0.6])):
        row = {"error_0": float(errors[0])}
        for number in range(1, 4):
            row |= {f"output_error_{number}": errors[number], f"output_network_{number}": errors[number]}
            row[f"output_neighbors_{number}"] = neighbors[number - 1]
        rows.append(row)
    assert [gains(row, "output") for row in rows] == [[1, 1.5, 0], [2, 0.5, 0.25]]
    found = observation(rows, "output")
    assert (found["most_neighbors_most_gain"], found["most_neighbors_best_labels"], found["seeds"]) == (1, 2, 2)
    assert [found[f"most_neighbors_in_round_{number}"] for number in (1, 2, 3)] == [0, 1, 1]
    agrees, differs = (observation([row], "output")["neighbors_and_gain_over_rounds"] for row in rows)
    assert differs < 0 < agrees
    assert found["gain_of_last_round"] == 0.125


def test_elongation_is_that_of_the_axes_and_turning_changes_it_little(digits: tuple[Tensor, Tensor]) -> None:
    bar = torch.zeros(1, 1, 28, 28)
    bar[0, 0, 4:24, 12:17] = 0.5
    ink, ratio = moments(bar)[0]
    assert float(ink) == pytest.approx(50)
    assert float(ratio) == pytest.approx(0.5 * math.log((20**2 - 1) / (5**2 - 1)))
    torch.testing.assert_close(moments(bar.rot90(1, (2, 3))), moments(bar))
    images = torch.nn.functional.avg_pool2d(digits[0][:50], 3, stride=1, padding=1)
    before, after = moments(images), moments(turned(images, torch.Generator().manual_seed(0)))
    assert ((before - after).square().mean(0).sqrt() < 0.1 * before.std(0)).all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("setting", SETTINGS)
def test_copies_share_the_truth_and_if_so_told_the_noise(setting: tuple[str, str], digits: tuple[Tensor, Tensor]) -> None:
    data = Copies.make(*setting, digits, 30, 4, seed=2)
    images, truth = data.inputs.unflatten(0, (30, 4)), data.truth.unflatten(0, (30, 4))
    assert bool((truth == truth[:, :1]).all()) == (setting[1] != "different")
    assert bool((images == images[:, :1]).all()) == (setting[1] == "identical")
    for noise, (labels, twin) in data.labels.items():
        if setting[0] == "values":
            assert torch.equal(twin, data.truth)
            added = (labels - data.truth).unflatten(0, (30, 4))
            assert bool((added - added[:, :1]).abs().max() < 1e-5) == (noise == "shared")
            continue
        for some in (labels, twin):
            changed = ((some - data.truth) % 10).unflatten(0, (30, 4))
            assert bool((changed == changed[:, :1]).all()) == (noise == "shared")
            assert 0.2 < float((changed != 0).float().mean()) < 0.6
        assert not torch.equal(labels, twin)


def test_the_factor_of_shared_noise_is_that_of_one_copy_each(digits: tuple[Tensor, Tensor]) -> None:
    images, network = torch.nn.functional.avg_pool2d(digits[0][:12], 2), seeded(1, 1, 14, 2)
    zeros, queries = torch.zeros(12, 2), torch.arange(4)
    alone = Kernel(network, images).average(zeros, zeros, queries).factor
    copied = Kernel(network, images.repeat_interleave(3, 0))
    factor = copied.average(zeros.repeat(3, 1), zeros.repeat(3, 1), 3 * queries).factor
    torch.testing.assert_close(shared_factor(copied, 3 * queries, 3).float(), alone, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(shared_factor(copied, 3 * queries, 1).float(), factor, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(factor * math.sqrt(3), alone, atol=1e-4, rtol=1e-3)


def test_the_law_is_exact_where_copies_are_seen_as_identical(digits: tuple[Tensor, Tensor]) -> None:
    assert max(exact_law(digits, seed=0, number=6, steps=5).values()) < 1e-10
    copies = augmentation_denoises.COPIES
    assert slope(copies, [3 / math.sqrt(number) for number in copies]) == pytest.approx(-0.5)


class TestWithCleanlab:
    """What is compared with cleanlab."""

    @pytest.fixture(autouse=True)
    def _imports(self) -> None:
        pytest.importorskip("cleanlab", reason="needs cleanlab: pip install cleanlab")
        from experiments import duplicates, label_noise

        self.noise, self.duplicates = label_noise, duplicates

    def case(self, path: Path, noise: str = "symmetric_20", size: int = 120, epochs: int = 1):
        data = self.noise.Data.load("digits", "", size, seed=3)
        return self.noise.Case("digits", data, noise, 3, epochs, path)

    @pytest.mark.parametrize(("noise", "share"), [("symmetric_20", 0.2), ("symmetric_40", 0.4), ("class_dependent_20", 0.2)])
    def test_planted_errors_are_as_many_as_they_say(self, noise: str, share: float) -> None:
        labels = torch.arange(1000) % 10
        given = self.noise.plant(labels, noise, 0)
        step = (given - labels)[given != labels] % 10
        assert len(step) == 1000 * share
        assert set(step.tolist()) == ({1} if noise.startswith("class") else set(range(1, 10)))

    def test_no_network_is_asked_of_what_it_was_trained_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trained: dict[int, Tensor] = {}

        def learn(case: object, labels: Tensor, kept: Tensor) -> nn.Module:
            network = self.noise.DigitsNetwork()
            trained[id(network)] = kept
            return network

        monkeypatch.setattr(self.noise.Case, "learn", learn)
        case = self.case(tmp_path)
        number = torch.arange(len(case.wrong))

        def ask(network: nn.Module, asked: Tensor, others: Tensor) -> object:
            assert not (trained[id(network)] & asked).any()
            assert torch.equal(trained[id(network)], others)
            return self.noise.Findings(number[asked].double(), number[asked])

        assert torch.equal(case.by_fold(ask).suggestion, number)

    def test_knowing_all_errors_is_perfect_and_puts_all_right(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        case, seen = self.case(tmp_path, "symmetric_40"), []
        assert set(self.noise.judge(case, self.noise.truth(case)).values()) == {1.0}
        reverse = self.noise.judge(case, self.noise.Findings(case.wrong.double(), case.given))
        assert (reverse["auroc"], reverse["precision"], reverse["named"]) == (0.0, 0.0, 0.0)
        learn = lambda case, labels, kept: seen.append((labels, kept)) or self.noise.DigitsNetwork()  # noqa: E731
        monkeypatch.setattr(self.noise.Case, "learn", learn)
        for treatment in self.noise.TREATMENTS:
            self.noise.clean(case, self.noise.truth(case), treatment)
        (_, kept), (replaced, _) = seen
        assert torch.equal(kept, ~case.wrong)
        assert torch.equal(replaced, case.data.labels)

    def test_scores_are_those_of_the_package_and_of_their_formulas(self, tmp_path: Path) -> None:
        case = self.case(tmp_path)
        tried = {score: found for (protocol, score), found in self.noise.try_scores(case).items() if protocol == "in sample"}
        found = self.noise.METHODS["kernel, in sample"]["k=30"](case)
        table = analyze(case.network, case.loader(torch.ones_like(case.wrong)), k=30, progress=False).find_issues().table
        assert found.score.tolist() == pytest.approx(table["label_score"].tolist())
        assert tried["`find_issues`, k=30"].score.tolist() == pytest.approx(found.score.tolist())
        analysis = analyze(case.network, case.loader(torch.ones_like(case.wrong)), k=50, progress=False)
        shares = [
            np.mean([float(case.given[other] == case.given[index]) for other in rows["neighbor"]])
            for index, rows in analysis.neighbors[analysis.neighbors["rank"] <= 30].groupby("index")
        ]
        assert tried["share of the label"].score.tolist() == pytest.approx(shares)
        probability = tried["probability of the label"].score
        assert tried["√(share · probability)"].score.tolist() == pytest.approx(
            (torch.tensor(shares) * probability).sqrt().tolist()
        )

    def planted(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(20, 3, 16, 16, generator=generator)
        return self.duplicates.Planted.among(images, per_kind=2, sets=1, generator=generator)

    def test_copies_are_near_and_none_is_equal(self) -> None:
        image, kinds = torch.arange(30.0).view(1, 5, 6), self.duplicates.KINDS
        seeds = [torch.Generator().manual_seed(seed) for seed in range(20)]
        assert {float(kinds["shift"](image, seed)[0, 2, 2]) for seed in seeds} == {8.0, 13.0, 15.0, 20.0}, "by one pixel"
        smooth = nn.functional.interpolate(torch.rand(1, 3, 4, 4), size=32, mode="bicubic")[0].clamp(0, 1)
        far = {kind: float((change(smooth, seeds[0]) - smooth).square().mean().sqrt()) for kind, change in kinds.items()}
        assert 0.015 < far["noise"] < 0.021
        assert 0 < far["jpeg 90"] < far["jpeg 75"] < 0.05

    def test_what_is_planted_is_written_down_and_judged(self) -> None:
        planted, kinds = self.planted(), self.duplicates.KINDS
        assert len(planted.images) == len(planted.origin) == len(planted.kind) == 20 + 2 * len(kinds) + 3
        for place in range(20, len(planted.kind)):
            assert planted.kind[planted.origin[place]] == planted.kind[place] != ""
        names = np.where(planted.kind != "", planted.origin, -1)
        perfect = self.duplicates.judge_sets(names, planted)
        assert all(perfect[f"{kind} {rate}"] == 1 for kind in (*kinds, "set", "all") for rate in ("recall", "precision"))
        assert (perfect["errors"], perfect["sets"]) == (0, 1)
        twin, stranger = int(np.flatnonzero(planted.kind == "noise")[-1]), int(np.flatnonzero(planted.kind == "")[0])
        names[twin] = names[stranger] = 99
        figures = self.duplicates.judge_sets(names, planted)
        assert (figures["noise recall"], figures["shift recall"]) == (1 / 2, 1), "neither it nor its original, of two pairs"
        assert figures["errors"] == 3, "the copy, its original, and the stranger"
        assert (figures["noise precision"], figures["shift precision"]) == pytest.approx((2 / 5, 4 / 7))

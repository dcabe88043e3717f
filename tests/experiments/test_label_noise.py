from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("cleanlab", reason="needs cleanlab: pip install cleanlab")

from experiments import label_noise, label_noise_scores, label_noise_training
from experiments.label_noise_training import FOLDS, METHODS, NOISE, Case, Data, Findings, plant, truth
from lightning_netsim import analyze

QUICK = ["--quick", "--size", "90", "--data-dir", ""]


def _case(path: Path, noise: str = "symmetric_20", size: int = 120, epochs: int = 1) -> Case:
    return Case("digits", Data.load("digits", "", size, seed=3), noise, 3, epochs, path)


@pytest.mark.parametrize(("noise", "share"), [("symmetric_20", 0.2), ("symmetric_40", 0.4), ("class_dependent_20", 0.2)])
def test_planted_errors_are_as_many_as_they_say(noise: str, share: float) -> None:
    labels = torch.arange(1000) % 10
    given = plant(labels, noise, 0)
    step = (given - labels)[given != labels] % 10
    assert len(step) == 1000 * share
    assert set(step.tolist()) == ({1} if noise.startswith("class") else set(range(1, 10)))
    assert torch.equal(given, plant(labels, noise, 0))
    assert not torch.equal(given, plant(labels, noise, 1))


def test_digits_are_split_before_they_are_drawn() -> None:
    data = Data.load("digits", "", 3000, 0)
    assert len(data.images) == len(data.labels) == 1078
    assert len(data.images) + len(data.test_images) == 1797
    images = {tuple(image.flatten().tolist()) for image in data.images}
    assert not images & {tuple(image.flatten().tolist()) for image in data.test_images}


def test_no_network_is_asked_of_what_it_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: dict[int, Tensor] = {}

    def learn(case: Case, labels: Tensor, kept: Tensor) -> nn.Module:
        assert torch.equal(labels, case.given)
        network = label_noise_training.DigitsNetwork()
        trained[id(network)] = kept
        return network

    monkeypatch.setattr(Case, "learn", learn)
    case = _case(tmp_path)
    number = torch.arange(len(case.wrong))

    def ask(network: nn.Module, asked: Tensor, others: Tensor | None) -> Findings:
        assert others is not None
        assert not (trained[id(network)] & asked).any()
        assert torch.equal(trained[id(network)], others)
        return Findings(number[asked].double(), number[asked])

    found = case.by_fold(ask)
    assert torch.equal(found.suggestion, number)
    assert torch.equal(found.score, number.double())
    sizes = [int((case.fold == fold).sum()) for fold in range(FOLDS)]
    assert sizes == [40, 40, 40]


def test_networks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _case(tmp_path)
    outputs = first.probabilities
    monkeypatch.setattr(label_noise_training, "train", lambda *_: pytest.fail("was trained again"))
    assert torch.equal(_case(tmp_path).probabilities, outputs)
    assert not torch.equal(outputs, outputs.flip(0))


def test_knowing_all_errors_is_perfect(tmp_path: Path) -> None:
    case = _case(tmp_path)
    perfect = label_noise.judge(case, truth(case))
    assert set(perfect.values()) == {1.0}
    reverse = label_noise.judge(case, Findings(case.wrong.double(), case.given))
    assert (reverse["auroc"], reverse["precision"], reverse["named"]) == (0.0, 0.0, 0.0)


def test_as_many_are_left_out_or_replaced_as_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(tmp_path, "symmetric_40")
    seen: list[tuple[Tensor, Tensor]] = []

    def learn(case: Case, labels: Tensor, kept: Tensor) -> nn.Module:
        seen.append((labels, kept))
        return label_noise_training.DigitsNetwork()

    monkeypatch.setattr(Case, "learn", learn)
    for treatment in label_noise.TREATMENTS:
        assert 0 <= label_noise.clean(case, truth(case), treatment)["accuracy"] <= 1
    (left, kept), (replaced, all_of_them) = seen
    assert torch.equal(kept, ~case.wrong)
    assert torch.equal(left[kept], case.data.labels[kept])
    assert all_of_them.all()
    assert torch.equal(replaced, case.data.labels)


def test_kernel_asks_the_package(tmp_path: Path) -> None:
    case = _case(tmp_path)
    found = METHODS["kernel, in sample"]["k=30"](case)
    everything = torch.ones_like(case.wrong)
    table = analyze(case.network, case.loader(everything), k=30, progress=False).find_issues().table
    assert found.score.tolist() == pytest.approx(table["label_score"].tolist())
    assert found.suggestion.tolist() == table["suggested_label"].tolist()
    assert found.flagged is not None
    assert found.flagged.tolist() == table["is_label_issue"].tolist()
    assert case.given.tolist() == table["label"].tolist()


def test_scores_that_were_tried_are_of_the_same_record(tmp_path: Path) -> None:
    case = _case(tmp_path)
    tried = label_noise_scores.try_scores(case)
    assert {score for _, score in tried} == set(label_noise_scores.TRIED)
    for protocol, kind in zip(label_noise_scores.PROTOCOLS, ("kernel", "kernel, in sample"), strict=True):
        found = METHODS[kind]["k=30"](case)
        assert tried[protocol, "`find_issues`, k=30"].score.tolist() == pytest.approx(found.score.tolist())
    analysis = analyze(case.network, case.loader(torch.ones_like(case.wrong)), k=50, progress=False)
    nearest = analysis.neighbors[analysis.neighbors["rank"] <= 30]
    shares, weighted = [], []
    for index, rows in nearest.groupby("index"):
        same = [float(case.given[other] == case.given[index]) for other in rows["neighbor"]]
        weight = [max(value, 0.0) for value in rows["similarity"]]
        shares.append(sum(same) / 30)
        weighted.append(sum(a * b for a, b in zip(same, weight, strict=True)) / sum(weight))
    protocol = label_noise_scores.PROTOCOLS[1]
    assert tried[protocol, "share of the label"].score.tolist() == pytest.approx(shares)
    assert tried[protocol, "share, weighted by similarity"].score.tolist() == pytest.approx(weighted)
    probability = tried[protocol, label_noise_scores.CONFIDENCE].score
    assert tried[protocol, label_noise_scores.MEAN].score.tolist() == pytest.approx(
        (torch.tensor(shares) * probability).sqrt().tolist()
    )


def test_issues_of_cleanlab_come_first(tmp_path: Path) -> None:
    case = _case(tmp_path, epochs=30)
    found = METHODS["cleanlab issues"]["prune_by_noise_rate"](case)
    assert found.flagged is not None
    assert 0 < found.flagged.sum() < len(found.flagged)
    assert found.score[found.flagged].max() < found.score[~found.flagged].min()


def test_every_method_finds_errors(tmp_path: Path) -> None:
    case = _case(tmp_path, size=160, epochs=25)
    for kind, variants in METHODS.items():
        found = label_noise.judge(case, list(variants.values())[-1](case))
        assert found["auroc"] > 0.75, kind


def test_choice_is_made_by_other_seeds() -> None:
    asked = []

    class FakeRuns:
        def detect(self, name: str, noise: str, seed: int, method: str, variant: str) -> dict[str, float]:
            asked.append(seed)
            return {"auroc": 1.0 if variant in ("k=20", "normalized_margin") else 0.5}

    runs: Any = FakeRuns()
    chosen = label_noise.choose(runs, [1000, 1001])
    assert chosen.keys() == METHODS.keys()
    assert (chosen["activations"], chosen["cleanlab score"]) == ("k=20", "normalized_margin")
    assert set(asked) == {1000, 1001}


def test_quick_run_prints_its_figures_and_repeats_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_noise, "NETWORKS", {"digits": label_noise.NETWORKS["digits"]})
    monkeypatch.setattr(label_noise, "NOISE", {"class_dependent_20": NOISE["class_dependent_20"]})
    few = {kind: dict(list(some.items())[:2]) for kind, some in METHODS.items() if kind in label_noise.CLEANED}
    monkeypatch.setattr(label_noise, "METHODS", few)
    arguments = [*QUICK, "--out", str(tmp_path)]
    figures = label_noise.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["auroc"]["digits"].keys() == few.keys()
    assert all(row.keys() == {"class_dependent_20"} for row in figures["auroc"]["digits"].values())
    assert figures["scores_tried"]["auroc"].keys() == set(label_noise_scores.TRIED)
    after = figures["accuracy_after"]["digits"]
    assert {arm.split(":")[0] for arm in after} == {label_noise.NOTHING, label_noise.EVERYTHING, *label_noise.CLEANED}
    assert {path.name for path in tmp_path.iterdir()} == {"label_noise.png", "detection.csv", "accuracy.csv", "networks"}
    logs = [(tmp_path / name).read_text() for name in ("detection.csv", "accuracy.csv")]
    assert label_noise.main(arguments) == figures
    assert [(tmp_path / name).read_text() for name in ("detection.csv", "accuracy.csv")] == logs

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments import two_afc
from experiments.two_afc import (
    Judgments,
    agreement_table,
    judge,
    measure,
    read_live,
    read_triplets,
    two_afc_score,
    weighted_agreement,
)
from lightning_netsim import NetsimError
from lightning_netsim.losses import VGGLoss

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SIDE = 48


def _save(image: Tensor, path: Path) -> None:
    Image.fromarray((255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a directory with three references and noisy images of each: more noise is worse, but of the second reference."""
    folder = tmp_path / "live"
    folder.mkdir()
    generator, rows = torch.Generator().manual_seed(0), []
    for number in range(3):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        reference = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0]
        _save(reference, folder / f"ref_{number}.png")
        for level in range(4):
            image = reference + 0.04 * level * torch.randn(3, SIDE, SIDE, generator=generator)
            _save(image, folder / f"{number}_{level}.png")
            rows.append((f"ref_{number}.png", f"{number}_{level}.png", 0.2 * level if number != 1 else 0.1 * (4 - level)))
    rows[0] = (*rows[0][:2], 0.0)
    _save(torch.from_numpy(np.array(Image.open(folder / "0_3.png"))).permute(2, 0, 1) / 255, folder / "0_again.png")
    rows.append(("ref_0.png", "0_again.png", 0.5))
    pd.DataFrame(rows, columns=["reference", "file", "dmos_scaled"]).to_csv(folder / "scores.csv", index=False)
    return tmp_path


def test_score_of_a_triplet() -> None:
    first, second, preference = torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5], [1.0, 1.0, 0.5], [1.0, 2.0, 0.9]]).unbind(1)
    preference = torch.tensor([0.2, 0.2, 0.2, 0.9])
    assert two_afc_score(first, second, preference).tolist() == pytest.approx([0.8, 0.2, 0.5, 0.1])


def test_copies_are_left_out_and_equal_images_are_one(data: Path) -> None:
    judgments = read_live(data, least_gap=0.05)
    assert [(reference.name, image.name) for reference, image in judgments.pairs] == [
        (f"ref_{number}.png", f"{number}_{level}.png") for number in range(3) for level in (1, 2, 3)
    ]
    assert judgments.scores == pytest.approx([0.2, 0.4, 0.55, 0.3, 0.2, 0.1, 0.2, 0.4, 0.6])
    assert judgments.owners.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for (first, second), preference in zip(judgments.triplets.tolist(), judgments.preference.tolist(), strict=True):
        assert preference == float(judgments.scores[first] > judgments.scores[second])
    gaps = torch.tensor([abs(judgments.scores[i] - judgments.scores[j]) for i, j in itertools.combinations(range(9), 2)])
    assert len(judgments.triplets) == int((gaps >= 0.05 - 1e-6).sum()), "0.55 and 0.6 are 0.05 apart"
    assert len(read_live(data, least_gap=0.0).triplets) == int((gaps > 1e-6).sum()), "equal scores say nothing"


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match=r"live/scores\.csv"):
        read_live(tmp_path, 0.0)
    with pytest.raises(NetsimError, match="does not exist"):
        read_triplets(tmp_path / "none.csv")


def test_triplets_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "triplets.csv"
    path.write_text("reference,first,second,h\na.png,b.png,c.png,0.25\na.png,c.png,d.png,1\ne.png,b.png,c.png,0\n")
    judgments = read_triplets(path)
    assert [(reference.name, image.name) for reference, image in judgments.pairs] == [
        *(("a.png", "b.png"), ("a.png", "c.png"), ("a.png", "d.png")),
        *(("e.png", "b.png"), ("e.png", "c.png")),
    ]
    assert judgments.pairs[0][0] == tmp_path / "a.png"
    assert judgments.triplets.tolist() == [[0, 1], [1, 2], [3, 4]]
    assert judgments.preference.tolist() == [0.25, 1, 0]
    assert judgments.owners.tolist() == [0, 0, 0, 1, 1]
    path.write_text("reference,first,second,h\na.png,b.png,c.png,25\n")
    with pytest.raises(NetsimError, match=r"within \[0, 1\]"):
        read_triplets(path)
    path.write_text("reference,first,second\na.png,b.png,c.png\n")
    with pytest.raises(NetsimError, match="one without 'h'"):
        read_triplets(path)


def _random_judgments(owners: list[int]) -> tuple[Judgments, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pairs = [(Path(f"r{owner}"), Path(str(place))) for place, owner in enumerate(owners)]
    triplets = torch.tensor(list(itertools.combinations(range(len(owners)), 2)))
    preference = torch.rand(len(triplets), generator=generator, dtype=torch.float64)
    return Judgments(pairs, triplets, preference), torch.randint(4, (3, len(owners)), generator=generator).double()


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 0, 1), (3, 1, 0)])
def test_agreement_with_references_drawn_several_times(within: bool, weights: tuple[int, ...]) -> None:
    owners = [0, 0, 0, 1, 1, 2, 2]
    judgments, distances = _random_judgments(owners)
    scores = []
    for (first, second), preference in zip(judgments.triplets.tolist(), judgments.preference.tolist(), strict=True):
        left, right = owners[first], owners[second]
        if (left == right) != within:
            continue
        times = weights[left] if within else weights[left] * weights[right]
        for draw in distances.tolist():
            share = 1 - preference if draw[first] < draw[second] else preference if draw[second] < draw[first] else 0.5
            scores += [share] * times
    found = weighted_agreement(*agreement_table(distances, judgments), torch.tensor([weights]).double(), within)
    assert found.tolist() == pytest.approx([sum(scores) / len(scores)])


def test_intervals_are_of_references() -> None:
    judgments, distances = _random_judgments([0, 0, 0, 1, 1, 1, 2, 2])
    baseline = torch.arange(8.0, dtype=torch.float64).unsqueeze(0)
    found = judge(distances, judgments, baseline)
    for name in ("agreement", "across"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
        assert found[f"{name}_spread"] > 0
    same = judge(baseline, judgments, baseline)
    assert same["agreement_gain_interval"] == same["across_gain_interval"] == [0, 0]
    assert same["agreement_spread"] == 0
    assert "spearman" not in found, "without scores there are no ranks"


def test_rank_correlations_within_references_and_of_all(data: Path) -> None:
    judgments = read_live(data, 0.05)
    distances = torch.tensor([[1.0, 2, 3, 1, 2, 3, 1, 2, 3]])
    found = two_afc.rank_correlations(distances, judgments)
    assert found["spearman_within"] == pytest.approx(1 / 3, abs=1e-4)
    expected = pd.Series(distances[0].tolist()).corr(pd.Series(judgments.scores), method="spearman")
    assert found["spearman"] == pytest.approx(expected, abs=1e-4)


def test_distances_of_images_together_are_those_of_each_alone(data: Path) -> None:
    judgments = read_live(data, 0.05)
    for name, recipe in two_afc.make_distances(None).items():
        if name in ("1 − MS-SSIM", "VGG random, to conv5_3"):  # Images are too small; it takes long.
            continue
        together = measure(recipe(3), judgments, shrink=1)
        reference, image = (two_afc.read_image(path, 1) for path in judgments.pairs[4])
        assert float(together[4]) == pytest.approx(float(recipe(3)(image, reference)), rel=1e-4), name
        assert torch.equal(together, measure(recipe(3), judgments, shrink=1)), name
        assert name in two_afc.FIXED or not torch.equal(together, measure(recipe(4), judgments, shrink=1)), name
        if name != "SWD":  # It takes other patches of both images.
            assert float(recipe(0)(reference, reference)) == pytest.approx(0, abs=1e-6), name


def test_quick_run_prints_its_figures(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["1 − SSIM", "1 − MS-SSIM", "MMD", "MMD++", "VGG random"]
    arguments = ["--data-dir", str(data), "--quick", "--shrink", "1", "--out", str(data), "--only", *names]
    figures = two_afc.main(arguments)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == figures
    assert "trained VGG networks are left out" in printed
    assert "1 − MS-SSIM: images are too small" in printed
    assert figures["agreement"].keys() == {"L2", "1 − SSIM", "MMD", "MMD++", "VGG random"}
    assert figures["images"] == 9
    assert sum(figures["triplets"]) == len(read_live(data, 0.05).triplets)
    # Noise is told apart by every distance; of one reference in three, people said the opposite.
    assert set(figures["agreement"].values()) == {round(2 / 3, 4)}
    assert all(0 < value < 1 for value in figures["across"].values())
    table = pd.read_csv(data / "distances.csv")
    assert [*table.columns] == ["reference", "image", *figures["agreement"]]
    assert len(table) == 9


def test_a_file_of_triplets_is_scored(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "live" / "triplets.csv"
    path.write_text("reference,first,second,h\nref_0.png,0_1.png,0_3.png,0.1\nref_2.png,2_3.png,2_1.png,0.7\n")
    figures = two_afc.main(["--triplets", str(path), "--quick", "--shrink", "1", "--out", str(data), "--only", "MMD"])
    assert figures["agreement"] == {"L2": 0.8, "MMD": 0.8}
    assert figures["triplets"] == [2, 0]
    assert "across" not in figures


def test_trained_networks_take_part_where_there_are_weights() -> None:
    weights = {
        f"features.{place}.{name}": value
        for place, layer in enumerate(VGGLoss(mode="random", layers=["conv3_1"])._network[0])
        for name, value in layer.state_dict().items()
    }
    assert {"VGG trained", "VGG first trained"} <= two_afc.make_distances(weights).keys()
    image, other = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained, first, random = (
        float(two_afc.make_distances(weights)[name](1)(image, other))
        for name in ("VGG trained", "VGG first trained", "VGG random")
    )
    assert len({trained, first, random}) == 3


@pytest.mark.skipif(not (DATA / "live").is_dir(), reason="the LIVE images are not at hand")
def test_live_images() -> None:
    judgments = read_live(DATA, 0.05)
    assert len(judgments.pairs) == 38
    assert len(set(judgments.owners.tolist())) == 7
    assert min(judgments.scores or []) == 0

"""Which of two distorted images is nearer to the original: how often do distances say what people say?

After the two-alternative forced choice (2AFC) of Zhang et al., CVPR 2018, with the distances of Amir and Weiss, Understanding
and Simplifying Perceptual Distances, CVPR 2021. On a triplet of a reference and two distorted images, of which a share h of
people find the second nearer, a distance with d0 to the first and d1 to the second scores 1 − h where d0 < d1, h where d1 < d0,
and ½ where they are equal; its agreement is the mean over triplets.

    python experiments/images/two_afc.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]
    python experiments/images/two_afc.py --triplets FILE

DIRECTORY/live holds scores.csv and the JPEG images of the LIVE database (release 2): for each image its reference and the
difference mean opinion score (DMOS), 0 for no difference and larger for worse. Triplets are made of two images with h = 1 where
the first has the larger score and h = 0 where the second has: both of the same reference, or, a harder question, each of its
own. Copies of a reference are left out, images that are equal are one image with the mean of their scores, and pairs whose
scores are less than --least-gap apart are left out, as the same image was rated that differently.

FILE is a CSV file with the columns reference, first, second and h: file names, as seen from the directory of the file.

Distances that draw random weights are drawn several times. Beside the table it writes the distances (`distances.csv`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure, structural_similarity_index_measure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.images.vgg_weights import LAYERS, read_vgg_weights
from lab import Size, Study, mean_of, script, spearman
from lightning_netsim._checks import expected
from lightning_netsim.estimators import SlicedWassersteinDistance
from lightning_netsim.losses import PatchMMDLoss, RandomNetworkLoss, VGGLoss

SIZES = {
    "triplets": Size("", None, "in place of LIVE: a CSV file with the columns reference, first, second, h"),
    "weights": Size("", None, "VGG-19 (normalized) up to conv3_1; by default DATA_DIR/weights/vgg19_normalised_conv3_1.pth"),
    "shrink": Size(2, 8, "what the sides of images are divided by"),
    "draws": Size(3, 2, "draws of each random distance"),
    "least_gap": Size(0.05, None, "between the scores of two images that are compared"),
    "only": Size(("",), None, "names of distances; L2 is always among them, and all if none are named"),
}
# Below this size of the shorter side, MS-SSIM with five scales and windows of 11 pixels is not defined.
LEAST_MS_SSIM = 161
WIDTH, DEPTH, NUM_FEATURES, BANDWIDTH = 128, 3, 512, 0.6
PATCHES = 512
BOOTSTRAPS = 10_000
# They draw no random numbers.
FIXED = ("L2", "1 − SSIM", "1 − MS-SSIM", "VGG trained")

Distance = Callable[[Tensor, Tensor], Tensor]
"""(images (n, 3, H, W), reference (1, 3, H, W)), values in [0, 1] -> distances (n,)."""


def two_afc_score(first: Tensor, second: Tensor, preference: Tensor) -> Tensor:
    """Return how a distance agrees with people on triplets.

    Args:
        first: distance of the reference from the first image of each triplet, any shape.
        second: from the second image.
        preference: h, the share of people who find the second image nearer, in [0, 1].

    Returns:
        1 − h where the first is nearer, h where the second is, ½ where neither.
    """
    return torch.where(first < second, 1 - preference, torch.where(second < first, preference, 0.5))


@dataclass(frozen=True)
class Judgments:
    """What people said.

    Attributes:
        pairs: the file of a reference and that of a distorted image, each pair once.
        triplets: places of the first and the second image in `pairs`, shape (T, 2).
        preference: h of each triplet, shape (T,), float64.
        scores: DMOS of each pair, where that is known.
    """

    pairs: list[tuple[Path, Path]]
    triplets: Tensor
    preference: Tensor
    scores: list[float] | None = None

    @property
    def owners(self) -> Tensor:
        """Return the number of the reference of each pair."""
        numbers = {reference: number for number, reference in enumerate(dict.fromkeys(pair[0] for pair in self.pairs))}
        return torch.tensor([numbers[reference] for reference, _ in self.pairs])


def read_live(data_dir: str | Path, least_gap: float) -> Judgments:
    """Return all pairs of distorted images of the LIVE images, of the same reference or not, whose scores are apart."""
    folder = Path(data_dir) / "live"
    if not (folder / "scores.csv").is_file():
        wanted = "a directory with live/scores.csv in it, and the images beside that file"
        remedy = "The LIVE image quality database is to be had from live.ece.utexas.edu."
        raise expected("data_dir", wanted, f"{str(data_dir)!r}", remedy)
    ratings: dict[tuple[Path, bytes], list[tuple[Path, float]]] = {}
    for row in pd.read_csv(folder / "scores.csv").itertuples():
        reference, file = folder / str(row.reference), folder / str(row.file)
        content = _pixels(file).tobytes()
        if content != _pixels(reference).tobytes():
            ratings.setdefault((reference, content), []).append((file, float(row.dmos_scaled)))
    pairs = [(reference, ratings[reference, content][0][0]) for reference, content in ratings]
    scores = [sum(score for _, score in rated) / len(rated) for rated in ratings.values()]
    apart = [
        (first, second)
        for second in range(len(pairs))
        for first in range(second)
        if abs(scores[first] - scores[second]) >= max(least_gap, 1e-9)
    ]
    triplets = torch.tensor(apart).view(-1, 2)
    worse = torch.tensor(scores, dtype=torch.float64)[triplets]
    return Judgments(pairs, triplets, (worse[:, 0] > worse[:, 1]).double(), scores)


def read_triplets(path: str | Path) -> Judgments:
    """Return the triplets of a CSV file with the columns reference, first, second and h."""
    folder, columns = Path(path).parent, ("reference", "first", "second", "h")
    if not Path(path).is_file():
        raise expected("triplets", f"a CSV file with the columns {', '.join(columns)}", f"{str(path)!r}, which does not exist")
    table = pd.read_csv(path)
    if missing := [column for column in columns if column not in table]:
        raise expected("triplets", f"a CSV file with the columns {', '.join(columns)}", f"one without {missing[0]!r}")
    preference = torch.tensor(table["h"].to_numpy(dtype=float))
    if not ((preference >= 0) & (preference <= 1)).all():
        raise expected("h", "shares of people, within [0, 1]", f"{float(preference.min()):g} to {float(preference.max()):g}")
    places: dict[tuple[Path, Path], int] = {}
    triplets = [
        [places.setdefault((folder / row["reference"], folder / row[side]), len(places)) for side in ("first", "second")]
        for _, row in table.iterrows()
    ]
    return Judgments(list(places), torch.tensor(triplets).view(-1, 2), preference)


@cache
def read_image(path: Path, shrink: int) -> Tensor:
    """Return an image, shape (1, 3, H, W), values in [0, 1], its sides divided by `shrink`."""
    image = torch.from_numpy(_pixels(path)).permute(2, 0, 1).unsqueeze(0) / 255
    return F.avg_pool2d(image, shrink)


def _pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def mean_squared_error(images: Tensor, reference: Tensor) -> Tensor:
    return (images - reference).square().flatten(1).mean(1)


def dissimilarity(images: Tensor, reference: Tensor) -> Tensor:
    """Return 1 − SSIM."""
    similarity = structural_similarity_index_measure(images, reference.expand_as(images), data_range=1.0, reduction="none")
    return 1 - torch.as_tensor(similarity)


def multiscale_dissimilarity(images: Tensor, reference: Tensor) -> Tensor:
    """Return 1 − MS-SSIM; NaN for images that are too small for it."""
    if min(images.shape[2:]) < LEAST_MS_SSIM:
        return images.new_full((len(images),), torch.nan)
    target = reference.expand_as(images)
    return 1 - multiscale_structural_similarity_index_measure(images, target, data_range=1.0, reduction="none")


def sliced_distance(draw: int) -> Distance:
    """Return the sliced Wasserstein distance of the patches of two images; places and directions are drawn."""

    def distance(images: Tensor, reference: Tensor) -> Tensor:
        found = []
        for image in images:
            metric = SlicedWassersteinDistance(patches_per_image=PATCHES, seed=draw)
            metric.update(image.unsqueeze(0), real=False)
            metric.update(reference, real=True)
            found.append(metric.compute()["swd"])
        return torch.stack(found)

    return distance


def make_distances(weights: Mapping[str, Tensor] | None) -> dict[str, Callable[[int], Distance]]:
    """Return all distances, each by the number of a draw; those with trained layers only where there are weights."""

    def mmd(local_weight: float) -> Callable[[int], Distance]:
        return lambda draw: PatchMMDLoss(
            BANDWIDTH, NUM_FEATURES, remove_mean=True, local_weight=local_weight, redraw=False, reduction="none", seed=draw
        )

    def network(pooling: bool) -> Callable[[int], Distance]:
        return lambda draw: RandomNetworkLoss(
            DEPTH, WIDTH, pooling=pooling, remove_mean=True, redraw=False, reduction="none", seed=draw
        )

    def vgg(mode: str, **options: Any) -> Callable[[int], Distance]:
        return lambda draw: VGGLoss(mode=mode, reduction="none", seed=draw, **options).eval()

    found: dict[str, Callable[[int], Distance]] = {
        "L2": lambda draw: mean_squared_error,
        "1 − SSIM": lambda draw: dissimilarity,
        "1 − MS-SSIM": lambda draw: multiscale_dissimilarity,
        "SWD": sliced_distance,
        "MMD": mmd(0.0),
        "MMD++": mmd(0.025),
        "S-CNN": network(pooling=True),
        "S-CNN, not pooled": network(pooling=False),
    }
    if weights is not None:
        for mode in ("trained", "first_trained"):
            found[f"VGG {mode.replace('_', ' ')}"] = vgg(mode, weights=weights, layers=LAYERS)
    return found | {"VGG random": vgg("random", layers=LAYERS), "VGG random, to conv5_3": vgg("random")}


@torch.no_grad()
def measure(distance: Distance, judgments: Judgments, shrink: int) -> Tensor:
    """Return the distance of each pair, shape (P,), float64."""
    found = torch.zeros(len(judgments.pairs), dtype=torch.float64)
    for owner in judgments.owners.unique():
        places = (judgments.owners == owner).nonzero().flatten().tolist()
        reference = read_image(judgments.pairs[places[0]][0], shrink)
        images = torch.cat([read_image(judgments.pairs[place][1], shrink) for place in places])
        found[places] = distance(images, reference).double()
    return found


def agreement_table(distances: Tensor, judgments: Judgments) -> tuple[Tensor, Tensor]:
    """Return the sum of the scores of triplets of each two references, averaged over draws, and their number.

    Args:
        distances: shape (draws, P).
        judgments: of which the triplets are scored.

    Returns:
        Shape (R, R) each, at [reference of the first image, reference of the second].
    """
    number = int(judgments.owners.max()) + 1
    first, second = judgments.triplets.unbind(1)
    scores = two_afc_score(distances[:, first], distances[:, second], judgments.preference).mean(0)
    places = judgments.owners[first] * number + judgments.owners[second]
    sums = torch.zeros(number * number, dtype=torch.float64).index_add(0, places, scores)
    return sums.view(number, number), torch.bincount(places, minlength=number * number).view(number, number).double()


def bootstrap_weights(number: int, seed: int = 0) -> Tensor:
    """Return how often each of the references is drawn, when as many are drawn with replacement: shape (draws, references)."""
    drawn = torch.randint(number, (BOOTSTRAPS, number), generator=torch.Generator().manual_seed(seed))
    return F.one_hot(drawn, number).sum(1).double()


def weighted_agreement(sums: Tensor, counts: Tensor, weights: Tensor, within: bool) -> Tensor:
    """Return the mean score of triplets within one reference, or across two, for each weighting of the references."""
    if within:
        total, number = (weights @ some.diagonal() for some in (sums, counts))
    else:  # As often as the one reference is drawn, times as often as the other.
        total, number = (((weights @ (some - some.diag().diag())) * weights).sum(1) for some in (sums, counts))
    return total / number


def judge(distances: Tensor, judgments: Judgments, baseline: Tensor) -> dict[str, Any]:
    """Return how the draws of a distance, shape (draws, P), agree with people, and by how much more than a baseline, (1, P).

    `agreement` is within references, `across` between images of two; each with the standard deviation over draws and, over
    references drawn anew, the interval that holds 95 % of the agreements and of their differences from the baseline.
    """
    found: dict[str, Any] = {}
    number = int(judgments.owners.max()) + 1
    resampled = bootstrap_weights(number)
    for name, within in (("agreement", True), ("across", False)):
        sums, counts = agreement_table(distances, judgments)
        ones = torch.ones(1, number, dtype=torch.float64)
        if not counts.diag().sum() if within else not (counts.sum() - counts.diag().sum()):
            continue
        single = [weighted_agreement(*agreement_table(draw[None], judgments), ones, within) for draw in distances]
        found[name] = round(float(weighted_agreement(sums, counts, ones, within)), 4)
        found[f"{name}_spread"] = round(float(torch.cat(single).std()), 4) if len(single) > 1 else 0.0
        means = weighted_agreement(sums, counts, resampled, within)
        gains = means - weighted_agreement(*agreement_table(baseline, judgments), resampled, within)
        found[f"{name}_interval"], found[f"{name}_gain_interval"] = (_interval(some) for some in (means, gains))
    if judgments.scores is not None:
        found |= rank_correlations(distances, judgments)
    return found


def _interval(values: Tensor) -> list[float]:
    low, high = torch.nanquantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return [round(low, 4), round(high, 4)]


def rank_correlations(distances: Tensor, judgments: Judgments) -> dict[str, float]:
    """Return Spearman's ρ of distance and DMOS: `spearman_within`, the mean over references, and `spearman`, of all pairs."""
    owners = judgments.owners.tolist()
    places = [[place for place, one in enumerate(owners) if one == owner] for owner in dict.fromkeys(owners)]
    found: dict[str, list[float]] = {"spearman_within": [], "spearman": []}
    for draw in distances.tolist():
        each = [spearman([draw[i] for i in some], [judgments.scores[i] for i in some]) for some in places]
        found["spearman_within"].append(sum(each) / len(each))
        found["spearman"].append(spearman(draw, judgments.scores))
    return {name: round(mean_of(values).mean, 4) for name, values in found.items()}


def write_table(study: Study, found: Mapping[str, Mapping[str, Any]]) -> None:
    shares = {"agreement": "one reference", "across": "two references"}
    ranks = {"spearman_within": "ρ, one", "spearman": "ρ, all"}
    shares, ranks = ({key: title for key, title in some.items() if key in found["L2"]} for some in (shares, ranks))
    titles = [part for title in shares.values() for part in (f"{title}, %", "95 %", "minus L2")] + list(ranks.values())
    rows = []
    for name, row in found.items():
        cells: list[object] = []
        for key in shares:
            spread = "" if name in FIXED else f" ± {100 * row[f'{key}_spread']:.1f}"
            low, high, less, more = (100 * value for value in row[f"{key}_interval"] + row[f"{key}_gain_interval"])
            gain = "" if name == "L2" else f"{less:+.1f} to {more:+.1f}"
            cells += [f"{100 * row[key]:.1f}{spread}", f"{low:.1f} to {high:.1f}", gain]
        rows.append([name, *cells, *(row[key] for key in ranks)])
    study.table("agreement", ("distance", *titles), rows, ["", *[""] * (3 * len(shares)), ".3f", ".3f"][: len(titles) + 1])


def read_weights(options: argparse.Namespace) -> Mapping[str, Tensor] | None:
    """Return the weights of VGG; None, and say so, where no file is named and there is none beside the data."""
    path = Path(options.data_dir, "weights", "vgg19_normalised_conv3_1.pth")
    if options.weights or path.is_file():
        return read_vgg_weights(options.weights or path)
    print(f"There is no {path}: trained VGG networks are left out. Name a file with --weights.")
    return None


def measure_all(
    recipes: Mapping[str, Callable[[int], Distance]], judgments: Judgments, options: argparse.Namespace
) -> dict[str, Tensor]:
    """Return the draws of each distance, shape (draws, P), without those that images are too small for."""
    found = {}
    for name, recipe in recipes.items():
        start = time.perf_counter()
        draws = range(1 if name in FIXED else options.draws)
        distances = torch.stack([measure(recipe(draw), judgments, options.shrink) for draw in draws])
        if distances.isnan().any():
            print(f"{name}: images are too small for it, left out.")
            continue
        found[name] = distances
        print(f"{name}: {(time.perf_counter() - start) / len(draws):.1f} s a draw", flush=True)
    return found


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    options = study.options
    judgments = read_triplets(options.triplets) if options.triplets else read_live(options.data_dir, options.least_gap)
    within = int((judgments.owners[judgments.triplets].diff() == 0).sum())
    print(f"{len(judgments.pairs)} images; {within} triplets of one reference, {len(judgments.triplets) - within} of two.")
    wanted = set(options.only) - {""}
    recipes = {
        name: recipe for name, recipe in make_distances(read_weights(options)).items() if not wanted or name in {"L2", *wanted}
    }
    distances = measure_all(recipes, judgments, options)
    found = {name: judge(draws, judgments, distances["L2"]) for name, draws in distances.items()}
    write_table(study, found)
    table = pd.DataFrame([[path.name for path in pair] for pair in judgments.pairs], columns=["reference", "image"])
    table = table.assign(**{name: draws.mean(0).numpy() for name, draws in distances.items()})
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "distances.csv", index=False)
    print(f"\nThe distances, means over draws, are in {options.out}/distances.csv")
    figures: dict[str, Any] = {key: {name: row[key] for name, row in found.items()} for key in found["L2"]}
    counts = {"images": len(judgments.pairs), "triplets": [within, len(judgments.triplets) - within]}
    return figures | counts | {"options": study.sizes}


if __name__ == "__main__":
    main()

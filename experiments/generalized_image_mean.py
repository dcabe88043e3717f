"""Average images under one loss or another: which losses keep the patches of a mean like those of the images?

After Amir and Weiss, Understanding and Simplifying Perceptual Distances, CVPR 2021, supplement 2.2: one image is optimized to
have the least mean loss to a set of similar images. Under L2 that is their blurred mean; under a perceptual loss it should be
sharp. Two families of sets: crops of a Kodak photograph that are shifted by up to ±4 pixels, and crops under smooth random
warps and changes of color, in place of generated faces. Judged by the sliced Wasserstein distance of patches in a Laplacian
pyramid, one image of each set against one target of each.

    python experiments/generalized_image_mean.py --data-dir DIRECTORY [--weights FILE] [--quick] [--out DIRECTORY]

Pixel weights and σ are chosen on photographs that are not judged. Prints the tables, writes picture grids, all images and every
run (`runs.csv`), and prints as its last line one JSON object. Runs that stand in `runs.csv` already are not repeated: an
interrupted experiment goes on where it was; delete the directory to start again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.image_means import (
    FAMILIES,
    REFERENCES,
    VGG_ARMS,
    Arm,
    mean_under,
    read_photographs,
    sharpness,
    sliced_distance,
)
from experiments.run_log import RunLog, mean_and_error
from experiments.vgg_weights import read_vgg_weights
from lightning_netsim.report import style

# The first photographs are judged, the last ones serve the choice of settings.
JUDGED = range(1, 21)
HELD_OUT = range(21, 25)
WEIGHTS = (0.003, 0.03, 0.3)
BANDWIDTHS = (0.54, 0.63, 0.72)
# Patches of each image and level where one set is judged by itself.
PATCHES = 512
# Sets of each family in a picture.
SHOWN = 4
# What all runs of an experiment have in common.
SIZES = ("size", "targets", "steps", "draws")
MAIN = ("MMD", "MMD++", "S-CNN", "VGG TN", "VGG RSN")
GRID = tuple(VGG_ARMS)
PAIRS = (
    ("MMD", "L2"),
    ("MMD++", "L2"),
    ("S-CNN", "L2"),
    ("VGG TN", "L2"),
    ("VGG RSN", "L2"),
    ("MMD++", "MMD"),
    ("S-CNN", "MMD"),
    ("VGG RSN", "VGG TN"),
)
GRID_PAIRS = tuple((name, "VGG TN") for name in GRID if name != "VGG TN")


class Runs:
    """Generalized means, by family, photograph and arm, kept in a log and a directory of images."""

    def __init__(self, out: Path, photographs: Sequence[Tensor], vgg: dict[str, Tensor], sizes: dict[str, int]) -> None:
        self.out, self.log = out, RunLog(out / "runs.csv")
        self.photographs, self.vgg, self.sizes = photographs, vgg, sizes
        self.images = out / "images" / "-".join(f"{name}-{value}" for name, value in sizes.items())
        self._targets: dict[tuple[str, int], Tensor] = {}

    def targets(self, family: str, photograph: int) -> Tensor:
        """Return the images that are averaged, shape (N, 3, H, W)."""
        place = (family, photograph)
        if place not in self._targets:
            generator = torch.Generator().manual_seed(100 * list(FAMILIES).index(family) + photograph)
            draw = FAMILIES[family]
            self._targets[place] = draw(self.photographs[photograph - 1], self.sizes["size"], self.sizes["targets"], generator)
        return self._targets[place]

    def of(self, arm: Arm, family: str, photograph: int) -> dict[str, float]:
        """Return what the mean of a set is worth: its distance to the targets, its sharpness, what is left of the loss."""
        key = {"family": family, "photograph": photograph, "arm": str(arm), **self.sizes}
        return self.log.get(key, partial(self._run, arm, family, photograph))

    def image(self, arm: Arm, family: str, photograph: int) -> Tensor:
        """Return the mean itself, shape (3, H, W)."""
        self.of(arm, family, photograph)
        image: Tensor = torch.load(self._path(arm, family, photograph), weights_only=True)
        return image

    def _path(self, arm: Arm, family: str, photograph: int) -> Path:
        return self.images / (re.sub(r"[^\w.+]+", "_", f"{family} {photograph} {arm}") + ".pt")

    def _run(self, arm: Arm, family: str, photograph: int) -> dict[str, float]:
        start = time.perf_counter()
        targets = self.targets(family, photograph)
        left = {"loss": 1.0, "pixels": 1.0}
        if arm.loss == "target":
            image = targets[0]
        elif arm.loss == "L2":
            image = targets.mean(dim=0)
        else:
            image, left = mean_under(arm.build(self.vgg, photograph), targets, arm.weight, self.sizes["steps"], photograph)
        seconds = time.perf_counter() - start
        path = self._path(arm, family, photograph)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(image.clone(), path)
        # The first target is a reference itself, so all are judged by the others.
        judged = sliced_distance(image[None], targets[None, 1:], self.sizes["draws"], PATCHES)
        return judged | {"sharpness": sharpness(image, targets)} | left | {"seconds": seconds}


def choose(runs: Runs, loss: str, families: Sequence[str], photographs: Sequence[int], weights: Sequence[float]) -> Arm:
    """Return the arm of a loss with the least mean distance on all families: first its pixel weight, then σ if it has one."""
    best = _best(runs, [Arm(loss, weight) for weight in weights], families, photographs)
    if not loss.startswith("MMD"):
        return best
    return _best(runs, [replace(best, bandwidth=bandwidth) for bandwidth in BANDWIDTHS], families, photographs)


def _best(runs: Runs, arms: Sequence[Arm], families: Sequence[str], photographs: Sequence[int]) -> Arm:
    found = {
        arm: [[runs.of(arm, family, photograph)["swd"] for photograph in photographs] for family in families] for arm in arms
    }
    for arm, rows in found.items():
        means = ", ".join(f"{family} {mean_and_error(row)[0]:.4f}" for family, row in zip(families, rows, strict=True))
        print(f"chosen from: {arm}: {means}", flush=True)
    return min(arms, key=lambda arm: sum(map(sum, found[arm])))


def make_all(runs: Runs, arms: dict[str, Arm], families: Sequence[str], photographs: Sequence[int]) -> None:
    """Make the means of all sets, so that an interrupted experiment has the first losses, or the first sets, complete."""
    for arm in arms.values():
        for photograph in photographs:
            for family in families:
                runs.of(arm, family, photograph)


def judge(runs: Runs, arms: dict[str, Arm], family: str, photographs: Sequence[int]) -> dict[str, Any]:
    """Return for each loss the distance over all sets together, by level, and what each set says."""
    targets = torch.stack([runs.targets(family, photograph)[1:] for photograph in photographs])
    found = {}
    for name, arm in arms.items():
        each = [runs.of(arm, family, photograph) for photograph in photographs]
        images = torch.stack([runs.image(arm, family, photograph) for photograph in photographs])
        levels = sliced_distance(images, targets, runs.sizes["draws"])
        found[name] = {"together": levels, "each": each}
    return found


def compare(found: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    """Return for pairs of losses the difference of their distances, set by set: mean, standard error, sets below 0."""
    gains = {}
    for name, other in pairs:
        if name not in found or other not in found:
            continue
        differences = [a["swd"] - b["swd"] for a, b in zip(found[name]["each"], found[other]["each"], strict=True)]
        mean, error = mean_and_error(differences)
        gains[f"{name} − {other}"] = [round(mean, 5), round(error, 5), sum(value < 0 for value in differences)]
    return gains


def print_tables(title: str, found: dict[str, Any], gains: dict[str, list[float]]) -> None:
    levels = list(next(iter(found.values()))["together"])
    names = [level.replace("swd_", "level ").replace("swd", "all levels") for level in levels]
    sets = len(next(iter(found.values()))["each"])
    print(f"\n{title}, {sets} sets\n\n| loss | {' | '.join(names)} | set by set | sharpness | left of loss | pixels | s |")
    print(f"|---|{'---:|' * (len(levels) + 5)}")
    for name, row in found.items():
        cells = [f"{row['together'][level]:.4f}" for level in levels]
        cells.append("{:.4f} ± {:.4f}".format(*mean_and_error([one["swd"] for one in row["each"]])))
        for key, digits in (("sharpness", 2), ("loss", 3), ("pixels", 2), ("seconds", 0)):
            known = key == "sharpness" or name != "target"
            cells.append(f"{mean_and_error([one[key] for one in row['each']])[0]:.{digits}f}" if known else "")
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| difference, set by set | mean ± standard error | sets below 0 |\n|---|---:|---:|")
    for name, (mean, error, below) in gains.items():
        print(f"| {name} | {mean:+.4f} ± {error:.4f} | {below:.0f} of {sets} |")


def report(
    runs: Runs,
    arms: dict[str, Arm],
    families: Sequence[str],
    photographs: Sequence[int],
    pairs: Sequence[tuple[str, str]],
    title: str,
) -> dict[str, Any]:
    """Print tables and write pictures of some arms, and return the figures by family."""
    figures: dict[str, Any] = {"swd": {}, "levels": {}, "sharpness": {}, "gains": {}}
    for family in families:
        found = judge(runs, arms, family, photographs)
        gains = compare(found, pairs)
        print_tables(f"{title}, {family}", found, gains)
        for name, row in found.items():
            levels = {level: round(value, 5) for level, value in row["together"].items()}
            sharp = mean_and_error([one["sharpness"] for one in row["each"]])[0]
            for key, value in (("swd", levels["swd"]), ("levels", levels), ("sharpness", round(sharp, 3))):
                figures[key].setdefault(family, {})[name] = value
        figures["gains"][family] = gains
    picture = "_".join([title.lower().replace(" ", "_"), *families]) + ".png"
    style.save_figure(plot(runs, arms, families, photographs[:SHOWN], f"Generalized means: {title}"), runs.out / picture)
    return figures


def plot(runs: Runs, arms: dict[str, Arm], families: Sequence[str], photographs: Sequence[int], title: str) -> Figure:
    """Draw the means of some sets: a row for each set, a column for each loss, a target first."""
    side, top, left = 1.0, 1.05, 0.7
    rows = [(family, photograph) for family in families for photograph in photographs]
    reading = (
        f"One row for each set of {runs.sizes['targets']} images: one of them, their mean, and their means under other losses."
    )
    with style.styled():
        width, height = left + len(arms) * side + 0.25, top + len(rows) * side + 0.2
        figure = style.new_figure(width, height, title, reading)
        canvas = style.add_canvas(figure)
        for column, name in enumerate(arms):
            canvas.text(left + (column + 0.5) * side, top - 0.08, name, ha="center", va="bottom", fontsize=8.5)
        for line, (family, photograph) in enumerate(rows):
            place = top + line * side
            canvas.text(left - 0.08, place + side / 2, f"{family}\n{photograph}", ha="right", va="center", fontsize=8)
            for column, arm in enumerate(arms.values()):
                image = runs.image(arm, family, photograph).permute(1, 2, 0).mul(255).round().byte().numpy()
                style.draw_thumbnail(canvas, image, (left + column * side, place, side * 0.97, side * 0.97))
    return figure


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", required=True, help="directory with kodak/kodim01.png to kodim24.png in it")
    parser.add_argument("--weights", help="VGG-19 (normalized) up to conv3_1 (DATA_DIR/weights/vgg19_normalised_conv3_1.pth)")
    parser.add_argument("--quick", action="store_true", help="2 sets, 3 steps at 36 pixels: only to see that it works")
    parser.add_argument("--families", nargs="+", default=["shifts", "warps"], choices=list(FAMILIES), help="which are judged")
    parser.add_argument("--losses", nargs="+", default=MAIN, choices=MAIN, help="which of the main losses are judged")
    parser.add_argument("--size", type=int, help="pixels of an image, in height and width (64)")
    parser.add_argument("--targets", type=int, help="images in a set (50)")
    parser.add_argument("--steps", type=int, help="of the optimization (150)")
    parser.add_argument("--draws", type=int, help="of a target of each set to be judged by, fewer than there are (5)")
    parser.add_argument("--sets", type=int, help="of each family, at most 20 (10)")
    parser.add_argument("--grid-sets", type=int, help="of each family for the grid of VGG networks, 0 for none (5)")
    parser.add_argument("--search-sets", type=int, help="of each family for the choice of settings, at most 4 (1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/generalized_image_mean"), help="directory of all that is written"
    )
    options = parser.parse_args(arguments)
    full = {"size": 64, "targets": 50, "steps": 150, "draws": 5, "sets": 10, "grid_sets": 5, "search_sets": 1}
    quick = {"size": 36, "targets": 10, "steps": 3, "draws": 1, "sets": 2, "grid_sets": 1, "search_sets": 1}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def choose_all(runs: Runs, options: argparse.Namespace) -> dict[str, Arm]:
    """Return the references and the arm of each loss, its settings chosen on photographs that are not judged."""
    weights = WEIGHTS[1:2] if options.quick else WEIGHTS
    arms = {name: Arm(name) for name in REFERENCES}
    arms |= {loss: choose(runs, loss, ("shifts", "warps"), HELD_OUT[: options.search_sets], weights) for loss in MAIN}
    # The other VGG networks take the pixel weight of the one that they are compared with.
    for loss in GRID:
        arms.setdefault(loss, replace(arms["VGG TN" if loss == "VGG T" else "VGG RSN"], loss=loss))
    return arms


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    photographs = read_photographs(options.data_dir)
    vgg = read_vgg_weights(options.weights or Path(options.data_dir) / "weights" / "vgg19_normalised_conv3_1.pth")
    runs = Runs(options.out, photographs, vgg, {name: getattr(options, name) for name in SIZES})
    arms = choose_all(runs, options)
    main_arms, grid_arms = ({name: arms[name] for name in (*REFERENCES, *names)} for names in (options.losses, GRID))
    judged, grid_judged = JUDGED[: options.sets], JUDGED[: options.grid_sets]
    make_all(runs, main_arms, options.families, judged)
    make_all(runs, grid_arms, options.families, grid_judged)
    figures = report(runs, main_arms, options.families, judged, PAIRS, "Losses")
    if grid_judged:
        figures["grid"] = report(runs, grid_arms, options.families, grid_judged, GRID_PAIRS, "VGG networks")
    print(f"\nPictures, images and all runs are in {options.out}/")
    figures |= {"setting": {name: str(arm) for name, arm in arms.items()}, "options": runs.sizes}
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()

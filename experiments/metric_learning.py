"""Align the differences of embeddings: are classes that training has not seen told apart better?

After Chen et al., ICLR 2024 (DASL). Networks are trained with N-pair, Proxy-Anchor, contrastive and triplet loss, each alone
and beside the alignment of distances (squared L2 or L2) or of difference vectors (signed or absolute, as in the paper). They
are judged on other classes: five of scikit-learn's ten digits, and the evaluation alphabets of Omniglot, for which learning
rates and weights are chosen on held-out background alphabets.

    python experiments/metric_learning.py [--quick] [--data digits omniglot] [--data-dir DIRECTORY] [--out DIRECTORY]

Prints the tables, writes figures and every run (`runs.jsonl`), and prints as its last line one JSON object. Runs that stand in
`runs.jsonl` already are not repeated: an interrupted experiment goes on where it was; delete the file to start again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import nn

from lightning_netsim.report import style

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.metric_learning_training import (
    BINS,
    DIGITS,
    LOSSES,
    OMNIGLOT,
    VALIDATION,
    Omniglot,
    Run,
    Split,
    measure,
    split_digits,
    train,
)

# The weights λ that are tried. The first form is the default of the library; its λ = 1 is what the bounds are on.
WEIGHTS: dict[str, dict[str, tuple[float, ...]]] = {
    DIGITS: {"distance": (0.3, 1.0, 3.0), "distance_l2": (0.1, 1.0), "signed": (0.1, 1.0), "abs": (1.0,)},
    VALIDATION: {"distance": (0.3, 1.0, 3.0), "distance_l2": (0.1, 1.0), "signed": (0.1, 1.0)},
}
QUICK_WEIGHTS: dict[str, dict[str, tuple[float, ...]]] = {key: {"distance": (1.0,)} for key in WEIGHTS}
LEARNING_RATES = (1e-3, 3e-3)
DIGITS_RATE = 1e-3
RECALLS = ("recall@1", "recall@2", "recall@4", "recall@8", "map@r", "nmi")

Result = dict[str, Any]


class Log:
    """The log of all runs, one JSON object a line: a run that stands in it is not repeated."""

    def __init__(self, path: Path, split: Callable[[str, int], Split]) -> None:
        self.path, self.split = path, split
        lines = path.read_text().splitlines() if path.is_file() else []
        self.results = {Run(**row["run"]): row["result"] for row in map(json.loads, lines)}

    def result(self, run: Run) -> Result:
        """Return what was measured of a run, after training where the log does not have it."""
        if run not in self.results:
            start = time.perf_counter()
            self.results[run] = train(run, self.split(run.data, run.seed))
            self.results[run]["seconds"] = round(time.perf_counter() - start, 1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"run": run._asdict(), "result": self.results[run]}) + "\n")
        return self.results[run]


class Arm(NamedTuple):
    """What is trained on every seed: a loss, and an alignment with its weight."""

    data: str
    loss: str
    form: str
    weight: float
    learning_rate: float


class Experiment:
    """All trainings, by arm."""

    def __init__(self, log: Log, options: argparse.Namespace) -> None:
        self.log, self.options = log, options
        self.weights = QUICK_WEIGHTS if options.quick else WEIGHTS
        self.seeds = {DIGITS: range(options.seeds[0]), OMNIGLOT: range(options.seeds[1])}
        self.seeds[VALIDATION] = range(1000, 1000 + options.seeds[2])
        self.steps = {DIGITS: options.steps[0], OMNIGLOT: options.steps[1], VALIDATION: options.steps[1]}

    def results(self, arm: Arm, steps: int | None = None) -> list[Result]:
        """Return what was measured of an arm, one result a seed."""
        steps = self.steps[arm.data] if steps is None else steps
        return [self.log.result(Run(*arm, steps, seed)) for seed in self.seeds[arm.data]]

    def score(self, arm: Arm) -> float:
        return statistics.mean(result["recall@1"] for result in self.results(arm))

    def forms(self, data: str, loss: str) -> dict[str, tuple[float, ...]]:
        """Return the weights that are tried of each form; the control is tried with the default form alone."""
        tried = self.weights[data]
        return {"distance": tried["distance"]} if loss == "npair_sharp" else tried

    def sweep(self, data: str, rate: Callable[[str], float]) -> list[Arm]:
        """Return every loss alone and with every form and weight."""
        arms = []
        for loss in LOSSES:
            arms.append(Arm(data, loss, "none", 0.0, rate(loss)))
            tried = self.forms(data, loss).items()
            arms += [Arm(data, loss, form, weight, rate(loss)) for form, weights in tried for weight in weights]
        return arms

    def learning_rate(self, loss: str) -> float:
        """Return the learning rate with which a loss alone does best on held-out background alphabets."""
        rates = (DIGITS_RATE,) if self.options.quick else LEARNING_RATES
        return max(rates, key=lambda rate: self.score(Arm(VALIDATION, loss, "none", 0.0, rate)))

    def best_weight(self, loss: str, form: str) -> float:
        """Return the weight that does best there."""
        rate = self.learning_rate(loss)
        return max(self.weights[VALIDATION][form], key=lambda weight: self.score(Arm(VALIDATION, loss, form, weight, rate)))

    def chosen(self) -> list[Arm]:
        """Return the arms for the evaluation alphabets: each form with its best weight, and the default."""
        arms = []
        for loss in LOSSES:
            rate = self.learning_rate(loss)
            arms.append(Arm(OMNIGLOT, loss, "none", 0.0, rate))
            for form, weights in self.forms(VALIDATION, loss).items():
                picked = {self.best_weight(loss, form), *((1.0,) if form == "distance" and 1.0 in weights else ())}
                arms += [Arm(OMNIGLOT, loss, form, weight, rate) for weight in sorted(picked)]
        return arms


def gain(results: Sequence[Result], reference: Sequence[Result], key: str = "recall@1") -> dict[str, float]:
    """Return mean and standard error of the differences seed by seed, in points, and of how many seeds they are above 0."""
    differences = [100 * (one[key] - other[key]) for one, other in zip(results, reference, strict=True)]
    deviation = statistics.stdev(differences) if len(differences) > 1 else 0.0
    found = {"mean": statistics.mean(differences), "se": deviation / len(differences) ** 0.5}
    return {name: round(value, 2) for name, value in found.items()} | {"wins": sum(value > 0 for value in differences)}


def summarize(experiment: Experiment, arms: Iterable[Arm]) -> list[dict[str, Any]]:
    """Return, for each arm, means in percent and the gain over the same loss alone."""
    rows, alone = [], {arm.loss: experiment.results(arm) for arm in arms if arm.form == "none"}
    for arm in arms:
        results = experiment.results(arm)
        keys = [key for key in (*RECALLS, "seen_recall@1") if key in results[0]]
        row = arm._asdict() | {key: round(100 * statistics.mean(result[key] for result in results), 2) for key in keys}
        for part in ("seen", "unseen"):
            spreads = [result["distances"][part]["sd"] / max(result["distances"][part]["mean"], 1e-9) for result in results]
            row[f"{part}_spread"] = round(statistics.mean(spreads), 3)
            row[f"{part}_distance"] = round(statistics.mean(result["distances"][part]["mean"] for result in results), 3)
        row["counts"] = np.mean([result["distances"]["unseen"]["counts"] for result in results], axis=0).round(1).tolist()
        curves = [result["curve"] for result in results]
        row["curve"] = {step: round(100 * statistics.mean(curve[step] for curve in curves), 2) for step in curves[0]}
        rows.append(row | {"gain": gain(results, alone[arm.loss])})
    return rows


def references(experiment: Experiment, data: str) -> dict[str, dict[str, float]]:
    """Return the figures of unseen classes, in percent, of pixels and of networks that are not trained."""
    seeds, few = (experiment.seeds[data] if data == DIGITS else [0]), data == VALIDATION
    pixels = [measure(nn.Flatten(), experiment.log.split(data, seed).unseen, recall_only=few) for seed in seeds]
    untrained = experiment.results(Arm(data, LOSSES[0], "none", 0.0, DIGITS_RATE), steps=0)
    found = {"pixels": pixels, "untrained": untrained}
    return {
        name: {key: round(100 * statistics.mean(one[key] for one in some), 2) for key in RECALLS if key in some[0]}
        for name, some in found.items()
    }


def print_table(title: str, rows: Sequence[dict[str, Any]], reference: dict[str, dict[str, float]]) -> None:
    keys = [key for key in RECALLS if key in rows[0]]
    print(f"\n{title}")
    print(f"| loss | alignment | λ | {' | '.join(keys)} | R@1 gain | seeds above | R@1 seen | distance | spread |")
    print("|---|---|---:|" + "---:|" * (len(keys) + 5))
    for name, figures in reference.items():
        print(f"| {name} | | | {' | '.join(f'{figures[key]:.1f}' for key in keys)} |" + " |" * 5)
    for row in rows:
        cells = [row["loss"], row["form"], f"{row['weight']:g}", *(f"{row[key]:.1f}" for key in keys)]
        known = row["gain"] if row["form"] != "none" else None
        error = f" ± {known['se']:.1f}" if known and known["se"] else ""  # One seed has none.
        cells += [f"{known['mean']:+.1f}{error}", str(known["wins"])] if known else ["", ""]
        cells += [f"{row['seen_recall@1']:.1f}", f"{row['unseen_distance']:.3f}", f"{row['unseen_spread']:.2f}"]
        print(f"| {' | '.join(cells)} |")


def headline(experiment: Experiment, tables: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return the gains of the default alignment at λ = 1 and, for Omniglot, also at the weight chosen beforehand."""
    found = {}
    for data, rows in tables.items():
        for row in rows if data != VALIDATION else ():
            if row["form"] == "distance":
                name = {"proxy_anchor": "proxy"}.get(row["loss"], row["loss"]) + "_gain"
                names = [name if data == DIGITS else f"omniglot_{name}"] * (row["weight"] == 1)
                if data == OMNIGLOT and row["weight"] == experiment.best_weight(row["loss"], "distance"):
                    names.append(f"omniglot_{name}_chosen")
                for key in names:
                    found |= {key: row["gain"]["mean"], f"{key}_se": row["gain"]["se"]}
    return found


def draw_grid(title: str, reading: str, tables: dict[str, Any], draw: Callable[[Axes, Any], None], x: str, y: str) -> Figure:
    """Draw one panel for each table of rows (down) and loss (across)."""
    with style.styled():
        figure = style.new_figure(1.4 + 2.3 * len(LOSSES), 0.95 + 2.35 * len(tables), title, reading)
        width, height = figure.get_size_inches()
        lines: dict[str, Any] = {}
        for down, (data, rows) in enumerate(tables.items()):
            for across, loss in enumerate(LOSSES):
                left, top = 0.65 + 2.3 * across, 1.2 + 2.35 * down
                axes = style.add_axes(figure, left, height - top - 1.65, width - left - 1.85, top)
                draw(axes, [row for row in rows if row["loss"] == loss])
                axes.set_title(f"{data}: {loss}", fontsize=8.5, loc="left")
                axes.set(xlabel=x, ylabel=y if across == 0 else "")
                lines |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(lines.values(), lines, loc="upper right", bbox_to_anchor=(1, 1 - 1.1 / height))
    return figure


_COLORS = {"none": style.INK, **dict(zip(WEIGHTS[DIGITS], style.CYCLE, strict=False))}


def draw_curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        steps = [int(step) for step in row["curve"]]
        axes.plot(steps, list(row["curve"].values()), color=_COLORS[row["form"]], linewidth=1.3, label=row["form"])


def draw_distances(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = (np.arange(BINS) + 0.5) * 2 / BINS
    for row in rows:
        share = np.array(row["counts"]) / sum(row["counts"])
        axes.plot(places, share, color=_COLORS[row["form"]], linewidth=1.3, label=row["form"], drawstyle="steps-mid")
    axes.set(yticks=[], ylim=(0, 0.2), xlim=(0, 2))


def draw_weights(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for form, color in _COLORS.items():
        some = [row for row in rows if row["form"] == form]
        values = [row["recall@1"] for row in some]
        if form == "none":
            axes.axhline(values[0], color=color, linewidth=1, linestyle="--", label=form)
        elif some:
            axes.plot([row["weight"] for row in some], values, "o-", color=color, markersize=3.5, linewidth=1.3, label=form)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_figures(experiment: Experiment, tables: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Write the three figures."""

    def shown(row: dict[str, Any]) -> bool:
        if row["data"] == DIGITS or row["form"] == "none":
            return row["weight"] in (0, 1)
        return bool(row["weight"] == experiment.best_weight(row["loss"], row["form"]))

    judged = {data: [row for row in rows if shown(row)] for data, rows in tables.items() if data != VALIDATION}
    weights = {data: rows for data, rows in tables.items() if data != OMNIGLOT}
    of = "Mean over the seeds. Digits: λ = 1; Omniglot: the weight chosen on validation alphabets."
    curves = f"R@1 (%) on unseen classes, on Omniglot every fourth of them. Vertical axes differ. {of}"
    title = "Unseen classes along training"
    distances = (
        f"Distances of normalized embeddings of images of different unseen classes, in bins of 0.04, cut off above. {of}"
    )
    accuracy = "R@1 (%) on unseen classes against the weight of the alignment; dashed: the loss alone. Vertical axes differ."
    for name, figure in {
        "curves": draw_grid(title, curves, judged, draw_curves, "steps", "R@1 (%)"),
        "distances": draw_grid("Distances between unseen classes", distances, judged, draw_distances, "distance", "share"),
        "weights": draw_grid("How much alignment", accuracy, weights, draw_weights, "λ", "R@1 (%)"),
    }.items():
        style.save_figure(figure, out / f"metric_learning_{name}.png", dpi=75)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few steps, weights and seeds: only to see that it works")
    parser.add_argument("--data", nargs="+", choices=[DIGITS, OMNIGLOT], default=[DIGITS, OMNIGLOT], help="both")
    parser.add_argument("--data-dir", default="../shared/data", help="directory with omniglot/images_background.zip in it")
    parser.add_argument("--steps", type=int, nargs=2, help="of training, on digits and on Omniglot (300 250)")
    parser.add_argument("--seeds", type=int, nargs=3, help="on digits, on Omniglot, and there to choose by (12 5 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/metric_learning"), help="directory of the log and the figures")
    options = parser.parse_args(arguments)
    defaults = {"steps": [20, 10], "seeds": [2, 1, 1]} if options.quick else {"steps": [300, 250], "seeds": [12, 5, 1]}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    characters = Omniglot.load(options.data_dir, 7 if options.quick else None) if OMNIGLOT in options.data else None
    split = cache(lambda data, seed: split_digits(seed) if data == DIGITS else characters.split(data))
    # The splits of Omniglot are the same for all seeds, and one is 100 MB.
    log = Log(options.out / "runs.jsonl", lambda data, seed: split(data, seed if data == DIGITS else 0))
    experiment = Experiment(log, options)
    arms: dict[str, list[Arm]] = {}
    if DIGITS in options.data:
        arms[DIGITS] = experiment.sweep(DIGITS, lambda loss: DIGITS_RATE)
    if OMNIGLOT in options.data:
        arms[VALIDATION] = experiment.sweep(VALIDATION, experiment.learning_rate)
        arms[OMNIGLOT] = experiment.chosen()
    tables = {data: summarize(experiment, some) for data, some in arms.items()}
    reference = {data: references(experiment, data) for data in tables}
    for data, rows in tables.items():
        print_table(f"{data}, {len(experiment.seeds[data])} seeds, in %", rows, reference[data])
    draw_figures(experiment, tables, options.out)
    print(f"\nThe figures and all runs are in {options.out}/")
    kept = ("loss", "form", "weight", "learning_rate", *RECALLS, "seen_recall@1", "unseen_spread", "gain")
    figures: dict[str, Any] = headline(experiment, tables)
    figures["reference"] = reference
    figures["rows"] = {data: [{key: row[key] for key in kept if key in row} for row in rows] for data, rows in tables.items()}
    figures["options"] = {"steps": options.steps, "seeds": options.seeds}
    figures["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()

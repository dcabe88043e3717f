"""Train on few labels: does it pay to make a network treat an image and its transformed self alike, in its gradients?

After Charpiat et al., NeurIPS 2019, section 5 of the supplementary material ("Enforcing similarity"): 100 labeled MNIST images,
with and without 5,000 unlabeled ones, and invariance to random affine maps. Augmentation alone and two kinds of consistency of
outputs stand beside every criterion on gradients. Weights, schedules, layers and directions are chosen on training images that
are held out; the chosen setting of each arm is then trained on fresh seeds and judged on the test images.

    python experiments/few_labels.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Prints the tables, writes a figure and every run (`runs.csv`), and prints as its last line one JSON object. Runs that stand in
`runs.csv` already are not repeated: an interrupted experiment goes on where it was; delete the file to start again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from lightning_netsim.report import style

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.few_labels_training import CLASSES, CONSISTENCY, Data, Setting, Term, Training, accuracy

# An arm that gains less than this over augmentation on the validation split is not carried on to the test images.
WORTH = 0.01
# Labeled images of each class in all, and with fewer; how many times as long augmentation alone is trained for comparison.
LABELED, FEWER, LONGER = 10, 2, 6


class Runs:
    """The log of all runs, a CSV file: a run that stands in it is not repeated."""

    COLUMNS = ("split", "setting", "labels", "steps", "seed", "clean", "transformed", "seconds")

    def __init__(self, path: Path, data: Data) -> None:
        self.path = path
        self.data = data
        self.table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=list(self.COLUMNS))

    def score(self, setting: Setting, split: str, per_class: int, steps: int, seeds: Iterable[int]) -> pd.DataFrame:
        """Return accuracies on clean and transformed images of "validation" or "test", one row for each seed."""
        rows = []
        for seed in seeds:
            key = {"split": split, "setting": str(setting), "labels": per_class * CLASSES, "steps": steps, "seed": seed}
            found = self.table[(self.table[list(key)] == pd.Series(key)).all(axis=1)] if len(self.table) else self.table
            rows.append(found.iloc[0].to_dict() if len(found) else self._train(setting, per_class, key))
        return pd.DataFrame(rows)[["seed", "clean", "transformed"]].astype({"clean": float, "transformed": float})

    def _train(self, setting: Setting, per_class: int, key: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        network = Training(setting, self.data, key["seed"], per_class, key["steps"]).run()
        images, labels, moved = self.data.validation if key["split"] == "validation" else self.data.test
        row = key | {"clean": accuracy(network, images, labels), "transformed": accuracy(network, moved, labels)}
        row["seconds"] = round(time.perf_counter() - start, 2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = pd.DataFrame([row], columns=list(self.COLUMNS))
        line.to_csv(self.path, mode="a", index=False, header=not self.path.is_file(), float_format="%.6g")
        self.table = pd.concat([self.table, line], ignore_index=True) if len(self.table) else line
        return row


Axis = Callable[[Term], list[Term]]


def vary(name: str, values: Iterable[Any]) -> Axis:
    return lambda term: [replace(term, **{name: value}) for value in values]


def switch(**changes: Any) -> Axis:
    return lambda term: [replace(term, **changes)]


def rescale(*factors: float) -> Axis:
    return lambda term: [replace(term, weight=float(f"{term.weight * factor:.2g}")) for factor in factors]


WEIGHTS = {
    "logits": (0.1, 0.3, 1.0, 3.0, 10.0),
    "probabilities": (0.3, 1.0, 3.0, 10.0, 30.0),
    "invariance": (0.03, 0.1, 0.3, 1.0),
    "group": (0.03, 0.1, 0.3, 1.0),
    "contrastive": (0.03, 0.1, 0.3, 1.0),
    "pair": (0.03, 0.1),
    "minibatch": (0.01, 0.03, 0.1),
    "density": (0.1, 0.3, 1.0),
    "tangent": (3e-5, 3e-4),
}
KINDS = {
    "labeled": tuple(WEIGHTS),
    "unlabeled": ("logits", "probabilities", "invariance", "group", "contrastive", "density", "tangent"),
}
QUICK_KINDS = dict.fromkeys(KINDS, ("logits", "probabilities", "invariance"))
ADDED = {"labeled": ("invariance", "contrastive"), "unlabeled": ("contrastive", "density")}


def axes_of(kind: str) -> list[Axis]:
    """Return what is tried of a term, one property after the other: most of the two criteria that the paper puts first."""
    axes = [vary("weight", WEIGHTS[kind])]
    if kind in CONSISTENCY:
        return [*axes, vary("schedule", ("up", "down", "early")), rescale(0.5, 2.0)]
    if kind in ("invariance", "group"):
        axes += [vary("layers", ("last", "but_last", "first")), vary("directions", ("fresh", "target", "contrast"))]
        axes += [vary("stop", (True,))] if kind == "invariance" else []
        # All ten directions are dear, and cheapest where few parameters are compared for a short time.
        return [*axes, vary("schedule", ("up", "down", "early")), switch(layers="first", directions="all", schedule="early")]
    axes += [vary("target", (0.02, 0.4))] if kind == "density" else []
    axes += [vary("layers", ("last",))] if kind == "contrastive" else []
    return [*axes, vary("schedule", ("early",))]


def search(start: Setting, axes: Sequence[Axis], judge: Callable[[Setting], float]) -> Setting:
    """Choose the last term of a setting, one property after the other, each time from the best so far."""
    best, best_score = start, -math.inf
    for axis in axes:
        *others, last = best.terms
        for term in axis(last):
            setting = replace(start, terms=(*others, term))
            score = judge(setting)
            best, best_score = (setting, score) if score > best_score else (best, best_score)
    return best


def choose(judge: Callable[[Setting], float], quick: bool) -> dict[str, Setting]:
    """Return the chosen setting of each arm: every kind of term alone, then criteria beside consistency."""
    chosen: dict[str, Setting] = {}
    for images, kinds in (QUICK_KINDS if quick else KINDS).items():
        for kind in kinds:
            axes = [vary("weight", WEIGHTS[kind][:2])] if quick else axes_of(kind)
            chosen[f"{images}: {kind}"] = search(Setting(images, (Term(kind, 0.0),)), axes, judge)
        steady = max(CONSISTENCY, key=lambda kind: judge(chosen[f"{images}: {kind}"]))
        for kind in (kind for kind in ADDED[images] if kind in kinds):
            both = Setting(images, chosen[f"{images}: {steady}"].terms + chosen[f"{images}: {kind}"].terms)
            axes = [rescale(1.0)] if quick else [rescale(1.0, 0.3), vary("schedule", ("early",))]
            chosen[f"{images}: {steady} + {kind}"] = search(both, axes, judge)
    return chosen


def relative_cost(setting: Setting, data: Data, steps: int, repeats: int) -> float:
    """Return the median time of a step over that of augmentation alone, taken in turns; over the schedule, times `longer`."""
    if not setting.terms:
        return float(setting.longer)
    plain, other = (Training(some, data, 0, LABELED, steps) for some in (Setting(), setting))
    shares: dict[tuple[Term, ...], list[float]] = {}
    for step in range(steps):
        active = tuple(term for term in setting.terms if term.factor(step / steps) > 0)
        shares.setdefault(active, []).append(step / steps)
    cost = 0.0
    for places in shares.values():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(3 + repeats):
            for training, taken in zip((plain, other), times, strict=True):
                start = time.perf_counter()
                training.step(places[0])
                taken.append(time.perf_counter() - start)
        cost += len(places) / steps * statistics.median(times[1][3:]) / statistics.median(times[0][3:])
    return cost * setting.longer


def spread(values: pd.Series) -> dict[str, float]:
    """Return mean, standard deviation and standard error, rounded."""
    deviation = float(values.std()) if len(values) > 1 else 0.0
    found = {"mean": float(values.mean()), "sd": deviation, "se": deviation / math.sqrt(len(values))}
    return {name: round(value, 4) for name, value in found.items()}


def compare(arms: dict[str, pd.DataFrame], references: dict[str, list[str]]) -> dict[str, Any]:
    """Return accuracies by arm, and differences to reference arms seed by seed: "clean", "transformed" and their mean."""
    for table in arms.values():
        table["mean"] = (table["clean"] + table["transformed"]) / 2
    found: dict[str, Any] = {}
    for name, table in arms.items():
        found[name] = {kind: spread(table[kind]) for kind in ("clean", "transformed", "mean")}
        for reference in references.get(name, []):
            found[name][f"minus {reference}"] = {
                kind: spread(table[kind] - arms[reference][kind]) for kind in ("clean", "transformed", "mean")
            }
    return found


def print_table(title: str, found: dict[str, Any], settings: dict[str, Setting], costs: dict[str, float]) -> None:
    print(f"\n{title}\n| arm | setting | clean | transformed | mean − augmentation | mean − consistency | cost |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, row in found.items():
        cells = [f"{row[kind]['mean']:.3f} ± {row[kind]['se']:.3f}" for kind in ("clean", "transformed")]
        references = [value["mean"] for key, value in row.items() if key.startswith("minus")]
        cells += [f"{value['mean']:+.3f} ± {value['se']:.3f}" for value in references] + [""] * (2 - len(references))
        print(f"| {name} | {settings[name]} | {' | '.join(cells)} | {costs.get(name, math.nan):.1f} |")


def plot(found: dict[str, Any], costs: dict[str, float], labels: int, seeds: int) -> Figure:
    """Draw the accuracies of all arms with their standard errors, beside the cost of a step."""
    names = list(found)
    with style.styled():
        reading = (
            f"Test accuracy with {labels} labeled images, mean and standard error of {seeds} seeds: clean images (filled) and "
            "affinely transformed ones (open). Dashed: augmentation alone. Blue: a criterion on gradients; brown: consistency "
            "of outputs alone. Right: time of training in units of that of augmentation alone."
        )
        height = 1.5 + 0.24 * len(names)
        figure = style.new_figure(10.5, height, "Few labels: what each criterion gains, and what it costs", reading)
        left, right = style.add_axes(figure, 2.9, 0.55, 3.0, 1.0), style.add_axes(figure, 7.8, 0.55, 0.3, 1.0)
        for place, name in enumerate(names):
            plain = not any(kind in name for kind in WEIGHTS if kind not in CONSISTENCY)
            color = style.INK if "augmentation" in name else style.ACTIVATION if plain else style.GRADIENT
            for kind, face in (("clean", color), ("transformed", style.PAPER)):
                value = found[name][kind]
                left.errorbar(
                    value["mean"], place, xerr=value["se"], fmt="o", color=color, mfc=face, markersize=5, linewidth=1.2
                )
            right.barh(place, costs[name], color=color, height=0.6)
            right.text(costs[name] * 1.05, place, f"{costs[name]:.1f}", va="center", fontsize=7.5, color=style.MUTED)
        for kind in ("clean", "transformed"):
            left.axvline(found[names[0]][kind]["mean"], color=style.MUTED, linewidth=0.9, linestyle="--", zorder=0)
        left.set_yticks(range(len(names)), names)
        right.set_yticks([])
        for axes, label in ((left, "test accuracy"), (right, "time of training")):
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xlabel(label)
        right.set_xlim(0, 1.15 * max(costs.values()))
    return figure


def shortlist(chosen: dict[str, Setting], judge: Callable[[Setting], float]) -> dict[str, list[str]]:
    """Return, for each kind of images, the arms that are best on the validation split: consistency, criterion, both."""

    def kind(name: str) -> int:
        return 2 if " + " in name else int(name.split(": ")[1] not in CONSISTENCY)

    best: dict[str, list[str]] = {}
    for images in KINDS:
        groups = [[name for name in chosen if name.startswith(images) and kind(name) == group] for group in range(3)]
        best[images] = [max(names, key=lambda name: judge(chosen[name])) for names in groups if names]
    return best


def references_of(settings: dict[str, Setting], best: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return which arms each arm is compared with: augmentation alone, and the best consistency on the same images."""
    found = {}
    for name, setting in settings.items():
        others = ["augmentation", best[setting.images][0]] if setting.terms else ["augmentation"]
        found[name] = [other for other in others if other != name]
    return found


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", required=True, help="directory with MNIST/raw in it")
    parser.add_argument("--quick", action="store_true", help="few settings, 40 steps, 2 seeds: only to see that it works")
    parser.add_argument("--steps", type=int, help="steps of training (400)")
    parser.add_argument("--search-steps", type=int, help="steps of training while settings are chosen (200)")
    parser.add_argument("--seeds", type=int, help="networks for each arm (6)")
    parser.add_argument("--search-seeds", type=int, help="networks for each setting that is tried (2)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; those of the search follow 1,000 later")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"), help="directory of the log and the figure")
    options = parser.parse_args(arguments)
    defaults = {"steps": 400, "search_steps": 200, "seeds": 6, "search_seeds": 2}
    for name, value in (
        {"steps": 40, "search_steps": 10, "seeds": 2, "search_seeds": 1} if options.quick else defaults
    ).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    data = Data.load(options.data_dir, *((500, 500) if options.quick else (2000, 10_000)))
    runs = Runs(options.out / "runs.csv", data)
    seeds = range(options.seed, options.seed + options.seeds)
    search_seeds = range(options.seed + 1000, options.seed + 1000 + options.search_seeds)
    tried: dict[Setting, float] = {}

    def judge(setting: Setting) -> float:
        if setting not in tried:
            table = runs.score(setting, "validation", LABELED, options.search_steps, search_seeds)
            tried[setting] = float(table[["clean", "transformed"]].to_numpy().mean())
        return tried[setting]

    chosen = choose(judge, options.quick)
    best = shortlist(chosen, judge)
    longer, steady = f"augmentation, {LONGER} × steps", best["labeled"][0]
    worth = judge(Setting()) + (WORTH if not options.quick else -1)
    kept = {name: setting for name, setting in chosen.items() if judge(setting) >= worth}
    settings = {"augmentation": Setting(), longer: Setting(longer=LONGER), **kept}
    settings[f"{steady}, 2 × steps"] = replace(chosen[steady], longer=2)
    references = references_of(settings, best)
    few = ["augmentation", longer, *(name for names in best.values() for name in (names[0], names[-1]))]
    found = {}
    for per_class, names in ((LABELED, list(settings)), (FEWER, few)):
        arms = {name: runs.score(settings[name], "test", per_class, options.steps, seeds) for name in names}
        found[str(per_class * CLASSES)] = compare(arms, references)
    repeats = 3 if options.quick else 80
    costs = {name: round(relative_cost(some, data, options.steps, repeats), 2) for name, some in settings.items()}
    for labels, rows in found.items():
        print_table(f"{labels} labeled images", rows, settings, costs)
    full = found[str(LABELED * CLASSES)]
    style.save_figure(plot(full, costs, LABELED * CLASSES, options.seeds), options.out / "few_labels.png", dpi=100)
    for name in chosen.keys() - kept.keys():
        print(f"Not carried on: {name} ({chosen[name]}), {judge(chosen[name]) - judge(Setting()):+.3f} on the validation split")
    print(f"\n{len(tried)} settings were tried. The figure and all runs are in {options.out}/")
    figures = {
        "accuracy": full,
        "accuracy_with_fewer": found[str(FEWER * CLASSES)],
        "best_on_validation": best,
        "setting": {name: str(setting) for name, setting in (chosen | settings).items()},
        "validation": {name: round(judge(some), 4) for name, some in {"augmentation": Setting(), **chosen}.items()},
        "cost": costs,
        "tried": len(tried),
        "options": {name: getattr(options, name) for name in ("steps", "search_steps", "seeds", "search_seeds", "seed")},
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()

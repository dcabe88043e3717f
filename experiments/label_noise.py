"""Plant wrong labels, look for them by the gradient kernel, by activations and by cleanlab, and train again without them.

A small network is trained on labels of which 20 or 40 % are wrong, on scikit-learn's digits and on 3,000 images of MNIST. Its
kernel neighbors (`analyze`, then `find_issues`), its k nearest penultimate activations, and cleanlab on its probabilities each
rank the labels, out of sample in three folds; the first two also in sample, by one network that has learned the errors too.
Judged by the area under the ROC curve (AUROC) and by average precision; then as many labels as are wrong, those ranked worst,
are left out or replaced, and a new network is judged by its accuracy on test images. k, and cleanlab's score, are those with
the best mean AUROC on data drawn and spoiled by other seeds.

    python experiments/label_noise.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Prints the tables, writes a figure and every run (`detection.csv`, `accuracy.csv`, `networks/`), and prints as its last line
one JSON object. Runs that stand in these files already are not repeated; take rows out, or delete the directory, to repeat
them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from lightning_netsim.report import style

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.label_noise_scores import PROTOCOLS, TRIED, try_scores
from experiments.label_noise_training import METHODS, NETWORKS, NOISE, Case, Data, Findings, Method, accuracy, truth
from experiments.run_log import RunLog, mean_and_error

# Whose worst labels are left out or replaced before a new network is trained.
CLEANED = ("kernel", "kernel, in sample", "activations", "cleanlab score")
TREATMENTS = ("remove", "relabel")
NOTHING, EVERYTHING = "no cleaning", "all errors known"
TABLES = {
    "auroc": "Area under the ROC curve of the planted errors",
    "average_precision": "Average precision",
    "precision": "Share of errors among as many labels, those ranked worst",
    "named": "Share of the errors whose true label is suggested",
    "accuracy": "Accuracy on test images after cleaning, %",
}
FLAGS = ("flagged_precision", "flagged_recall")
IN_SAMPLE = ", in sample"
COLORS = {
    "kernel": style.GRADIENT,
    "activations": style.CYCLE[1],
    "activations, kernel's score": style.CYCLE[4],
    "cleanlab score": style.CYCLE[2],
    "cleanlab issues": style.CYCLE[5],
    NOTHING: style.MUTED,
    EVERYTHING: style.INK,
}
TITLES = {"digits": "digits", "mnist": "MNIST"}


def judge(case: Case, findings: Findings) -> dict[str, float]:
    """Return how well the planted errors are found.

    `precision` is that of the worst labels, as many as are wrong; `named` the share of the errors whose true label is
    suggested; `flagged_precision` and `flagged_recall` those of a method's own threshold, NaN where it has none.
    """
    wrong, score = case.wrong.numpy(), findings.score.double().numpy()
    flagged, none = findings.flagged, float("nan")
    hits = none if flagged is None else float((flagged & case.wrong).sum())
    return {
        "auroc": float(roc_auc_score(wrong, -score)),
        "average_precision": float(average_precision_score(wrong, -score)),
        "precision": float(case.wrong[worst(case, findings)].double().mean()),
        "named": float((findings.suggestion == case.data.labels)[case.wrong].double().mean()),
        "flagged_precision": none if flagged is None else hits / max(int(flagged.sum()), 1),
        "flagged_recall": none if flagged is None else hits / int(case.wrong.sum()),
    }


def worst(case: Case, findings: Findings) -> Tensor:
    """Return the places of the labels ranked worst, as many as are wrong."""
    return findings.score.argsort(stable=True)[: int(case.wrong.sum())]


def clean(case: Case, findings: Findings, treatment: str) -> dict[str, float]:
    """Return the accuracy of a new network after the worst labels were left out, or replaced by those suggested."""
    chosen, labels = worst(case, findings), case.given.clone()
    kept = torch.ones_like(case.wrong)
    if treatment == "remove":
        kept[chosen] = False
    else:
        labels[chosen] = findings.suggestion[chosen]
    return {"accuracy": accuracy(case.learn(labels, kept), case.data)}


class Runs:
    """What was found in each case, by method; a case is made, and its networks are trained, only for what is not known yet."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.detection, self.accuracy = (RunLog(options.out / f"{name}.csv") for name in ("detection", "accuracy"))
        self._last: tuple[tuple[str, str, int], Case] | None = None
        self._tried: tuple[Case, dict[tuple[str, str], Findings]] | None = None

    def case(self, name: str, noise: str, seed: int) -> Case:
        key = (name, noise, seed)
        if self._last is None or self._last[0] != key:
            data = Data.load(name, self.options.data_dir, self.options.size, seed)
            self._last = key, Case(name, data, noise, seed, self.options.epochs[name], self.options.out)
        return self._last[1]

    def detect(self, name: str, noise: str, seed: int, method: str, variant: str) -> dict[str, float]:
        """Return how well a method finds the errors."""
        key = {**self._key(name, noise, seed), "method": method, "variant": variant}
        return self.detection.get(key, partial(self._detect, name, noise, seed, METHODS[method][variant]))

    def compare(self, name: str, noise: str, seed: int, protocol: str, score: str) -> dict[str, float]:
        """Return how well one of the scores that were tried finds the errors."""
        key = {**self._key(name, noise, seed), "method": f"score, {protocol}", "variant": score}
        return self.detection.get(key, partial(self._compare, name, noise, seed, protocol, score))

    def retrain(self, name: str, noise: str, seed: int, method: str, variant: str, treatment: str) -> dict[str, float]:
        """Return the accuracy after cleaning."""
        key = {**self._key(name, noise, seed), "method": method, "variant": variant, "treatment": treatment}
        find = truth if method == EVERYTHING else METHODS[method][variant]
        return self.accuracy.get(key, lambda: clean(case := self.case(name, noise, seed), case.ask(find), treatment))

    def leave(self, name: str, noise: str, seed: int) -> dict[str, float]:
        """Return the accuracy of the network that was trained on all labels as they are."""
        key = {**self._key(name, noise, seed), "method": NOTHING, "variant": "", "treatment": ""}
        return self.accuracy.get(key, lambda: {"accuracy": accuracy((case := self.case(name, noise, seed)).network, case.data)})

    def _detect(self, name: str, noise: str, seed: int, find: Method) -> dict[str, float]:
        case = self.case(name, noise, seed)
        return judge(case, case.ask(find))

    def _compare(self, name: str, noise: str, seed: int, protocol: str, score: str) -> dict[str, float]:
        case = self.case(name, noise, seed)
        if self._tried is None or self._tried[0] is not case:
            self._tried = case, try_scores(case)
        return judge(case, self._tried[1][protocol, score])

    def _key(self, name: str, noise: str, seed: int) -> dict[str, Any]:
        sizes = {"size": self.options.size, "epochs": self.options.epochs[name]}
        return {"data": name, "noise": noise, "seed": seed, **sizes}


def choose(runs: Runs, seeds: Sequence[int]) -> dict[str, str]:
    """Choose of each kind of method what has the best mean AUROC in all cases of these seeds."""
    tried: dict[str, dict[str, list[float]]] = {kind: {variant: [] for variant in some} for kind, some in METHODS.items()}
    for name, noise, seed in cases(seeds):
        for kind, variants in tried.items():
            if len(variants) > 1:
                for variant, values in variants.items():
                    values.append(runs.detect(name, noise, seed, kind, variant)["auroc"])
    return {kind: max(some, key=lambda variant: sum(some[variant])) for kind, some in tried.items()}


def compare(runs: Runs, seeds: Sequence[int]) -> dict[str, dict[str, Row]]:
    """Return AUROC and average precision of the scores that were tried, on these seeds, by score, then by data and protocol."""
    found: dict[str, dict[str, Row]] = {figure: {score: {} for score in TRIED} for figure in ("auroc", "average_precision")}
    for name, noise, seed in cases(seeds):
        for protocol in PROTOCOLS:
            for score in TRIED:
                judged = runs.compare(name, noise, seed, protocol, score)
                for figure, rows in found.items():
                    rows[score].setdefault((name, protocol), []).append(judged[figure])
    return found


def cases(seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """Return every data set with every noise, by seed."""
    return [(name, noise, seed) for seed in seeds for name in NETWORKS for noise in NOISE]


Row = dict[tuple[str, str], list[float]]


def collect(runs: Runs, chosen: dict[str, str], seeds: Sequence[int]) -> dict[str, dict[str, Row]]:
    """Return each figure by method, then by data and noise: the values of all seeds."""
    found: dict[str, dict[str, Row]] = {}
    for name, noise, seed in cases(seeds):

        def add(figure: str, method: str, value: float, place: tuple[str, str] = (name, noise)) -> None:
            found.setdefault(figure, {}).setdefault(method, {}).setdefault(place, []).append(value)

        for kind, variant in chosen.items():
            for figure, value in runs.detect(name, noise, seed, kind, variant).items():
                add(figure, kind, value)
        add("accuracy", NOTHING, runs.leave(name, noise, seed)["accuracy"])
        for treatment in TREATMENTS:
            for kind in (*CLEANED, EVERYTHING):
                cleaned = runs.retrain(name, noise, seed, kind, chosen.get(kind, ""), treatment)
                add("accuracy", f"{kind}: {treatment}", cleaned["accuracy"])
    return found


def format_table(heading: str, rows: dict[str, Row], scale: float, digits: int, errors: bool = True) -> str:
    """Return a Markdown table: mean and standard error of each case, and the mean over all cases."""
    places = list(next(iter(rows.values())))
    head = [f"{TITLES[name]}, {title(noise)}" for name, noise in places]
    lines = [f"\n{heading}\n", f"| method | {' | '.join(head)} | mean |", f"|---|{'---:|' * (len(head) + 1)}"]
    for name, row in rows.items():
        cells = []
        for place in places:
            mean, error = mean_and_error(row[place])
            cells.append(f"{scale * mean:.{digits}f}" + f" ± {scale * error:.{digits}f}" * errors)
        lines.append(f"| {name} | {' | '.join(cells)} | {scale * overall(row):.{digits}f} |")
    return "\n".join(lines)


def overall(row: Row) -> float:
    """Return the mean over all cases and seeds."""
    return fmean(fmean(values) for values in row.values())


def nested(rows: dict[str, Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the means by data, method and noise, as they stand in the last line."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method, row in rows.items():
        for (name, noise), values in row.items():
            found.setdefault(name, {}).setdefault(method, {})[noise] = round(fmean(values), 5)
    return found


def title(noise: str) -> str:
    """Return what a kind of noise is called in tables and figures; what is none is left as it is."""
    kind, _, share = noise.rpartition("_")
    return f"{kind.replace('_', '-')}, {share} %" if kind else share


def draw(auroc: dict[str, Row], after: dict[str, Row]) -> Figure:
    """Draw the AUROC of every method and the accuracy after cleaning, a row of panels for each data set."""
    reading = (
        "Left: how well each method ranks the planted errors. Middle and right: test accuracy of a new network after as many "
        "labels as are wrong, those ranked worst, were left out or replaced. Open circles: by one network, in sample; the "
        "others out of sample. Mean and standard error over the seeds; axes differ."
    )
    names = list(dict.fromkeys(name for name, _ in next(iter(auroc.values()))))
    panels = [("AUROC", auroc, 1)] + [(f"accuracy, {treatment}, %", treated(after, treatment), 100) for treatment in TREATMENTS]
    with style.styled():
        figure = style.new_figure(14.6, 1.15 + 2.65 * len(names), "Wrong labels: found, left out, replaced", reading)
        width, height = figure.get_size_inches()
        shown: dict[str, Any] = {}
        for down, name in enumerate(names):
            for across, (text, rows, scale) in enumerate(panels):
                left, top = 0.7 + 3.75 * across, 1.25 + 2.65 * down
                axes = style.add_axes(figure, left, height - top - 1.95, width - left - 3.2, top)
                draw_panel(axes, rows, name, scale)
                axes.set_title(f"{TITLES[name]}: {text}", fontsize=9, loc="left")
                shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        anchor = (11.5 / width, 1 - 1.2 / height)
        figure.legend(shown.values(), shown, loc="upper left", bbox_to_anchor=anchor)
    return figure


def treated(after: dict[str, Row], treatment: str) -> dict[str, Row]:
    """Return the accuracies of one treatment, and those without any, by method."""
    return {arm.split(": ")[0]: row for arm, row in after.items() if arm == NOTHING or arm.endswith(treatment)}


def draw_panel(axes: Axes, rows: dict[str, Row], name: str, scale: float) -> None:
    """Draw one data set: noise across, methods side by side."""
    for place, (method, row) in enumerate(rows.items()):
        found = [mean_and_error(row[name, noise]) for noise in NOISE]
        across = [column + 0.72 * (place / max(len(rows) - 1, 1) - 0.5) for column in range(len(NOISE))]
        means, errors = ([scale * pair[side] for pair in found] for side in (0, 1))
        color = COLORS[method.removesuffix(IN_SAMPLE)]
        inside = style.PAPER if method.endswith(IN_SAMPLE) else color
        axes.errorbar(
            across, means, errors, fmt="o", markersize=5, capsize=2, color=color, markerfacecolor=inside, label=method
        )
    axes.set_xticks(range(len(NOISE)), [title(noise).replace(", ", "\n") for noise in NOISE])
    axes.set_xlim(-0.5, len(NOISE) - 0.5)
    axes.grid(axis="y")


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", required=True, help="directory with MNIST/raw in it")
    parser.add_argument("--quick", action="store_true", help="few images, hardly trained: only to see that it works")
    parser.add_argument("--size", type=int, help="training images at most (3,000; of the digits there are 1,078)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the cases that are reported (0 to 4)")
    parser.add_argument("--choose-seeds", type=int, nargs="+", help="of those that k and cleanlab's score are chosen by")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/label_noise"), help="directory of the runs and the figure")
    options = parser.parse_args(arguments)
    full = {"size": 3000, "seeds": [0, 1, 2, 3, 4], "choose_seeds": [1000, 1001]}
    quick = {"size": 200, "seeds": [0], "choose_seeds": [1000]}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.epochs = {"digits": 2, "mnist": 2} if options.quick else {"digits": 40, "mnist": 20}
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    runs = Runs(options)
    tried, chosen = compare(runs, options.choose_seeds), choose(runs, options.choose_seeds)
    for figure, rows in tried.items():
        print(format_table(f"Scores that were tried, on other seeds: {TABLES[figure]}", rows, 1, 4, errors=False))
    found = collect(runs, chosen, options.seeds)
    for figure, heading in TABLES.items():
        print(format_table(heading, found[figure], *((100, 1) if figure == "accuracy" else (1, 4))))
    style.save_figure(draw(found["auroc"], found["accuracy"]), options.out / "label_noise.png", dpi=100)
    print(f"\nThe figure and all runs are in {options.out}/")
    figures: dict[str, Any] = {figure: nested(found[figure]) for figure in ("auroc", "average_precision")}
    figures |= {
        "accuracy_after": nested(found["accuracy"]),
        "auroc_mean": {method: round(overall(row), 5) for method, row in found["auroc"].items()},
        "average_precision_mean": {method: round(overall(row), 5) for method, row in found["average_precision"].items()},
        "accuracy_after_mean": {arm: round(overall(row), 5) for arm, row in found["accuracy"].items()},
        "scores_tried": {
            figure: {score: round(overall(row), 5) for score, row in rows.items()} for figure, rows in tried.items()
        },
        "named": nested(found["named"]),
        "threshold": {figure: nested({"kernel": found[figure]["kernel"]}) for figure in FLAGS},
        "chosen": chosen,
        "options": {name: getattr(options, name) for name in ("size", "epochs", "seeds", "choose_seeds")},
    }
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()

"""Plant near-duplicates, leaks and outliers among real images, and find them by the neighbors of the gradient kernel.

Images are shifted by one pixel, given a little noise, or written as JPEG, and put back beside their originals (near-duplicates)
or among images that the network has not seen (leaks); then some images of another kind are put in (outliers). `find_issues`
looks for them in what `analyze` found, at its default thresholds; the same in either table of neighbors alone; and cleanlab's
Datalab, at its own, in the same activations. Three data sets, with a network each: MNIST, CIFAR-10, scikit-learn's digits.

    python experiments/duplicates.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Prints the tables, writes a figure and every run (`near_duplicates.csv`, `leaks.csv`, `outliers.csv`, `shown/`), and prints as
its last line one JSON object. Runs that stand in these files already are not repeated; delete the directory to start again.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import analyze, find_issues
from lightning_netsim.analysis.issues import THRESHOLDS
from lightning_netsim.records.record import Record
from lightning_netsim.report import style
from lightning_netsim.report.pictures import to_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.planted_issues import (
    DATA,
    KINDS,
    Planted,
    Problem,
    activations,
    ask_cleanlab,
    cleanlab_sets,
    judge_leaks,
    judge_sets,
)
from experiments.run_log import RunLog, mean_and_error

BOTH, KERNEL, ACTIVATIONS, CLEANLAB = METHODS = ("find_issues", "kernel", "activations", "cleanlab")
PARTS = ("near_duplicates", "leaks", "outliers")
STRANGERS = ("characters", "photographs", "noise")
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "digits": "digits"}
# Images that are analyzed, copies of each kind, sets of four, images that may leak, outliers of each kind.
SIZES = {
    "mnist": {"images": 1500, "per_kind": 30, "sets": 15, "queries": 500, "leaks": 10, "strangers": 5},
    "cifar10": {"images": 600, "per_kind": 12, "sets": 6, "queries": 250, "leaks": 6, "strangers": 5},
    "digits": {"images": 900, "per_kind": 18, "sets": 9, "queries": 400, "leaks": 8, "strangers": 5},
}
STEPS = {"mnist": 1500, "cifar10": 0, "digits": 600}
# Pairs of pictures of each sort in the figure.
SHOWN = 3
LEAST = 1e-9
Figures = dict[str, float]
Summary = dict[str, list[float]]


def measure(network: nn.Module, images: Tensor, reference: Tensor | None = None) -> Record:
    """Return the neighbors of images, by default among themselves."""
    loaders = [None if some is None else DataLoader(TensorDataset(some), batch_size=64) for some in (images, reference)]
    return analyze(network, loaders[0], loaders[1], progress=False).record  # type: ignore[arg-type]


def by_kernel(record: Record) -> Record:
    """Return the record without neighbors under activations."""
    return replace(record, activation_neighbors=None)


def by_activations(record: Record) -> Record:
    """Return the record as if activations were the kernel."""
    assert record.activation_neighbors is not None
    return replace(record, neighbors=record.activation_neighbors, activation_neighbors=None)


def prefixed(figures: dict[str, Figures]) -> Figures:
    return {f"{method} {name}": value for method, some in figures.items() for name, value in some.items()}


def find_near_duplicates(problem: Problem, sizes: dict[str, int], shown: Path) -> Figures:
    """Plant copies among images that the network knows, and compare what is found."""
    planted = Planted.among(problem.draw(True, sizes["images"]), sizes["per_kind"], sizes["sets"], problem.generator(4))
    record = measure(problem.network, planted.images)
    tables = {
        BOTH: find_issues(record, ["near_duplicate"]).table,
        KERNEL: find_issues(by_kernel(record), ["near_duplicate"]).table,
        ACTIVATIONS: find_issues(by_activations(record), ["near_duplicate"]).table,
    }
    sets = {method: table["near_duplicate_set"].to_numpy() for method, table in tables.items()}
    sets[CLEANLAB] = cleanlab_sets(activations(problem.network, planted.images))
    score = tables[BOTH]["near_duplicate_score"].to_numpy()
    nearest = record.neighbors[record.neighbors["rank"] == 1].sort_values("index")["neighbor"].to_numpy()
    pairs = {"score": score, "nearest": nearest, "set": sets[BOTH], "origin": planted.origin, "kind": planted.kind}
    shown.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"images": planted.images} | {name: value.tolist() for name, value in pairs.items()}, shown)
    return prefixed({method: judge_sets(names, planted) for method, names in sets.items()})


def find_leaks(problem: Problem, sizes: dict[str, int], shown: Path) -> Figures:
    """Plant copies of images that the network knows among images that it has not seen, and compare what is found."""
    reference, unseen = problem.draw(True, sizes["images"]), problem.draw(False, sizes["queries"])
    generator, number = problem.generator(5), sizes["leaks"]
    plan = [kind for kind in KINDS for _ in range(number)]
    copies = [KINDS[kind](image, generator) for kind, image in zip(plan, reference, strict=False)]
    queries = torch.cat([unseen, torch.stack(copies)])
    record = measure(problem.network, queries, reference)
    table = find_issues(record, ["leak"]).table
    nearest = record.neighbors[record.neighbors["rank"] == 1].set_index("index")["neighbor"]
    found = [
        place for place in table.sort_values("leak_score")["index"] if place < len(unseen) and table["is_leak_issue"][place]
    ]
    if found:
        torch.save([(queries[place].clone(), reference[nearest[place]].clone()) for place in found], shown)
    flags = {
        BOTH: table["is_leak_issue"],
        KERNEL: find_issues(by_kernel(record), ["leak"]).table["is_leak_issue"],
        ACTIVATIONS: find_issues(by_activations(record), ["leak"]).table["is_leak_issue"],
        CLEANLAB: leaks_by_cleanlab(activations(problem.network, torch.cat([queries, reference])), len(queries)),
    }
    kinds = [""] * len(unseen) + plan
    return prefixed({method: judge_leaks(np.asarray(flagged), kinds) for method, flagged in flags.items()})


def leaks_by_cleanlab(features: np.ndarray[Any, Any], number: int) -> list[bool]:
    """Return which of the first samples Datalab takes for near-duplicates of the others: it has no check for leaks."""
    table = ask_cleanlab(features, "near_duplicate")[:number]
    flagged, sets = table["is_near_duplicate_issue"], table["near_duplicate_sets"]
    return [bool(flag) and bool((np.asarray(near) >= number).any()) for flag, near in zip(flagged, sets, strict=True)]


def find_outliers(problem: Problem, sizes: dict[str, int]) -> Figures:
    """Put images of other kinds among images that the network knows, and compare how they are ranked."""
    known, strangers = problem.draw(True, sizes["images"]), problem.strangers(sizes["strangers"])
    images = torch.cat([known, *strangers.values()])
    record = measure(problem.network, images)
    tables = {
        KERNEL: find_issues(record, ["outlier"]).table,
        ACTIVATIONS: find_issues(by_activations(record), ["outlier"]).table,
        CLEANLAB: ask_cleanlab(activations(problem.network, images), "outlier"),
    }
    kinds = np.repeat(["", *strangers], [len(known), *map(len, strangers.values())])
    figures = {}
    for method, table in tables.items():
        score, flagged = table["outlier_score"].to_numpy(), table["is_outlier_issue"].to_numpy()
        figures[method] = {"flagged clean": float(flagged[kinds == ""].mean())}
        for kind in strangers:
            rows = (kinds == "") | (kinds == kind)
            figures[method][f"{kind} auroc"] = float(roc_auc_score(kinds[rows] == kind, -score[rows]))
            figures[method][f"{kind} flagged"] = float(flagged[kinds == kind].mean())
    return prefixed(figures)


def run(options: argparse.Namespace) -> dict[str, dict[str, list[Figures]]]:
    """Return what was found, by part and data set, one for each seed."""
    found: dict[str, dict[str, list[Figures]]] = {part: {name: [] for name in options.data} for part in PARTS}
    logs = {part: RunLog(options.out / f"{part}.csv") for part in PARTS}
    for name in options.data:
        sizes = {key: max(2, round(value * options.scale)) for key, value in SIZES[name].items()}
        for seed in options.seeds:
            problem = Problem(name, options.data_dir, seed, round(STEPS[name] * options.scale))
            shown, leaks_shown = (options.out / "shown" / f"{prefix}{name}-{seed}.pt" for prefix in ("", "leaks-"))
            makers: dict[str, Callable[[], Figures]] = {
                "near_duplicates": partial(find_near_duplicates, problem, sizes, shown),
                "leaks": partial(find_leaks, problem, sizes, leaks_shown),
                "outliers": partial(find_outliers, problem, sizes),
            }
            for part, make in makers.items():
                key = {"data": name, "seed": seed, "scale": options.scale}
                found[part][name].append(logs[part].get(key, make))
    return found


def summarize(rows: Sequence[Figures]) -> dict[str, Summary]:
    """Return mean and standard error of each figure of each method, over the seeds where it has a value."""
    found: dict[str, Summary] = {method: {} for method in METHODS}
    for name in rows[0]:
        method, figure = name.split(" ", 1)
        values = [row[name] for row in rows if not np.isnan(row[name])]
        if values:
            found[method][figure] = [round(value, 4) for value in mean_and_error(values)]
    return {method: figures for method, figures in found.items() if figures}


def print_tables(found: dict[str, dict[str, dict[str, Summary]]]) -> None:
    """Print a table for each part, its rows data sets and methods, its values means over the seeds."""
    print_rates(
        "Near-duplicates", found["near_duplicates"], (*KINDS, "set", "all"), {"sets": "sets whole", "errors": "in error"}
    )
    print_rates("Leaks", found["leaks"], (*KINDS, "all"), {"errors": "in error"})
    print(f"\nOutliers: AUROC (share flagged)\n| data | by | {' | '.join(STRANGERS)} | others flagged, % |")
    print(f"|---|---|{'---:|' * (len(STRANGERS) + 1)}")
    for name, methods in found["outliers"].items():
        for method, figures in methods.items():
            cells = [f"{figures[f'{kind} auroc'][0]:.3f} ({figures[f'{kind} flagged'][0]:.2f})" for kind in STRANGERS]
            print(f"| {TITLES[name]} | {method} | {' | '.join(cells)} | {100 * figures['flagged clean'][0]:.2f} |")


def print_rates(title: str, found: dict[str, dict[str, Summary]], kinds: Sequence[str], ends: dict[str, str]) -> None:
    """Print precision and recall of each kind; "-" where nothing was flagged."""
    print(f"\n{title}: precision / recall\n| data | by | {' | '.join((*kinds, *ends.values()))} |")
    print(f"|---|---|{'---:|' * (len(kinds) + len(ends))}")
    for name, methods in found.items():
        for method, figures in methods.items():
            texts = {key: f"{value[0]:.2f}" for key, value in figures.items()}
            cells = [f"{texts.get(f'{kind} precision', '-')} / {texts[f'{kind} recall']}" for kind in kinds]
            print(f"| {TITLES[name]} | {method} | {' | '.join((*cells, *(texts[end] for end in ends)))} |")


def sorts(options: argparse.Namespace, name: str) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return pairs of images of all seeds: near-duplicates that were found, that were missed, and what was not planted."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {
        "planted, found": [],
        "missed": [],
        "found, not planted": [],
        "leaks, not planted": [],
    }
    for seed in options.seeds:
        shown = torch.load(options.out / "shown" / f"{name}-{seed}.pt", weights_only=True)
        origin, kind, score = (np.array(shown[key]) for key in ("origin", "kind", "score"))
        near = score < THRESHOLDS["near_duplicate"]
        places: dict[str, list[tuple[int, int]]] = {"planted, found": [], "missed": [], "found, not planted": []}
        # The first copy of each kind, then the second, ...
        copied = origin != np.arange(len(origin))
        copies = np.stack([np.flatnonzero(copied & (kind == one)) for one in KINDS], axis=1).ravel()
        for place in copies:
            places["planted, found" if near[place] else "missed"].append((origin[place], place))
        for place in np.argsort(score):
            pair = min(place, shown["nearest"][place]), max(place, shown["nearest"][place])
            if near[place] and kind[place] == "" and pair not in places["found, not planted"]:
                places["found, not planted"].append(pair)
        for sort, some in places.items():
            pairs[sort] += [(shown["images"][one], shown["images"][other]) for one, other in some]
        leaks = options.out / "shown" / f"leaks-{name}-{seed}.pt"
        pairs["leaks, not planted"] += torch.load(leaks, weights_only=True) if leaks.is_file() else []
    return pairs


def draw_scores(axes: Any, shown: dict[str, Any], title: str) -> None:
    """Draw the score of every image, in a line for each kind."""
    score, kind = np.array(shown["score"]).clip(LEAST), np.array(shown["kind"], dtype=object)
    jitter = np.random.default_rng(0).uniform(-0.32, 0.32, len(score))
    names = {"": "not planted"} | {name: name for name in (*KINDS, "set")} | {"set": "set of four"}
    for line, name in enumerate(names):
        rows = kind == name
        color = style.MUTED if name == "" else style.CYCLE[line - 1]
        axes.plot(score[rows], jitter[rows] - line, ".", color=color, markersize=3, alpha=0.6, markeredgewidth=0)
    axes.axvline(THRESHOLDS["near_duplicate"], color=style.MISMATCH, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(LEAST / 2, 2)
    axes.set_yticks([-line for line in range(len(names))], list(names.values()))
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")


def draw(options: argparse.Namespace) -> Figure:
    """Draw scores of the first seed, and pairs of pictures of all."""
    size, gap, high, top, left, scores = 0.62, 0.08, 1.85, 1.1, 0.95, 3.3
    block = SHOWN * (size + gap) + 0.2
    width, height = left + scores + 0.3 + 4 * block + 0.1, top + len(options.data) * high + 0.35
    reading = (
        "Left: the chance of a neighbor as near as the nearest, of every image of the first seed; left of the red line it is"
        f" taken for a near-duplicate (less than {LEAST:g} is drawn at {LEAST:g}). Right: pairs of all seeds and how many"
        " there are of each sort, originals above; in the last column test images above training images."
    )
    with style.styled():
        figure = style.new_figure(width, height, "Planted near-duplicates", reading)
        canvas = style.add_canvas(figure)
        for row, name in enumerate(options.data):
            shown = torch.load(options.out / "shown" / f"{name}-{options.seeds[0]}.pt", weights_only=True)
            start = top + row * high
            axes = style.add_axes(figure, left, height - start - high + 0.5, width - left - scores, start)
            draw_scores(axes, shown, TITLES[name])
            if row == len(options.data) - 1:
                axes.set_xlabel("score")
            for column, (sort, pairs) in enumerate(sorts(options, name).items()):
                x = left + scores + 0.3 + column * block
                canvas.text(x, start - 0.07, f"{sort}: {len(pairs)}", ha="left", va="bottom", fontsize=8.5, color=style.INK)
                for place, pair in enumerate(pairs[:SHOWN]):
                    for line, image in enumerate(pair):
                        box = (x + place * (size + gap), start + line * (size + gap / 2), size, size)
                        style.draw_thumbnail(canvas, to_image(image), box)
    return figure


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, with the sizes of a full or a quick run where none are given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data-dir", required=True, help="with MNIST/raw, cifar10/, weights/, omniglot/ and kodak/ in it")
    parser.add_argument("--quick", action="store_true", help="a few images, one seed: only to see that it works")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="which data sets")
    parser.add_argument("--seeds", type=int, nargs="+", help="of networks and of what is planted (0 1 2)")
    parser.add_argument("--scale", type=float, help="of all numbers of images and of training steps (1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/duplicates"), help="directory of the runs and the figure")
    options = parser.parse_args(arguments)
    for name, value in ({"seeds": [0], "scale": 0.08} if options.quick else {"seeds": [0, 1, 2], "scale": 1.0}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cleanlab's packages warn of each other
        rows = run(options)
    found = {part: {name: summarize(some) for name, some in names.items()} for part, names in rows.items()}
    print_tables(found)
    style.save_figure(draw(options), options.out / "duplicates.png", dpi=100)
    print(f"\nThe figure and all runs are in {options.out}/")
    figures: dict[str, Any] = {part: found[part] for part in PARTS}
    figures["options"] = {"data": options.data, "seeds": options.seeds, "scale": options.scale}
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()

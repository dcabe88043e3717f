"""Count the neighbors of points of a sinusoid: does a network treat fewer points as the same where the curve bends more?

The toy problem of Charpiat et al., NeurIPS 2019, section 4.1, figures 1 and 2: y = sin(2πfα) on the points (cos 2πα, sin 2πα)
of a circle, for f = 1, 2, 4, 8, five runs each. After training, the neighbors of every point among all points are counted; the
median over the runs is set against the frequency and against the curvature of the target.

    python experiments/toy_sinusoid.py [--quick] [--hidden-layers 5] [--out DIRECTORY]

Prints a table for each kind of count, writes two figures and the counts (CSV), and prints as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from lightning_netsim.demos import SinusoidDataModule, SinusoidRegressor, sinusoid
from lightning_netsim.functional import neighbor_count
from lightning_netsim.functional.results import NeighborCountResult
from lightning_netsim.jacobian.features import GradientFeatures
from lightning_netsim.report import style

# What the released code of the paper lists.
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.925, 0.95, 0.975, 0.99)
POWERS = (2.0, 3.0, 4.0)
# With six hidden layers and 2,048 points: mean soft counts to be met within 10 %, rank correlations not to be exceeded.
EXPECTED_MEANS = {1: 1477, 2: 1267, 4: 921, 8: 736}
EXPECTED_CORRELATIONS = {1: -0.9, 2: -0.6}
# What a count is called in tables and JSON.
COUNTS = ("soft", *(f"hard_{tau:g}" for tau in THRESHOLDS), *(f"power_{alpha:g}" for alpha in POWERS))
_SHADES = {"hard_0.5": "#9fc3e6", "hard_0.7": "#6a9fd4", "hard_0.9": "#2f6db3", "hard_0.99": "#153a66", "power_4": "#d1622b"}


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="256 points, 20 epochs, 2 runs: only to see that it works")
    parser.add_argument("--frequencies", type=int, nargs="+", default=[1, 2, 4, 8], help="periods around the circle")
    parser.add_argument("--hidden-layers", type=int, default=6, help="6 as in the released code, 5 as in the text of the paper")
    parser.add_argument("--points", type=int, help="points on the circle (2048)")
    parser.add_argument("--epochs", type=int, help="passes over the points (80)")
    parser.add_argument("--runs", type=int, help="networks for each frequency (5)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and shuffling")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/toy_sinusoid"), help="directory of the figures")
    options = parser.parse_args(arguments)
    defaults = {"points": 256, "epochs": 20, "runs": 2} if options.quick else {"points": 2048, "epochs": 80, "runs": 5}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def make_models(number: int, hidden_layers: int, seed: int) -> list[SinusoidRegressor]:
    """Return networks with PyTorch's default initial weights, each from its own seed."""
    models = []
    with torch.random.fork_rng(devices=[]):
        for run in range(number):
            torch.manual_seed(seed + run)
            models.append(SinusoidRegressor(hidden_layers))
    return models


def train(
    models: Sequence[SinusoidRegressor], points: Tensor, targets: Tensor, epochs: int, seed: int, batch_size: int = 64
) -> list[float]:
    """Train M networks of the same shape at once by Adam on the L1 loss, each with its own shuffling; change them in place.

    Parameters are stacked, the loss is the sum of the networks' losses, and Adam works entry by entry: every network takes
    exactly the steps that it would take alone.

    Args:
        models: M networks.
        points: shape (N, 2), the same for all.
        targets: shape (M, N, 1), one row for each network.
        epochs: passes over the points.
        seed: of the shuffling.
        batch_size: points in a batch.

    Returns:
        the mean loss of each network over the batches of its last epoch.
    """
    stacked, _ = stack_module_state(list(models))
    optimizer = torch.optim.Adam(stacked.values(), lr=models[0].learning_rate)
    forward = vmap(lambda parameters, x: functional_call(models[0], parameters, (x,)))
    generators = [torch.Generator().manual_seed(seed + run) for run in range(len(models))]
    rows = torch.arange(len(models)).unsqueeze(1)
    losses = torch.zeros(len(models))
    for _ in range(epochs):
        order = torch.stack([torch.randperm(len(points), generator=generator) for generator in generators])
        losses = torch.zeros(len(models))
        for batch in order.split(batch_size, dim=1):
            loss = (forward(stacked, points[batch]) - targets[rows, batch]).abs().mean((1, 2))
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses += loss.detach() * batch.shape[1] / len(points)
    for run, model in enumerate(models):
        model.load_state_dict({name: value[run].detach() for name, value in stacked.items()})
    return losses.tolist()


def count_neighbors(model: SinusoidRegressor, points: Tensor) -> NeighborCountResult:
    """Count the neighbors of all points among all points; D = 1, so that k is the cosine of two gradients."""
    features = GradientFeatures(model, directions="all")(points)
    return neighbor_count(features.vectors(), thresholds=THRESHOLDS, powers=POWERS)


def curvature(alpha: Tensor, frequency: float) -> Tensor:
    """Return |y''| / (1 + y'²)^1.5 of y = sin(2πfα), shape (N,)."""
    angular = 2 * math.pi * frequency
    slope, second = angular * (angular * alpha).cos(), angular**2 * (angular * alpha).sin()
    return second.abs() / (1 + slope**2) ** 1.5


def spearman(left: Any, right: Any) -> float | None:
    """Return the rank correlation; None where one side is constant."""
    ranks = [pd.Series(np.asarray(values)).rank().to_numpy() for values in (left, right)]
    return None if min(rank.std() for rank in ranks) == 0 else float(np.corrcoef(*ranks)[0, 1])


def measure(options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train all networks and count.

    Returns:
        a table with one row for each frequency and point (medians over the runs), and one with a row for each run.
    """
    alpha = SinusoidDataModule(num_points=options.points).alpha
    points, frequencies = sinusoid(alpha, 1)[0], options.frequencies
    targets = torch.stack([sinusoid(alpha, frequency)[1] for frequency in frequencies])
    models = make_models(len(frequencies) * options.runs, options.hidden_layers, options.seed)
    losses = train(models, points, targets.repeat_interleave(options.runs, 0), options.epochs, options.seed)
    tables, rows = [], []
    for position, frequency in enumerate(frequencies):
        runs = range(position * options.runs, (position + 1) * options.runs)
        results = [count_neighbors(models[run], points) for run in runs]
        for run, result in zip(runs, results, strict=True):
            rows.append({"frequency": frequency, "run": run, "mean_soft": float(result.soft.mean()), "loss": losses[run]})
        with torch.no_grad():
            outputs = torch.stack([models[run](points).squeeze(1) for run in runs])
        soft = torch.stack([result.soft for result in results])
        columns = {
            "frequency": torch.full_like(alpha, frequency),
            "alpha": alpha,
            "target": targets[position].squeeze(1),
            "output": _median(outputs),
            "curvature": curvature(alpha.double(), frequency),
            "soft": _median(soft),
            "soft_low": soft.amin(0),
            "soft_high": soft.amax(0),
        }
        columns |= {f"hard_{tau:g}": _median(torch.stack([result.hard[tau] for result in results])) for tau in THRESHOLDS}
        columns |= {f"power_{p:g}": _median(torch.stack([result.power[p] for result in results])) for p in POWERS}
        tables.append(pd.DataFrame({name: value.double().numpy() for name, value in columns.items()}))
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows)


def _median(values: Tensor) -> Tensor:
    """Return the median over the runs; of an even number of runs, the mean of the middle two."""
    return values.double().quantile(0.5, dim=0)


def summarize(counts: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Any]:
    """Return, by kind of count and by frequency, the mean of the median counts and their rank correlation with curvature."""
    groups = {f"{frequency:g}": group for frequency, group in counts.groupby("frequency")}
    means = {kind: {f: round(float(group[kind].mean()), 1) for f, group in groups.items()} for kind in COUNTS}
    correlations = {
        kind: {f: _rounded(spearman(group[kind], group["curvature"])) for f, group in groups.items()} for kind in COUNTS
    }
    by_run = {f"{f:g}": group for f, group in runs.groupby("frequency")}
    return {
        "mean_count": means["soft"],
        "spearman": correlations["soft"],
        "mean_count_by_run": {f: [round(value, 1) for value in group["mean_soft"]] for f, group in by_run.items()},
        "loss": {f: round(float(group["loss"].mean()), 4) for f, group in by_run.items()},
        "other_mean_counts": {kind: means[kind] for kind in COUNTS[1:]},
        "other_spearman": {kind: correlations[kind] for kind in COUNTS[1:]},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def check_bounds(figures: dict[str, Any]) -> dict[str, bool]:
    """Return which of the bounds that apply to a full run hold."""
    means = {int(f): mean for f, mean in figures["mean_count"].items()}
    falling = [mean for _, mean in sorted(means.items())]
    held = {"means fall with the frequency": all(a > b for a, b in itertools.pairwise(falling))}
    for f, mean in means.items():
        if f in EXPECTED_MEANS:
            held[f"mean at f = {f} within 10 % of {EXPECTED_MEANS[f]}"] = abs(mean / EXPECTED_MEANS[f] - 1) <= 0.1
        if f in EXPECTED_CORRELATIONS:
            correlation = figures["spearman"][str(f)]
            held[f"correlation at f = {f} below {EXPECTED_CORRELATIONS[f]}"] = (correlation or 0) < EXPECTED_CORRELATIONS[f]
    return held


def print_tables(figures: dict[str, Any]) -> None:
    frequencies = list(figures["mean_count"])
    head = "".join(f" {f:>7} |" for f in frequencies)
    means = {"soft": figures["mean_count"], **figures["other_mean_counts"]}
    correlations = {"soft": figures["spearman"], **figures["other_spearman"]}
    for title, table, form in (("mean count", means, "7.1f"), ("Spearman(count, curvature)", correlations, "7.2f")):
        print(f"\n| {title:<26} |{head}\n|{'-' * 28}|{'--------:|' * len(frequencies)}")
        for kind, row in table.items():
            print(f"| {kind:<26} |" + "".join(f" {'-':>7} |" if row[f] is None else f" {row[f]:{form}} |" for f in frequencies))
    print("\nL1 loss in the last epoch: " + ", ".join(f"{loss} at f = {f}" for f, loss in figures["loss"].items()))


def plot_along_circle(counts: pd.DataFrame) -> Figure:
    """Draw target, counts and curvature against the position on the circle, one column for each frequency."""
    groups = list(counts.groupby("frequency"))
    with style.styled():
        title = "Where a network sees fewer neighbors: the sinusoid, point by point"
        reading = (
            "Each column is one frequency f, each point a position α on the circle. Second row: soft count N_S, the median of "
            "the runs and, shaded, their range. Third row: hard counts (similarities of at least τ) and the power count with "
            "exponent 4. Fourth row: curvature of the target; where it is high, a network has to tell neighbors apart."
        )
        figure = style.new_figure(12.4, 9.4, title, reading)
        for column, (frequency, group) in enumerate(groups):
            panels = [_panel(figure, row, column, len(groups)) for row in range(4)]
            _draw_column(panels, group)
            panels[0].set_title(f"f = {frequency:g}", fontsize=10.5, loc="left")
            panels[3].set_xlabel("position α (turns)")
            if column > 0:
                for axes in panels:
                    axes.tick_params(labelleft=False)
            else:
                labels = ("target and output", "soft count", "hard and power counts", "curvature (log)")
                for axes, label in zip(panels, labels, strict=True):
                    axes.set_ylabel(label)
            if column == len(groups) - 1:
                panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
                panels[2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _panel(figure: Figure, row: int, column: int, columns: int) -> Axes:
    """Return the axes of one panel; its inches from the figure's left and top edges follow from row and column."""
    width, height = figure.get_size_inches()
    pitch, tall = (width - 0.85 - 1.1) / columns, 1.65
    left, top = 0.85 + column * pitch, 1.3 + row * (tall + 0.32)
    return style.add_axes(figure, left, height - top - tall, width - left - pitch + 0.2, top)


def _draw_column(panels: Sequence[Axes], group: pd.DataFrame) -> None:
    alpha, size = group["alpha"], len(group)
    panels[0].plot(alpha, group["target"], color=style.MUTED, linewidth=2.5, alpha=0.4, label="target")
    panels[0].plot(alpha, group["output"], color=style.GRADIENT, linewidth=1.0, label="output")
    panels[1].fill_between(alpha, group["soft_low"], group["soft_high"], color=style.GRADIENT, alpha=0.2, linewidth=0)
    panels[1].plot(alpha, group["soft"], color=style.GRADIENT, linewidth=1.2)
    for kind, color in _SHADES.items():
        name, _, value = kind.partition("_")
        label = f"τ = {value}" if name == "hard" else f"exponent {value}"
        panels[2].plot(alpha, group[kind], color=color, linewidth=1.0, label=label)
    panels[3].semilogy(alpha, group["curvature"].clip(lower=1e-3), color=style.CYCLE[1], linewidth=1.0)
    for axes in panels:
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    panels[0].set_ylim(-1.1, 1.1)
    panels[3].set_ylim(5e-4, 1e4)
    for axes in panels[1:3]:
        axes.set_ylim(0, 1.04 * size)


def plot_on_circle(counts: pd.DataFrame) -> Figure:
    """Draw the soft count as the height above the circle, one panel for each frequency."""
    groups, size = list(counts.groupby("frequency")), len(counts) / counts["frequency"].nunique()
    with style.styled():
        title = "Soft neighbor counts above the circle"
        reading = (
            "The points (cos 2πα, sin 2πα) lie on the floor, colored by their target; above each stands its soft count, out "
            f"of {size:,.0f} points. The more periods the target has, the fewer points a network treats as the same."
        )
        figure = style.new_figure(12.4, 4.0, title, reading)
        for column, (frequency, group) in enumerate(groups):
            share = 1 / len(groups)
            axes: Any = figure.add_axes((column * share, 0.02, share - 0.03, 0.8), projection="3d")
            circle = [group["alpha"].mul(2 * math.pi).map(function) for function in (math.cos, math.sin)]
            axes.scatter(*circle, 0, c=group["target"], cmap="coolwarm", s=2, vmin=-1, vmax=1)
            axes.scatter(*circle, group["soft"], c=group["target"], cmap="coolwarm", s=4, vmin=-1, vmax=1)
            axes.set_zlim(0, size)
            axes.set_xticks([-1, 0, 1])
            axes.set_yticks([-1, 0, 1])
            axes.view_init(elev=22, azim=-60)
            axes.set_box_aspect(None, zoom=1.05)
            axes.set_title(f"f = {frequency:g}: mean {group['soft'].mean():,.0f}", fontsize=10.5, y=0.98)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    counts, runs = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    counts.to_csv(options.out / "counts.csv", index=False, float_format="%.6g")
    style.save_figure(plot_along_circle(counts), options.out / "along_circle.png")
    style.save_figure(plot_on_circle(counts), options.out / "on_circle.png")
    figures = summarize(counts, runs)
    names = ("frequencies", "hidden_layers", "points", "epochs", "runs", "seed")
    figures["settings"] = {name: getattr(options, name) for name in names}
    print_tables(figures)
    if not options.quick:
        figures["held"] = check_bounds(figures)
        print("\n" + "\n".join(f"{'held' if held else 'MISSED'}: {bound}" for bound, held in figures["held"].items()))
    print(f"\nFigures and counts are in {options.out}/")
    figures["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()

"""Train on noisy labels, denoise them, train again, three times: has the round that aligns most the most neighbors?

After Charpiat et al., NeurIPS 2019, section 6 of the supplementary material (noisy map alignment), at a size that one core can
train. There a network learns to move a misplaced map back onto its photograph from annotations that are themselves misplaced;
its corrections are the annotations of the next round. Here the photograph is an MNIST digit and the map its outline, moved by
up to four pixels; labels are the displacement back, with independent Gaussian noise of three pixels in each coordinate. The
same is done for the classes of digits, 40 % of which are replaced by another one. Each round trains a new network on the labels
as they are and replaces them all by one of `UPDATES`. True labels only judge.

    python experiments/noisy_rounds.py --data-dir DIRECTORY [--quick] [--choose] [--out DIRECTORY]

Beside the tables it writes a figure and every run (`runs.csv`). Runs that stand there already are not repeated.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.noisy_targets import BATCH_SIZE, CLASSES, Kernel, loss_of, seeded, training
from lab import Mean, Size, Study, mean_of, script, spearman
from lab.data import Labeled, read_mnist
from lab.figures import panels
from lightning_netsim.report import style

SIZES = {
    "size": Size(1000, 100, "samples"),
    "seeds": Size(range(5), range(1), "of digits, noise and networks"),
    "choose": Size(False, None, "only print the held-out loss by epochs, on other seeds"),
}
ROUNDS = 3
TASKS = ("displacement", "classes")
# What labels are replaced by: what the network says; their average over all kernel neighbors; their mean, or majority, over the
# nearest; or they are kept, so that only the network is another one.
UPDATES = ("output", "smoothed", "nearest", "kept")
NEAREST = 20
# Epochs of a network with the least loss on held-out noisy labels (`--choose`), and four times as many.
EPOCHS = {"displacement": {"short": 6, "long": 24}, "classes": {"short": 8, "long": 32}}
CHOICE = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32)
# How far an outline is moved and how far the digit is from the middle, at most, and the noise: pixels.
REACH, OFFSET, NOISE = 4, 2, 3.0
WRONG = 0.4
# Up to which error the figure goes.
LIMITS = {"displacement": 4.0, "classes": 1.0}
COLORS = dict(zip(UPDATES, style.CYCLE, strict=False))


@dataclass(frozen=True)
class Problem:
    """Samples with true and with noisy labels: displacements, shape (N, 2), or classes, shape (N,)."""

    inputs: Tensor
    truth: Tensor
    labels: Tensor

    @classmethod
    def make(cls, task: str, digits: Labeled, size: int, seed: int) -> Problem:
        """Draw digits, displacements and noise; they depend on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(digits[0]), generator=generator)[:size]
        images, classes = digits[0][chosen], digits[1][chosen]
        if task == "classes":
            other = (classes + torch.randint(1, CLASSES, (size,), generator=generator)) % CLASSES
            return cls(images, classes, torch.where(torch.rand(size, generator=generator) < WRONG, other, classes))
        images = F.pad(images, (2, 2, 2, 2))
        outlines = F.max_pool2d(images, 3, stride=1, padding=1) - images
        place = torch.randint(-OFFSET, OFFSET + 1, (size, 2), generator=generator)
        moves = torch.randint(-REACH, REACH + 1, (size, 2), generator=generator)
        truth = -moves.float()
        inputs = torch.cat([moved(images, place), moved(outlines, place + moves)], dim=1)
        return cls(inputs, truth, truth + NOISE * torch.randn(truth.shape, generator=generator))

    @property
    def outputs(self) -> int:
        return self.truth.shape[1] if self.truth.ndim == 2 else CLASSES

    def network(self, seed: int) -> nn.Module:
        """Return a new network for these samples."""
        return seeded(seed, self.inputs.shape[1], self.inputs.shape[2], self.outputs, 3)


def moved(images: Tensor, by: Tensor) -> Tensor:
    """Move images, shape (N, 1, S, S), down and right by whole pixels, shape (N, 2); what leaves on one side comes back."""
    return torch.stack([image.roll(shift.tolist(), (1, 2)) for image, shift in zip(images, by, strict=True)])


def distances(labels: Tensor, truth: Tensor) -> Tensor:
    """Return how far each label is from the truth, shape (N,): root mean square over the coordinates, or 1 if it is wrong."""
    return (labels - truth).square().mean(1).sqrt() if truth.is_floating_point() else (labels != truth).float()


def error(labels: Tensor, truth: Tensor) -> float:
    """Return the root mean square error of labels in pixels, or the share of wrong ones."""
    squared = distances(labels, truth).square().mean()
    return float(squared.sqrt() if truth.is_floating_point() else squared)


def predicted(outputs: Tensor, like: Tensor) -> Tensor:
    """Return the labels that outputs, or averages of labels, stand for."""
    return outputs if like.is_floating_point() else outputs.argmax(1)


def train(problem: Problem, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train a new network on the samples of a problem with these labels."""
    network = problem.network(seed)
    steps = epochs * -(-len(labels) // BATCH_SIZE)
    list(training(network, problem.inputs, labels, [steps], seed))
    return network


class Round:
    """One round: a network trained on the labels as they are, and what its kernel says of the samples."""

    def __init__(self, problem: Problem, fresh: Problem, labels: Tensor, epochs: int, seed: int) -> None:
        network = train(problem, labels, epochs, seed)
        self.problem, self.labels, self.kernel = problem, labels, Kernel(network, problem.inputs)
        self.outputs = self.kernel.jacobian.outputs.detach()
        with torch.no_grad():
            self.held_out = error(predicted(network(fresh.inputs), fresh.truth), fresh.truth)
        self.neighbors = self.kernel.neighbor_fraction()
        regression = labels.is_floating_point()
        targets = labels if regression else F.one_hot(labels, problem.outputs).to(self.outputs)
        self.targets = targets
        self.average = self.kernel.average(targets, self.outputs if regression else self.outputs.softmax(1))

    def relabel(self, update: str) -> Tensor:
        """Return the labels of the next round."""
        makers: dict[str, Callable[[], Tensor]] = {
            "output": lambda: self.outputs,
            "smoothed": lambda: self.average.smoothed_targets,
            "nearest": lambda: self.targets[self.kernel.nearest(min(NEAREST, len(self.targets)))].mean(1),
        }
        return self.labels if update == "kept" else predicted(makers[update](), self.labels)

    def figures(self, after: Tensor) -> dict[str, float]:
        """Return what is kept of a round that replaces its labels by these."""
        truth = self.problem.truth
        output = distances(predicted(self.outputs, truth), truth)
        gain = distances(self.labels, truth) - distances(after, truth)
        return {
            "error": error(after, truth),
            "network": error(predicted(self.outputs, truth), truth),
            "held_out": self.held_out,
            "neighbors": float(self.neighbors.mean()),
            "factor": float(self.average.factor.mean()),
            "neighbors_and_error": rank_correlation(self.neighbors, output),
            "neighbors_and_gain": rank_correlation(self.neighbors, gain),
            "factor_and_error": rank_correlation(self.average.factor, output),
        }


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Return Spearman's rank correlation; 0 where one side is constant."""
    return spearman(left.tolist(), right.tolist()) or 0.0


def run(task: str, digits: Labeled, size: int, epochs: int, seed: int) -> dict[str, float]:
    """Return the figures of all rounds, by every update, of one seed; and of a network trained on the truth."""
    problem = Problem.make(task, digits, size, seed)
    fresh = Problem.make(task, digits, size, seed + 500_000)
    begin = partial(Round, problem, fresh, epochs=epochs)
    first = begin(labels=problem.labels, seed=seed)
    found = {"error_0": error(problem.labels, problem.truth)}
    for update in UPDATES:
        now = first
        for number in range(1, ROUNDS + 1):
            after = now.relabel(update)
            found |= {f"{update}_{name}_{number}": value for name, value in now.figures(after).items()}
            if number < ROUNDS:
                now = begin(labels=after, seed=seed + 10_000 * number)
    best = begin(labels=problem.truth, seed=seed)
    return found | {f"truth_{name}": value for name, value in best.figures(problem.truth).items()}


def choose(digits: Labeled, size: int) -> None:
    """Print, by epochs, the loss on held-out samples with noisy labels, over other seeds than those of the experiment."""
    for task in TASKS:
        rows = []
        for seed in range(1_000_000, 1_000_003):
            problem, held_out = (Problem.make(task, digits, size, some) for some in (seed, seed + 500_000))
            network = problem.network(seed)
            marks = [epochs * -(-size // BATCH_SIZE) for epochs in CHOICE]
            steps = training(network, problem.inputs, problem.labels, marks, seed)
            rows.append([float(loss_of(network(held_out.inputs).detach(), held_out.labels)) for _ in steps])
        means = np.mean(rows, axis=0)
        print(f"{task}: " + ", ".join(f"{epochs} {mean:.3f}" for epochs, mean in zip(CHOICE, means, strict=True)))


def gains(row: dict[str, float], update: str) -> list[float]:
    """Return by how much each round lowers the error of the labels."""
    errors = [row["error_0"], *(row[f"{update}_error_{number}"] for number in range(1, ROUNDS + 1))]
    return [before - after for before, after in itertools.pairwise(errors)]


def by_round(row: dict[str, float], update: str, name: str) -> list[float]:
    return [row[f"{update}_{name}_{number}"] for number in range(1, ROUNDS + 1)]


def observation(rows: Sequence[dict[str, float]], update: str) -> dict[str, float]:
    """Test what the paper observed, of all seeds with one update.

    Returns:
        in how many seeds the round with the most neighbors is the one with the greatest gain, and the one whose labels end
        nearest to the truth; the correlation of neighbors with gain and with the error of the network, over rounds and seeds,
        as deviations from the mean of each seed; and the gain of the last round.
    """
    neighbors = np.array([by_round(row, update, "neighbors") for row in rows])
    gain = np.array([gains(row, update) for row in rows])
    network = np.array([by_round(row, update, "network") for row in rows])
    labels = np.array([by_round(row, update, "error") for row in rows])
    most = neighbors.argmax(1)
    deviations = [values - values.mean(1, keepdims=True) for values in (neighbors, gain, network)]
    figures: dict[str, float] = {"seeds": len(rows), "most_neighbors_most_gain": int((most == gain.argmax(1)).sum())}
    figures["most_neighbors_best_labels"] = int((most == labels.argmin(1)).sum())
    figures |= {f"most_neighbors_in_round_{number + 1}": int((most == number).sum()) for number in range(ROUNDS)}
    for name, values in zip(("gain", "network_error"), deviations[1:], strict=True):
        spread = min(values.std(), deviations[0].std())
        both = np.corrcoef(deviations[0].ravel(), values.ravel())[0, 1] if spread else 0.0
        figures[f"neighbors_and_{name}_over_rounds"] = round(float(both), 3)
    figures["gain_of_last_round"], figures["its_error"] = round(mean_of(gain[:, -1].tolist()), 4)
    return figures


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return means and standard errors of all figures, and what became of the observation."""
    means = {name: round(mean_of(rows, name), 4) for name in rows[0]}
    return {"means": means, "observation": {update: observation(rows, update) for update in UPDATES}}


def write_tables(study: Study, found: dict[str, dict[str, Any]]) -> None:
    """Write errors and neighbors by round, a table for each setting, and what became of the observation."""
    numbers = range(1, ROUNDS + 1)
    observed: list[list[object]] = []
    for setting, summary in found.items():
        means = summary["means"]
        unit = "RMSE, px" if "displacement" in setting else "share wrong"
        title = f"{setting}; {unit} of the labels given {means['error_0'].mean:.3f}"
        rows: list[list[object]] = [
            [update, *(means[f"{update}_{name}_{number}"] for name in ("error", "neighbors") for number in numbers)]
            for update in UPDATES
        ]
        rows.append(["*network trained on the truth*", means["truth_network"], "", "", means["truth_neighbors"], "", ""])
        study.table(setting, (title, "after round 1", "2", "3", "N_S/N in round 1", "2", "3"), rows, ["", *[".3f"] * 6])
        for update in ("output", "nearest", "smoothed"):
            row = summary["observation"][update]
            cells: list[object] = [
                f"{row[f'most_neighbors_{name}']} of {row['seeds']}" for name in ("most_gain", "best_labels")
            ]
            cells += [row[f"neighbors_and_{name}_over_rounds"] for name in ("gain", "network_error")]
            cells.append(Mean(row["gain_of_last_round"], row["its_error"]))
            cells.append(", ".join(f"{means[f'{update}_neighbors_and_error_{number}'].mean:.2f}" for number in numbers))
            observed.append([f"{setting}, {update}", *cells])
    head = ("setting, update", "round with most neighbors = greatest gain", "= best labels", "neighbors and gain, over rounds")
    head += ("neighbors and network's error, over rounds", "gain of round 3")
    head += ("neighbors and error, over samples (round 1, 2, 3)",)
    study.table("observation", head, observed, ("", "", "", ".2f", ".2f", ".3f"))


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Draw errors of the labels above, neighbors below, by round, a column for each setting."""
    reading = (
        "Above, the error of the labels before any round (0) and after each; below, how many neighbors a sample has in the "
        "network of a round, as a share of all. Dashed: a network trained on the true labels. Bars: standard errors over seeds."
    )
    shape = {"size": (1.75, 1.4), "gap": (0.55, 0.55), "bottom": 0.85, "rows": 2, "columns": len(found)}
    with panels("Labels denoised in rounds", reading, **shape) as (figure, (upper, lower)):
        for top, bottom, (setting, summary) in zip(upper, lower, found.items(), strict=True):
            means = summary["means"]
            for place, update in enumerate(UPDATES):
                errors = [means["error_0"], *(means[f"{update}_error_{n}"] for n in range(1, ROUNDS + 1))]
                counts = [means[f"{update}_neighbors_{n}"] for n in range(1, ROUNDS + 1)]
                for axes, values, start in ((top, errors, 0), (bottom, counts, 1)):
                    places = [start + number + 0.04 * (place - 1.5) for number in range(len(values))]
                    heights, bars = zip(*values, strict=True)
                    axes.errorbar(places, heights, yerr=bars, fmt="o-", color=COLORS[update], markersize=3.5, label=update)
            bottom.axhline(means["truth_neighbors"].mean, color=style.MUTED, linestyle="--", linewidth=1)
            top.set_title(setting, fontsize=9)
            top.set_ylim(0, LIMITS[setting.split(",")[0]])
            for axes in (top, bottom):
                axes.set(xlim=(-0.2, ROUNDS + 0.2), xticks=range(ROUNDS + 1))
            bottom.set_xlabel("round")
        upper[0].set_ylabel("error of the labels")
        lower[0].set_ylabel("neighbors, N_S/N")
        figure.legend(*upper[0].get_legend_handles_labels(), loc="lower left", ncols=4, bbox_to_anchor=(0.02, 0.0))
    return figure


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    options, (digits, _) = study.options, read_mnist(study.options.data_dir)
    if options.choose:
        choose(digits, options.size)
        return {}
    rows: dict[str, list[dict[str, float]]] = {}
    for task in TASKS:
        for epochs in EPOCHS[task].values():
            make = partial(run, task, digits, options.size, epochs)
            key = {"task": task, "size": options.size, "epochs": epochs}
            rows[f"{task}, {epochs} epochs"] = study.log.by_seed(key, options.seeds, make)
    found = {setting: summarize(some) for setting, some in rows.items()}
    write_tables(study, found)
    study.figure(draw(found), dpi=110)
    return {"settings": found, "options": study.sizes}


if __name__ == "__main__":
    main()

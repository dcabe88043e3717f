"""Plant near-duplicates, leaks and outliers among real images, and find them by the neighbors of the gradient kernel.

Images are shifted by one pixel, given a little noise, or written as JPEG, and put back beside their originals (near-duplicates)
or among images that the network has not seen (leaks); then some images of another kind are put in (outliers). `find_issues`
looks for them in what `analyze` found, at its default thresholds; the same in either table of neighbors alone; and cleanlab's
Datalab, at its own, in the same activations. Three data sets, with a network each: MNIST, CIFAR-10, scikit-learn's digits.

    python experiments/duplicates.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Beside the tables it writes a figure and every run (`near_duplicates.csv`, `leaks.csv`, `outliers.csv`). Runs that stand
in these files already are not repeated; delete the directory to start again.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from cleanlab import Datalab
from matplotlib.figure import Figure
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import Mean, RunLog, Size, Study, mean_of, script
from lab.data import read_cifar, read_digits, read_mnist, read_omniglot, read_photographs
from lab.networks import IMAGENET_MEAN, IMAGENET_STD, load_resnet20
from lab.training import take_step
from lightning_netsim import analyze, find_issues
from lightning_netsim.analysis.issues import THRESHOLDS
from lightning_netsim.demos import DigitsNetwork, MNISTNetwork
from lightning_netsim.records.record import Record
from lightning_netsim.report import style
from lightning_netsim.report.pictures import to_image

Array = npt.NDArray[Any]
BOTH, KERNEL, ACTIVATIONS, CLEANLAB = METHODS = ("find_issues", "kernel", "activations", "cleanlab")
PARTS = ("near_duplicates", "leaks", "outliers")
STRANGERS = ("characters", "photographs", "noise")
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "digits": "digits"}
DATA = ("mnist", "cifar10", "digits")
NOISE = 0.02
# Of every photograph, a crop four times as wide as the images is reduced to their size.
REDUCED = 4
KNOWN = 10_000


def shifted(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return an image moved by one pixel, up, down, left or right; the edge is repeated."""
    down, right = ((0, 1), (1, 0), (2, 1), (1, 2))[int(torch.randint(4, (), generator=generator))]
    padded = F.pad(image.unsqueeze(0), (1, 1, 1, 1), mode="replicate").squeeze(0)
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]


def noisy(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return an image with Gaussian noise, five gray levels of 255 strong."""
    return (image + NOISE * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def recoded(image: Tensor, quality: int) -> Tensor:
    """Return an image that was written as JPEG and read again."""
    file = io.BytesIO()
    to_pil_image((image * 255).round().to(torch.uint8)).save(file, "JPEG", quality=quality)
    return pil_to_tensor(Image.open(file)).float() / 255


#: What makes a near-duplicate of an image, shape (C, H, W), values in [0, 1].
KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "shift": shifted,
    "noise": noisy,
    "jpeg 90": lambda image, _: recoded(image, 90),
    "jpeg 75": lambda image, _: recoded(image, 75),
}
# Originals of a set have these copies, one of each.
SET = ("shift", "noise", "jpeg 90")


@dataclass(frozen=True)
class Planted:
    """A data set with near-duplicates.

    Attributes:
        images: shape (N, C, H, W), values in [0, 1]: originals first, then copies.
        origin: shape (N,), for each image the place of the original; its own for an original.
        kind: N kinds: of a copy and of its original what was done to it, "set" where there are several copies, else "".
    """

    images: Tensor
    origin: Array
    kind: Array

    @classmethod
    def among(cls, images: Tensor, per_kind: int, sets: int, generator: torch.Generator) -> Planted:
        """Copy `per_kind` of the images by each kind, and `sets` others by three kinds each."""
        plan = [(kind, (kind,)) for kind in KINDS for _ in range(per_kind)] + [("set", SET)] * sets
        kind, origin, copies = np.full(len(images), "", dtype=object), list(range(len(images))), []
        copied = []
        for place, (name, changes) in zip(torch.randperm(len(images), generator=generator).tolist(), plan, strict=False):
            kind[place] = name
            for change in changes:
                copies.append(KINDS[change](images[place], generator))
                origin.append(place)
                copied.append(name)
        everything = torch.cat([images, torch.stack(copies)])
        return cls(everything, np.array(origin), np.concatenate([kind, np.array(copied, dtype=object)]))


@dataclass
class Problem:
    """A data set and a network, drawn and trained by one seed.

    Args:
        name: "mnist", "cifar10" or "digits".
        data_dir: the directory with MNIST/raw, cifar10, weights, omniglot and kodak in it.
        seed: of weights and draws.
        steps: of training, where the network is trained here.
    """

    name: str
    data_dir: str
    seed: int
    steps: int

    def generator(self, purpose: int) -> torch.Generator:
        """Return a generator of random numbers of its own for each purpose."""
        return torch.Generator().manual_seed(1000 * self.seed + purpose)

    @cached_property
    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images that the network has learned from, their labels, and images that it has not seen."""
        if self.name == "cifar10":
            (known, labels), (other, _) = (read_cifar(self.data_dir, part) for part in ("train", "test"))
            # The first 2,000 training images served to choose the rule and its threshold.
            return known[2000:] / 255, labels[2000:], other / 255
        known, other = read_digits(1 / 3) if self.name == "digits" else read_mnist(self.data_dir)
        return known[0][-KNOWN:], known[1][-KNOWN:], other[0]

    @cached_property
    def network(self) -> nn.Module:
        """Return the network, which takes images with values in [0, 1]."""
        if self.name == "cifar10":
            return nn.Sequential(Standardized(), load_resnet20(self.data_dir)).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._train(DigitsNetwork() if self.name == "digits" else MNISTNetwork())

    def _train(self, network: nn.Module) -> nn.Module:
        images, labels, _ = self.images
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(self.steps):
            chosen = torch.randint(len(images), (64,))
            take_step(optimizer, F.cross_entropy(network(images[chosen]), labels[chosen]))
        optimizer.zero_grad()
        return network.eval()

    def draw(self, known: bool, number: int) -> Tensor:
        """Return images, drawn at random, that the network has learned from, or has not."""
        images = self.images[0 if known else 2]
        return images[torch.randperm(len(images), generator=self.generator(1 if known else 2))[:number]]

    def strangers(self, number: int) -> dict[str, Tensor]:
        """Return images of other kinds: so many handwritten characters, photographs, and images of noise."""
        generator, (channels, _, side) = self.generator(3), self.images[0].shape[1:]
        if self.name == "cifar10":
            digits = read_mnist(self.data_dir)[1][0]
            chosen = torch.randperm(len(digits), generator=generator)[:number]
            characters = F.pad(digits[chosen], (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        else:
            characters = read_characters(self.data_dir, number, side, generator)
        photographs = read_crops(self.data_dir, number, side, generator)
        return {
            "characters": characters,
            "photographs": photographs.mean(1, keepdim=True) if channels == 1 else photographs,
            "noise": torch.rand(number, channels, side, side, generator=generator),
        }


class Standardized(nn.Module):
    """Standardize colors as the published weights want them."""

    def forward(self, images: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(colors).view(3, 1, 1) for colors in (IMAGENET_MEAN, IMAGENET_STD))
        return (images - mean) / deviation


def read_characters(data_dir: str, number: int, side: int, generator: torch.Generator) -> Tensor:
    """Return characters of Omniglot, white on black, shape (number, 1, side, side)."""

    def drawn(names: list[str]) -> list[str]:
        return [names[place] for place in torch.randperm(len(names), generator=generator)[:number].tolist()]

    _, drawings = read_omniglot(data_dir, "images_background.zip", drawn)
    pixels = torch.stack([1 - torch.from_numpy(np.array(drawing)).float() / 255 for drawing in drawings]).unsqueeze(1)
    reduced = F.interpolate(pixels, size=(side, side), mode="area")
    # The thin pen strokes are grey after that: make them as bright as those of digits.
    return reduced / reduced.amax((2, 3), keepdim=True)


def read_crops(data_dir: str, number: int, side: int, generator: torch.Generator) -> Tensor:
    """Return reduced crops of photographs of the Kodak set, shape (number, 3, side, side)."""
    photographs, crops = read_photographs(data_dir), []
    for place in torch.randint(len(photographs), (number,), generator=generator).tolist():
        wide = REDUCED * side
        top, left = (int(torch.randint(size - wide + 1, (), generator=generator)) for size in photographs[place].shape[1:])
        crops.append(photographs[place][:, top : top + wide, left : left + wide])
    return F.interpolate(torch.stack(crops), size=(side, side), mode="area")


@torch.no_grad()
def activations(network: nn.Module, images: Tensor) -> Array:
    """Return what goes into the last linear layer, shape (N, number of units)."""
    found: list[Tensor] = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    for batch in images.split(256):
        network(batch)
    hook.remove()
    return torch.cat(found).numpy()


def ask_cleanlab(features: Array, issue: str) -> Any:
    """Return the table in which Datalab says, at its default thresholds, which samples have an issue."""
    lab = Datalab({"sample": np.arange(len(features))}, verbosity=0)
    lab.find_issues(features=features, issue_types={issue: {}})
    return lab.get_issues(issue)


def cleanlab_sets(features: Array) -> Array:
    """Return the number of the set of near-duplicates, by Datalab, that each of N samples is in; -1 for none."""
    table = ask_cleanlab(features, "near_duplicate")
    pairs = [(one, other) for one, others in enumerate(table["near_duplicate_sets"]) for other in others]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    _, names = connected_components(csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(table),) * 2), directed=False)
    return np.where(table["is_near_duplicate_issue"], names, -1)


def judge_sets(names: Array, planted: Planted) -> dict[str, float]:
    """Compare the sets of near-duplicates that were found with those that were planted.

    Args:
        names: shape (N,), the number of the set that each image was found in, -1 for none.
        planted: what there is to be found.

    Returns:
        for each kind "KIND recall", the share of copies and originals in one set with their twin; "KIND precision", those
        against them and all that were flagged in error; the same of "all"; "sets", the share of sets of four that were
        found as they are; "errors", the number flagged in error.
    """
    found = np.zeros(len(names), dtype=bool)
    wrong = names >= 0
    whole: list[bool] = []
    for original in np.unique(planted.origin[planted.kind != ""]):
        members = planted.origin == original
        values, counts = np.unique(names[members], return_counts=True)
        together = members & np.isin(names, values[(values >= 0) & (counts > 1)])
        found |= together
        wrong &= ~together
        if planted.kind[original] == "set":
            whole.append(names[original] >= 0 and np.array_equal(names == names[original], members))
    figures = {"errors": float(wrong.sum()), "sets": float(np.mean(whole)) if whole else np.nan}
    for kind in (*KINDS, "set", "all"):
        rows = planted.kind != "" if kind == "all" else planted.kind == kind
        figures |= rates(found[rows], int(wrong.sum()), kind)
    return figures


def rates(found: Array, errors: int, kind: str) -> dict[str, float]:
    """Return recall and precision, where `found` says of each of those planted whether it was found."""
    hits = int(found.sum())
    precision = hits / (hits + errors) if hits + errors else float("nan")
    return {f"{kind} recall": float(found.mean()) if len(found) else float("nan"), f"{kind} precision": precision}


def judge_leaks(flagged: Array, kinds: Sequence[str]) -> dict[str, float]:
    """Compare the leaks that were found with those that were planted: N flags, and N kinds, "" where none was planted."""
    kind, found = np.array(kinds, dtype=object), flagged.astype(bool)
    errors = int((found & (kind == "")).sum())
    figures = {"errors": float(errors)}
    for name in (*KINDS, "all"):
        figures |= rates(found[kind != "" if name == "all" else kind == name], errors, name)
    return figures


# Images that are analyzed, copies of each kind, sets of four, images that may leak, outliers of each kind.
NUMBERS = {
    "mnist": {"images": 1500, "per_kind": 30, "sets": 15, "queries": 500, "leaks": 10, "strangers": 5},
    "cifar10": {"images": 600, "per_kind": 12, "sets": 6, "queries": 250, "leaks": 6, "strangers": 5},
    "digits": {"images": 900, "per_kind": 18, "sets": 9, "queries": 400, "leaks": 8, "strangers": 5},
}
STEPS = {"mnist": 1500, "cifar10": 0, "digits": 600}
# Pairs of pictures of each sort in the figure.
SHOWN = 3
LEAST = 1e-9
SIZES = {
    "data": Size(DATA, None, "which data sets", choices=DATA),
    "seeds": Size(range(3), range(1), "of networks and of what is planted"),
    "scale": Size(1.0, 0.08, "of all numbers of images and of training steps"),
}
Figures = dict[str, float]
Summary = dict[str, Mean]


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


def leaks_by_cleanlab(features: Array, number: int) -> list[bool]:
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
        sizes = {key: max(2, round(value * options.scale)) for key, value in NUMBERS[name].items()}
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
            found[method][figure] = round(mean_of(values), 4)
    return {method: figures for method, figures in found.items() if figures}


def write_tables(study: Study, found: dict[str, dict[str, dict[str, Summary]]]) -> None:
    """Write a table for each part, its rows data sets and methods, its values means over the seeds; "-" for none."""
    near, leaks, outliers = (
        [(TITLES[name], method, figures) for name, methods in found[part].items() for method, figures in methods.items()]
        for part in PARTS
    )
    write_rates(study, PARTS[0], near, (*KINDS, "set", "all"), {"sets": "sets whole", "errors": "in error"})
    write_rates(study, PARTS[1], leaks, (*KINDS, "all"), {"errors": "in error"})
    rows = []
    for data, method, row in outliers:
        cells = [f"{row[f'{kind} auroc'].mean:.3f} ({row[f'{kind} flagged'].mean:.2f})" for kind in STRANGERS]
        rows.append([data, method, *cells, 100 * row["flagged clean"].mean])
    head = ["data", "by", *STRANGERS, "others flagged, %"]
    study.table(PARTS[2], head, rows, [*[""] * (len(STRANGERS) + 2), ".2f"], "Outliers: AUROC (share flagged)", left=2)


def write_rates(
    study: Study, part: str, found: list[tuple[str, str, Summary]], kinds: Sequence[str], ends: dict[str, str]
) -> None:
    """Write precision and recall of each kind."""
    rows = []
    for data, method, figures in found:
        texts = {key: f"{value.mean:.2f}" for key, value in figures.items()}
        cells = [f"{texts.get(f'{kind} precision', '-')} / {texts[f'{kind} recall']}" for kind in kinds]
        rows.append([data, method, *cells, *(texts[end] for end in ends)])
    study.table(part, ["data", "by", *kinds, *ends.values()], rows, title=f"{part}: precision / recall", left=2)


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


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cleanlab's packages warn of each other
        rows = run(study.options)
    found = {part: {name: summarize(some) for name, some in names.items()} for part, names in rows.items()}
    write_tables(study, found)
    study.figure(draw(study.options))
    return found | {"options": study.sizes}


if __name__ == "__main__":
    main()

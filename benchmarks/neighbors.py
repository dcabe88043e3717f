"""Measure what audited kernel neighbors of all samples cost and how many of them are right.

- `ratio_plain`: exact soft counts and 10 neighbors of all MNIST test images, one direction (d = 1), by `analyze`, in units of
  one plain forward and backward pass over the same images;
- `recall_at_10`: the share of the true 10 neighbors that the tables hold, against all exact similarities of some queries drawn
  at random, for the MNIST network and ResNet-20, one direction and all ten outputs: the least of the four;
- `directions_ratio`: the time of counts and neighbors under all ten outputs by the plan that `analyze` chooses, compared
  exactly and audited, in units of the time of neighbors from sketches of all ten outputs that are not compared.

    python benchmarks/neighbors.py [--quick] [--data-dir DIRECTORY] [--threads 2]

The last line printed is one JSON object.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import counting
from benchmarks.problems import Problem, cifar, mnist
from lab import Bound, Size, Study, medians, ratio, script, time_interleaved
from lightning_netsim import analyze
from lightning_netsim.analysis.analyze import SimilarityAnalysis
from lightning_netsim.estimators import KernelNeighbors
from lightning_netsim.functional.results import KernelNeighborsResult
from lightning_netsim.jacobian import SketchProjection
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
from lightning_netsim.jacobian.features import GradientFeatures
from lightning_netsim.measurement.settings import SweepSettings

SIZES = {
    "images": Size(10_000, 256, "MNIST images whose neighbors are found"),
    "table_images": Size(2000, 32, "MNIST images of the tables that are compared"),
    "resnet_images": Size(1000, 32, "CIFAR-10 images of the tables that are compared"),
    "output_images": Size(768, 48, "MNIST images compared under all ten outputs; of CIFAR-10 a third as many"),
    "queries": Size(64, 8, "images, drawn at random, whose exact neighbors are found"),
    "rounds": Size(3, 1, "timings of each method"),
    "steps": Size(300, 20, "training steps of the MNIST network"),
}
BOUNDS = {
    "ratio_plain": Bound(10, 5, what="soft counts and 10 audited neighbors of all, in units of the plain pass"),
    "recall_at_10": Bound(0.99, 0.999, at_least=True, what="recall@10 against exact tables, the least of four"),
    "directions_ratio": Bound(1 / 3, 1 / 4, what="neighbors under all ten outputs, in units of the time of sketching all ten"),
}
K = 10
# The width of a sketch of one output: that of a user who does not choose one.
WIDTH = SweepSettings().projection_dim
# A neighbor whose similarity is within this of the tenth is as good as the tenth.
TIE = 1e-6
# Rows of exact features held at a time, of up to 13 MB each, and columns summed in float32.
ROWS, COLUMNS = 256, 2**12


def neighbors(
    problem: Problem, directions: int | str = 1, plan: str = "auto", loader: DataLoader[tuple[Tensor, ...]] | None = None
) -> SimilarityAnalysis:
    """Count and find the neighbors of all images among themselves, as a user would."""
    options = {"k": K, "directions": directions, "plan": plan, "compare_activations": False, "progress": False}
    return analyze(problem.network, problem.loader() if loader is None else loader, **options)


def sketch_all_outputs(problem: Problem) -> KernelNeighborsResult:
    """Find the neighbors under all ten outputs from sketches of all ten, each as wide as that of one, without comparing."""
    features = GradientFeatures(problem.network, directions="all", seed=0)
    neighbors, done, projection = KernelNeighbors(K), 0, None
    sketched = []
    for chunk in problem.chunks():
        batch = features(chunk)
        projection = projection or SketchProjection(features.operator.shapes, WIDTH, energy=batch.energy())
        sketched.append(DenseFeatureBatch(batch.vectors(projection)))
        neighbors.update(sketched[-1], torch.arange(done, done + len(chunk)))
        done += len(chunk)
    for vectors, ids in zip(sketched, torch.split(torch.arange(done), len(sketched[0].valid)), strict=True):
        neighbors.query(vectors, ids)
    return neighbors.compute()


def exact_similarity(problem: Problem, directions: int | str, queries: Tensor) -> Tensor:
    """Return the similarities of some images to all, shape (Q, N), from their features at full length; to itself it is -∞.

    Args:
        problem: the problem.
        directions: as in `GradientFeatures`.
        queries: shape (Q,), int64.
    """
    features = GradientFeatures(problem.network, directions=directions, seed=0)
    inputs = problem.inputs()
    similarity = torch.cat([_rows(features, inputs, inputs[chosen]) for chosen in queries.split(ROWS)])
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    return similarity


def _rows(features: GradientFeatures, inputs: Tensor, chosen: Tensor, chunk_size: int = 8) -> Tensor:
    left = torch.cat([features(chunk).vectors() for chunk in chosen.split(chunk_size)])
    return torch.cat([_product(left, features(chunk).vectors()) for chunk in inputs.split(chunk_size)], 1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ rightᵀ; over millions of columns, a sum in float32 would lose four digits."""
    parts = zip(left.split(COLUMNS, 1), right.split(COLUMNS, 1), strict=True)
    return sum((some @ others.T).double() for some, others in parts)  # type: ignore[return-value]


def recall(index: Tensor, similarity: Tensor) -> float:
    """Return the share of listed neighbors that are among the true k, ties counted as true.

    Args:
        index: shape (Q, k), the listed neighbors; -1 where there is none.
        similarity: shape (Q, N), exact.
    """
    kth = similarity.topk(index.shape[1]).values[:, -1:]
    listed = similarity.gather(1, index.clamp_min(0)).masked_fill(index < 0, -torch.inf)
    return float((listed >= kth - TIE).float().mean())


def tables(problem: Problem, directions: int | str, num_queries: int) -> dict[str, dict[str, Any]]:
    """Compare the tables of `analyze` with the exact one; return what was found for each plan.

    The plan is the one that it chooses, and for one direction also the sketch where it has chosen to compare all pairs.
    """
    generator = torch.Generator().manual_seed(0)
    queries = torch.randperm(len(problem), generator=generator)[:num_queries].sort().values
    exact = exact_similarity(problem, directions, queries)
    analyses = [neighbors(problem, directions)]
    if directions == 1 and analyses[0].meta["plan"]["kind"] != "sketch":
        analyses.append(neighbors(problem, directions, "sketch"))
    return {analysis.meta["plan"]["kind"]: compare(analysis, exact, queries) for analysis in analyses}


def compare(analysis: SimilarityAnalysis, exact: Tensor, queries: Tensor) -> dict[str, Any]:
    """Return the recall of a table, what it said itself, and the largest error of a similarity in it."""
    found = analysis.result.neighbors
    error = (found.similarity[queries] - exact.gather(1, found.index[queries])).abs().max()
    return {
        "recall": recall(found.index[queries], exact),
        "said": analysis.meta["recall"],
        "largest_error": float(error),
        "seconds": round(analysis.result.seconds, 2),
    }


@script(SIZES, BOUNDS, threads=2, page="benchmarks")
def main(study: Study) -> dict[str, Any]:
    """Compare tables, then time."""
    options = study.options
    digits = mnist(options.data_dir, options.images, options.steps)
    photos = cifar(options.data_dir, max(options.resnet_images, options.output_images // 3))
    few = digits.first(options.output_images)
    print(f"{len(digits):,} {digits.what}; {photos.what}; {options.threads} threads.")
    compared = {
        "mnist_1": (digits.first(options.table_images), 1),
        "resnet20_1": (photos.first(options.resnet_images), 1),
        "mnist_all": (few, "all"),
        "resnet20_all": (photos.first(options.output_images // 3), "all"),
    }
    recalls = {}
    for name, (problem, directions) in compared.items():
        for plan, case in tables(problem, directions, options.queries).items():
            recalls[f"{name}_{plan}"] = case | {"images": len(problem)}
    many, _ = time_interleaved(
        {"plain": partial(counting.plain, digits), "neighbors": partial(neighbors, digits)}, options.rounds, warm_up=False
    )
    outputs, found = time_interleaved(
        {"chosen_plan": partial(neighbors, few, "all"), "sketch_all_outputs": partial(sketch_all_outputs, few)},
        options.rounds,
        warm_up=False,
    )
    head = ("network, directions, plan", "images", "recall@10", "said by the audit", "largest error of a similarity", "seconds")
    cells = ("images", "recall", "said", "largest_error", "seconds")
    rows = [(name.replace("_", ", "), *(case[key] for key in cells)) for name, case in recalls.items()]
    study.table("neighbors", head, rows)
    plan, typical = found["chosen_plan"].meta["plan"]["kind"], {"mnist": medians(many), "all_outputs": medians(outputs)}
    rows = [
        ("one plain pass", len(digits), typical["mnist"]["plain"]),
        ("counts and neighbors", len(digits), typical["mnist"]["neighbors"]),
        (f"all ten outputs, {plan}, with counts and audit", len(few), typical["all_outputs"]["chosen_plan"]),
        ("all ten outputs, by sketches of all ten, not compared", len(few), typical["all_outputs"]["sketch_all_outputs"]),
    ]
    study.table("neighbors_time", ("", "MNIST images", "seconds"), rows)
    return {
        "ratio_plain": ratio(many, "neighbors", "plain"),
        "recall_at_10": min(case["recall"] for case in recalls.values()),
        "directions_ratio": ratio(outputs, "chosen_plan", "sketch_all_outputs"),
        "recalls": recalls,
        "plan": plan,
        "median_seconds": typical,
        "num_images": {"mnist": len(digits), "all_outputs": len(few), "queries": options.queries},
        "images": {"mnist": digits.what, "resnet20": photos.what},
        "rounds": options.rounds,
    }


if __name__ == "__main__":
    main()

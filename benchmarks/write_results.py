"""Run all benchmarks and write what came out to RESULTS.md: the bounds, the peers, the machine and the versions.

    python benchmarks/write_results.py [--only NAME ...] [--quick] [--data-dir DIRECTORY] [--threads 2]

The last line of each script is kept in `runs/benchmarks/NAME.json`; with `--only`, those of the others are read from there.
What stands in RESULTS.md below the line that says so is written by hand and stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ctv, neighbors, patch_mmd, peers, scaling, similarity_cost, sketch, soft_counts
from benchmarks.common import Bound

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "soft_counts": soft_counts,
    "peers": peers,
    "sketch": sketch,
    "neighbors": neighbors,
    "scaling": scaling,
    "similarity_cost": similarity_cost,
    "ctv": ctv,
    "patch_mmd": patch_mmd,
}
KEPT = Path("runs/benchmarks")
BY_HAND = "<!-- What follows is written by hand: `make bench` leaves it as it is. -->"
PACKAGES = (
    *("torch", "torchvision", "lightning", "faiss-cpu", "pytorch-metric-learning"),
    *("backpack-for-pytorch", "opacus", "captum", "dattri", "traker", "geomloss"),
)
WHAT = {
    "ratio_plain": "exact soft counts in O(P) memory, MNIST network, in units of one plain forward and backward pass",
    "ratio_plain_resnet20": "the same, ResNet-20",
    "ratio_plain_stored": "the same where all gradients are stored, MNIST network",
    "speedup_vmap_two_pass": "soft counts against two passes of `vmap(grad)`, MNIST network",
    "peak_growth": "peak memory of soft counts, images doubled",
    "speedup_fastest_mnist": "soft counts against the fastest correct peer in the same memory, MNIST network",
    "speedup_fastest_resnet20": "the same, ResNet-20",
    "speedup_dattri": "matrix of all similarities against dattri's exact Grad-Cos",
    "speedup_trak": "sketch of a batch against TRAK's `BasicProjector`",
    "recall_at_10": "recall@10 against exact tables, the least of four",
    "directions_ratio": "neighbors under all ten outputs, in units of the time of sketching all ten",
    "growth_counts": "time of soft counts, four times the images",
    "growth_neighbors": "time of counts and neighbors, four times the images",
    "exact_ratio": "training step with the exact criterion of all pairs of a class, in units of a plain step",
    "minibatch_ratio": "the same with the paper's criterion of two mini-batches",
    "last_layer_ratio": "the same with the exact criterion of the last layer's gradients",
    "speedup_vmap": "the exact criterion against per-sample gradients by `vmap(grad)`",
    "growth_memory": "peak memory of soft counts above the model and its data, N doubled",
    "speedup_pairwise": "CTV norm and its gradient against the vectorized pairwise form, the lesser of L1 and squared L2",
    "regularizer_ratio": "training step with the alignment of differences, in units of the same without",
    "speedup_vgg19": "patch MMD of 512 random features, value and gradient, against VGG-19 up to conv5_3 on the same images",
    "peak_mb": "peak memory of that patch MMD above its images, MB",
    "rff_error": "relative error of the mean of 60 draws of 512 features against the exact patch MMD",
    "ratio_geomloss": "Gaussian MMD, time in units of geomloss's, the greater of two sizes",
    "disagreement_geomloss": "relative difference from twice geomloss's value, and of the gradients",
}
WHAT_BY_SCRIPT = {("neighbors", "ratio_plain"): "soft counts and 10 audited neighbors of all, in units of the plain pass"}

Figures = Mapping[str, Any]


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="scripts to run")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes to runs/benchmarks/RESULTS.md")
    parser.add_argument("--data-dir", default="../shared/data", help="where MNIST/raw, cifar10 and weights lie")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, help="the file to write (benchmarks/RESULTS.md)")
    options = parser.parse_args(arguments)
    options.out = options.out or (KEPT if options.quick else HERE) / "RESULTS.md"
    return options


def run(name: str, options: argparse.Namespace) -> Figures | None:
    """Run one script, show what it prints, keep its last line; None if it fails."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--threads", str(options.threads), "--data-dir", options.data_dir]
    command += ["--quick"] if options.quick else []
    if name == "scaling" and not options.quick:
        command += ["--out", str(HERE.parent / "docs" / "images")]
    print(f"\n== {' '.join(command[1:])}", flush=True)
    start, last = time.perf_counter(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line
    if process.returncode:
        print(f"{name}.py ended with {process.returncode}.", file=sys.stderr)
        return None
    figures = json.loads(last) | {"seconds": round(time.perf_counter() - start)}
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return figures


def kept(name: str) -> Figures | None:
    """Return the figures of an earlier run; None if there are none."""
    path = KEPT / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def machine(threads: int) -> str:
    """Return a sentence on the processor, the memory and the versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{package} {version(package)}" for package in ("lightning-netsim", *PACKAGES))
    return (
        f"Measured on {cpu}, {psutil.cpu_count()} cores, {threads} threads, {memory:.0f} GB of memory, no GPU; "
        f"Python {platform.python_version()}, {versions}."
    )


def version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "(not installed)"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column left and the others right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bounds_section(results: Mapping[str, Figures | None]) -> str:
    """Return the table of what was promised."""
    rows = []
    for name, module in SCRIPTS.items():
        figures, bounds = results[name], module.BOUNDS
        for key, bound in bounds.items():
            value = None if figures is None else figures.get(key)
            held = "not measured" if value is None else "held" if bound.holds(value) else "**missed**"
            if value is not None and bound.holds(value) and bound.aim is not None:
                held += ", aim too" if Bound(bound.aim, at_least=bound.at_least).holds(value) else ", aim missed"
            what = WHAT_BY_SCRIPT.get((name, key), WHAT[key])
            sign = "≥" if bound.at_least else "≤"
            aim = number(bound.aim)
            rows.append((what, f"`{name}.py`: `{key}`", f"{sign} {number(bound.limit)}", aim, number(value), held))
    return "## What is promised\n\n" + table(("what", "figure", "bound", "aim", "measured", ""), rows)


def soft_counts_section(figures: Figures) -> Iterator[str]:
    numbers, seconds, peak = figures["num_images"], figures["median_seconds"], figures["peak_megabytes"]
    yield (
        f"{numbers['mnist']:,} and {numbers['mnist_stored']:,} {figures['images']['mnist']}; {numbers['resnet20']:,} "
        f"{figures['images']['resnet20']}; one random direction (d = 1), chunks of {figures['chunk_size']}. `plain` is one "
        "forward and backward pass over the same images. Medians of "
        f"{figures['rounds']} interleaved rounds; all ways agree to {max(figures['disagreement'].values()):.0e}."
    )
    names = {"mnist": "MNIST network", "mnist_stored": "MNIST network", "resnet20": "ResNet-20"}
    rows = []
    for group, values in seconds.items():
        for name, value in values.items():
            if not name.startswith("plain_"):
                memory = number(peak[name][0]) if group == "mnist_stored" and name in peak else "-"
                cells = (f"{numbers[group]:,}", number(value), number(value / values["plain"]), memory)
                rows.append((f"{names[group]}: `{name}`", *cells))
    yield table(("method", "images", "median seconds", "in units of plain", "peak growth of memory, MB"), rows)
    low, high = figures["ratio_plain_range"]
    yield (
        f"`ratio_plain` lies between {low} and {high} in single rounds. `plain` is fastest in chunks of "
        f"{figures['fastest_plain_chunk']}; against that, the ratio is {figures['ratio_plain_fastest_chunk']}. Against "
        f"`vmap(grad)` with all gradients stored: {figures['speedup_vmap_stored']} times as fast."
    )


def peers_section(figures: Figures) -> Iterator[str]:
    yield (
        "Every peer does exactly the same job; each answer is held against float64 gradients, one by one, before it is timed. "
        f"Soft counts are made in the same O(P) memory, chunks of {figures['chunk_size']} images; the matrix holds all pairs. "
        f"In units of the time of this package, and medians of {figures['rounds']} interleaved rounds."
    )
    jobs = {
        name: f"{label}, {figures['num_images'][name]} images"
        for name, label in (("mnist", "counts, MNIST"), ("resnet20", "counts, ResNet-20"), ("matrix", "matrix, MNIST"))
    }
    names = list(dict.fromkeys(name for job in jobs for name in figures["peers"][job]))
    rows = []
    for name in names:
        found = [figures["peers"][job].get(name) for job in jobs]
        rows.append((f"`{name}`", *(_cell(record) for record in found)))
    yield table(("peer", *jobs.values()), rows)
    reasons = [
        f"- `{name}`, {jobs[job]}: {record['reason']}"
        for job in jobs
        for name, record in figures["peers"][job].items()
        if not record["correct"]
    ]
    yield "Not timed, and why:\n\n" + "\n".join(reasons)
    yield (
        "In favor of the peers: norms of the first pass are kept for the second; BackPACK gets the rule for PReLU that it "
        "lacks; for Opacus, batch norm is rewritten as the affine map that it is in evaluation mode; Captum differentiates one "
        "image at a time, which is its fastest way that is right; dattri takes all images in one batch, and the projection to "
        "512 numbers that it leaves in place when it is asked for none is switched off."
    )


def _cell(record: Figures | None) -> str:
    if record is None:
        return "-"
    return f"{number(record['in_units_of_ours'])} ({number(record['seconds'])} s)" if record["correct"] else "not timed"


def sketch_section(figures: Figures) -> Iterator[str]:
    yield (
        f"{figures['num_images']} {figures['images']}, {figures['num_parameters']:,} parameters, d = 1. TRAK's projector is "
        "handed the matrix of gradients, made outside the time; `ours` starts from the same gradients in factored form, "
        "`ours_with_jacobian` from the images. The error is that of inner products of unit vectors."
    )
    seconds, errors = figures["median_seconds"], figures["rms_error"]
    rows = [
        (f"`{name}`", number(value), number(errors[name.split("_")[0]]), number(seconds["trak"] / value))
        for name, value in seconds.items()
    ]
    yield table(("sketch", "median seconds", "rms error", "times as fast as TRAK"), rows)


def neighbors_section(figures: Figures) -> Iterator[str]:
    numbers = figures["num_images"]
    yield (
        f"Tables of 10 neighbors by `analyze`, against the exact similarities of {numbers['queries']} images, drawn at random, "
        "to all; similarities within 1e-6 of the tenth count as ties. The plan is the one that is chosen; for one direction "
        "also the sketch where that is another."
    )
    rows = [
        (name.replace("_", ", "), *(number(case[key]) for key in ("images", "recall", "said", "largest_error", "seconds")))
        for name, case in figures["recalls"].items()
    ]
    yield table(
        ("network, directions, plan", "images", "recall@10", "said by the audit", "largest error of a similarity", "seconds"),
        rows,
    )
    many, outputs = figures["median_seconds"]["mnist"], figures["median_seconds"]["all_outputs"]
    yield (
        f"Counts and neighbors of {numbers['mnist']:,} images take {number(many['neighbors'])} s, one plain pass "
        f"{number(many['plain'])} s. Neighbors of {numbers['all_outputs']:,} images under all ten outputs take "
        f"{number(outputs['chosen_plan'])} s by the plan that is chosen ({figures['plan']}), with counts and audit, "
        f"{number(outputs['sketch_all_outputs'])} s by sketches of all ten, neighbors alone and not compared."
    )


def scaling_section(figures: Figures) -> Iterator[str]:
    yield "![Time and memory against N, P, d and T](../docs/images/growth.png)"
    for axis, records in figures["series"].items():
        columns = [key for key in dict.fromkeys(key for record in records for key in record) if key not in ("value", axis)]
        rows = [(f"{record[axis]:,}", *(number(record.get(column)) for column in columns)) for record in records]
        yield table((axis, *(column.replace("_", ", ") for column in columns)), rows)


STEPS = {
    "plain": "no criterion",
    "exact": "`GroupSimilarityLoss`, ten labels",
    "exact_one_label": "`GroupSimilarityLoss`, one label",
    "minibatch": "`MinibatchSimilarityLoss`, one label",
    "last_layer": "`GroupSimilarityLoss` of the last layer",
    "pairs": "`PairSimilarityLoss`, ten labels",
    "density": "`DensityLoss`",
    "invariance": "`InvarianceLoss`, two forward passes",
    "vmap": "the same as the first by `vmap(grad)`",
}


def similarity_cost_section(figures: Figures) -> Iterator[str]:
    yield (
        f"A training step (forward, backward, Adam) of {figures['images']} MNIST images, {figures['num_parameters']:,} "
        f"parameters, one direction. Medians of {figures['rounds']} interleaved rounds. In float64, the exact criterion and "
        f"its gradient agree with those by `vmap(grad)` to {figures['disagreement']:.0e}."
    )
    seconds = figures["median_seconds"]
    ratios = {name: 1.0 if name == "plain" else figures[f"{name}_ratio"] for name in seconds}
    rows = [(STEPS[name], number(1000 * value), number(ratios[name])) for name, value in seconds.items()]
    yield table(("criterion", "milliseconds", "in units of a plain step"), rows)


PAIRWISE = {
    "pairs": "`m[first] - m[second]` of all pairs",
    "broadcast": "`m.unsqueeze(1) - m.unsqueeze(0)`",
    "pdist": "`torch.pdist`, which forms no differences",
}


def ctv_section(figures: Figures) -> Iterator[str]:
    numbers, coordinates = figures["num_differences"], figures["coordinates"]
    yield (
        f"The CTV norm of random differences of {coordinates} coordinates and its gradient, float32. Medians of "
        f"{figures['rounds']} interleaved rounds; in float64, all forms agree to {figures['disagreement']:.0e}."
    )
    rows = []
    for key, size in (("median_seconds", "all"), ("median_seconds_half", "half")):
        for norm, seconds in figures[key].items():
            for form, value in seconds.items():
                label = f"`ctv_norm`, `{norm}`" if form == "ours" else f"{PAIRWISE[form]}, `{norm}`"
                times = 1.0 if form == "ours" else figures["speedups"][form][norm]
                rows.append((label, f"{numbers[size]:,}", number(1000 * value), number(times)))
    yield table(("form", "differences", "milliseconds", "in units of ours"), rows)
    many = ", ".join(
        f"`{norm}` {number(value)} s and {number(figures['peak_megabytes_many'][norm])} MB"
        for norm, value in figures["seconds_many"].items()
    )
    yield (
        f"Of {numbers['many']:,} differences, `ctv_norm` and its gradient take: {many}. One tensor of their pairwise "
        f"differences has {number(figures['pair_megabytes_many'])} MB, and the pairwise form holds three or four; "
        f"this machine has {number(figures['machine_megabytes'])} MB."
    )
    yield (
        f"A training step (forward, backward, Adam) of {figures['images']} images on the MNIST network with 64 outputs. "
        f"Medians of {figures['steps']} interleaved rounds; milliseconds, and in units of the step without alignment."
    )
    losses = figures["median_seconds_step"]
    rows = [
        (label, *(_step(losses[loss][kind], figures["regularizer_ratios"][loss].get(kind)) for loss in losses))
        for kind, label in ALIGNED.items()
    ]
    yield table(("alignment", *(f"`{loss}`" for loss in losses)), rows)


ALIGNED = {
    "plain": "none",
    "chain": "`DifferenceAlignmentLoss()`, along a chain",
    "all_pairs": "of all pairs",
    "vectors": "along a chain, vectors and L2",
}


def _step(seconds: float, ratio: float | None) -> str:
    return number(1000 * seconds) + ("" if ratio is None else f" ({number(ratio)})")


IMAGE_LOSSES = {"ours": "`PatchMMDLoss`", "autograd": "the same, with phases, by `conv2d`, `cos`, `avg_pool2d` and autograd"}


def patch_mmd_section(figures: Figures) -> Iterator[str]:
    yield (
        f"Value and gradient of {figures['images']} × 3 × {figures['side']}² pixels with respect to the input. Medians of "
        f"{figures['rounds']} interleaved rounds. VGG-19 is drawn once, outside the time; both batches go through it."
    )
    seconds, first = figures["median_seconds"], next(iter(figures["median_seconds"].values()))
    rows = []
    for name, value in seconds.items():
        form, _, features = name.partition("_")
        label = f"{IMAGE_LOSSES[form]}, {features} features" if form in IMAGE_LOSSES else "`VGGLoss`, VGG-19 up to conv5_3"
        rows.append((label, number(1000 * value), number(value / first), number(figures["peak_megabytes"][name])))
    yield table(("loss", "milliseconds", "in units of the first", "peak growth of memory, MB"), rows)
    yield f"{figures['draws']} draws of {figures['features']} features against the exact patch MMD, relative to it:"
    rows = [(name, number(error), number(figures["spreads"][name])) for name, error in figures["errors"].items()]
    yield table(("form, images", "error of the mean", "standard deviation of single draws"), rows)
    if figures["median_seconds_sets"]:
        yield (
            f"Gaussian MMD of two sets of samples of {figures['coordinates']} coordinates, value and both gradients; twice "
            f"geomloss's value and its gradients agree with ours to {figures['disagreement_geomloss']:.0e} in float64."
        )
        rows = [
            (f"{int(size):,} and {int(size):,}", *(number(1000 * value) for value in each.values()), number(ratio))
            for (size, each), ratio in zip(
                figures["median_seconds_sets"].items(), figures["ratios_geomloss"].values(), strict=True
            )
        ]
        yield table(("samples", "`squared_mmd`, milliseconds", "geomloss, milliseconds", "ratio"), rows)


SECTIONS = {
    "soft_counts": ("Exact soft counts", soft_counts_section),
    "peers": ("Against other packages", peers_section),
    "sketch": ("The sketch of a batch", sketch_section),
    "neighbors": ("Neighbors", neighbors_section),
    "scaling": ("Growth", scaling_section),
    "similarity_cost": ("Enforcing similarity", similarity_cost_section),
    "ctv": ("Aligning differences", ctv_section),
    "patch_mmd": ("Patch MMD", patch_mmd_section),
}


def page(results: Mapping[str, Figures | None], options: argparse.Namespace, by_hand: str) -> str:
    """Return the whole file."""
    minutes = sum(figures["seconds"] for figures in results.values() if figures) / 60
    parts = [
        "# Results of the benchmarks",
        f"Written by `make bench`, which took {minutes:.0f} minutes.\n{machine(options.threads)}",
        *(["**Small sizes, to see that it works: the figures mean nothing.**"] if options.quick else []),
        bounds_section(results),
    ]
    for name, (title, section) in SECTIONS.items():
        figures = results[name]
        parts.append(f"## {title} (`{name}.py`)")
        parts += ["Not measured."] if figures is None else section(figures)
    return "\n\n".join([*parts, BY_HAND]) + by_hand


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts and write the file; return how many failed."""
    options = read_arguments(arguments)
    results = {name: run(name, options) if name in options.only else kept(name) for name in SCRIPTS}
    before = options.out.read_text(encoding="utf-8") if options.out.is_file() else ""
    by_hand = before.partition(BY_HAND)[2] or "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(results, options, by_hand), encoding="utf-8")
    failed = [name for name in options.only if results[name] is None]
    print(f"\nWritten: {options.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())

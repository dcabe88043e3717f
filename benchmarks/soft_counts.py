"""Measure what exact soft neighbor counts cost, in units of one plain forward and backward pass over the same images.

MNIST test images, the network of 317,069 parameters, one random direction of its outputs (d = 1), on a CPU. Compared, in one
process, interleaved and warmed up:

- `plain`: forward and backward, gradients of all weights summed over the batch: what a training step does before the optimizer;
- `ours`: exact soft counts in two sweeps and O(P) memory, by `GradientFeatures` and `NeighborCount`;
- `vmap_two_pass`: the same two sweeps and memory by `torch.func.vmap(grad)`, the gradients of a chunk formed in each;
- `vmap_stored`: one sweep by `vmap(grad)` with the gradients of all images kept, N·P numbers.

    python benchmarks/soft_counts.py [--quick] [--data-dir DIRECTORY] [--threads 2]

That all three give the same counts is checked before anything is timed. Memory is measured in a fresh process each. The last
line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchvision.datasets import MNIST

from lightning_netsim.demos import MNISTNetwork
from lightning_netsim.estimators import NeighborCount
from lightning_netsim.features import GradientFeatures
from lightning_netsim.jacobian import Directions

METHODS = ("plain", "ours", "vmap_two_pass", "vmap_stored")
PLAIN_CHUNKS = (32, 64, 128, 256, 512)
# |ΔN| ≤ TOLERANCE · max(1, |N|) between any two ways of counting.
TOLERANCE = 1e-4
MEMORY_PROCESSES = 5
LIMITS = {"ratio_plain": (None, 3.5), "speedup_vmap_two_pass": (3.0, None), "peak_growth": (None, 1.2)}


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="256 images, 3 rounds: shows that it works, not what it costs")
    parser.add_argument("--data-dir", default="../shared/data", help="directory with MNIST/raw in it; random images if absent")
    parser.add_argument("--images", type=int, help="N (2048)")
    parser.add_argument("--rounds", type=int, help="timings of each method (9)")
    parser.add_argument("--chunk-size", type=int, default=64, help="images differentiated at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--measure-memory", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in {"images": 256 if options.quick else 2048, "rounds": 3 if options.quick else 9}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def load_images(data_dir: str, number: int) -> tuple[Tensor, str]:
    """Return N images, shape (N, 28, 28), uint8, and what they are."""
    try:
        images = MNIST(data_dir, train=False).data
    except RuntimeError:
        images = torch.empty(0, 28, 28, dtype=torch.uint8)
    if len(images) >= number:
        return images[:number].clone(), "MNIST test images"
    noise = torch.randint(0, 256, (number, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return noise, "random images"


class Problem:
    """A network, a direction of its outputs, and images that become numbers one chunk at a time.

    Args:
        images: shape (N, 28, 28), uint8.
        chunk_size: images differentiated at a time.
    """

    def __init__(self, images: Tensor, chunk_size: int) -> None:
        self.images = images
        self.chunk_size = chunk_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network: nn.Module = MNISTNetwork().eval()
        # The direction that GradientFeatures(directions=1, seed=0) draws, shape (10, 1).
        self.direction = torch.as_tensor(Directions(1, seed=0).matrix(10)).float()
        self.parameters = {name: value.detach() for name, value in self.network.named_parameters()}
        self.stored: Tensor | None = None

    def chunks(self, chunk_size: int | None = None) -> Iterator[Tensor]:
        """Yield the images in chunks, shape (B, 1, 28, 28), in [0, 1]."""
        for chunk in self.images.split(chunk_size or self.chunk_size):
            yield chunk.unsqueeze(1).float() / 255

    def plain(self, chunk_size: int | None = None) -> Tensor:
        """Run forward and backward over all images; return the summed outputs."""
        total = torch.zeros(())
        for chunk in self.chunks(chunk_size):
            self.network.zero_grad()
            value = (self.network(chunk) @ self.direction).sum()
            value.backward()
            total += value.detach()
        return total

    def ours(self) -> Tensor:
        """Count in two sweeps with this package."""
        features = GradientFeatures(self.network, directions=1, seed=0)
        count = NeighborCount()
        normalizations = []
        for chunk in self.chunks():
            batch = features(chunk)
            count.update(batch)
            normalizations.append(batch.normalization)
        for chunk, known in zip(self.chunks(), normalizations, strict=True):
            count.query(features(chunk, normalization=known))
        return count.compute().soft

    def vmap_two_pass(self) -> Tensor:
        """Count in two passes with `vmap(grad)`; only the gradients of one chunk are held."""
        total = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        for chunk in self.chunks():
            gradients = self._gradients(chunk)
            scale = _norm(gradients).reciprocal()
            for name, value in gradients.items():
                total[name] += torch.tensordot(scale, value, 1)
        counts = []
        for chunk in self.chunks():
            gradients = self._gradients(chunk)
            products = [value.flatten(1) @ total[name].flatten() for name, value in gradients.items()]
            counts.append(torch.stack(products).sum(0) / _norm(gradients))
        return torch.cat(counts)

    def vmap_stored(self) -> Tensor:
        """Count in one pass with `vmap(grad)`; the matrix of all gradients, (N, P), is allocated once and used again."""
        if self.stored is None:
            self.stored = torch.empty(len(self.images), sum(value.numel() for value in self.parameters.values()))
        for start, chunk in enumerate(self.chunks()):
            rows = self.stored[start * self.chunk_size :][: len(chunk)]
            gradients = self._gradients(chunk)
            torch.cat([value.flatten(1) for value in gradients.values()], 1, out=rows)
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return self.stored @ self.stored.sum(0)

    def _gradients(self, chunk: Tensor) -> dict[str, Tensor]:
        def value(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return (functional_call(self.network, parameters, (image.unsqueeze(0),)) @ self.direction)[0, 0]

        gradients: dict[str, Tensor] = vmap(grad(value), (None, 0))(self.parameters, chunk)
        return gradients


def _norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.flatten(1).square().sum(1) for value in gradients.values()]).sum(0).sqrt()


def disagreement(problem: Problem) -> float:
    """Return the largest |ΔN| / max(1, |N|) between the ways of counting.

    Raises:
        RuntimeError: if it is above the tolerance.
    """
    ours = problem.ours().double()
    others = [problem.vmap_two_pass().double(), problem.vmap_stored().double()]
    largest = max(float(((ours - other).abs() / other.abs().clamp_min(1)).max()) for other in others)
    if not largest <= TOLERANCE:
        raise RuntimeError(f"The ways of counting disagree by {largest:.1e}, more than {TOLERANCE:g}.")
    return largest


def time_interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each function in each round; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(-1, rounds):  # The first round warms up.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            functions[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """Return the median over the rounds of the ratio of two methods within the same round."""
    return round(median(a / b for a, b in zip(seconds[over], seconds[under], strict=True)), 2)


def peak_megabytes(method: str, images: int, options: argparse.Namespace) -> float:
    """Return by how much the resident memory of a fresh process grows at most while a method runs, in MB, the median of some.

    What the allocator keeps differs from process to process by a quarter; what the method needs does not.
    """
    return median(_peak_of_one_process(method, images, options) for _ in range(1 if options.quick else MEMORY_PROCESSES))


def _peak_of_one_process(method: str, images: int, options: argparse.Namespace) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure-memory", method, "--images", str(images)]
    command += ["--data-dir", options.data_dir, "--chunk-size", str(options.chunk_size), "--threads", str(options.threads)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(answer.splitlines()[-1])["megabytes"])


def report_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Run one method in this process and return the growth of its resident memory, from before it to the peak."""
    problem = Problem(load_images(options.data_dir, options.images)[0], options.chunk_size)
    with PeakMemory() as memory:
        getattr(problem, options.measure_memory)()
    return {"megabytes": round(memory.growth / 1e6, 1)}


class PeakMemory:
    """Look at the resident memory of this process every millisecond, from another thread.

    The operating system's own record of the peak is no use here: it includes what was held before.

    Attributes:
        growth: bytes by which it grew at most since the beginning.
    """

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = self._peak - self._before

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, self._process.memory_info().rss)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Check, time and weigh all methods; return the figures."""
    images, kind = load_images(options.data_dir, options.images)
    print(f"{len(images):,} {kind}, chunks of {options.chunk_size}, {options.threads} threads, torch {torch.__version__}.")
    problem = Problem(images, options.chunk_size)
    error = disagreement(problem)
    print(f"All ways of counting agree to {error:.1e}.")
    functions: dict[str, Callable[[], object]] = {name: getattr(problem, name) for name in METHODS}
    functions |= {f"plain_{size}": lambda size=size: problem.plain(size) for size in PLAIN_CHUNKS}
    seconds = time_interleaved(functions, options.rounds)
    fastest = min((f"plain_{size}" for size in PLAIN_CHUNKS), key=lambda name: median(seconds[name]))
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True))
    weighed = ("ours",) if options.quick else METHODS  # A process takes seconds to start.
    peak = {name: [_peak_of_one_process(name, options.images, options)] for name in weighed if name != "ours"}
    peak["ours"] = [peak_megabytes("ours", number * options.images, options) for number in (1, 2)]
    return {
        "ratio_plain": ratio(seconds, "ours", "plain"),
        "ratio_plain_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "ratio_plain_fastest_chunk": ratio(seconds, "ours", fastest),
        "fastest_plain_chunk": int(fastest.removeprefix("plain_")),
        "speedup_vmap_stored": ratio(seconds, "vmap_stored", "ours"),
        "speedup_vmap_two_pass": ratio(seconds, "vmap_two_pass", "ours"),
        "peak_growth": round(peak["ours"][1] / peak["ours"][0], 3),
        "peak_megabytes": peak,
        "median_seconds": {name: round(median(values), 3) for name, values in seconds.items()},
        "disagreement": error,
        "images": kind,
        "num_images": len(images),
        "num_parameters": sum(value.numel() for value in problem.parameters.values()),
        "chunk_size": options.chunk_size,
        "threads": options.threads,
        "rounds": options.rounds,
        "torch": torch.__version__,
    }


def print_figures(figures: dict[str, Any]) -> None:
    seconds, memory = figures["median_seconds"], figures["peak_megabytes"]
    print("\n| method         | seconds | in units of plain | peak memory, MB |")
    print("|----------------|--------:|------------------:|----------------:|")
    for name in METHODS:
        peak = f"{memory[name][0]:,.0f}" if name in memory else "-"
        print(f"| {name:<14} | {seconds[name]:7.3f} | {seconds[name] / seconds['plain']:17.2f} | {peak:>15} |")
    others = ", ".join(f"{size}: {seconds[f'plain_{size}']:.3f} s" for size in PLAIN_CHUNKS)
    print(f"\nplain in chunks of {others}")
    print(f"ours with twice the images: {memory['ours'][1]:,.0f} MB at its peak")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    figures = report_memory(options) if options.measure_memory else measure(options)
    if not options.measure_memory:
        print_figures(figures)
        if not options.quick:
            figures["held"] = {
                name: (low is None or figures[name] >= low) and (high is None or figures[name] <= high)
                for name, (low, high) in LIMITS.items()
            }
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()

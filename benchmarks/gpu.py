"""Measure on a CUDA device what a CPU takes hours for: random images of 224 pixels, torchvision's ResNets, d = 1.

- `counts`: exact soft counts of 10,000 images under ResNet-18 in O(P) memory, in units of one plain forward and backward pass
  (bound: 3);
- `neighbors`: all 10,000 × 10,000 similarities of ResNet-18, compared exactly, 10 neighbors of each;
- `large`: the plan for 50,000 images and ResNet-50, the time it says and the time it takes.

    python benchmarks/gpu.py [--quick] [--part counts neighbors large] [--images 10000] [--many-images 50000]

Each part is of use alone, where time on a device is short. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_netsim import analyze
from lightning_netsim.estimators import NeighborCount
from lightning_netsim.jacobian.features import GradientFeatures

PARTS = ("counts", "neighbors", "large")
CHUNK, ROUNDS = 256, 5


class Pixels(nn.Module):
    """Turn bytes into numbers where the network is: a quarter of the bytes to move."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - 0.45) / 0.225


class Images:
    """Random images in batches, the same whenever they are gone through; they are made on the CPU and moved as bytes."""

    def __init__(self, number: int, side: int, size: int = CHUNK) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randint(0, 256, (number, 3, side // 16, side // 16), generator=generator, dtype=torch.uint8)
        self.batches = [part.repeat_interleave(16, 2).repeat_interleave(16, 3) for part in torch.split(coarse, size)]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def network(make: Any, device: torch.device) -> nn.Module:
    """Return a network with initial weights, whose statistics are those of its first batch."""
    torch.manual_seed(0)
    model = nn.Sequential(Pixels(), make(weights=None)).to(device)
    with torch.no_grad():
        model.train()(Images(64, 224).batches[0].to(device))
    return model.eval()


def seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def counts(images: Images, device: torch.device) -> dict[str, Any]:
    """Time soft counts and the plain pass, interleaved."""
    model = network(resnet18, device)
    direction = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device)

    def plain() -> None:
        for batch in images:
            model.zero_grad()
            (model(batch.to(device)) @ direction).sum().backward()

    def ours() -> None:
        features, count, known = GradientFeatures(model, directions=1), NeighborCount(), []
        for batch in images:
            found = features(batch.to(device))
            count.update(found)
            known.append(found.normalization)
        for batch, normalization in zip(images, known, strict=True):
            count.query(features(batch.to(device), normalization=normalization))
        count.compute()

    plain(), ours()
    pairs = [(seconds(plain), seconds(ours)) for _ in range(ROUNDS)]
    return {
        "ratio_plain": round(median(ours_ / plain_ for plain_, ours_ in pairs), 2),
        "plain_seconds": round(median(plain_ for plain_, _ in pairs), 2),
        "counts_seconds": round(median(ours_ for _, ours_ in pairs), 2),
    }


def tables(images: Images, make: Any, device: torch.device, **options: Any) -> dict[str, Any]:
    """Time counts and neighbors, and return the plan beside."""
    model = network(make, device)
    taken = time.perf_counter()
    analysis = analyze(model, images.batches, k=10, directions=1, compare_activations=False, progress=False, **options)
    plan = analysis.meta["plan"]
    return {
        "seconds": round(time.perf_counter() - taken, 1),
        "said": plan["expected_seconds"],
        "plan": plan["kind"],
        "sweeps": plan["num_sweeps"],
        "recall": analysis.meta["recall"],
        "gigabytes": round(plan["bytes"] / 1e9, 1),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts that are asked for and return the figures of the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="32 images of 32 pixels, on whatever device there is")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--many-images", type=int, default=50_000)
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here; --quick shows on a CPU that the script works.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    few, many, side = (32, 48, 32) if options.quick else (options.images, options.many_images, 224)
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "images": few}
    if "counts" in options.part:
        figures["counts"] = counts(Images(few, side), device)
    if "neighbors" in options.part:
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 2**33
        figures["neighbors"] = tables(Images(few, side), resnet18, device, plan="store", memory_budget=0.7 * free)
    if "large" in options.part:
        figures["large"] = tables(Images(many, side), resnet50, device) | {"images": many}
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()

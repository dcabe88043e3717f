"""Measure on a CUDA device what a CPU takes hours for: random images of 224 pixels, torchvision's ResNets, d = 1.

- `counts`: exact soft counts of 10,000 images under ResNet-18 in O(P) memory, in units of one plain forward and backward pass
  (bound: 3);
- `neighbors`: all 10,000 × 10,000 similarities of ResNet-18, compared exactly, 10 neighbors of each;
- `large`: the plan for 50,000 images and ResNet-50, the time it says and the time it takes.

    python benchmarks/gpu.py [--quick] [--part counts neighbors large] [--images 10000] [--many-images 50000]

Each part is of use alone, where time on a device is short. The last line printed is one JSON object.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import Size, Study, medians, ratio, script, time_interleaved
from lightning_netsim import analyze
from lightning_netsim.estimators import NeighborCount
from lightning_netsim.jacobian.features import GradientFeatures

PARTS = ("counts", "neighbors", "large")
SIZES = {
    "part": Size(PARTS, None, "which", choices=PARTS),
    "images": Size(10_000, 32, "images counted and compared"),
    "many_images": Size(50_000, 48, "images of the large set"),
    "side": Size(224, 32, "their height and width in pixels"),
}
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


def network(make: Callable[..., nn.Module], device: torch.device) -> nn.Module:
    """Return a network with initial weights, whose statistics are those of its first batch."""
    torch.manual_seed(0)
    model = nn.Sequential(Pixels(), make(weights=None)).to(device)
    with torch.no_grad():
        model.train()(Images(64, 224).batches[0].to(device))
    return model.eval()


def counts(images: Images, device: torch.device) -> dict[str, Any]:
    """Time soft counts and the plain pass, interleaved."""
    model = network(resnet18, device)
    direction = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device)

    def plain() -> None:
        for batch in images:
            model.zero_grad()
            (model(batch.to(device)) @ direction).sum().backward()
        finish(device)

    def ours() -> None:
        features, count, known = GradientFeatures(model, directions=1), NeighborCount(), []
        for batch in images:
            found = features(batch.to(device))
            count.update(found)
            known.append(found.normalization)
        for batch, normalization in zip(images, known, strict=True):
            count.query(features(batch.to(device), normalization=normalization))
        count.compute()
        finish(device)

    seconds, _ = time_interleaved({"plain": plain, "counts": ours}, ROUNDS)
    return {"ratio_plain": ratio(seconds, "counts", "plain")} | {f"{name}_seconds": v for name, v in medians(seconds).items()}


def finish(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def tables(images: Images, make: Callable[..., nn.Module], device: torch.device, **options: Any) -> dict[str, Any]:
    """Time counts and neighbors, and return the plan beside."""
    model = network(make, device)
    start = time.perf_counter()
    analysis = analyze(model, images.batches, k=10, directions=1, compare_activations=False, progress=False, **options)
    plan = analysis.meta["plan"]
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "said": plan["expected_seconds"],
        "plan": plan["kind"],
        "sweeps": plan["num_sweeps"],
        "recall": analysis.meta["recall"],
        "gigabytes": round(plan["bytes"] / 1e9, 1),
    }


@script(SIZES, threads=torch.get_num_threads())
def main(study: Study) -> dict[str, Any]:
    """Run the parts that are asked for; a quick run on whatever device there is."""
    options, known = study.options, torch.cuda.is_available()
    if not options.quick and not known:
        raise SystemExit("There is no CUDA device here; --quick shows on a CPU that the script works.")
    device = torch.device("cuda" if known else "cpu")
    few, figures = Images(options.images, options.side), {"device": torch.cuda.get_device_name() if known else "cpu"}
    if "counts" in options.part:
        figures["counts"] = counts(few, device)
    if "neighbors" in options.part:
        free = torch.cuda.mem_get_info()[0] if known else 2**33
        figures["neighbors"] = tables(few, resnet18, device, plan="store", memory_budget=0.7 * free)
    if "large" in options.part:
        figures["large"] = tables(Images(options.many_images, options.side), resnet50, device)
    return figures | {"options": study.sizes}


if __name__ == "__main__":
    main()

"""What patch MMD costs beside a VGG loss and beside plain autograd, how near random features come, and MMD beside geomloss.

    python benchmarks/patch_mmd.py [--quick] [--images 5] [--side 128] [--features 512] [--threads 2]

Value and gradient with respect to the first of two batches of images, by

- `ours_512` (and 1024, 2048): `PatchMMDLoss()`, so many random features, drawn anew at each call;
- `autograd_512`: the same from `conv2d`, `cos` with random phases and `avg_pool2d`, differentiated by autograd;
- `vgg19`: `VGGLoss(mode="random")`, VGG-19 up to conv5_3, both batches through the network; drawn once, outside the time.

`speedup_vgg19` is `vgg19` over `ours_512`, `peak_mb` what `ours_512` needs above its images in a fresh process. `rff_error` is
the relative error of the mean of 60 draws of 512 features against the exact patch MMD, of images with a spectrum like that of
photographs; the greater of two pairs.

`ratio_geomloss` is the time of `squared_mmd` over that of geomloss's Gaussian kernel norm, value and gradient of both sets, the
greater of a training batch and a large set; geomloss computes half of the squared MMD, and `disagreement_geomloss` is the
relative difference of twice that, in value and gradient, in float64. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problems import Function, largest_difference, value_and_gradients
from lab import Bound, Size, Study, medians, ratio, script, time_interleaved
from lightning_netsim.functional import exact_patch_mmd, gaussian_kernel, squared_mmd
from lightning_netsim.losses import PatchMMDLoss, VGGLoss

SIZES = {
    "images": Size(5, 2, "images in a batch"),
    "side": Size(128, 64, "their height and width in pixels"),
    "features": Size(512, 64, "random features; also two and four times as many"),
    "draws": Size(60, 8, "draws of the features that are held against the exact MMD"),
    "batch": Size(256, 64, "samples in a set of a training batch"),
    "samples": Size(2048, 128, "samples in a large set"),
    "rounds": Size(11, 2, "timings of each method"),
}
BOUNDS = {
    "speedup_vgg19": Bound(1.5, 3, at_least=True, what="patch MMD of 512 random features, value and gradient, against VGG-19"),
    "peak_mb": Bound(60, what="peak memory of that patch MMD above its images, MB"),
    "rff_error": Bound(0.02, what="relative error of the mean of 60 draws of 512 features against the exact patch MMD"),
    "ratio_geomloss": Bound(1.0, what="Gaussian MMD, time in units of geomloss's, the greater of two sizes"),
    "disagreement_geomloss": Bound(1e-6, what="relative difference from twice geomloss's value, and of the gradients"),
}
BANDWIDTH, WINDOW, STRIDE = 0.6, 32, 16
EXACT_SIDE, COORDINATES = 50, 64
# Standard errors by which a mean of draws may be off: beyond, a method computes something else.
TOLERANCE = 6


def natural_images(number: int, side: int, seed: int) -> Tensor:
    """Return images whose amplitudes fall as one over the frequency, as in photographs: (number, 3, side, side) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, 3, side, side, generator=generator)
    noise += 2 * torch.randn(number, 1, side, side, generator=generator)
    rows, columns = torch.fft.fftfreq(side).unsqueeze(1), torch.fft.rfftfreq(side)
    amplitudes = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / side)
    images = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitudes, s=(side, side))
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    return (0.5 + 0.2 * (images - mean) / deviation).clamp(0, 1)


class AutogradPatchMMD:
    """Estimate the patch MMD by cosines with random phases, as it is written down in the paper.

    Args:
        num_features: r.
        seed: of the draws; each call draws anew.
    """

    def __init__(self, num_features: int, seed: int = 0) -> None:
        self.num_features, self.generator = num_features, torch.Generator().manual_seed(seed)

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        weights = torch.randn(self.num_features, input.shape[1], 3, 3, generator=self.generator) / BANDWIDTH
        phases = 2 * math.pi * torch.rand(self.num_features, generator=self.generator)
        pooled = [
            F.avg_pool2d(F.conv2d(2 * images - 1, weights, phases).cos(), WINDOW, STRIDE, ceil_mode=True)
            for images in (input, target)
        ]
        return 2 * F.mse_loss(*pooled)


def computations(options: argparse.Namespace) -> dict[str, partial[Any]]:
    """Return what is timed and weighed: each loss and its gradient with respect to the first of two batches of images."""
    number = options.features
    losses: dict[str, Function] = {f"ours_{times * number}": PatchMMDLoss(BANDWIDTH, times * number) for times in (1, 2, 4)}
    losses |= {f"autograd_{number}": AutogradPatchMMD(number), "vgg19": VGGLoss(mode="random")}
    images = [natural_images(options.images, options.side, seed) for seed in (1, 2)]
    return {name: partial(value_and_gradients, loss, *images, of=1) for name, loss in losses.items()}


def weigh(options: argparse.Namespace, name: str) -> Callable[[], object]:
    """Return the computation of one loss; that of small images comes first."""
    computation = computations(options)[name]
    loss, *images = computation.args
    value_and_gradients(loss, *(some[:1, :, :48, :48] for some in images), of=1)
    return computation


@torch.no_grad()
def measure_error(options: argparse.Namespace) -> dict[str, Any]:
    """Hold random features against the exact MMD of a pair of images, and of an image and itself, smoothed.

    Raises:
        RuntimeError: if a mean of draws is further off than draws vary.
    """
    input, other = natural_images(2, EXACT_SIDE, seed=0).split(1)
    smooth = F.avg_pool2d(F.pad(input, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    kernel = partial(gaussian_kernel, bandwidths=BANDWIDTH)
    losses = {
        "ours": partial(PatchMMDLoss, BANDWIDTH, options.features),
        "autograd": partial(AutogradPatchMMD, options.features),
    }
    errors, spreads = {}, {}
    for pair, target in (("two images", other), ("smoothed", smooth)):
        exact = float(exact_patch_mmd(2 * input.double() - 1, 2 * target.double() - 1, kernel, 3, WINDOW, STRIDE))
        for name, loss in losses.items():
            draws = torch.tensor([float(loss(seed=seed)(input, target)) / exact for seed in range(options.draws)])
            error, spread = abs(float(draws.mean()) - 1), float(draws.std())
            if not error <= TOLERANCE * spread / options.draws**0.5:
                raise RuntimeError(
                    f"{name}: the mean of {options.draws} draws is off by {error:.0%}, single ones vary by {spread:.0%}."
                )
            errors[f"{name}, {pair}"], spreads[f"{name}, {pair}"] = round(error, 5), round(spread, 5)
    first = max(error for name, error in errors.items() if name.startswith("ours"))
    return {"rff_error": first, "errors": errors, "spreads": spreads}


def kernel_norms(bandwidth: float) -> dict[str, Function]:
    """Return ours, and twice that of geomloss."""
    from geomloss import SamplesLoss

    half = SamplesLoss("gaussian", blur=bandwidth, backend="tensorized")
    ours = partial(squared_mmd, kernel=partial(gaussian_kernel, bandwidths=bandwidth))
    return {"ours": ours, "geomloss": lambda x, y: 2 * half(x, y)}


def measure_geomloss(options: argparse.Namespace) -> dict[str, Any]:
    """Hold MMD against geomloss and time both; nothing, and say so, where it is not installed."""
    if not importlib.util.find_spec("geomloss"):
        print("geomloss is not installed: not compared.")
        return {"ratio_geomloss": None, "disagreement_geomloss": None, "median_seconds_sets": {}, "ratios_geomloss": {}}
    typical, found, error = {}, {}, 0.0
    for number in (options.batch, options.samples):
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(number, COORDINATES, generator=generator) + shift for shift in (0, 0.3))
        losses = kernel_norms(math.sqrt(COORDINATES))
        error = max(error, largest_difference(losses.values(), x.double(), y.double()))
        functions = {name: partial(value_and_gradients, loss, x, y) for name, loss in losses.items()}
        seconds, _ = time_interleaved(functions, options.rounds)
        typical[str(number)], found[str(number)] = medians(seconds), ratio(seconds, "ours", "geomloss")
    return {
        "ratio_geomloss": max(found.values()),
        "ratios_geomloss": found,
        "disagreement_geomloss": error,
        "median_seconds_sets": typical,
    }


@script(SIZES, BOUNDS, threads=2, weigh=weigh, page="benchmarks")
def main(study: Study) -> dict[str, Any]:
    """Hold random features against the exact MMD, then time all losses."""
    options, functions = study.options, computations(study.options)
    errors, sets = measure_error(options), measure_geomloss(options)
    seconds, _ = time_interleaved(functions, options.rounds)
    typical = medians(seconds)
    megabytes = dict(zip(functions, study.peaks([([name], {}) for name in functions]), strict=True))
    first = f"ours_{options.features}"
    rows = [(f"`{name}`", 1000 * value, value / typical[first], megabytes[name]) for name, value in typical.items()]
    study.table("patch_mmd", ("loss", "milliseconds", "in units of the first", "peak growth of memory, MB"), rows)
    rows = [(name, error, errors["spreads"][name]) for name, error in errors["errors"].items()]
    head = ("form, images", "error of the mean", "standard deviation of single draws")
    study.table("patch_mmd_errors", head, rows)
    rows = [
        (f"{int(size):,} and {int(size):,}", *(1000 * value for value in each.values()), sets["ratios_geomloss"][size])
        for size, each in sets["median_seconds_sets"].items()
    ]
    if rows:
        study.table("patch_mmd_sets", ("samples", "`squared_mmd`, milliseconds", "geomloss, milliseconds", "ratio"), rows)
    return (
        errors
        | sets
        | {
            "speedup_vgg19": ratio(seconds, "vgg19", first),
            "speedup_autograd": ratio(seconds, f"autograd_{options.features}", first),
            "peak_mb": megabytes[first],
            "peak_megabytes": megabytes,
            "median_seconds": typical,
            "options": study.sizes,
        }
    )


if __name__ == "__main__":
    main()

"""Do random networks and random features compute the patch MMD that theory says, and what does its minimizer look like?

After Amir and Weiss, Understanding and Simplifying Perceptual Distances, CVPR 2021, supplement, section 1. Four checks:

- networks: the squared distance of two images in the features of a random network that sees patches (S-CNN), averaged over
  windows, against the MMD of their patches under the kernel of infinite width; before pooling, against 2 − 2k(p, q);
- features: the patch MMD by r random Fourier features against the exact one;
- depth: the kernel, rescaled to [0, 1], falls with the depth of the network at every angle;
- mixture: the image with the least mean MMD to two textures has patches that are distributed as those of both together.

    python experiments/images/kernel_equivalence.py [--data-dir DIRECTORY] [--quick] [--out DIRECTORY]

DIRECTORY/kodak holds the Kodak photographs; with `--noise`, images are smooth noise. Beside the tables it writes a figure.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.images.generalized_image_mean import crop_center, mean_under
from lab import Size, Study, script
from lab.data import read_photographs
from lab.figures import draw_pictures
from lightning_netsim.functional import arc_cosine, arc_cosine_kernel, exact_patch_mmd, gaussian_kernel, sliced_wasserstein
from lightning_netsim.functional.mmd import Kernel
from lightning_netsim.losses import PatchMMDLoss, RandomNetworkLoss
from lightning_netsim.report import style
from lightning_netsim.report.pictures import to_image

SIZES = {
    "widths": Size((64, 128, 256, 512, 1024, 2048), (64, 256), "of the networks"),
    "numbers": Size((32, 64, 128, 256, 512, 1024, 2048), (64, 512), "of random features"),
    "draws": Size(12, 2, "of each network"),
    "feature_draws": Size(60, 4, "of random features"),
    "steps": Size(300, 10, "of each minimization"),
    "noise": Size(False, None, "take smooth noise in place of photographs"),
}
BANDWIDTH, PATCH = 0.6, 3
# Of the images whose MMD is computed exactly: 24 × 24 patches in four windows.
SIDE, WINDOW, STRIDE, SHIFT = 26, 16, 8, 4
DEPTHS, DEEPEST, ANGLES = (1, 2, 3), 10, 1001
# Photograph, top and left of two textures in the Kodak set, squares of 128 pixels that are reduced to 64.
TEXTURE = 64
TEXTURES = {
    "wall, water": ((1, 48, 508), (6, 370, 560)),
    "stones, grass": ((13, 280, 10), (20, 384, 10)),
    "leaves, wood": ((13, 130, 40), (2, 20, 370)),
}
DIRECTIONS = 512
LOSSES = ("MMD", "S-CNN")
MIXTURE_DEPTH, MIXTURE_WIDTH, MIXTURE_FEATURES = 3, 128, 512


def smooth_noise(count: int, side: int, seed: int) -> Tensor:
    """Return random smooth images, shape (count, 3, side, side), values from 0 to 1."""
    coarse = torch.randn(count, 3, side // 3, side // 3, generator=torch.Generator().manual_seed(seed))
    images = F.interpolate(coarse, size=(side, side), mode="bicubic")
    least, greatest = (some.view(-1, 1, 1, 1) for some in images.flatten(1).aminmax(dim=1))
    return (images - least) / (greatest - least)


def load_pairs(photographs: Sequence[Tensor] | None, count: int) -> tuple[Tensor, Tensor]:
    """Return pairs of small images, each with itself, moved by four pixels, and with the next: two of (2·count, 3, 26, 26)."""
    size = SIDE + SHIFT
    if photographs is None:
        wide = smooth_noise(count, size, seed=0)
    else:
        chosen = photographs[:: len(photographs) // count][:count]
        wide = torch.stack([F.avg_pool2d(crop_center(photograph, 2 * size), 2) for photograph in chosen])
    first, moved = wide[:, :, :SIDE, :SIDE], wide[:, :, :SIDE, SHIFT:]
    return first.repeat(2, 1, 1, 1), torch.cat([moved, first.roll(1, 0)])


def load_textures(photographs: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """Return pairs of textures, shape (2, 3, 64, 64) each."""
    if photographs is None:
        bars = (torch.arange(TEXTURE) // 4 % 2).float().expand(3, TEXTURE, -1) * torch.tensor([0.9, 0.5, 0.1]).view(3, 1, 1)
        clouds = smooth_noise(1, TEXTURE, seed=1)[0] * torch.tensor([0.2, 0.4, 0.8]).view(3, 1, 1)
        return {"bars, clouds": torch.stack([bars, clouds])}
    return {
        name: torch.stack(
            [
                F.avg_pool2d(photographs[number - 1][:, top : top + 2 * TEXTURE, left : left + 2 * TEXTURE], 2)
                for number, top, left in places
            ]
        )
        for name, places in TEXTURES.items()
    }


def scaled(images: Tensor) -> Tensor:
    """Return images as losses see them, in [−1, 1] and float64."""
    return 2 * images.double() - 1


def exact_mmd(first: Tensor, second: Tensor, kernel: Kernel, window: int = WINDOW, stride: int = STRIDE) -> Tensor:
    """Return the exact squared MMD of the patches in the windows of images with values in [0, 1], shape (B,)."""
    return exact_patch_mmd(scaled(first), scaled(second), kernel, PATCH, window, stride)


def local_similarity(first: Tensor, second: Tensor, depth: int) -> Tensor:
    """Return the mean over positions of the infinite network's k(p, q) of the patches there, shape (B,)."""
    p, q = (F.unfold(scaled(images), PATCH) for images in (first, second))
    return arc_cosine(F.cosine_similarity(p, q, dim=1), depth).mean(1)


def deviations(estimates: Tensor, exact: Tensor) -> dict[str, float]:
    """Return how far estimates (draws, pairs) are from the exact values, relative to them.

    `error` is the root mean square over draws and pairs, `bias` that of the means over draws, and `mean` the mean of all.
    """
    relative = estimates.double() / exact - 1
    found = {
        "error": relative.square().mean().sqrt(),
        "bias": relative.mean(0).square().mean().sqrt(),
        "mean": relative.mean(),
    }
    return {name: float(value) for name, value in found.items()}


def slope(series: dict[int, dict[str, float]]) -> float:
    """Return the exponent with which the error changes, by least squares of the logarithms."""
    return float(np.polyfit(np.log(list(series)), np.log([row["error"] for row in series.values()]), 1)[0])


@torch.no_grad()
def check_networks(pairs: tuple[Tensor, Tensor], widths: Sequence[int], draws: int) -> dict[int, dict[int, dict[str, float]]]:
    """Return the deviations of networks from the infinite one, by depth and width.

    `kernel` is the largest deviation over pairs of the similarity before pooling, 1 − ½ distance, averaged over draws.
    """
    found: dict[int, dict[int, dict[str, float]]] = {}
    for depth in DEPTHS:
        exact, local = exact_mmd(*pairs, partial(arc_cosine_kernel, depth=depth)), local_similarity(*pairs, depth)
        found[depth] = {}
        for width in widths:
            network = partial(
                RandomNetworkLoss, depth, width, PATCH, window=WINDOW, stride=STRIDE, redraw=False, reduction="none"
            )
            pooled = torch.stack([network(seed=draw)(*pairs) for draw in range(draws)])
            apart = torch.stack([network(pooling=False, seed=draw)(*pairs) for draw in range(draws)])
            kernel = float((1 - apart.double().mean(0) / 2 - local).abs().max())
            found[depth][width] = deviations(pooled, exact) | {"kernel": kernel}
    return found


@torch.no_grad()
def check_features(pairs: tuple[Tensor, Tensor], numbers: Sequence[int], draws: int) -> dict[int, dict[str, float]]:
    """Return the deviations of the patch MMD by random features from the exact one, by their number."""
    exact = exact_mmd(*pairs, partial(gaussian_kernel, bandwidths=BANDWIDTH))
    loss = partial(PatchMMDLoss, BANDWIDTH, patch_size=PATCH, window=WINDOW, stride=STRIDE, redraw=False, reduction="none")
    return {
        number: deviations(torch.stack([loss(num_features=number, seed=draw)(*pairs) for draw in range(draws)]), exact)
        for number in numbers
    }


def rescaled_kernels() -> tuple[Tensor, Tensor]:
    """Return angles from 0 to π, and the kernel of each depth at these, rescaled to [0, 1]: shape (depths, angles)."""
    angles = torch.linspace(0, math.pi, ANGLES, dtype=torch.float64)
    kernels = torch.stack([arc_cosine(angles.cos(), depth) for depth in range(1, DEEPEST + 1)])
    least = kernels[:, -1:]
    return angles, (kernels - least) / (1 - least)


def mixture_distances(image: Tensor, textures: Tensor, kernel: Kernel) -> dict[str, float]:
    """Return the squared MMD of an image to the patches of two textures together, and to either, in units of theirs.

    With μ the mean feature of the patches in a window, ‖μ_y − (μ_a + μ_b)/2‖² is half of ‖μ_y − μ_a‖² and half of
    ‖μ_y − μ_b‖² minus a quarter of ‖μ_a − μ_b‖².

    Args:
        image: shape (3, H, W), values in [0, 1].
        textures: shape (2, 3, H, W).
        kernel: of patches.
    """
    mmd = partial(exact_mmd, kernel=kernel, window=32, stride=16)
    first, second = mmd(image.unsqueeze(0), textures).tolist()
    apart = float(mmd(textures[:1], textures[1:]))
    together = (first + second) / 2 - apart / 4
    return {name: value / apart for name, value in (("mixture", together), ("first", first), ("second", second))}


def sliced_distances(image: Tensor, textures: Tensor) -> dict[str, float]:
    """Return the sliced Wasserstein distance of all patches of an image to those of two textures together, and to either."""
    size = 3 * PATCH**2
    normal = torch.randn(DIRECTIONS, size, generator=torch.Generator().manual_seed(0))
    directions = normal / normal.norm(dim=1, keepdim=True)
    own, first, second = (F.unfold(some.unsqueeze(0), PATCH)[0].mT for some in (image, *textures))
    # Of each patch two, so that there are as many as of both textures together.
    pairs = {"mixture": (own.repeat(2, 1), torch.cat([first, second])), "first": (own, first), "second": (own, second)}
    apart = float(sliced_wasserstein(first, second, directions))
    return {name: float(sliced_wasserstein(*pair, directions)) / apart for name, pair in pairs.items()}


def make_loss(name: str, seed: int) -> tuple[nn.Module, Kernel]:
    """Return what is minimized, with new random weights in each step, and the kernel that it stands for."""
    if name == "MMD":
        return PatchMMDLoss(BANDWIDTH, MIXTURE_FEATURES, seed=seed), partial(gaussian_kernel, bandwidths=BANDWIDTH)
    network = RandomNetworkLoss(MIXTURE_DEPTH, MIXTURE_WIDTH, seed=seed)
    return network, partial(arc_cosine_kernel, depth=MIXTURE_DEPTH)


def check_mixture(textures: Tensor, steps: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the distances of the minimizer of each loss and of the mean of two textures, and the minimizers."""
    found: dict[str, Any] = {}
    images = {}
    for name in LOSSES:
        loss, kernel = make_loss(name, seed=0)
        images[name] = mean_under(loss, textures, weight=0.0, steps=steps, seed=0)[0]
        found[name] = {
            "minimizer": mixture_distances(images[name], textures, kernel),
            "mean": mixture_distances(textures.mean(0), textures, kernel),
        }
        found[name]["minimizer_swd"] = sliced_distances(images[name], textures)
    found["mean_swd"] = sliced_distances(textures.mean(0), textures)
    return found, images


def write_tables(
    study: Study,
    networks: dict[int, dict[int, dict[str, float]]],
    features: dict[int, dict[str, float]],
    mixture: dict[str, Any],
) -> None:
    rows: list[list[object]] = [[str(number), 100 * row["error"], 100 * row["bias"]] for number, row in features.items()]
    rows.append(["slope", slope(features), ""])
    study.table("features", ("r", "error of one draw, %", "of the mean of all draws, %"), rows, ("", ".2f", ".2f"), left=0)
    rows = [
        [str(width)]
        + [
            cell
            for series in networks.values()
            for cell in (f"{100 * series[width]['error']:.1f} ({100 * series[width]['mean']:+.1f})", series[width]["kernel"])
        ]
        for width in next(iter(networks.values()))
    ]
    rows.append(["slope", *(cell for series in networks.values() for cell in (f"{slope(series):.2f}", ""))])
    head = ["width", *(title for depth in networks for title in (f"depth {depth}", "k"))]
    study.table("networks", head, rows, ["", *["", ".4f"] * len(networks)], left=0)
    rows = []
    for textures, row in mixture.items():
        for name in LOSSES:
            mmd, swd = row[name]["minimizer"], row[name]["minimizer_swd"]
            means = row[name]["mean"]["mixture"], row["mean_swd"]["mixture"]
            rows.append([f"{textures}, {name}", *mmd.values(), means[0], *swd.values(), means[1]])
    columns = ("both together", "first", "second", "mean image: both together")
    head = ["textures, loss", *columns, *("SWD: " + column for column in columns)]
    study.table("mixtures", head, rows, ["", *[".4f"] * 3, *[".3f"] * 5])


def draw_errors(axes: Axes, series: dict[str, dict[int, dict[str, float]]], label: str) -> None:
    """Draw errors in percent against a number, and a line that falls as one over its root."""
    for (name, points), color in zip(series.items(), style.CYCLE, strict=False):
        places = list(points)
        axes.plot(places, [100 * row["error"] for row in points.values()], color=color, marker="o", markersize=3, label=name)
    level = 70 * next(iter(next(iter(series.values())).values()))["error"]
    line = [level * math.sqrt(places[0] / place) for place in places]
    axes.plot(places, line, color=style.MUTED, linestyle="--", linewidth=0.9, label="1/√ of it")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(places[::2], [str(place) for place in places[::2]])
    low, high = axes.get_ylim()
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if low < tick < high]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel=label, ylabel="relative error, %")
    axes.legend(fontsize=7)


def draw_kernels(axes: Axes) -> None:
    angles, kernels = rescaled_kernels()
    for depth in (1, 2, 3, 5, 10):
        axes.plot(torch.rad2deg(angles), kernels[depth - 1], color=style.CYCLE[depth - 1], label=f"depth {depth}")
    axes.set(xlabel="angle of two patches, degrees", ylabel="kernel, rescaled")
    axes.legend(fontsize=7)


def plot(
    networks: dict[int, dict[int, dict[str, float]]],
    features: dict[int, dict[str, float]],
    pictures: dict[str, tuple[Tensor, dict[str, Tensor]]],
) -> Figure:
    """Draw the errors, the kernels, and the minimizers beside their textures."""
    side = 1.35
    height = 4.35 + len(pictures) * (side + 0.06)
    reading = (
        "Top: random networks against the infinite one, random features against the exact kernel (root mean square over draws "
        "and pairs), and the kernel by depth. Bottom: images with the least mean distance to two textures."
    )
    rows = {
        name.replace(", ", ",\n"): {
            title: to_image(image)
            for title, image in {"first": some[0], "second": some[1], "their mean": some.mean(0), **images}.items()
        }
        for name, (some, images) in pictures.items()
    }
    with style.styled():
        figure = style.new_figure(10, height, "Random networks, random features and the patch MMD", reading)
        axes = [style.add_axes(figure, start, height - 3.55, 10 - start - 2.45, 1.0) for start in (0.7, 4.0, 7.3)]
        draw_errors(axes[0], {f"depth {depth}": series for depth, series in networks.items()}, "width of the network")
        draw_errors(axes[1], {"Gaussian kernel": features}, "random features")
        draw_kernels(axes[2])
        draw_pictures(style.add_canvas(figure), rows, (1.25, 4.3), side, 0.06)
    return figure


def rounded(value: Any) -> Any:
    """Return nested figures with four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(some) for key, some in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    options = study.options
    photographs = None if options.noise else read_photographs(options.data_dir)
    pairs = load_pairs(photographs, count=4)
    features = check_features(pairs, options.numbers, options.feature_draws)
    networks = check_networks(pairs, options.widths, options.draws)
    rise = float(rescaled_kernels()[1][:, 1:-1].diff(dim=0).max())
    print(f"From depth to depth up to {DEEPEST}, at {ANGLES - 2} angles, the rescaled kernel changes by at most {rise:+.1e}")
    every, mixture, pictures = load_textures(photographs), {}, {}
    for name in list(every)[: 1 if options.quick else None]:
        mixture[name], images = check_mixture(every[name], options.steps)
        pictures[name] = (every[name], images)
    write_tables(study, networks, features, mixture)
    study.figure(plot(networks, features, pictures), dpi=80)
    figures = rounded(
        {
            "network": {str(depth): {str(width): row for width, row in some.items()} for depth, some in networks.items()},
            "network_slope": {str(depth): slope(series) for depth, series in networks.items()},
            "features": {str(number): row for number, row in features.items()},
            "features_slope": slope(features),
            "rise_with_depth": rise,
            "mixture": mixture,
        }
    )
    return figures | {"options": study.sizes}


if __name__ == "__main__":
    main()

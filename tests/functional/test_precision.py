from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_netsim.functional import (
    arc_cosine,
    arc_cosine_kernel,
    contrastive_loss,
    ctv_norm,
    denoising_factor,
    denoising_weights,
    density_loss,
    difference_alignment_loss,
    draw_frequencies,
    exact_patch_mmd,
    fourier_features,
    gaussian_kernel,
    group_similarity_loss,
    inverse_root,
    kernel_matrix,
    kernel_neighbors,
    laplacian_pyramid,
    minibatch_similarity_loss,
    neighbor_count,
    pair_similarity_loss,
    pairwise_similarity,
    random_feature_mmd,
    random_patch_mmd,
    sliced_wasserstein,
    smooth,
    squared_mmd,
)
from tests.functional.common import random

FREQUENCIES = draw_frequencies(24, 3, 0.5, torch.Generator().manual_seed(0))
WAVES = draw_frequencies(24, 27, 0.6, torch.Generator().manual_seed(0)).view(12, 3, 3, 3)
LABELS = torch.arange(9) % 3
AXES = torch.eye(3)


def counts(features: Tensor) -> list[Tensor]:
    result = neighbor_count(features, thresholds=[0.25], powers=[2])
    return [result.soft, result.hard[0.25], result.power[2.0]]


#: Name -> (a function of inputs of half precision, the shapes of these).
CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "arc_cosine": (arc_cosine, [(9,)]),
    "arc_cosine_kernel": (partial(arc_cosine_kernel, depth=2, normalize=False), [(9, 3), (7, 3)]),
    "contrastive_loss": (lambda x: contrastive_loss(x, LABELS, 4.0), [(9, 4)]),
    "ctv_norm l1": (lambda x: ctv_norm(x, "l1"), [(9, 4)]),
    "ctv_norm l2": (ctv_norm, [(9, 4)]),
    "ctv_norm squared": (lambda x: ctv_norm(x, "squared_l2"), [(9, 4)]),
    "denoising": (lambda k, v: smooth(denoising_weights(k), v), [(5, 6, 2, 2), (6, 2)]),
    "denoising_factor": (denoising_factor, [(5, 6, 2, 2)]),
    "density_loss": (lambda x: density_loss(x, 0.1), [(9,)]),
    "difference_alignment_loss": (lambda x: difference_alignment_loss(x, LABELS), [(9, 4)]),
    "difference_alignment_loss abs": (lambda x: difference_alignment_loss(x, None, None, "abs", "l2"), [(9, 4)]),
    "exact_patch_mmd": (lambda x, y: exact_patch_mmd(x, y, gaussian_kernel, 3, 5, 3), [(2, 3, 12, 12), (2, 3, 12, 12)]),
    "fourier_features": (lambda x: fourier_features(x, FREQUENCIES), [(9, 3)]),
    "gaussian_kernel": (gaussian_kernel, [(9, 3), (7, 3)]),
    "group_similarity_loss": (lambda s: group_similarity_loss(s, LABELS), [(9, 9)]),
    "inverse_root": (lambda x: inverse_root(x @ x.mT)[0], [(9, 2, 4)]),
    "kernel_matrix": (kernel_matrix, [(5, 2, 7)]),
    "kernel_neighbors": (lambda x: kernel_neighbors(x, k=3).similarity, [(9, 16)]),
    "laplacian_pyramid": (lambda x: laplacian_pyramid(x, 2), [(2, 3, 11, 12)]),
    "minibatch_similarity_loss": (lambda x, y: minibatch_similarity_loss(x, y, 1), [(9,), (9,)]),
    "neighbor_count": (counts, [(40, 16)]),
    "pair_similarity_loss": (pair_similarity_loss, [(9,)]),
    "pairwise_similarity": (pairwise_similarity, [(5, 2, 7)]),
    "pairwise_similarity subspace": (partial(pairwise_similarity, scalar="subspace"), [(5, 2, 7)]),
    "random_feature_mmd": (lambda x, y: random_feature_mmd(x, y, FREQUENCIES), [(9, 3), (7, 3)]),
    "random_patch_mmd": (lambda x, y: random_patch_mmd(x, y, WAVES, 5, 3), [(2, 3, 12, 12), (2, 3, 12, 12)]),
    "sliced_wasserstein": (lambda x, y: sliced_wasserstein(x, y, AXES), [(9, 3), (9, 3)]),
    "squared_mmd": (squared_mmd, [(9, 3), (7, 3)]),
    "squared_mmd arc-cosine": (partial(squared_mmd, kernel=arc_cosine_kernel, unbiased=True), [(9, 3), (7, 3)]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_half_precision_is_raised_and_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    function, shapes = CALLS[name]
    half = [random(seed, *shape).to(dtype) for seed, shape in enumerate(shapes)]
    full = [x.float() for x in half]

    def values(inputs: list[Tensor]) -> list[Tensor]:
        found = function(*inputs)
        return list(found) if isinstance(found, list) else [found]

    wanted, found = values(full), [values(half)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # What is multiplied before the function itself is called is not its own.
        found += [] if name == "inverse_root" else [values(half), values(full)]
    for some in found:
        for value, other in zip(some, wanted, strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, other, rtol=0.02 if name == "inverse_root" else 0, atol=0, equal_nan=True)


SMALL = torch.tensor([[0.3, 0.5], [0.1, -0.4], [0.2, 0.9]])
IMAGES = random(0, 1, 3, 10, 9)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x: arc_cosine(x).sum(), SMALL),
        (lambda x: arc_cosine_kernel(x, torch.ones(1, 2)).sum(), SMALL),
        (ctv_norm, SMALL),
        (lambda x: inverse_root(x.mT @ x)[0].sum(), SMALL),
        (lambda x: squared_mmd(x, torch.ones(2, 2)), SMALL),
        (lambda x: squared_mmd(torch.ones(2, 2), x, arc_cosine_kernel, unbiased=True), SMALL),
        (lambda x: random_patch_mmd(x, IMAGES.flip(2), WAVES, 4, 3), IMAGES),
        (lambda x: random_patch_mmd(IMAGES.flip(2), x, WAVES, 4, 3), IMAGES),
        (lambda x: exact_patch_mmd(x, IMAGES.flip(2), gaussian_kernel, 3, 4, 3).sum(), IMAGES),
    ],
)
def test_a_second_derivative_is_refused(function: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
    """Also where what comes down is a constant, as for a loss."""
    x = inputs.clone().requires_grad_()
    for given in (x, x**2):
        loss = function(given)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError), match="once"):
            (loss + gradient.square().sum()).backward()

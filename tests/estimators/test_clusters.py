"""Centers of clusters of unit vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import NetsimError
from lightning_netsim.estimators.index import find_clusters


def unit_features(seed: int, n: int, k: int = 16) -> Tensor:
    return F.normalize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), dim=1)


def blobs(directions: Tensor, size: int, spread: float = 0.05) -> tuple[Tensor, Tensor]:
    """Return `size` unit vectors around each direction, in random order, and the number of the direction."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(directions)).repeat(size)[torch.randperm(size * len(directions), generator=generator)]
    noise = torch.randn(len(labels), directions.shape[1], generator=generator)
    return F.normalize(directions[labels] + spread * noise, dim=1), labels


def objective(features: Tensor, centers: Tensor) -> float:
    """Return the sum of the similarities of each sample to its center, in float64."""
    return sum(max(float(center @ feature) for center in centers.double()) for feature in features.double())


def test_each_center_is_the_direction_of_the_mean_of_its_samples() -> None:
    features, _ = blobs(torch.eye(16)[:3], 30)
    centers = find_clusters(features, 3, num_starts=5)
    torch.testing.assert_close(centers.norm(dim=1), torch.ones(3), rtol=0, atol=1e-5)
    nearest = (features @ centers.mT).argmax(1)
    for cluster in range(3):
        mean = F.normalize(features[nearest == cluster].double().mean(0), dim=0)
        torch.testing.assert_close(centers[cluster].double(), mean, rtol=0, atol=1e-5)


def test_more_starts_are_never_worse() -> None:
    features = unit_features(2, 80)
    values = [objective(features, find_clusters(features, 8, seed=3, num_starts=starts)) for starts in (1, 2, 10)]
    assert values[0] <= values[1] + 1e-4
    assert values[1] <= values[2] + 1e-4
    assert values[0] < values[2] - 1e-2  # A single start is not the best for this seed.


def test_fewer_different_samples_than_clusters() -> None:
    features = torch.eye(3)[[0, 0, 0, 1, 1]]
    centers = find_clusters(features, 4)
    torch.testing.assert_close((features @ centers.mT).amax(1), torch.ones(5), rtol=0, atol=1e-3)


def test_the_seed_decides() -> None:
    features = unit_features(4, 200)
    before = torch.random.get_rng_state()
    first = find_clusters(features, 7, seed=1)
    assert torch.equal(find_clusters(features, 7, seed=1), first)
    assert not torch.equal(find_clusters(features, 7, seed=2), first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_and_layouts(dtype: torch.dtype) -> None:
    features = unit_features(5, 30).to(dtype)
    strided = torch.stack([features, -features], dim=2)[..., 0].requires_grad_()
    assert not strided.is_contiguous()
    centers = find_clusters(strided, 3)
    assert centers.dtype == dtype
    assert not centers.requires_grad
    torch.testing.assert_close(centers, find_clusters(features.float(), 3).to(dtype))


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.zeros(3, 2), {}, "non-zero in every row"),
        (torch.eye(3).long(), {}, "a floating-point tensor of shape"),
        (torch.tensor([[1.0, float("nan")]]), {}, "`features` to be finite, but got 1 non-finite of 2 entries"),
        (torch.eye(3), {"num_clusters": 4}, "`num_clusters` to be at most 3, the number of samples, but got 4"),
        (torch.eye(3), {"num_clusters": True}, "`num_clusters` to be a positive int"),
        (torch.eye(3), {"num_starts": 0}, "`num_starts` to be a positive int"),
        (torch.eye(3), {"seed": 2**40}, "`seed` to be an int from 0"),
    ],
)
def test_bad_input_is_named(features: torch.Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(NetsimError, match=message):
        find_clusters(features, **{"num_clusters": 1, **options})

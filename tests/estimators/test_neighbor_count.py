"""Counts from one sum over the reference set, against sums over all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_netsim.estimators import NeighborCount
from lightning_netsim.jacobian.feature_batches import AbstractFeatureBatch, DenseFeatureBatch
from lightning_netsim.jacobian.features import GradientFeatures
from tests import cases, oracles


def gradient_batches(name: str, sizes: tuple[int, ...] = (3, 4)) -> tuple[list[AbstractFeatureBatch], Tensor]:
    model, inputs = cases.build(name)
    features = GradientFeatures(model, directions="all")
    return [features(part) for part in inputs.split(sizes)], oracles.dense_similarity(
        oracles.loop_jacobian(model, inputs), 1e-6
    )


def run(estimator: NeighborCount, queries: list[AbstractFeatureBatch], reference: list[AbstractFeatureBatch]) -> None:
    for batch in reference:
        estimator.update(batch)
    for batch in queries:
        estimator.query(batch)


@pytest.mark.parametrize("name", ["mlp_1", "mlp_10"])
def test_a_count_is_the_sum_over_the_row(name: str) -> None:
    batches, similarity = gradient_batches(name)
    estimator = NeighborCount()
    run(estimator, batches, batches)
    result = estimator.compute()
    assert result.num_reference == estimator.num_reference == 7
    torch.testing.assert_close(result.soft.double(), similarity.sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.fraction, result.soft / 7)
    assert estimator.squared_norm() == pytest.approx(float(similarity.sum()), abs=1e-5)


def test_queries_apart_from_the_reference() -> None:
    batches, similarity = gradient_batches("mlp_2")
    estimator = NeighborCount()
    run(estimator, batches[1:], batches[:1])
    torch.testing.assert_close(estimator.compute().soft.double(), similarity[3:, :3].sum(1), rtol=0, atol=1e-5)
    assert estimator.compute().num_reference == 3


def test_left_out_samples_count_for_nothing() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.6, 0.8], [torch.nan, 1.0]])
    batch = DenseFeatureBatch(vectors)
    estimator = NeighborCount()
    run(estimator, [batch], [batch])
    result = estimator.compute()
    wanted = torch.tensor([1.6, torch.nan, 1.6, torch.nan])
    torch.testing.assert_close(result.soft, wanted, equal_nan=True)
    assert result.num_reference == 2


def test_a_parameter_that_only_some_batches_use() -> None:
    class Batch(DenseFeatureBatch):
        def sum(self) -> dict[str, Tensor]:
            return {**super().sum(), "extra": torch.ones(1)}

    estimator = NeighborCount()
    estimator.update(DenseFeatureBatch(torch.eye(2)))
    estimator.update(Batch(torch.eye(2)))
    assert estimator.query(DenseFeatureBatch(torch.eye(2))).tolist() == [2, 2]


def test_a_query_without_a_reference_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one batch, but got none\. Call `update` before `query`"):
        NeighborCount().query(DenseFeatureBatch(torch.eye(2)))

"""Neighbors in batches, against sorted rows."""

from __future__ import annotations

import pytest
import torch

from lightning_netsim.estimators import KernelNeighbors
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
from lightning_netsim.jacobian.features import GradientFeatures
from tests import cases, oracles


@pytest.mark.parametrize("name", ["mlp_1", "mlp_10"])
def test_the_table_is_the_sorted_row(name: str) -> None:
    model, inputs = cases.build(name)
    features = GradientFeatures(model, directions="all")
    batches = [features(inputs[:3]), features(inputs[3:])]
    ids = [torch.tensor([10, 11, 12]), torch.tensor([20, 21, 22, 23])]
    neighbors = KernelNeighbors(k=4)
    for batch, own in zip(batches, ids, strict=True):
        vectors = neighbors.update(batch, own)
        assert vectors.shape[0] == len(own)
    for batch, own in zip(batches, ids, strict=True):
        neighbors.query(batch, own)
    result = neighbors.compute()
    assert neighbors.is_exact
    assert result.recall == 1.0
    similarity = oracles.dense_similarity(oracles.loop_jacobian(model, inputs), 1e-6).fill_diagonal_(-2)
    order = similarity.argsort(1, descending=True)[:, :4]
    torch.testing.assert_close(result.similarity.double(), similarity.gather(1, order), rtol=0, atol=1e-5)
    assert torch.equal(result.index, torch.cat(ids)[order])


def test_left_out_samples_are_nobodys_neighbor() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    batch, ids = DenseFeatureBatch(vectors), torch.arange(4)
    neighbors = KernelNeighbors(k=3)  # Of four samples, each could have three neighbors.
    neighbors.update(batch, ids)
    result = neighbors.query(batch, ids)
    assert result.index.tolist() == [[2, 3, -1], [-1, -1, -1], [3, 0, -1], [2, 0, -1]]
    assert bool(result.similarity[1].isnan().all())
    nothing = neighbors.query(DenseFeatureBatch(torch.zeros(2, 2)))
    assert nothing.index.tolist() == [[-1, -1, -1]] * 2
    assert neighbors.compute().index.shape == (6, 3)


@pytest.mark.parametrize(("k", "excluded", "most"), [(3, True, 2), (4, False, 3)])
def test_more_neighbors_than_samples_are_refused(k: int, excluded: bool, most: int) -> None:
    batch, ids = DenseFeatureBatch(torch.eye(3)), torch.arange(3)
    neighbors = KernelNeighbors(k=k)
    neighbors.update(batch, ids)
    with pytest.raises(ValueError, match=f"Expected `k` to be at most {most}, the number of other samples .* but got {k}"):
        neighbors.query(batch, ids if excluded else None)


def test_recall_of_an_approximate_table_is_what_was_measured() -> None:
    batch, ids = DenseFeatureBatch(torch.eye(9)), torch.arange(9)
    for factory, exact in [("HNSW8", False), ("Flat", True)]:
        neighbors = KernelNeighbors(2, factory)
        neighbors.update(batch, ids)
        answer = neighbors.query(batch, ids)
        assert neighbors.is_exact == exact
        assert answer.recall == (1.0 if exact else None)
        assert neighbors.compute(0.75).recall == (1.0 if exact else 0.75)

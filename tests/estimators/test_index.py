"""The neighbor index against the exact neighbors, and its file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_netsim._checks import NetsimError
from lightning_netsim.estimators.index import NeighborIndex
from lightning_netsim.functional import kernel_neighbors


def unit_features(seed: int, n: int, k: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    features = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features, dim=1).to(dtype)


def filled(features: Tensor, index_factory: str = "Flat", batch_size: int = 1000) -> NeighborIndex:
    index = NeighborIndex(features.shape[1], index_factory)
    for block in features.split(batch_size):
        index.add(block)
    return index


def test_flat_index_finds_the_exact_neighbors() -> None:
    features = unit_features(0, 200)
    index = filled(features, batch_size=33)
    assert len(index) == 200
    found, exact = index.search(features, 10, exclude=torch.arange(200)), kernel_neighbors(features, k=10)
    assert torch.equal(found.index, exact.index)
    torch.testing.assert_close(found.similarity, exact.similarity, rtol=0, atol=1e-6)
    assert (found.similarity.dtype, found.index.dtype, found.recall) == (torch.float32, torch.int64, 1.0)
    others = unit_features(2, 7)
    others[3] = features[20]  # Samples of another set may find any.
    found = index.search(others, 200)
    assert torch.equal(found.index, kernel_neighbors(others, features, k=200).index)
    assert found.index[3, 0] == 20


@pytest.mark.parametrize(("num_queries", "width"), [(1, 16), (19, 257), (300, 16)])  # faiss takes another way from 20 on.
def test_duplicates_tie_by_id(num_queries: int, width: int) -> None:
    rows = torch.randint(20, (300,), generator=torch.Generator().manual_seed(3))
    features = unit_features(3, 20, width)[rows]
    found = filled(features).search(features[:num_queries], 30, exclude=torch.arange(num_queries))
    exact = kernel_neighbors(features, k=30)
    assert torch.equal(found.index, exact.index[:num_queries])


def test_duplicates_tie_by_id_where_faiss_rounds_them_differently() -> None:
    # At these sizes faiss gives duplicates similarities that differ by up to 3e-7, on some processors at least.
    features = unit_features(16, 30, 1097).repeat(28, 1)
    found = filled(features).search(features[:169], 40, exclude=torch.arange(169))
    exact = kernel_neighbors(features[:169], features, k=41)
    for row in range(169):
        wanted = [i for i in exact.index[row].tolist() if i != row][:40]
        assert found.index[row].tolist() == wanted


def test_a_tie_larger_than_what_is_fetched_first_still_gives_the_lowest_ids() -> None:
    features = torch.ones(60, 4) / 2
    index = NeighborIndex(4)
    index.add(features, ids=torch.arange(60).flip(0) * 10)
    found = index.search(features[:2], 3, exclude=torch.tensor([0, 500]))
    assert found.index.tolist() == [[10, 20, 30], [0, 10, 20]]


def test_ids_are_the_callers_and_self_is_removed_by_id() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    index = NeighborIndex(2)
    index.add(features[:2], ids=torch.tensor([70, 5]))
    index.add(features[2:], ids=torch.tensor([1, 30]))
    assert index.ids.tolist() == [70, 5, 1, 30]
    own = index.search(features, 3, exclude=torch.tensor([70, 5, 1, 30]))
    assert own.index.tolist() == [[5, 1, 30], [70, 1, 30], [5, 70, 30], [1, 5, 70]]
    absent = index.search(features[:1], 3, exclude=torch.tensor([999]))
    assert absent.index.tolist() == [[5, 70, 1]]
    torch.testing.assert_close(absent.similarity, torch.tensor([[1.0, 1.0, 0.8]]))


def test_left_out_queries_have_no_neighbors() -> None:
    features = unit_features(4, 20)
    query = features.clone()
    query[1], query[2], query[3, 0] = 0, math.nan, math.inf
    found = filled(features).search(query, 4, exclude=torch.arange(20))
    assert found.index[1:4].tolist() == [[-1] * 4] * 3
    assert bool(found.similarity[1:4].isnan().all())
    assert torch.equal(found.index[4:], kernel_neighbors(features, k=4).index[4:])
    nothing = filled(features).search(query[1:4], 4)
    assert nothing.index.tolist() == [[-1] * 4] * 3
    assert filled(features).search(query[:0], 4).index.shape == (0, 4)


@pytest.mark.parametrize("index_factory", ["HNSW32", "IVF8,Flat", "PCA12,Flat"])
def test_other_factories_find_most_neighbors(index_factory: str) -> None:
    features = unit_features(7, 600)
    found = filled(features, index_factory, batch_size=100).search(features, 10, exclude=torch.arange(600))
    exact = kernel_neighbors(features, k=10)
    recall = (found.index.unsqueeze(2) == exact.index.unsqueeze(1)).any(2).double().mean()
    assert recall > 0.5
    assert found.recall is None
    assert not bool((found.index == torch.arange(600).unsqueeze(1)).any())
    finite = found.similarity.nan_to_num(-2.0)
    assert bool((finite[:, :-1] >= finite[:, 1:]).all())
    assert torch.equal(found.index < 0, found.similarity.isnan())


def test_trained_index_waits_for_all_samples_and_copies_them() -> None:
    features = unit_features(8, 64)
    index, buffer = NeighborIndex(16, "IVF8,Flat"), torch.empty(4, 16)
    for block in features.split(4):  # Each batch is smaller than the number of lists.
        buffer.copy_(block)
        index.add(buffer)
    assert len(index) == 64
    whole = filled(features, "IVF8,Flat", batch_size=64)
    first, second = (one.search(features, 3, exclude=torch.arange(64)) for one in (index, whole))
    assert torch.equal(first.index, second.index)
    index.add(features[:4] * 0.5)
    assert index.search(features[:4], 64, exclude=torch.arange(4)).index.shape == (4, 64)


def test_too_few_samples_to_train() -> None:
    index = filled(unit_features(9, 10), "IVF64,Flat")
    with pytest.raises(NetsimError, match="Expected `index_factory` to be trainable on 10 samples, but got 'IVF64,Flat'"):
        index.search(unit_features(9, 1), 2)


@pytest.mark.parametrize("index_factory", ["Nonsense", "LSH", "IDMap,Flat", 3])
def test_unknown_factory_is_refused_at_construction(index_factory: str) -> None:
    with pytest.raises(NetsimError, match=r"Expected `index_factory` to be a faiss index_factory string .* Use 'Flat'"):
        NeighborIndex(16, index_factory)


FOUR = unit_features(10, 4)
NAN, ZERO = (FOUR.index_fill(0, torch.tensor(2), value) for value in (math.nan, 0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: NeighborIndex(0), "`dim` to be a positive int"),
        (lambda index: index.search(FOUR, 4, exclude=torch.arange(4)), "`k` to be at most 3"),
        (lambda index: index.search(FOUR, 5), "`k` to be at most 4"),
        (lambda index: index.search(FOUR[:, 1:], 2), r"`features` to be of shape \(n, 16\)"),
        (lambda index: index.search(FOUR, 2, exclude=torch.arange(3)), "`exclude` to be of the same size"),
        (lambda index: index.add(FOUR, ids=torch.rand(4)), "`ids` to be an int64 tensor"),
        (lambda index: index.add(FOUR, ids=torch.tensor([4, 5, 6, 3])), "`ids` to be at least 0, without repetition"),
        (lambda index: index.add(FOUR, ids=torch.tensor([4, 5, 6, 6])), "`ids` to be at least 0, without repetition"),
        (lambda index: index.add(FOUR, ids=torch.tensor([4, 5, 6, -1])), "`ids` to be at least 0, without repetition"),
        (lambda index: index.add(NAN, ids=torch.arange(4, 8)), "`features` to be finite"),
        (lambda index: index.add(ZERO, ids=torch.arange(4, 8)), "`features` to be non-zero in every row, but got 1 zero"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call: Callable[[NeighborIndex], object], message: str) -> None:
    index = filled(FOUR)
    with pytest.raises(NetsimError, match=f"Expected {message}"):
        call(index)
    assert len(index) == 4
    assert index.search(FOUR, 4).index.shape == (4, 4)


# The file


@pytest.mark.parametrize("index_factory", ["Flat", "IVF4,Flat"])
def test_save_and_load(tmp_path: Path, index_factory: str) -> None:
    features, ids = unit_features(11, 60), torch.randperm(1000)[:60]
    index = NeighborIndex(16, index_factory)
    index.add(features[:50], ids[:50])
    index.save(tmp_path / "some.index")
    assert [path.name for path in tmp_path.iterdir()] == ["some.index"]
    loaded = NeighborIndex.load(tmp_path / "some.index")
    assert (len(loaded), loaded.dim, loaded.index_factory) == (50, 16, index_factory)
    assert torch.equal(loaded.ids, ids[:50])
    for one in (index, loaded):
        one.add(features[50:], ids[50:])
    before, after = (one.search(features, 5, exclude=ids) for one in (index, loaded))
    assert torch.equal(before.index, after.index)
    assert torch.equal(before.similarity, after.similarity)
    assert before.recall == after.recall == (1.0 if index_factory == "Flat" else None)
    with pytest.raises(NetsimError, match="Expected `ids`"):
        loaded.add(features[:1], ids[:1])
    loaded.save(tmp_path / "some.index")
    assert len(NeighborIndex.load(tmp_path / "some.index")) == 60


def test_an_empty_index_can_be_saved(tmp_path: Path) -> None:
    NeighborIndex(16).save(tmp_path / "empty")
    loaded = NeighborIndex.load(tmp_path / "empty")
    assert (len(loaded), loaded.dim, loaded.ids.tolist()) == (0, 16, [])
    loaded.add(FOUR)
    assert loaded.search(FOUR, 1).index.flatten().tolist() == [0, 1, 2, 3]


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    filled(unit_features(14, 9)).save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    newer = data.replace(b'{"version": 1,', b'{"version": 2,')
    assert newer != data
    cases = {"empty": b"", "text": b"a table of neighbors, perhaps", "cut": data[:-7], "spliced": data[:100] + data[200:]}
    for name, content in {**cases, "newer": newer, "garbled": b"x" * 40 + data[40:]}.items():
        (tmp_path / name).write_bytes(content)
    faiss.write_index(faiss.IndexFlatIP(16), str(tmp_path / "plain"))
    for name in (*cases, "newer", "garbled", "plain", "missing", "."):
        with pytest.raises(NetsimError, match=r"Expected `path` to be a file written by `NeighborIndex.save`"):
            NeighborIndex.load(tmp_path / name)


def test_an_index_of_another_run_is_refused(tmp_path: Path) -> None:
    for name, fingerprint in (("named", "run 1, epoch 3"), ("unnamed", None)):
        index = NeighborIndex(16, fingerprint=fingerprint)
        index.add(unit_features(15, 9))
        index.save(tmp_path / name)
        assert NeighborIndex.load(tmp_path / name).fingerprint == fingerprint
    assert len(NeighborIndex.load(tmp_path / "named", "run 1, epoch 3")) == 9
    with pytest.raises(NetsimError, match=r"an index of 'run 2', but got '.*named', which is of 'run 1, epoch 3'\. Build"):
        NeighborIndex.load(tmp_path / "named", fingerprint="run 2")
    with pytest.raises(NetsimError, match=r"an index of 'run 2', but got '.*unnamed', which does not say of what it is"):
        NeighborIndex.load(tmp_path / "unnamed", fingerprint="run 2")


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled(unit_features(15, 9))
    index.save(tmp_path / "a.index")
    before = (tmp_path / "a.index").read_bytes()
    index.add(unit_features(16, 3))

    def interrupted(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(OSError, match="the disk is full"):
        index.save(tmp_path / "a.index")
    assert [path.name for path in tmp_path.iterdir()] == ["a.index"]
    assert (tmp_path / "a.index").read_bytes() == before
    with pytest.raises(NetsimError, match="Expected `path` to be in an existing directory"):
        index.save(tmp_path / "nowhere" / "a.index")

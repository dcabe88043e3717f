"""Clusters in place of classes: what is kept, when it is clustered, what a checkpoint holds, and what two processes share."""

from __future__ import annotations

import math
from io import BytesIO

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import NetsimError
from lightning_netsim.data.processes import Processes
from lightning_netsim.estimators import PseudoLabels

KEPT = 256  # For each cluster.


def blobs(size: int, shift: int = 0, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return embeddings of any length around three coordinate axes of eight, in random order, and the number of the blob."""
    labels = torch.arange(size) % 3
    labels = labels[torch.randperm(size)]
    length = 0.1 + 10 * torch.rand(size, 1)
    return length * (torch.eye(8)[labels + shift] + spread * torch.randn(size, 8)), labels


def refreshed(embeddings: Tensor, num_clusters: int = 3, seed: int = 0) -> PseudoLabels:
    labels = PseudoLabels(num_clusters, seed)
    labels.update(embeddings)
    labels.refresh()
    return labels


def centers(labels: PseudoLabels) -> Tensor:
    assert labels.centers is not None
    return labels.centers


def same_partition(one: Tensor, other: Tensor) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == one.unique().numel() == other.unique().numel()


def saved(state: dict[str, object]) -> dict[str, Tensor]:
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


def test_clusters_are_the_blobs_up_to_their_names() -> None:
    embeddings, truth = blobs(90)
    labels = PseudoLabels(3)
    for batch in embeddings.split([1, 40, 49]):
        assert labels.assign(batch).tolist() == [-1] * len(batch)
        labels.update(batch.requires_grad_())
    labels.refresh()
    torch.testing.assert_close(centers(labels), centers(refreshed(embeddings)))
    found = labels.assign(embeddings)
    assert found.dtype == torch.int64
    assert same_partition(found, truth)
    others, truth = blobs(30)
    assert same_partition(labels.assign(others), truth)
    torch.testing.assert_close(centers(labels).norm(dim=1), torch.ones(3), rtol=0, atol=1e-5)
    assert not centers(labels).requires_grad


def test_a_sample_belongs_to_the_center_with_the_highest_cosine() -> None:
    embeddings = torch.randn(60, 8)
    labels = refreshed(embeddings, 5)
    wanted = [
        max(range(5), key=lambda each: float(F.cosine_similarity(row, centers(labels)[each].double(), dim=0)))
        for row in embeddings.double()
    ]
    assert len(set(wanted)) == 5
    assert labels.assign(embeddings).tolist() == wanted
    assert labels.assign(embeddings * torch.logspace(-3, 3, 60).unsqueeze(1)).tolist() == wanted
    assert labels.assign(embeddings[:0]).shape == (0,)


@pytest.mark.parametrize("batch_size", [100, 2 * KEPT])
def test_the_latest_samples_are_kept(batch_size: int) -> None:
    # Two old blobs, then more samples than are kept of two others: the old ones are gone.
    axis = torch.eye(8)
    old, new = axis[torch.arange(4 * KEPT) % 2], axis[2 + torch.arange(6 * KEPT) % 2]
    labels = PseudoLabels(2)
    for part in (old, new):
        for batch in part.split(batch_size):
            labels.update(batch)
            held = sum(map(len, labels._kept))
            assert held < 2 * KEPT + batch_size
    assert held >= 2 * KEPT
    labels.refresh()
    found = centers(labels)[labels.assign(axis[2:4])]
    torch.testing.assert_close(found, axis[2:4], rtol=0, atol=1e-4)
    assert not labels._kept


def test_clusters_keep_their_numbers() -> None:
    embeddings, _ = blobs(300)
    labels = refreshed(embeddings)
    before = labels.assign(embeddings)
    for seed in range(1, 4):
        labels.seed = seed  # Which alone would number them anew.
        labels.update(embeddings[torch.randperm(300)])
        labels.refresh()
        assert torch.equal(labels.assign(embeddings), before)


def test_an_epoch_begins_once() -> None:
    labels = PseudoLabels(3)
    embeddings = blobs(30)[0]
    for epoch in (0, 0, 0):
        labels.begin_epoch(epoch)
        labels.update(embeddings)
    assert labels.centers is None
    state = saved(labels.state_dict())
    labels.begin_epoch(1)
    resumed = PseudoLabels(3)
    resumed.load_state_dict(state)
    resumed.begin_epoch(1)
    assert torch.equal(centers(resumed), centers(labels))


def test_too_few_samples_leave_the_centers() -> None:
    labels = PseudoLabels(3)
    embeddings = blobs(30)[0]
    labels.update(embeddings)
    labels.refresh()
    before = centers(labels).clone()
    labels.update(torch.eye(8)[5:7])
    labels.refresh()
    labels.refresh()
    assert torch.equal(centers(labels), before)
    labels.update(torch.eye(8)[4:7])  # As many as clusters are enough, and what came before is not among them.
    labels.refresh()
    assert labels.assign(torch.eye(8)[4:7]).sort().values.tolist() == [0, 1, 2]


def test_rows_without_a_direction_are_left_out() -> None:
    embeddings = torch.randn(40, 8)
    broken = torch.cat([embeddings[:10], torch.zeros(20, 8), torch.full((20, 8), math.nan), embeddings[10:]])
    broken = torch.cat([broken, embeddings[:3] * math.inf])
    torch.testing.assert_close(centers(refreshed(broken, 4)), centers(refreshed(embeddings, 4)))
    nothing = PseudoLabels(2)
    nothing.update(broken[10:50])
    with pytest.raises(NetsimError, match="at most 0, the number of samples so far"):
        nothing.refresh()


def test_a_checkpoint_holds_the_centers() -> None:
    embeddings, _ = blobs(30)
    labels = refreshed(embeddings)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), PseudoLabels(3))  # As a part of another module.
    module.load_state_dict(saved(torch.nn.Sequential(torch.nn.Linear(8, 8), labels).state_dict()))
    assert torch.equal(module[1].assign(embeddings), labels.assign(embeddings))
    labels.load_state_dict(saved(PseudoLabels(3).state_dict()))  # From before the first refresh.
    assert labels.assign(embeddings).tolist() == [-1] * 30


def test_bad_input_is_named() -> None:
    for number, message in ((0, "a positive int"), (True, "a positive int"), (1, "at least 2")):
        with pytest.raises(NetsimError, match=f"Expected `num_clusters` to be {message}"):
            PseudoLabels(number)
    embeddings = blobs(9)[0]
    for labels in (PseudoLabels(3), refreshed(embeddings)):
        with pytest.raises(NetsimError, match=r"Expected `embeddings` to be a floating-point tensor of shape \(B, h\)"):
            labels.assign(embeddings[0])
        with pytest.raises(NetsimError, match="Expected `embeddings` to be finite, but got 8 non-finite of 72 entries"):
            labels.assign(torch.where(torch.arange(9).unsqueeze(1) == 4, math.nan, embeddings))
    with pytest.raises(NetsimError, match="of the same size as `centers`"):
        labels.assign(torch.eye(4))
    labels.update(torch.eye(3))
    with pytest.raises(NetsimError, match="of the same size as `earlier embeddings`"):
        labels.update(torch.eye(4))
    few = PseudoLabels(3)
    few.update(torch.eye(8)[:2])
    with pytest.raises(NetsimError, match="`num_clusters` to be at most 2, the number of samples so far, but got 3"):
        few.refresh()


# Two processes


def test_processes_cluster_what_all_have_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, found = torch.randn(40, 8).split([15, 25]), {}

    class Both(Processes):
        def gather(self, value: list[Tensor]) -> list[list[Tensor]]:  # type: ignore[override]
            return [value if rank == self.rank else [F.normalize(parts[rank], dim=1)] for rank in (0, 1)]

        def broadcast(self, value: Tensor | None) -> Tensor:  # type: ignore[override]
            return found["first"] if value is None else value  # type: ignore[no-any-return]

    for rank, name in enumerate(("first", "second")):
        monkeypatch.setattr(Processes, "current", lambda rank=rank: Both(rank, 2))
        found[name] = centers(refreshed(parts[rank], 4))
    monkeypatch.undo()
    alone = refreshed(torch.cat(parts), 4)
    torch.testing.assert_close(found["first"], centers(alone))
    assert torch.equal(found["first"], found["second"])

"""The measured recall against the recall counted from the exact table."""

from __future__ import annotations

import pytest
import torch

from lightning_netsim.measurement.candidates import RecallAudit

ALL = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
SIMILARITY = ALL @ ALL.mT
IDS = torch.arange(30) * 2 + 100


def audit(chosen: torch.Tensor, excluded: bool = True, parts: int = 3) -> RecallAudit:
    made = RecallAudit(IDS[chosen] if excluded else torch.full_like(chosen, -1))
    # In an order of its own: the ids say which is which.
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    for part in order.chunk(parts):
        made.offer(SIMILARITY[chosen][:, part], IDS[part])
    return made


def recall_of(made: RecallAudit, index: torch.Tensor) -> float:
    return float(made.hits(index).float().mean())


def error_of(made: RecallAudit, index: torch.Tensor, similarity: torch.Tensor) -> float:
    return float(made.squared_errors(index, similarity).mean().sqrt())


def true_rows(chosen: torch.Tensor, k: int, excluded: bool = True) -> torch.Tensor:
    rows = SIMILARITY[chosen].clone()
    if excluded:
        rows[torch.arange(len(chosen)), chosen] = -2
    return rows.topk(k).indices


@pytest.mark.parametrize("excluded", [True, False])
def test_recall_is_the_share_of_true_neighbors(excluded: bool) -> None:
    chosen, k = torch.tensor([3, 8, 20, 21, 29]), 4
    wanted = true_rows(chosen, k, excluded)
    generator = torch.Generator().manual_seed(2)
    table = wanted.clone()
    for row in range(len(chosen)):  # Replace one, two, ... of the neighbors by others.
        wrong = [c for c in torch.randperm(30, generator=generator).tolist() if c not in wanted[row] and c != chosen[row]]
        table[row, : row % 4] = torch.tensor(wrong[: row % 4], dtype=torch.int64)
    recall = sum(len(set(t) & set(w)) for t, w in zip(table.tolist(), wanted.tolist(), strict=True)) / (k * len(chosen))
    assert 0 < recall < 1
    made = audit(chosen, excluded)
    assert recall_of(made, IDS[table]) == pytest.approx(recall)
    assert recall_of(made, IDS[wanted]) == 1.0
    assert recall_of(audit(chosen, excluded, parts=1), IDS[table]) == pytest.approx(recall)


def test_itself_is_no_neighbor() -> None:
    chosen = torch.tensor([5, 6])
    wanted = true_rows(chosen, 3)
    # With the query itself counted as a neighbor, the third true one would count as wrong.
    assert recall_of(audit(chosen, excluded=True), IDS[wanted]) == 1.0
    assert recall_of(audit(chosen, excluded=False), IDS[wanted]) == pytest.approx(4 / 6)


def test_similarity_error() -> None:
    chosen = torch.tensor([1, 2])
    wanted = true_rows(chosen, 3)
    exact = SIMILARITY[chosen].gather(1, wanted)
    made = audit(chosen)
    assert error_of(made, IDS[wanted], exact) == pytest.approx(0, abs=1e-12)
    off = exact + torch.tensor([[0.1, -0.1, 0.1], [0.3, -0.3, 0.3]])
    assert error_of(made, IDS[wanted], off) == pytest.approx(0.05**0.5)


def test_ties_are_as_good_as_each_other() -> None:
    made = RecallAudit(torch.tensor([0]))
    made.offer(torch.ones(1, 5), torch.arange(5))
    assert recall_of(made, torch.tensor([[3, 4]])) == 1.0


def test_what_an_approximate_index_did_not_find_counts_as_missed() -> None:
    chosen = torch.tensor([4, 9])
    wanted = IDS[true_rows(chosen, 4)]
    wanted[0, 3] = wanted[1, 3] = wanted[1, 2] = -1
    made = audit(chosen)
    assert recall_of(made, wanted) == 5 / 8
    similarity = torch.full((2, 4), torch.nan, dtype=torch.float64)
    similarity[0, :3], similarity[1, :2] = SIMILARITY[4].topk(4).values[1:], SIMILARITY[9].topk(3).values[1:]
    assert error_of(made, wanted, similarity) == pytest.approx(0, abs=1e-12)


def test_without_queries_there_is_nothing_to_say() -> None:
    made = RecallAudit(torch.zeros(0, dtype=torch.int64))
    assert made.hits(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
    assert made.squared_errors(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)).shape == (0,)

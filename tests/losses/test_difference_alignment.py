"""The alignment of differences as a module: what it draws, what it does not depend on, and how it is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import instantiate_class
from torch import Tensor

from lightning_netsim import NetsimError
from lightning_netsim.functional import difference_alignment_loss
from lightning_netsim.losses import DifferenceAlignmentLoss
from lightning_netsim.losses import difference_alignment as room
from tests import oracles

ROOM = room.__name__


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Return the pairs that are compared, one entry for each call from now on."""
    found: list[Tensor | None] = []

    def record(embeddings: Tensor, labels: Tensor, pairs: Tensor | None, *others: Any) -> Tensor:
        found.append(pairs)
        return difference_alignment_loss(embeddings, labels, pairs, *others)

    monkeypatch.setattr(room, "difference_alignment_loss", record)
    return found


def links(pairs: Tensor | None) -> list[tuple[int, int]]:
    assert pairs is not None
    return [(int(i), int(j)) for i, j in pairs.T]


@pytest.mark.parametrize("size", [2, 3, 20])
def test_a_chain_visits_each_sample_once(size: int, drawn: list[Tensor | None]) -> None:
    DifferenceAlignmentLoss()(random(0, size, 3))
    chain = links(drawn[0])
    assert [j for _, j in chain[:-1]] == [i for i, _ in chain[1:]]
    assert sorted([chain[0][0], *(j for _, j in chain)]) == list(range(size))


@pytest.mark.parametrize("number", [2, 5, 19, 100])
def test_a_chain_of_a_given_length(number: int, drawn: list[Tensor | None]) -> None:
    DifferenceAlignmentLoss(num_differences=number)(random(0, 20, 3))
    chain = links(drawn[0])
    assert len(chain) == min(number, 19)
    assert len({chain[0][0], *(j for _, j in chain)}) == len(chain) + 1


@pytest.mark.parametrize("number", [2, 7, 14])
def test_so_many_of_all_pairs(number: int, drawn: list[Tensor | None]) -> None:
    DifferenceAlignmentLoss(pairs="all", num_differences=number)(random(0, 6, 3))
    chosen = {frozenset(pair) for pair in links(drawn[0])}
    assert len(chosen) == len(links(drawn[0])) == number
    assert all(len(pair) == 2 and max(pair) < 6 for pair in chosen)


@pytest.mark.parametrize("arguments", [{}, {"num_differences": 4}, {"pairs": "all", "num_differences": 4}])
def test_draws_differ_from_call_to_call_and_follow_the_seed(arguments: dict[str, Any], drawn: list[Tensor | None]) -> None:
    x, one, same = random(1, 20, 3), *(DifferenceAlignmentLoss(seed=7, **arguments) for _ in range(2))
    first = [float(one(x)) for _ in range(3)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert [float(same(x)) for _ in range(3)] == first
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of the run are its own"
    assert [links(pairs) for pairs in drawn[:3]] == [links(pairs) for pairs in drawn[3:]]
    assert links(drawn[0]) != links(drawn[1]) != links(drawn[2])
    DifferenceAlignmentLoss(seed=8, **arguments)(x)
    assert links(drawn[6]) != links(drawn[0])


@pytest.mark.parametrize("norm", ["l1", "l2", "squared_l2"])
@pytest.mark.parametrize("difference", ["distance", "abs", "signed"])
def test_all_pairs_against_the_loop(difference: str, norm: str) -> None:
    x, labels = random(2, 7, 3).requires_grad_(), torch.tensor([0, 1, 0, 2, -1, 1, 3])
    pairs = [(i, j) for i in range(7) for j in range(i + 1, 7)]
    unit = x / x.square().sum(1, keepdim=True).sqrt()
    for normalize, embeddings in ((True, unit), (False, x)):
        wanted = oracles.difference_alignment(embeddings, labels, pairs, difference, norm)
        found = DifferenceAlignmentLoss(difference, norm, pairs="all", normalize=normalize)(x, labels)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
        mine, other = (torch.autograd.grad(value, x, retain_graph=True)[0] for value in (found, wanted))
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10 * float(other.abs().max()))


@pytest.mark.parametrize("number", [3, 10])
@pytest.mark.parametrize("norm", ["l2", "squared_l2"])
@pytest.mark.parametrize("difference", ["distance", "signed"])
def test_some_of_all_pairs_estimate_without_bias(difference: str, norm: str, number: int) -> None:
    x = random(3, 8, 3)
    wanted = float(DifferenceAlignmentLoss(difference, norm, pairs="all")(x))
    criterion = DifferenceAlignmentLoss(difference, norm, pairs="all", num_differences=number)
    draws = torch.stack([criterion(x) for _ in range(600)])
    error = float(draws.std()) / len(draws) ** 0.5
    assert 0 < error < 0.05 * wanted
    assert abs(float(draws.mean()) - wanted) < 4 * error


def test_the_size_of_each_embedding_does_not_count() -> None:
    x, scales = random(4, 6, 3), torch.tensor([1e-6, 0.3, 1.0, 2.0, 50.0, 1e6]).double()[:, None]
    for difference in ("distance", "abs", "signed"):
        values = [DifferenceAlignmentLoss(difference)(embeddings) for embeddings in (x, scales * x)]
        torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=0)
    bare = DifferenceAlignmentLoss(norm="l2", normalize=False)
    assert float(DifferenceAlignmentLoss(norm="l2", normalize=False)(2 * x)) == pytest.approx(2 * float(bare(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_vectors_of_zero_have_a_finite_gradient(dtype: torch.dtype) -> None:
    for difference in ("distance", "abs", "signed"):
        for norm in ("l1", "l2", "squared_l2"):
            x = torch.zeros(6, 3, dtype=dtype)
            x[4:] = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]])
            x.requires_grad_()
            loss = DifferenceAlignmentLoss(difference, norm, pairs="all")(x)
            assert loss.dtype == torch.float32
            loss.backward()
            assert x.grad is not None
            assert bool(torch.isfinite(x.grad).all())
            assert bool(x.grad[4:].any())


def test_autocast_changes_nothing() -> None:
    x, labels = random(5, 9, 4).float().requires_grad_(), torch.arange(9) % 4
    for difference in ("distance", "signed"):
        wanted = DifferenceAlignmentLoss(difference, "l2")(x, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = DifferenceAlignmentLoss(difference, "l2")(x, labels)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)
        assert torch.equal(torch.autograd.grad(found, x)[0], torch.autograd.grad(wanted, x)[0])


NOTHING: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "no sample": lambda x: (x[:0], None),
    "one sample": lambda x: (x[:1], None),
    "two samples": lambda x: (x[:2], None),
    "one class": lambda x: (x, torch.full((5,), 3)),
    "no label": lambda x: (x, torch.full((5,), -1)),
    "two labels": lambda x: (x, torch.tensor([-1, 0, -1, 1, -1])),
}


@pytest.mark.parametrize("arguments", [{}, {"pairs": "all"}, {"pairs": "all", "num_differences": 3}, {"num_differences": 3}])
@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_can_be_compared_there_is_a_zero_with_a_graph(name: str, arguments: dict[str, Any]) -> None:
    x = random(6, 5, 3).requires_grad_()
    loss = DifferenceAlignmentLoss(**arguments)(*NOTHING[name](x))
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_minimizing_it_makes_classes_equidistant() -> None:
    x, labels = random(7, 6, 5).requires_grad_(), torch.arange(6)
    criterion, optimizer = DifferenceAlignmentLoss(), torch.optim.Adam([x], lr=0.05)
    full = DifferenceAlignmentLoss(pairs="all")
    before = float(full(x, labels).detach())
    for _ in range(150):
        optimizer.zero_grad()
        criterion(x, labels).backward()
        optimizer.step()
    assert float(full(x, labels).detach()) < 0.02 * before
    unit = x.detach() / x.detach().norm(dim=1, keepdim=True)
    assert float(torch.pdist(unit).mean()) > 0.5, "they have not come together"


def test_copies_go_on_with_the_same_draws() -> None:
    x, criterion = random(8, 20, 3), DifferenceAlignmentLoss(seed=3, num_differences=4)
    criterion(x)
    others = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    wanted = [float(criterion(x)) for _ in range(3)]
    for other in others:
        assert [float(other(x)) for _ in range(3)] == wanted
        assert other.config() == criterion.config()


def test_its_arguments_make_it_again() -> None:
    arguments = {
        "difference": "abs",
        "norm": "l1",
        "pairs": "all",
        "num_differences": 5,
        "normalize": False,
        "seed": 4,
    }
    criterion = DifferenceAlignmentLoss(**arguments)  # type: ignore[arg-type]
    config = criterion.config()
    assert config == {"class_path": f"{ROOM}.DifferenceAlignmentLoss", "init_args": arguments}
    again = instantiate_class((), config)
    assert again.config() == config
    x = random(9, 8, 3)
    assert [float(again(x)) for _ in range(2)] == [float(criterion(x)) for _ in range(2)]
    assert "difference='abs', norm='l1', pairs='all', num_differences=5, normalize=False, seed=4" in repr(criterion)
    assert list(criterion.parameters()) == []


ROWS, LABELS = torch.eye(3), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DifferenceAlignmentLoss("signd"), "but got 'signd'. Did you mean 'signed'?"),
        (lambda: DifferenceAlignmentLoss(norm="l3"), "Expected `norm` to be one of 'l1', 'l2', 'squared_l2', but got 'l3'"),
        (lambda: DifferenceAlignmentLoss(pairs="any"), "Expected `pairs` to be one of 'chain', 'all', but got 'any'"),
        (lambda: DifferenceAlignmentLoss(num_differences=0), "Expected `num_differences` to be .*, but got 0"),
        (lambda: DifferenceAlignmentLoss(num_differences=2.5), "Expected `num_differences`"),  # type: ignore[arg-type]
        (lambda: DifferenceAlignmentLoss()(ROWS, LABELS[:2]), r"Expected `labels` .* but got torch.int64 of shape \(2,\)"),
        (lambda: DifferenceAlignmentLoss()(ROWS, LABELS.float()), "Expected `labels` .* but got torch.float32"),
        (lambda: DifferenceAlignmentLoss()(ROWS * float("nan")), "Expected `embeddings` to be finite"),
        (lambda: DifferenceAlignmentLoss()(ROWS[0]), r"Expected `embeddings` .* but got shape \(3,\)"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_some_of_all_pairs_with_labels_estimate_without_bias() -> None:
    z, labels = random(0, 4, 3), torch.tensor([0, 0, 0, 1])
    wanted = float(DifferenceAlignmentLoss(norm="l2", pairs="all")(z, labels))
    criterion = DifferenceAlignmentLoss(norm="l2", pairs="all", num_differences=2)
    draws = torch.stack([criterion(z, labels) for _ in range(500)])
    assert abs(float(draws.mean()) - wanted) < 4 * float(draws.std()) / 500**0.5


@pytest.mark.parametrize("pairs", ["chain", "all"])
def test_one_difference_cannot_be_compared(pairs: str) -> None:
    with pytest.raises(NetsimError, match="`num_differences` to be at least 2"):
        DifferenceAlignmentLoss(pairs=pairs, num_differences=1)


@pytest.mark.parametrize("seed", [0.5, "a", True, -1])
def test_a_seed_that_is_none(seed: Any) -> None:
    with pytest.raises(NetsimError, match="`seed` to be an int"):
        DifferenceAlignmentLoss(seed=seed)


@pytest.mark.parametrize("size", [1e-22, 1e20])
def test_size_of_embeddings_in_float32(size: float) -> None:
    z = random(0, 8, 3).float()
    wanted = DifferenceAlignmentLoss(pairs="all")(z)
    torch.testing.assert_close(DifferenceAlignmentLoss(pairs="all")(z * size), wanted, rtol=1e-3, atol=0)


def test_few_of_very_many_pairs_estimate_without_bias() -> None:
    z, labels = random(0, 60, 3), torch.arange(60) % 7 // 2  # Of about 1,300 pairs between classes.
    wanted = float(DifferenceAlignmentLoss(norm="l2", pairs="all")(z, labels))
    criterion = DifferenceAlignmentLoss(norm="l2", pairs="all", num_differences=20)
    draws = torch.stack([criterion(z, labels) for _ in range(600)])
    assert abs(float(draws.mean()) - wanted) < 4 * float(draws.std()) / 600**0.5
    for _ in range(20):
        pairs = criterion._draw(labels)
        assert pairs is not None
        first, second = pairs
        assert bool((labels[first] != labels[second]).all())
        assert len({(a, b) for a, b in pairs.T.tolist()}) == 20
        assert bool((first < second).all())

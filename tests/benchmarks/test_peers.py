from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import adapters, counting, peers
from benchmarks.adapters import Way
from benchmarks.problems import Problem, cifar
from tests.benchmarks.conftest import NOWHERE

SMALL = ["--images", "6", "--resnet-images", "4", "--matrix-images", "5", "--rounds", "1", "--threads", "1"]
MISSING = "needs `pip install -e .[bench]`"


def counted(count: Callable[[Problem], Tensor]) -> Callable[[Problem], Way]:
    return lambda problem: lambda: count(problem)


def refusing(problem: Problem) -> Way:
    raise NotImplementedError("no such layer")


@pytest.mark.parametrize("name", ["backpack", "backpack_norms", "opacus", "captum"])
def test_peers_count_the_same(problem: Problem, name: str) -> None:
    pytest.importorskip(name.partition("_")[0], reason=MISSING)
    rows = counting.exact_rows(problem)
    way = getattr(adapters, name)(problem)
    before = [parameter.clone() for parameter in problem.network.parameters()]
    for _ in range(2):  # Nothing is left over from the first time.
        torch.testing.assert_close(way().double(), rows @ rows.sum(0), rtol=1e-4, atol=1e-4)
    for parameter, value in zip(problem.network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


@pytest.mark.parametrize("problem", ["resnet20"], indirect=True)
def test_a_mode_that_leaves_batch_norm_out_is_found_wrong(problem: Problem) -> None:
    pytest.importorskip("captum", reason=MISSING)
    found = peers.check(peers.counts_of(problem), {"captum_sample_wise": adapters.captum_sample_wise})
    assert found.refused["captum_sample_wise"].startswith("wrong: off by")


def test_dattri_forms_the_same_matrix_once_its_projection_is_off(digits: Problem) -> None:
    pytest.importorskip("dattri", reason=MISSING)
    rows = counting.exact_rows(digits)
    torch.testing.assert_close(adapters.dattri(digits, batch_size=5)().double(), rows @ rows.T, rtol=0, atol=1e-4)
    hidden = adapters.dattri(digits, batch_size=5, hidden_projection=True)()
    assert (hidden.double() - rows @ rows.T).abs().max() > 1e-3


def test_frozen_batch_norm_is_batch_norm_in_evaluation_mode() -> None:
    problem = cifar(NOWHERE, 2)
    for module in problem.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    frozen = adapters.without_batch_norm(problem.network)
    names = [name for name, _ in problem.network.named_parameters()]
    assert [name for name, _ in frozen.named_parameters()] == names
    assert not list(frozen.buffers())
    torch.testing.assert_close(frozen.train()(problem.inputs()), problem.network(problem.inputs()))


def test_matrix_of_this_package_is_that_of_float64_gradients(problem: Problem) -> None:
    job = peers.matrix_of(problem)
    similarity = peers.similarity_matrix(problem)
    assert similarity.shape == (5, 5)
    assert job.error_of(similarity) < 1e-4
    assert job.error_of(similarity + 1e-3) == pytest.approx(1e-3, rel=0.1)


def test_what_is_wrong_or_refuses_is_not_timed(digits: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: name != "missing")
    found = peers.check(
        peers.counts_of(digits),
        {
            "right": counted(counting.loop),
            "wrong": counted(lambda problem: counting.loop(problem) * 1.01),
            "nan": counted(lambda problem: counting.loop(problem) * torch.nan),
            "refusing": refusing,
            "missing": refusing,
        },
    )
    assert list(found.right) == ["ours", "right"]
    assert found.refused == {
        "wrong": "wrong: off by 1.0e-02",
        "nan": "wrong: off by nan",
        "refusing": "refused: NotImplementedError: no such layer",
        "missing": "not installed",
    }
    records = peers.records(found, {"ours": 1.0, "right": 2.0})
    assert records["right"]["in_units_of_ours"] == 2.0
    assert [name for name, record in records.items() if not record["correct"]] == ["wrong", "nan", "refusing", "missing"]


def test_an_answer_that_turns_wrong_while_it_is_timed_is_noticed(digits: Problem) -> None:
    job = peers.counts_of(digits)
    found = peers.check(job, {"right": counted(counting.loop)})
    assert peers.time_right(job, found, rounds=1)[1]
    found.right["right"] = lambda: counting.loop(digits) * 1.01
    assert not peers.time_right(job, found, rounds=1)[1]


def test_this_package_must_be_right(digits: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "ours", lambda problem, **_: counting.loop(problem) * 1.01)
    with pytest.raises(RuntimeError, match=r"off by 1\.0e-02"):
        peers.check(peers.counts_of(digits), {})


def test_quick_run_goes_without_missing_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: not name.startswith(peers.PACKAGES))
    figures = peers.main(["--quick", *SMALL, "--data-dir", NOWHERE])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["all_correct"] is True
    for network in ("mnist", "resnet20"):
        for peer in ("vmap_two_pass", "vmap_jvp", "loop", "fastest"):
            assert figures[f"speedup_{peer}_{network}"] > 0
    assert "speedup_dattri" not in figures
    assert figures["peers"]["mnist"]["opacus"] == {"correct": False, "reason": "not installed"}


@pytest.mark.slow
def test_quick_run_times_all_peers(data_dir: Path) -> None:
    for package in peers.PACKAGES:
        pytest.importorskip(package, reason=MISSING)
    figures = peers.main(["--quick", "--data-dir", str(data_dir), "--threads", "1"])
    assert figures["all_correct"] is True
    assert peers.BOUNDS.keys() <= figures.keys()
    assert [name for name, record in figures["peers"]["mnist"].items() if not record["correct"]] == ["captum_sample_wise"]
    refused = {name for name, record in figures["peers"]["resnet20"].items() if not record["correct"]}
    assert refused == {"captum_sample_wise", "opacus_as_given"}

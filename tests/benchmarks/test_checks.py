"""What the benchmarks measure on, and what they check before they time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import counting, ctv, patch_mmd, scaling, similarity_cost, sketch, soft_counts
from benchmarks.problems import Problem, cifar, largest_difference, mnist, value_and_gradients
from lab.data import read_cifar
from lightning_netsim.functional import exact_patch_mmd, gaussian_kernel
from tests.benchmarks.conftest import NOWHERE


def test_problems_without_data_say_so_and_chunks_are_all_inputs() -> None:
    for make, parameters in ((mnist, 317_069), (cifar, 269_722)):
        problem = make(NOWHERE, 5, chunk_size=2)
        assert problem.what == "random images, initial weights"
        assert problem.num_parameters == parameters
        torch.testing.assert_close(torch.cat(list(problem.chunks())), problem.inputs())
        torch.testing.assert_close(torch.cat([batch for (batch,) in problem.loader()]), problem.inputs())
        pixels = problem.inputs() * torch.tensor(problem.std).view(-1, 1, 1) + torch.tensor(problem.mean).view(-1, 1, 1)
        torch.testing.assert_close((pixels * 255).round().to(torch.uint8), problem.images)


def test_training_is_the_same_each_time_and_leaves_the_global_generator(data_dir: Path) -> None:
    before = torch.get_rng_state()
    first, second, initial = (mnist(str(data_dir), 4, steps) for steps in (2, 2, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.what == "MNIST test images, weights after 2 training steps"
    for a, b, c in zip(*(some.network.parameters() for some in (first, second, initial)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize(("number", "part"), [(1000, "test"), (1001, "training")])
def test_resnet20_with_published_weights_knows_its_images(data_dir: Path, number: int, part: str) -> None:
    problem = cifar(str(data_dir), number)
    assert problem.what == f"CIFAR-10 {part} images, trained weights"
    labels = read_cifar(data_dir, part.removesuffix("ing"))[1][:100]
    with torch.no_grad():
        right = problem.network(problem.first(100).inputs()).argmax(1) == labels
    assert right.float().mean() > 0.87


def test_one_quantity_grows_at_a_time() -> None:
    options = scaling.main.read(["--few-images", "2", "--data-dir", NOWHERE])
    problems = {axis: [scaling.problem_of(axis, value, options) for value in scaling.VALUES[axis]] for axis in ("P", "T")}
    assert [problem.num_parameters for problem in problems["P"]] == [118_349, 582_029, 4_291_469]
    assert {problem.num_parameters for problem in problems["T"]} == {13_530}
    assert [problem.images.shape[-1] for problem in problems["T"]] == [14, 28, 56]


def test_wrong_counts_criteria_and_sketches_are_refused(digits: Problem) -> None:
    with pytest.raises(RuntimeError, match=r"disagree by 1\.0e-02"):
        soft_counts.largest_disagreement(digits, {"right": counting.ours, "wrong": lambda some: counting.ours(some) * 1.01})
    torch.manual_seed(0)
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])
    first, second = (similarity_cost.Step(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), images, labels) for _ in range(2))
    assert similarity_cost.largest_disagreement(first, first) == 0
    with pytest.raises(RuntimeError, match="disagree by"):
        similarity_cost.largest_disagreement(first, second)
    gradients, signs = nn.functional.normalize(torch.randn(6, 500), dim=1), torch.randint(0, 2, (500, 100)) * 2.0 - 1
    assert 0.02 < sketch.sketch_error(gradients @ signs / 10, gradients, width=100) < 0.2
    with pytest.raises(RuntimeError, match="are off by"):
        sketch.sketch_error(gradients @ signs, gradients, width=100)


def test_forms_of_the_norm_agree_or_are_refused() -> None:
    differences = ctv.random_differences(6, 3).double()
    assert ctv.largest_disagreement(ctv.FORMS.values(), differences) < 1e-14
    with pytest.raises(RuntimeError, match=r"disagree by 1\.0e-02"):
        ctv.largest_disagreement([ctv.by_pairs, lambda m, norm: 1.01 * ctv.by_pairs(m, norm)], differences)


def test_without_room_for_all_pairs_they_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.triu_indices(16, 16, offset=1)
    differences = ctv.random_differences(16, 5)
    assert ctv.pair_bytes(16, 5) == (differences[first] - differences[second]).nbytes
    options = ctv.main.read(["--differences", "24", "--coordinates", "3", "--rounds", "1"])
    free = 4 * 24 * 23 // 2 * 3 * 4
    monkeypatch.setattr(ctv.psutil, "virtual_memory", lambda: SimpleNamespace(available=free, total=free))
    figures = ctv.measure_norm(options)
    assert figures["speedup_pairwise"] is None
    assert figures["speedups"]["pairs"] == {}


def test_a_mean_of_draws_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    input, target = patch_mmd.natural_images(2, 36, seed=3).split(1)
    exact = float(exact_patch_mmd(2 * input - 1, 2 * target - 1, partial(gaussian_kernel, bandwidths=patch_mmd.BANDWIDTH)))
    draws = [float(patch_mmd.AutogradPatchMMD(1024, seed)(input, target)) for seed in range(10)]
    assert sum(draws) / 10 == pytest.approx(exact, rel=0.1)
    call = patch_mmd.AutogradPatchMMD.__call__
    monkeypatch.setattr(patch_mmd.AutogradPatchMMD, "__call__", lambda self, *images: call(self, *images) / 2)
    monkeypatch.setattr(patch_mmd, "EXACT_SIDE", 36)
    with pytest.raises(RuntimeError, match=r"autograd: the mean of 20 draws is off by [45]"):
        patch_mmd.measure_error(SimpleNamespace(features=512, draws=20))


def test_differences_are_those_of_value_and_gradients() -> None:
    x, y = torch.tensor([2.0]), torch.tensor([5.0])
    assert [float(some) for some in value_and_gradients(lambda a, b: (a * a * b).sum(), x, y)] == [20, 20, 4]
    assert len(value_and_gradients(lambda a, b: (a * b).sum(), x, y, of=1)) == 2
    functions = [lambda a, b: (a * b).sum(), lambda a, b: (a * b.detach()).sum() + 0 * b.sum()]
    assert largest_difference(functions, x, y) == 1  # The second has no gradient where the first has 2.

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.problems import cifar, mnist
from lab.networks import ResNet20
from tests.benchmarks.conftest import NOWHERE


def test_missing_data_are_replaced_and_it_is_said() -> None:
    assert mnist(NOWHERE, 3).what == "random images, initial weights"
    assert cifar(NOWHERE, 3).what == "random images, initial weights"
    torch.testing.assert_close(mnist(NOWHERE, 3).images, mnist(NOWHERE, 3).images)


def test_chunks_are_all_inputs_in_order() -> None:
    problem = cifar(NOWHERE, 5, chunk_size=2)
    torch.testing.assert_close(torch.cat(list(problem.chunks())), problem.inputs())
    torch.testing.assert_close(torch.cat([batch for (batch,) in problem.loader()]), problem.inputs())
    mean = problem.inputs() * torch.tensor(problem.std).view(3, 1, 1) + torch.tensor(problem.mean).view(3, 1, 1)
    torch.testing.assert_close((mean * 255).round().to(torch.uint8), problem.images)


def test_first_keeps_everything_else() -> None:
    problem = mnist(NOWHERE, 5, chunk_size=2)
    assert len(problem.first(3)) == 3
    assert problem.first(3).network is problem.network
    assert problem.num_parameters == 317_069


def test_training_is_the_same_each_time_and_leaves_the_global_generator(data_dir: Path) -> None:
    before = torch.get_rng_state()
    first, second = (mnist(str(data_dir), 4, steps=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.what == "MNIST test images, weights after 2 training steps"
    for a, b, initial in zip(
        first.network.parameters(), second.network.parameters(), mnist(str(data_dir), 4, 0).network.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert not torch.equal(a, initial)
        assert a.grad is None


@pytest.mark.parametrize(("number", "part"), [(1000, "test"), (1001, "training")])
def test_resnet20_with_published_weights_knows_its_images(data_dir: Path, number: int, part: str) -> None:
    if not (data_dir / "cifar10" / "cifar10_subset.npz").is_file():
        pytest.skip("needs cifar10/cifar10_subset.npz and weights/resnet20-12fca82f.th in the data directory")
    problem = cifar(str(data_dir), number)
    assert problem.what == f"CIFAR-10 {part} images, trained weights"
    assert problem.num_parameters == 269_722
    if part == "test":
        import numpy as np

        with np.load(data_dir / "cifar10" / "cifar10_subset.npz") as arrays:
            labels = torch.from_numpy(arrays["y_test"])
        with torch.no_grad():
            right = problem.network(problem.first(200).inputs()).argmax(1) == labels[:200]
        assert right.float().mean() > 0.87


def test_resnet20_halves_twice() -> None:
    network = ResNet20().eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert network.layer3(network.layer2(torch.zeros(1, 16, 32, 32))).shape == (1, 64, 8, 8)

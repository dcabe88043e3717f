"""Enforced and counted similarity: the sinusoid, first steps on MNIST, few labels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from experiments import few_labels, mnist_dynamics, toy_sinusoid
from experiments.few_labels import SCHEDULES, Data, Term, criterion
from lightning_netsim import JacobianOperator
from lightning_netsim.demos import sinusoid
from lightning_netsim.losses import GradientBatch, InvarianceLoss


def test_networks_trained_at_once_are_those_trained_apart() -> None:
    x, y = sinusoid(torch.arange(24) / 24, 1)
    targets = torch.stack([y, sinusoid(torch.arange(24) / 24, 2)[1]])
    together = toy_sinusoid.make_models(2, hidden_layers=2, seed=3)
    apart = copy.deepcopy(together)
    toy_sinusoid.train(together, x, targets, epochs=5, seed=7, batch_size=10)
    for run, model in enumerate(apart):
        start = copy.deepcopy(model.state_dict())
        optimizer, generator = model.configure_optimizers(), torch.Generator().manual_seed(7 + run)
        for _ in range(5):
            for batch in torch.randperm(24, generator=generator).split(10):
                optimizer.zero_grad()
                (model(x[batch]) - targets[run, batch]).abs().mean().backward()
                optimizer.step()
        for name, value in model.state_dict().items():
            moved = (value - start[name]).abs().max()
            # Adam divides by the root of the second moment: where a gradient is nearly 0, rounding decides. 1 % of the way.
            torch.testing.assert_close(together[run].state_dict()[name], value, rtol=0, atol=1e-2 * float(moved))


def test_curvature_is_that_of_the_graph() -> None:
    alpha = torch.rand(20, dtype=torch.float64).requires_grad_()
    y = torch.sin(2 * torch.pi * 3 * alpha)
    (first,) = torch.autograd.grad(y.sum(), alpha, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), alpha)
    expected = second.abs() / (1 + first.detach() ** 2) ** 1.5
    torch.testing.assert_close(toy_sinusoid.curvature(alpha.detach(), 3), expected)


def random_loss(network: str, variant: str, weight: float, size: int = 3) -> Tensor:
    model = mnist_dynamics.make_network(network, seed=0).double()
    operator = JacobianOperator(model, directions="contrast", create_graph=True)
    images = torch.rand(2 * size, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return mnist_dynamics.batch_loss(operator, images, torch.full((2 * size,), 4), variant, weight)


@pytest.mark.parametrize(("variant", "opposite"), [("cosine", "released"), ("ours", "ours_opposite")])
def test_opposite_variants_differ_in_the_sign_alone(variant: str, opposite: str) -> None:
    plain = random_loss("paper", "baseline", 0)
    terms = [random_loss("paper", name, 0.7) - plain for name in (variant, opposite)]
    assert abs(float(terms[0].detach())) > 0.1
    torch.testing.assert_close(terms[0], -terms[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", list(mnist_dynamics.NETWORKS))
def test_released_term_is_the_cosine_of_the_mean_gradients_of_the_masked_log_probabilities(network: str) -> None:
    found = random_loss(network, "released", 1.0) - random_loss(network, "baseline", 0)
    model = mnist_dynamics.make_network(network, seed=0).double()
    images = torch.rand(6, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.full((10,), -1 / 9, dtype=torch.float64)
    mask[4] = 1
    means = []
    for half in images.split(3):
        value = (model(half).log_softmax(1) * mask).sum(1).mean()
        means.append(torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))]))
    expected = means[0] @ means[1] / (means[0].norm() * means[1].norm())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-8)


def test_pairs_join_the_two_halves() -> None:
    model = mnist_dynamics.make_network("paper", seed=0).double()
    operator = JacobianOperator(model, directions="contrast", create_graph=True)
    batch = GradientBatch(operator, torch.rand(6, 1, 28, 28, dtype=torch.float64), torch.full((6,), 4))
    similarity = batch.similarity().detach()
    expected = -(similarity[0, 3] + similarity[1, 4] + similarity[2, 5]) / 3
    torch.testing.assert_close(mnist_dynamics.pair_criterion(batch).detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.fixture
def random_data() -> Data:
    images, labels = torch.rand(8000, 1, 28, 28), torch.arange(8000) % 10
    held_out = (images[:20], labels[:20], images[:20])
    return Data((images, labels), held_out, held_out)


def test_labeled_and_unlabeled_images_are_apart_and_fewer_are_among_more(random_data: Data) -> None:
    (ten, unlabeled), (two, _) = (random_data.choose(seed=3, per_class=number) for number in (10, 2))
    assert torch.equal(random_data.train[1][ten], torch.arange(10).unsqueeze(1).expand(10, 10))
    assert torch.equal(ten[:, :2], two)
    assert not set(ten.flatten().tolist()) & set(unlabeled.tolist())
    assert not torch.equal(ten, random_data.choose(seed=4, per_class=10)[0])


def test_invariance_of_two_halves_is_the_criterion_of_the_library() -> None:
    network, images, moved = few_labels.SmallNetwork(), torch.rand(6, 1, 28, 28), torch.rand(6, 1, 28, 28)
    operator = JacobianOperator(network, directions=1, create_graph=True)
    found = criterion(Term("invariance", 1.0), GradientBatch(operator, torch.cat([images, moved])), torch.Generator())
    expected = InvarianceLoss(lambda _: moved, per_sample=False)(GradientBatch(operator, images))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_one_side_moves_only_the_second_view() -> None:
    network, images = few_labels.SmallNetwork(), torch.rand(6, 1, 28, 28, requires_grad=True)
    operator = JacobianOperator(network, directions=1, create_graph=True)
    term = Term("invariance", 1.0, stop=True)
    (gradient,) = torch.autograd.grad(criterion(term, GradientBatch(operator, images), torch.Generator()), images)
    assert float(gradient[:3].abs().max()) == 0 < float(gradient[3:].abs().max())


def test_schedules() -> None:
    factors = {name: [Term("group", 2.0, name).factor(done) for done in (0.0, 0.25, 0.5)] for name in SCHEDULES}
    assert factors == {"constant": [2, 2, 2], "up": [0, 1, 2], "down": [2, 1.5, 1], "early": [2, 0, 0]}


def test_differences_of_arms_are_taken_seed_by_seed() -> None:
    rows = [{"clean": 0.5, "transformed": 0.3}, {"clean": 0.7, "transformed": 0.5}]
    better = [row | {"clean": row["clean"] + 0.1} for row in rows]
    found = few_labels.compare({"a": rows, "b": better}, {"b": ["a"]})
    assert found["a"]["clean"] == {"mean": 0.6, "sd": pytest.approx(0.1414), "se": 0.1}
    assert found["b"]["minus a"]["clean"] == {"mean": 0.1, "sd": 0.0, "se": 0.0}
    assert found["b"]["minus a"]["mean"]["mean"] == 0.05

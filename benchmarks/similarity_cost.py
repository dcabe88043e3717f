"""What a similarity criterion adds to the cost of a training step, and what the same exact criterion costs by torch.func.

    python benchmarks/similarity_cost.py [--quick] [--images 64] [--threads 2]

A step is forward, backward and Adam on the MNIST network of 317,069 parameters. That the exact criterion and its gradient are
the same by both ways is checked in float64 before anything is timed. The last line printed is one JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problems import mnist
from lab import Bound, Size, Study, medians, ratio, script, time_interleaved
from lightning_netsim import JacobianOperator
from lightning_netsim.functional import group_similarity_loss
from lightning_netsim.losses import (
    AbstractSimilarityLoss,
    DensityLoss,
    GradientBatch,
    GroupSimilarityLoss,
    InvarianceLoss,
    MinibatchSimilarityLoss,
    PairSimilarityLoss,
)

SIZES = {
    "images": Size(64, 32, "images in a batch"),
    "rounds": Size(21, 3, "timings of each method"),
    "steps": Size(300, 5, "training steps of the network before"),
}
BOUNDS = {
    "exact_ratio": Bound(5.5, 3.5, what="training step with the exact criterion of all pairs of a class, in plain steps"),
    "minibatch_ratio": Bound(4.0, 3.0, what="the same with the paper's criterion of two mini-batches"),
    "last_layer_ratio": Bound(1.3, what="the same with the exact criterion of the last layer's gradients"),
    "speedup_vmap": Bound(3.0, at_least=True, what="the exact criterion against per-sample gradients by `vmap(grad)`"),
}
WEIGHT = 0.1
LAST_LAYER = "9"
TOLERANCE = 1e-8


class Step:
    """A training step, with or without a criterion.

    Args:
        network: changed by the steps.
        images: shape (B, 1, 28, 28).
        labels: shape (B,).
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-6)

    def loss(self) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.network(self.images), self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


class Regularized(Step):
    """A step with a criterion of the library, from its one forward pass."""

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        criterion: AbstractSimilarityLoss,
        parameters: str = "trainable",
        groups: Tensor | None = None,
    ) -> None:
        super().__init__(network, images, labels)
        self.criterion, self.groups = criterion, labels if groups is None else groups
        self.operator = JacobianOperator(network, directions="contrast", parameters=parameters, create_graph=True)
        self.operator.prepare(images, labels)

    def loss(self) -> Tensor:
        batch = GradientBatch(self.operator, self.images, self.groups)
        return F.cross_entropy(batch.outputs, self.labels) + WEIGHT * self.criterion(batch)


class ByVmap(Step):
    """The exact criterion from gradients of single samples by torch.func, differentiated by autograd."""

    def loss(self) -> Tensor:
        parameters = dict(self.network.named_parameters())

        def contrast(values: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(self.network, dict(values), (image.unsqueeze(0),)).squeeze(0)
            given = logits.gather(0, label.unsqueeze(0)).squeeze(0)
            return given - (logits.sum() - given) / (len(logits) - 1)

        gradients = vmap(grad(contrast), in_dims=(None, 0, 0))(parameters, self.images, self.labels)
        rows = F.normalize(torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1), dim=1)
        return super().loss() + WEIGHT * group_similarity_loss(rows @ rows.mT, self.labels)


def steps_of(network: Callable[[], nn.Module], images: Tensor) -> dict[str, Step]:
    """Return each way of making a step by name, each with a network of its own."""
    labels = torch.arange(len(images)) % 10
    one = torch.zeros(len(images), dtype=torch.long)
    return {
        "plain": Step(network(), images, labels),
        "exact": Regularized(network(), images, labels, GroupSimilarityLoss()),
        "exact_one_label": Regularized(network(), images, labels, GroupSimilarityLoss(), groups=one),
        "minibatch": Regularized(network(), images, labels, MinibatchSimilarityLoss(), groups=one),
        "last_layer": Regularized(network(), images, labels, GroupSimilarityLoss(), LAST_LAYER),
        "pairs": Regularized(network(), images, labels, PairSimilarityLoss()),
        "density": Regularized(network(), images, labels, DensityLoss(0.3)),
        "invariance": Regularized(network(), images, labels, InvarianceLoss(lambda x: x.flip(-1), per_sample=False)),
        "vmap": ByVmap(network(), images, labels),
    }


def largest_disagreement(first: Step, second: Step) -> float:
    """Return by how much the losses of two steps and their gradients differ.

    Raises:
        RuntimeError: if it is above the tolerance.
    """
    losses = [step.loss() for step in (first, second)]
    mine, other = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(step.network.parameters()))])
        for loss, step in zip(losses, (first, second), strict=True)
    )
    largest = max(float((mine - other).norm() / other.norm()), float((losses[0] - losses[1]).detach().abs()))
    if not largest <= TOLERANCE:
        raise RuntimeError(f"Two ways to the same criterion disagree by {largest:.1e}, more than {TOLERANCE:g}.")
    return largest


@script(SIZES, BOUNDS, threads=2, page="benchmarks")
def main(study: Study) -> dict[str, Any]:
    """Check and time all ways."""
    options = study.options
    problem = mnist(options.data_dir, options.images, options.steps)
    state = problem.network.state_dict()

    def network() -> nn.Module:
        copy = type(problem.network)()
        copy.load_state_dict(state)
        return copy

    steps = steps_of(network, problem.inputs())
    print(f"Batches of {options.images} {problem.what}; {options.threads} threads.")
    exact = steps_of(lambda: network().double(), problem.inputs().double())
    error = largest_disagreement(exact["exact"], exact["vmap"])
    for step in steps.values():  # Twice: the first step of Adam makes its state.
        step()
    seconds, _ = time_interleaved(steps, options.rounds)
    ratios = {f"{name}_ratio": ratio(seconds, name, "plain") for name in steps if name != "plain"}
    typical = medians(seconds)
    rows = [(f"`{name}`", 1000 * value, ratios.get(f"{name}_ratio", 1.0)) for name, value in typical.items()]
    study.table("similarity_cost", ("criterion", "milliseconds", "in units of a plain step"), rows)
    print(f"\nThe exact criterion and its gradient agree with those by vmap to {error:.1e}.")
    return {
        **ratios,
        "speedup_vmap": ratio(seconds, "vmap", "exact"),
        "median_seconds": typical,
        "disagreement": error,
        "images": options.images,
        "num_parameters": problem.num_parameters,
        "rounds": options.rounds,
    }


if __name__ == "__main__":
    main()

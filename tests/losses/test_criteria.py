"""What all criteria share: names in files, copies, draws, precision, and refusals in one sentence."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import instantiate_class
from torch import Tensor, nn

from lightning_netsim import NetsimError, losses
from lightning_netsim.functional import gaussian_kernel
from lightning_netsim.jacobian import JacobianOperator
from lightning_netsim.losses import (
    AbstractCriterion,
    AbstractSimilarityLoss,
    ContrastiveLoss,
    DensityLoss,
    DifferenceAlignmentLoss,
    GradientBatch,
    InvarianceLoss,
    MetricLearningLoss,
    MMDLoss,
    PatchMMDLoss,
    RandomNetworkLoss,
    TangentLoss,
    VGGLoss,
)
from tests.functional.common import random


def a_transform(x: Tensor) -> Tensor:
    return x.flip(-1)


SHALLOW: dict[str, Any] = {"network": "vgg11", "layers": ["conv1_1", "conv2_1"]}
IMAGE_ARGUMENTS: dict[str, Any] = {"value_range": (-1.0, 1.0), "reduction": "none", "seed": 7}
WINDOWS: dict[str, Any] = {"window": 5, "stride": 4, "patch_size": 2, "remove_mean": True, "redraw": False}
MINED: dict[str, Any] = {"loss": "NTXentLoss", "loss_args": {"temperature": 0.2}, "miner": "TripletMarginMiner"}
#: Name -> (arguments, those that it has besides by default).
CRITERIA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ContrastiveLoss": ({"margin": 5.0}, {}),
    "MetricLearningLoss": ({**MINED, "miner_args": {"margin": 0.1}}, {}),
    "DifferenceAlignmentLoss": (
        {"difference": "abs", "norm": "l1", "pairs": "all", "num_differences": 5, "normalize": False, "seed": 4},
        {},
    ),
    "MMDLoss": (
        {"bandwidths": [0.5, 2.0], "num_features": 6, "seed": 4},
        {"kernel": "gaussian", "depth": 1, "unbiased": False},
    ),
    "PatchMMDLoss": (
        {"bandwidth": 0.5, "num_features": 8, "local_weight": 0.1, "local_bandwidth": 0.7, **WINDOWS, **IMAGE_ARGUMENTS},
        {},
    ),
    "RandomNetworkLoss": ({"depth": 2, "width": 8, "pooling": True, "normalize": False, **WINDOWS, **IMAGE_ARGUMENTS}, {}),
    "VGGLoss": ({"mode": "random", "normalize": False, "pooling": "average", **SHALLOW, **IMAGE_ARGUMENTS}, {"weights": None}),
    "PairSimilarityLoss": ({}, {}),
    "GroupSimilarityLoss": ({}, {}),
    "MinibatchSimilarityLoss": ({}, {}),
    "DensityLoss": ({"target": [0.1, 0.2], "reduction": "sum"}, {}),
    "InvarianceLoss": ({"transform": a_transform, "per_sample": False}, {}),
    "TangentLoss": ({"operators": [a_transform]}, {}),
}


def inputs_of(criterion: AbstractCriterion, seed: int = 0) -> tuple[Any, ...]:
    """Return what a criterion is called with."""
    if isinstance(criterion, AbstractSimilarityLoss):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        operator = JacobianOperator(model, create_graph=True)
        return (GradientBatch(operator, random(seed, 6, 4), torch.tensor([0, 1, 0, 1, 1, 2])),)
    if isinstance(criterion, losses.AbstractEmbeddingLoss):
        return random(seed, 9, 3), torch.arange(9) % 3
    if isinstance(criterion, MMDLoss):
        return random(seed, 9, 3), random(seed + 1, 8, 3)
    return random(seed, 2, 3, 16, 14).sigmoid(), random(seed + 1, 2, 3, 16, 14).sigmoid()


def test_every_criterion_is_in_the_table() -> None:
    kinds = {name for name in losses.__all__ if issubclass(getattr(losses, name), AbstractCriterion)}
    assert {name for name in kinds if not name.startswith("Abstract")} == set(CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_its_public_path_and_its_arguments_make_it_again(name: str) -> None:
    kind, (given, defaults) = getattr(losses, name), CRITERIA[name]
    criterion = kind(**given)
    config = criterion.config()
    assert config == {"class_path": f"lightning_netsim.losses.{name}", "init_args": {**defaults, **given}}
    package, _, attribute = config["class_path"].rpartition(".")
    assert getattr(importlib.import_module(package), attribute) is kind
    # Checkpoints and files of before name the module in which the class stands.
    former = {**config, "class_path": f"{kind.__module__}.{name}"}
    assert former["class_path"] != config["class_path"]
    for found in (config, former):
        again = instantiate_class((), found)
        assert type(again) is kind
        assert again.config() == config
        assert torch.equal(again(*inputs_of(again)), kind(**given)(*inputs_of(criterion)))
    assert repr(criterion).startswith(name)


@pytest.mark.parametrize(
    ("room", "names"),
    [
        ("contrastive", "ContrastiveLoss MetricLearningLoss"),
        ("difference_alignment", "DifferenceAlignmentLoss"),
        ("mmd", "MMDLoss"),
        ("patch_mmd", "PatchMMDLoss"),
        ("random_network", "RandomNetworkLoss"),
        ("similarity", "PairSimilarityLoss GroupSimilarityLoss MinibatchSimilarityLoss DensityLoss InvarianceLoss TangentLoss"),
        ("vgg", "VGGLoss"),
    ],
)
def test_former_paths_are_still_read(room: str, names: str) -> None:
    for name in names.split():
        path = f"lightning_netsim.losses.{room}.{name}"
        criterion = instantiate_class((), {"class_path": path, "init_args": CRITERIA[name][0]})
        assert type(criterion) is getattr(losses, name)


class Own(DensityLoss):
    """A criterion of somebody else, who also shows it elsewhere."""


def test_a_criterion_of_somebody_else_is_named_by_its_module() -> None:
    assert Own(0.3).config() == {"class_path": f"{__name__}.Own", "init_args": {"target": 0.3, "reduction": "mean"}}


#: Those that draw: name -> arguments.
DRAWING: dict[str, tuple[type[AbstractCriterion], dict[str, Any]]] = {
    "differences along a chain": (DifferenceAlignmentLoss, {"num_differences": 4}),
    "some differences": (DifferenceAlignmentLoss, {"pairs": "all", "num_differences": 4}),
    "MMD": (MMDLoss, {"num_features": 16}),
    "patch MMD": (PatchMMDLoss, {"num_features": 32, "window": 6, "stride": 4}),
    "random network": (RandomNetworkLoss, {"width": 16, "window": 6, "stride": 4}),
    "VGG": (VGGLoss, {"mode": "redrawn", **SHALLOW}),
}


@pytest.mark.parametrize("name", DRAWING)
def test_draws_follow_the_seed_alone_and_copies_go_on_with_them(name: str) -> None:
    kind, arguments = DRAWING[name]
    criterion, same = kind(seed=4, **arguments), kind(seed=4, **arguments)
    inputs, state = inputs_of(criterion), torch.get_rng_state()
    values = [float(criterion(*inputs)) for _ in range(3)]
    assert len(set(values)) == 3
    assert [float(same(*inputs)) for _ in range(3)] == values
    assert float(kind(seed=5, **arguments)(*inputs)) not in values
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of the run are its own"
    if kind is not DifferenceAlignmentLoss:
        assert [float(criterion.eval()(*inputs)) for _ in range(2)] == [values[0]] * 2, "the first draw, in evaluation mode"
        assert float(kind(seed=4, **arguments).eval()(*inputs)) == values[0]
        assert float(criterion.train()(*inputs)) not in values, "evaluation does not turn the draws back"
    others = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    wanted = [float(criterion(*inputs)) for _ in range(2)]
    assert [[float(other(*inputs)) for _ in range(2)] for other in others] == [wanted] * 2
    assert list(criterion.parameters()) == list(criterion.buffers()) == []
    assert not criterion.state_dict()


PRECISE: dict[str, tuple[type[AbstractCriterion], dict[str, Any]]] = {
    **DRAWING,
    "contrastive": (ContrastiveLoss, {}),
    "of the library": (MetricLearningLoss, {"loss": "NTXentLoss"}),
    "differences": (DifferenceAlignmentLoss, {"difference": "signed", "norm": "l2", "pairs": "all"}),
    "exact MMD": (MMDLoss, {}),
    "arc-cosine MMD": (MMDLoss, {"kernel": "arc_cosine"}),
    "MMD++": (PatchMMDLoss, {"num_features": 32, "window": 6, "stride": 4, "remove_mean": True, "local_weight": 0.025}),
    "before pooling": (RandomNetworkLoss, {"width": 16, "pooling": False}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PRECISE)
def test_half_precision_is_raised_and_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    kind, arguments = PRECISE[name]
    first, *others = inputs_of(kind(**arguments))
    half = first.to(dtype).requires_grad_()
    rest = [x.to(dtype) if x.is_floating_point() else x for x in others]
    full = [x.float() if x.is_floating_point() else x for x in rest]
    wanted = kind(**arguments)(half.float(), *full)
    found = [kind(**arguments)(half, *rest)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found += [kind(**arguments)(half, *rest), kind(**arguments)(half.float(), *full)]
    for loss in found:
        assert loss.dtype == torch.float32
        assert torch.equal(loss, wanted)
    gradients = [torch.autograd.grad(loss, half)[0] for loss in (found[1], wanted)]
    assert gradients[0].dtype == dtype
    assert torch.equal(*gradients)
    assert bool(gradients[0].any())


ROWS, LABELS, ROW, IMAGE = torch.eye(3), torch.arange(3), torch.ones(3), torch.rand(1, 3, 20, 16)
PROXIES: dict[str, Any] = {"loss": "ProxyAnchorLoss", "loss_args": {"num_classes": 2, "embedding_size": 3}}
NAMES = "Expected `loss` to be one of 'AngularLoss', .*, but got"


class Foreign(nn.Module):
    """A criterion that no library has."""


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ContrastiveLoss(0), "`margin` to be a positive number, but got 0"),
    (lambda: ContrastiveLoss()(ROWS, LABELS[:2]), r"`labels` .* but got torch.int64 of shape \(2,\)"),
    (lambda: ContrastiveLoss()(ROWS / 0, LABELS), "`embeddings` to be finite"),
    (lambda: MetricLearningLoss("NTXentLos"), "but got 'NTXentLos'. Did you mean 'NTXentLoss'?"),
    (lambda: MetricLearningLoss("nn"), NAMES),
    (lambda: MetricLearningLoss("SelfSupervisedLoss"), NAMES),
    (lambda: MetricLearningLoss("BaseMetricLossFunction"), NAMES),
    (lambda: MetricLearningLoss("GenericPairLoss"), NAMES),
    (lambda: MetricLearningLoss("NTXentLoss", miner="MultiSimilarityMine"), "Did you mean 'MultiSimilarityMiner'?"),
    (lambda: MetricLearningLoss("ProxyAnchorLoss"), "`loss_args` to be the arguments of ProxyAnchorLoss"),
    (lambda: MetricLearningLoss("SubCenterArcFaceLoss", {}), "`loss_args` to be the arguments of SubCenterArcFaceLoss"),
    (lambda: MetricLearningLoss("NTXentLoss", {"temprature": 1}), r"got \{'temprature': 1\} \(.*temprature.*\)"),
    (lambda: MetricLearningLoss("NTXentLoss", miner_args={"epsilon": 1}), "`miner_args` to be given with a `miner`"),
    (lambda: MetricLearningLoss(Foreign(), {"a": 1}), r"`loss_args` .* but got \{'a': 1\} beside an object"),
    (lambda: MetricLearningLoss(3), "`loss` to be the name of a class, or an object .*, but got 3"),  # type: ignore[arg-type]
    (lambda: MetricLearningLoss(Foreign), "the class Foreign"),
    (lambda: MetricLearningLoss(**PROXIES)(ROWS, LABELS), "whole numbers below the 2 classes .* but got a label 2"),
    (lambda: DifferenceAlignmentLoss("signd"), "but got 'signd'. Did you mean 'signed'?"),
    (lambda: DifferenceAlignmentLoss(norm="l3"), "`norm` to be one of 'l1', 'l2', 'squared_l2', but got 'l3'"),
    (lambda: DifferenceAlignmentLoss(pairs="any"), "`pairs` to be one of 'chain', 'all', but got 'any'"),
    (lambda: DifferenceAlignmentLoss(num_differences=1), "`num_differences` to be at least 2"),
    (lambda: DifferenceAlignmentLoss(num_differences=2.5), "`num_differences`"),  # type: ignore[arg-type]
    (lambda: DifferenceAlignmentLoss(seed=-1), "`seed` to be an int"),
    (lambda: MMDLoss("gausian"), "`kernel` to be one of 'gaussian', 'arc_cosine', .* Did you mean 'gaussian'?"),
    (lambda: MMDLoss(bandwidths=[]), "`bandwidths` to be one or more positive numbers"),
    (lambda: MMDLoss(depth=0), "`depth` to be a positive int"),
    (lambda: MMDLoss(depth=2), "`depth` to be left out for another kernel than 'arc_cosine'"),
    (lambda: MMDLoss("arc_cosine", bandwidths=1.0), "`bandwidths` to be left out for another kernel than 'gaussian'"),
    (lambda: MMDLoss(num_features=5), "`num_features` to be an even number"),
    (lambda: MMDLoss("arc_cosine", num_features=8), "`num_features` to be None for other kernels .* but got 8"),
    (lambda: MMDLoss(gaussian_kernel, num_features=8), "`num_features` to be None"),
    (lambda: MMDLoss(seed=True), "`seed` to be an int"),
    (lambda: MMDLoss()(ROWS, ROWS[:0]), r"`y` to be one or more samples, but got shape \(0, 3\)"),
    (lambda: MMDLoss(unbiased=True)(ROWS, ROWS[:1]), "`y` to be two or more samples"),
    (lambda: MMDLoss(num_features=8)(ROWS, ROWS * torch.nan), "`y` to be finite"),
    (lambda: PatchMMDLoss(bandwidth=0.0), "`bandwidth` to be a positive number, but got 0.0"),
    (lambda: PatchMMDLoss(num_features=7), "`num_features` to be an even number, .* but got 7"),
    (lambda: PatchMMDLoss(patch_size=1, remove_mean=True), "`patch_size` to be at least 2 with `remove_mean`"),
    (lambda: PatchMMDLoss(window=8), r"`stride` to be at most `window` \(8\), but got 16"),
    (lambda: PatchMMDLoss(local_weight=-0.1), "`local_weight` to be a positive number, but got -0.1"),
    (lambda: PatchMMDLoss(local_bandwidth=-1.0), "`local_bandwidth` to be a positive number, but got -1.0"),
    (lambda: PatchMMDLoss()(IMAGE, IMAGE), "`window` to be at most 14, .* of 20×16, but got 32. Choose a smaller"),
    (lambda: PatchMMDLoss(reduction="sum"), "`reduction` to be one of 'mean', 'none', but got 'sum'"),
    (lambda: PatchMMDLoss(seed=0.5), "`seed` to be an int"),  # type: ignore[arg-type]
    (lambda: RandomNetworkLoss(depth=0), "`depth` to be a positive int, but got 0"),
    (lambda: RandomNetworkLoss(width=0), "`width` to be a positive int, but got 0"),
    (lambda: RandomNetworkLoss(patch_size=1, remove_mean=True), "`patch_size` to be at least 2 with `remove_mean`"),
    (lambda: RandomNetworkLoss(patch_size=17, pooling=False)(IMAGE, IMAGE), "`patch_size` to be at most"),
    (lambda: VGGLoss(mode="pretrained"), "`mode` to be one of 'trained', 'random', .* Did you mean 'trained'?"),
    (lambda: VGGLoss(), r"`weights` to be the file of a state dict .*, but got None\. Fetch one.*mode='redrawn'"),
    (lambda: VGGLoss("nowhere.pth", mode="redrawn"), r"`weights` to be None with mode 'redrawn', .* 'nowhere\.pth'"),
    (lambda: VGGLoss(Path("nowhere.pth")), r"torchvision's vgg19, but got 'nowhere\.pth' \(No such file or directory\)"),
    (lambda: VGGLoss(mode="random", network="vgg18"), "`network` to be one of .*, but got 'vgg18'. Did you mean"),
    (lambda: VGGLoss(mode="random", pooling="mean"), "`pooling` to be one of 'max', 'average', but got 'mean'"),
    (lambda: VGGLoss(mode="random", layers="conv1_2"), "`layers` to be a list of one or more layers"),
    (lambda: VGGLoss(mode="random", layers=[]), r"`layers` to be a list of one or more layers, but got \[\]"),
    (lambda: VGGLoss(mode="random", **SHALLOW)(IMAGE[:, :1], IMAGE[:, :1]), "but got 1 channels. Repeat a gray image"),
    (
        lambda: VGGLoss(mode="random", network="vgg11", layers=["conv4_1"])(IMAGE[..., :7], IMAGE[..., :7]),
        "`input` to be images of at least 8 pixels, which conv4_1 wants, but got 20×7. Leave out deeper layers",
    ),
    (lambda: DensityLoss(1.5), r"`target` to be numbers within \[0, 1\], but got 1.5"),
    (lambda: DensityLoss([0.4, 0.2]), r"a range \(low, high\) of shares, but got \[0.4, 0.2\]"),
    (lambda: DensityLoss("a"), "`target`"),  # type: ignore[arg-type]
    (lambda: DensityLoss(0.1, "max"), "`reduction` to be one of 'mean', 'sum', but got 'max'"),
    (lambda: InvarianceLoss("flip"), "`transform` to be a function of a tensor, but got str"),  # type: ignore[arg-type]
    (lambda: TangentLoss([]), r"`operators` to be a function of the inputs, or several, but got \[\]"),
    (lambda: TangentLoss([torch.ones_like, 3]), "`operators` to be a function"),  # type: ignore[list-item]
    (lambda: TangentLoss(3), "`operators`"),  # type: ignore[arg-type]
    (lambda: GradientBatch(JacobianOperator(nn.Linear(3, 2)), ROWS), "`operator` to be .* with `create_graph=True`"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_arguments_are_refused_in_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message) as caught:
        call()
    assert str(caught.value).startswith("Expected `")
    assert "\n" not in str(caught.value)

"""What the criteria of image pairs share: scale, draws, precision, pairs, and what they say of bad images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_netsim import NetsimError
from lightning_netsim.losses import AbstractImageLoss, PatchMMDLoss, RandomNetworkLoss, VGGLoss

WINDOWS = {"window": 6, "stride": 4}
MAKERS: dict[str, Callable[..., AbstractImageLoss]] = {
    "patch MMD": lambda **more: PatchMMDLoss(num_features=32, **WINDOWS, **more),
    "MMD++": lambda **more: PatchMMDLoss(num_features=32, remove_mean=True, local_weight=0.025, **WINDOWS, **more),
    "random network": lambda **more: RandomNetworkLoss(width=16, **WINDOWS, **more),
    "before pooling": lambda **more: RandomNetworkLoss(depth=2, width=16, pooling=False, **more),
    "with lengths": lambda **more: RandomNetworkLoss(depth=1, width=16, normalize=False, remove_mean=True, **WINDOWS, **more),
    "VGG": lambda **more: VGGLoss(mode="redrawn", network="vgg11", layers=["conv1_1", "conv2_1"], **more),
}
EACH = pytest.mark.parametrize("name", MAKERS)
REDRAWN = pytest.mark.parametrize("name", [name for name in MAKERS if name != "VGG"])


def images(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 16, 14), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Brightness(AbstractImageLoss):
    """The least that a subclass needs: the mean squared difference of what it is handed."""

    def __init__(self, value_range: Any = (0.0, 1.0), redraw: bool = True, reduction: str = "mean", seed: int = 0) -> None:
        super().__init__(value_range, redraw, reduction, seed)
        self.seen: list[tuple[float, float]] = []

    def compute(self, input: Tensor, target: Tensor) -> Tensor:
        self.seen.append((float(input.detach().min()), float(target.detach().max())))
        return (input - target).square().mean()


@pytest.mark.parametrize("value_range", [(0, 1), (-1.0, 1.0), (0, 255), [-3.0, 0.5]])
def test_images_are_scaled_from_their_range(value_range: Any) -> None:
    low, high = value_range
    criterion = Brightness(value_range)
    criterion(torch.full((1, 1, 2, 2), float(low)), torch.full((1, 1, 2, 2), float(high)))
    assert criterion.seen == [(-1.0, 1.0)]
    assert float(criterion(torch.full((1, 1, 2, 2), (low + high) / 2), torch.full((1, 1, 2, 2), float(high)))) == pytest.approx(
        1
    )


@EACH
def test_without_reduction_each_image_has_its_own(name: str) -> None:
    input, target = images(2, 3, 3, 16, 14), images(3, 3, 3, 16, 14)
    each = MAKERS[name](reduction="none")(input, target)
    assert each.shape == (3,)
    mean = MAKERS[name]()(input, target)
    assert mean.shape == ()
    torch.testing.assert_close(each.mean(), mean, rtol=1e-10, atol=0)
    for row in range(3):
        torch.testing.assert_close(MAKERS[name]()(input[row : row + 1], target[row : row + 1]), each[row], rtol=1e-10, atol=0)


@EACH
def test_one_image_is_compared_with_each_of_the_other_batch(name: str) -> None:
    one, several = images(4, 1, 3, 16, 14), images(5, 3, 3, 16, 14)
    for reduction in ("none", "mean"):
        for swap in (False, True):
            single, repeated = one.clone().requires_grad_(), one.clone().requires_grad_()
            pairs = [(single, several), (repeated.expand(3, -1, -1, -1), several)]
            found, wanted = (MAKERS[name](reduction=reduction)(*(pair[::-1] if swap else pair)) for pair in pairs)
            assert found.shape == ((3,) if reduction == "none" else ())
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
            gradients = [torch.autograd.grad(v.sum(), x)[0] for v, x in ((found, single), (wanted, repeated))]
            torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-14)


@EACH
def test_equal_images_give_exactly_zero_and_a_gradient_of_zeros(name: str) -> None:
    for image in (images(6), images(6).float(), torch.full((2, 3, 16, 14), 0.3), torch.zeros(2, 3, 16, 14)):
        for second in (image, image.clone(), image.to(memory_format=torch.channels_last)):
            x = image.clone().requires_grad_()
            for loss in (MAKERS[name]()(x, second), MAKERS[name](reduction="none")(x, second)):
                assert not loss.detach().any()
                (gradient,) = torch.autograd.grad(loss.sum(), x)
                assert not gradient.any()


@EACH
def test_constant_images_have_a_finite_gradient(name: str) -> None:
    for level in (0.0, 0.5, 1.0):
        for other in (torch.full((2, 3, 16, 14), 0.7), images(7).float()):
            x = torch.full((2, 3, 16, 14), level, requires_grad=True)
            loss = MAKERS[name]()(x, other)
            assert float(loss.detach()) >= 0
            (gradient,) = torch.autograd.grad(loss, x)
            assert bool(torch.isfinite(gradient).all())


@EACH
def test_gradients_of_both_sides(name: str) -> None:
    criterion = MAKERS[name]().eval()
    x, y = (images(seed, 1, 3, 10, 9).requires_grad_() for seed in (8, 9))
    assert torch.autograd.gradcheck(criterion, (x, y), fast_mode=True, atol=1e-6)


# Draws


@REDRAWN
def test_held_in_training_if_so_wished(name: str) -> None:
    input, target = images(12), images(13)
    criterion = MAKERS[name](seed=4, redraw=False)
    values = {float(criterion(input, target)) for _ in range(3)} | {float(criterion.eval()(input, target))}
    assert values == {float(MAKERS[name](seed=4)(input, target))}


@EACH
def test_two_calls_before_one_backward_pass(name: str) -> None:
    """Each keeps the draw that it was made with."""
    target, pair = images(27), MAKERS[name](seed=4)
    first, second = images(28).requires_grad_(), images(29).requires_grad_()
    (pair(first, target) + pair(second, target)).backward()
    alone = MAKERS[name](seed=4)
    for x in (first, second):
        (wanted,) = torch.autograd.grad(alone(x, target), x)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, wanted, rtol=1e-10, atol=1e-14)


@EACH
def test_evaluation_without_gradients_first_does_no_harm(name: str) -> None:
    """As a trainer that validates before it fits, in inference mode, perhaps in another precision."""
    criterion, x = MAKERS[name](), images(22).float()
    for dtype in (torch.float32, torch.float64):
        with torch.inference_mode():
            wanted = criterion.eval()(images(23).to(dtype), x.to(dtype))
        for mode in (False, True):
            y = images(23).to(dtype).requires_grad_()
            loss = criterion.train(mode)(y, x.to(dtype))
            if not mode:
                torch.testing.assert_close(loss.detach(), wanted.clone(), rtol=1e-5, atol=0)
            assert bool(torch.autograd.grad(loss, y)[0].any())


@EACH
def test_a_second_derivative_is_right_or_refused(name: str) -> None:
    x, target = images(24, 1, 3, 10, 9).requires_grad_(), images(25, 1, 3, 10, 9)
    criterion = MAKERS[name]().eval()
    direction = images(26, 1, 3, 10, 9)
    try:
        (gradient,) = torch.autograd.grad(criterion(x**2, target), x, create_graph=True)
        (found,) = torch.autograd.grad((gradient * direction).sum(), x)
    except (RuntimeError, NetsimError):
        return
    ends = []
    for step in (1e-5, -1e-5):
        moved = (x.detach() + step * direction).requires_grad_()
        ends.append(torch.autograd.grad(criterion(moved**2, target), moved)[0])
    wanted = (ends[0] - ends[1]) / 2e-5
    assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())


# Bad images


IMAGE = torch.rand(2, 3, 16, 14, generator=torch.Generator().manual_seed(1))
HOLED = IMAGE.clone()
HOLED[0, 0, 0, :2] = torch.tensor([math.nan, math.inf])


@pytest.mark.parametrize(
    ("input", "target", "message"),
    [
        (IMAGE[:0], IMAGE, r"Expected `input` to be one or more images, but got shape \(0, 3, 16, 14\)"),
        (IMAGE[0], IMAGE, r"`input` to be images of shape \(B, C, H, W\), .* \(3, 16, 14\)\. .* `image.unsqueeze\(0\)`"),
        (IMAGE, (IMAGE * 255).byte(), r"`target` to be .* torch.uint8\. Divide: `images.float\(\) / 255`"),
        (None, IMAGE, "Expected `input` .* but got NoneType"),
        (IMAGE[..., :12], IMAGE, r"Expected `input` to be of the shape of `target`, \(2, 3, 16, 14\), .* Resize or crop"),
        (IMAGE, IMAGE[[0, 1, 1]], r"Expected `input` to be of the shape of `target`, \(3, 3, 16, 14\), or one image"),
        (HOLED, IMAGE, "Expected `input` to be finite, but got 2 non-finite of 1344 entries"),
        (IMAGE, HOLED, "Expected `target` to be .*nan"),
        (IMAGE, IMAGE + 0.5, r"`target` to be images with values within `value_range` \[0, 1\], but got values from 0.5"),
        (IMAGE, -IMAGE, "Expected `target` to be images .* Set `value_range` to the least and greatest value"),
    ],
)
def test_bad_images_are_refused(input: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(NetsimError, match=message) as caught:
        Brightness()(input, target)
    assert "\n" not in str(caught.value)


def test_what_a_network_puts_out_may_overshoot() -> None:
    criterion = Brightness()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(criterion(IMAGE * 1.5 - 0.2, IMAGE)) > 0
        criterion(IMAGE, IMAGE * 1.0015 - 0.0005)  # By rounding of a resampled target.


def test_an_input_far_outside_is_warned_of_once() -> None:
    criterion = Brightness()
    with pytest.warns(UserWarning, match=r"`input` has values from .* to 2\d\d?\.?\d*, far outside `value_range` \[0, 1\]"):
        criterion(IMAGE * 255, IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(IMAGE * 255, IMAGE)


@pytest.mark.parametrize("value_range", [1.0, None, (0,), (0, 1, 2), (1, 0), (0, math.inf), (math.nan, 1), ("a", "b"), "01"])
def test_a_range_that_is_none(value_range: Any) -> None:
    with pytest.raises(NetsimError, match="Expected `value_range` to be two numbers, the least and the greatest"):
        Brightness(value_range)

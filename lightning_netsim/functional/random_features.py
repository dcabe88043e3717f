"""Random Fourier features of the Gaussian kernel: inner products of finite vectors in place of the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_netsim._checks import check_positive_int, check_positive_number, check_same_size, check_tensor, expected
from lightning_netsim.functional._precision import full_precision, upcast


def check_num_features(num_features: object) -> int:
    """Return a number of random features if it is one: cosines and sines of half as many frequencies."""
    number = check_positive_int("num_features", num_features)
    if number % 2:
        raise expected("num_features", "an even number, half of it cosines and half sines", str(number))
    return number


def check_bandwidths(name: str, bandwidths: object) -> tuple[float, ...]:
    """Return one or several bandwidths as a tuple of positive numbers."""
    numbers = bandwidths if isinstance(bandwidths, Sequence) and not isinstance(bandwidths, str) else [bandwidths]
    if not numbers:
        raise expected(name, "one or more positive numbers", repr(bandwidths))
    return tuple(check_positive_number(name, number) for number in numbers)


def draw_frequencies(
    num_features: int, num_inputs: int, bandwidths: float | Sequence[float], generator: torch.Generator
) -> Tensor:
    """Draw the frequencies of random Fourier features: normal numbers over σ, a bandwidth in turn for each.

    Args:
        num_features: r, even: there are r/2 frequencies, of each of which the cosine and the sine are taken.
        num_inputs: K, the coordinates of a sample.
        bandwidths: σ of the Gaussian kernel in the units of the samples, or several for their mean.
        generator: what they are drawn from, on the CPU.

    Returns:
        Shape (r/2, K), float64.

    Raises:
        NetsimError: `num_features` is odd, or a number is not positive.

    Source: Rahimi and Recht, NeurIPS 2007.

    Example:
        >>> draw_frequencies(6, 2, 0.5, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """
    number = check_num_features(num_features) // 2
    sigmas = torch.tensor(check_bandwidths("bandwidths", bandwidths), dtype=torch.float64)
    if number < len(sigmas):
        raise expected("num_features", f"at least {2 * len(sigmas)}, two for each bandwidth", str(num_features))
    normal = torch.randn(number, check_positive_int("num_inputs", num_inputs), generator=generator, dtype=torch.float64)
    return normal / sigmas[torch.arange(number) % len(sigmas)].unsqueeze(1)


def fourier_features(x: Tensor, frequencies: Tensor) -> Tensor:
    """Compute φ(x) = [cos(W x), sin(W x)] / √(r/2), whose inner products estimate a Gaussian kernel.

    ⟨φ(x), φ(y)⟩ is the mean of cos(w·(x − y)) over the frequencies w: without the random phases of the other form, it depends
    on x − y alone, is 1 where they are equal, and varies less around the kernel at as many features, from half the frequencies.

    Args:
        x: shape (N, K).
        frequencies: W, shape (r/2, K), see `draw_frequencies`.

    Returns:
        Shape (N, r), rows of length 1, in float32 or better.

    Raises:
        NetsimError: for tensors that are not floating-point matrices of one width.

    Source: Rahimi and Recht, NeurIPS 2007; Sutherland and Schneider, On the Error of Random Fourier Features, UAI 2015.

    Example:
        >>> fourier_features(torch.zeros(1, 3), torch.ones(2, 3))
        tensor([[0.7071, 0.7071, 0.0000, 0.0000]])
    """
    x = upcast(check_tensor("x", x, 2, like="(N, K)"))
    check_same_size("frequencies", check_tensor("frequencies", frequencies, 2, like="(r/2, K)"), "x", x, dim=1)
    if not len(frequencies):
        raise expected("frequencies", "one or more rows", f"shape {tuple(frequencies.shape)}")
    with full_precision(x):
        angles = x @ frequencies.to(x).mT
    return torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(len(frequencies))

"""Match two sets of samples by the maximum mean discrepancy, as a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_netsim._checks import check_choice, check_positive_int, expected
from lightning_netsim.functional.arc_cosine import arc_cosine_kernel
from lightning_netsim.functional.mmd import (
    Kernel,
    check_samples,
    gaussian_kernel,
    median_distance,
    random_feature_mmd,
    squared_mmd,
)
from lightning_netsim.functional.random_features import check_bandwidths, check_num_features, draw_frequencies
from lightning_netsim.losses.criterion import AbstractCriterion, Draws

KERNELS = ("gaussian", "arc_cosine")
# Bandwidths in units of the median distance.
_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


class MMDLoss(AbstractCriterion):
    """Compute the squared maximum mean discrepancy of two sets of samples: 0 where they are distributed alike.

    Args:
        kernel: "gaussian", the mean of Gaussian kernels of several bandwidths; "arc_cosine", that of a random ReLU network, of
            the cosine of two samples; or a symmetric function of (x, y), shapes (N, K) and (M, K), that gives (N, M).
        bandwidths: σ of the Gaussian kernels, in the units of the samples; None for a quarter, half, one, two and four times
            the median distance of the samples at hand, which is not differentiated.
        depth: of the arc-cosine kernel.
        unbiased: leave out each sample's similarity to itself: for reporting, as it can be negative; the biased one is for
            training.
        num_features: estimate the Gaussian kernel by so many random Fourier features, drawn anew at each call in training
            mode: time and memory then grow with N + M, and not with N · M. None for the exact one.
        seed: of these draws, which begin anew where a run is resumed.

    Raises:
        NetsimError: for a value out of range; later, for sets that are empty, not finite, or of different widths.

    Source: Gretton et al., A Kernel Two-Sample Test, JMLR 2012; several bandwidths: Long et al., Deep Adaptation Networks,
    ICML 2015.

    Example:
        >>> import torch
        >>> loss, generator = MMDLoss(), torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 200, 3, generator=generator)
        >>> loss(x, x).item()
        0.0
        >>> bool(loss(x, y) < loss(x, y + 1))
        True
    """

    def __init__(
        self,
        kernel: Callable[..., Any] | str = "gaussian",  # In this order, a file can name a function.
        bandwidths: float | Sequence[float] | None = None,
        depth: int = 1,
        unbiased: bool = False,
        num_features: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.kernel = kernel if callable(kernel) else check_choice("kernel", kernel, KERNELS)
        self.bandwidths = None if bandwidths is None else list(check_bandwidths("bandwidths", bandwidths))
        self.depth = check_positive_int("depth", depth)
        self.unbiased = unbiased
        if num_features is not None and kernel != "gaussian":
            raise expected("num_features", "None for other kernels than 'gaussian'", repr(num_features))
        self.num_features = None if num_features is None else check_num_features(num_features)
        for name, given, of in (("bandwidths", bandwidths is not None, "gaussian"), ("depth", depth != 1, "arc_cosine")):
            if given and kernel != of:
                raise expected(name, f"left out for another kernel than {of!r}", f"given with {kernel!r}")
        self.seed = seed
        self._draws = Draws(seed)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared discrepancy.

        Args:
            x: samples, shape (N, K).
            y: samples, shape (M, K).

        Returns:
            A scalar on the graph, in float32 or better.

        Raises:
            NetsimError: a set is empty, not finite, not a floating-point matrix, or of another width than the other.
        """
        x, y = check_samples(x, y, at_least=2 if self.unbiased else 1)
        if self.kernel != "gaussian":
            kernel: Kernel = self.kernel if callable(self.kernel) else partial(arc_cosine_kernel, depth=self.depth)
            return squared_mmd(x, y, kernel, self.unbiased)
        bandwidths = self.bandwidths
        if bandwidths is None:
            middle = median_distance(x, y)
            bandwidths = [scale * middle for scale in _SCALES]
        if self.num_features is None:
            return squared_mmd(x, y, partial(gaussian_kernel, bandwidths=bandwidths), self.unbiased)
        generator = self._draws.generator(anew=self.training)
        frequencies = draw_frequencies(self.num_features, x.shape[1], bandwidths, generator)
        return random_feature_mmd(x, y, frequencies, self.unbiased)

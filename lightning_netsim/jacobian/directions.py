"""Directions of the output space: which scalar functions of the output are differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, check_positive_int, check_tensor, expected

#: What `directions=` accepts: a number of random directions, a name, a (D, d) matrix, or a function of the outputs. Numbers
#: come first: jsonargparse takes the first type that fits.
DirectionsLike = int | str | Tensor | Callable[[Tensor], Tensor]

NAMES = ("all", "auto", "contrast", "predicted", "target")
AUTO_DIRECTIONS = 4


class Directions:
    """Project outputs (B, D) on d directions: (B, d) = f(x) V, one matrix V for every sample, epoch and process.

    The kernel is then that of Vᵀf. Names:

    - ``"all"``: V = identity, d = D, the full kernel of the paper.
    - ``"auto"``: all for D ≤ 4, else 4 random directions. Against the full trace kernel of a ten-class network, 4 directions
      share 0.86 to 0.96 of the ten nearest neighbors (two networks on MNIST), and soft counts correlate at 0.99 or more.
    - an int d: d orthonormal random directions, drawn once from `seed`.
    - a matrix (D, d): used as it is.
    - a callable: any differentiable function (B, D) -> (B, d) that treats each sample on its own.
    - ``"contrast"``: z_y − mean of the other outputs, with y the given class. Within one class it is the same function for
      every sample; made for criteria that compare samples of one class.
    - ``"predicted"`` and ``"target"``: the output of the predicted or the given class. These compare a *different* function
      on each sample, as contrasts of different classes do: neighbor counts then correlate negatively with those of the full
      kernel. Prefer the others to compare samples of different classes.

    Args:
        directions: as above.
        seed: the seed of random directions.

    Raises:
        ValueError: for an unknown name, a number below 1, or a matrix that is not (D, d).
    """

    def __init__(self, directions: DirectionsLike = "all", seed: int = 0) -> None:
        if isinstance(directions, str):
            check_choice("directions", directions, NAMES)
        elif isinstance(directions, Tensor):
            check_tensor("directions", directions, ndim=2, like="(D, d)")
        elif not callable(directions):
            check_positive_int("directions", directions, f"Or choose one of {', '.join(NAMES)}, a matrix or a function.")
        self.directions = directions
        self.seed = seed
        self._drawn: dict[int, Tensor] = {}

    def __repr__(self) -> str:
        return f"Directions({self.kind})"

    @property
    def kind(self) -> str:
        """Return how the directions were chosen, in one word."""
        if isinstance(self.directions, str):
            return self.directions
        return {Tensor: "matrix", int: "random"}.get(type(self.directions), "function")

    def count(self, num_outputs: int) -> int | None:
        """Return d for a network of D = `num_outputs` outputs, or None where only a function knows."""
        if isinstance(self.directions, Tensor):
            return self.directions.shape[1]
        if isinstance(self.directions, str):
            counts = {"all": num_outputs, "auto": min(num_outputs, AUTO_DIRECTIONS), "contrast": 1, "predicted": 1, "target": 1}
            return counts[self.directions]
        return self.directions if isinstance(self.directions, int) else None

    def matrix(self, num_outputs: int) -> Tensor | None:
        """Return V, shape (D, d), in float64 on the CPU; None for the identity and for directions that differ by sample."""
        if isinstance(self.directions, Tensor):
            if self.directions.shape[0] != num_outputs:
                raise expected("directions", f"a matrix with D = {num_outputs} rows", f"shape {tuple(self.directions.shape)}")
            return self.directions.detach().to("cpu", torch.float64)
        number = self.count(num_outputs)
        random = isinstance(self.directions, int) or (self.directions == "auto" and num_outputs > AUTO_DIRECTIONS)
        if not random or number is None:
            return None
        if number > num_outputs:
            raise expected(
                "directions",
                f"at most the number of outputs, {num_outputs}",
                str(number),
                'Use directions="all" for all of them.',
            )
        if num_outputs not in self._drawn:  # Drawn once: inside `torch.func.vmap` nothing random can be.
            generator = torch.Generator().manual_seed(self.seed)
            gaussian = torch.randn(num_outputs, number, dtype=torch.float64, generator=generator)
            self._drawn[num_outputs] = torch.linalg.qr(gaussian).Q
        return self._drawn[num_outputs]

    def project(self, outputs: Tensor, labels: Any = None, checked: bool = False) -> Tensor:
        """Return the projected outputs, shape (B, d), differentiable.

        Args:
            outputs: shape (B, D).
            labels: shape (B,), class indices; only for ``"contrast"`` and ``"target"``.
            checked: whether the labels have been found to be class indices; inside `torch.func.vmap` it cannot be asked.
        """
        if self.directions == "predicted":
            return outputs.gather(1, outputs.detach().argmax(1, keepdim=True))
        if self.directions in ("contrast", "target"):
            if not checked:
                self._check_labels(outputs, labels)
            given = outputs.gather(1, labels.to(outputs.device, torch.int64).unsqueeze(1))
            if self.directions == "target":
                return given
            others = outputs.shape[1] - 1
            return given - (outputs.sum(1, keepdim=True) - given) / max(1, others)
        if not isinstance(self.directions, (str, int, Tensor)):
            projected = self.directions(outputs)
            if not isinstance(projected, Tensor) or projected.ndim != 2 or len(projected) != len(outputs):
                got = f"shape {tuple(projected.shape)}" if isinstance(projected, Tensor) else type(projected).__name__
                raise expected("directions", f"a function that returns shape ({len(outputs)}, d)", got)
            return projected
        matrix = self.matrix(outputs.shape[1])
        return outputs if matrix is None else outputs @ matrix.to(outputs)

    def _check_labels(self, outputs: Tensor, labels: Any) -> None:
        """Refuse labels that are no class indices."""
        wanted = f'class indices of shape ({len(outputs)},) for directions="{self.directions}"'
        remedy = "Choose other directions, for example 1 for a random one."
        if not isinstance(labels, Tensor) or labels.shape != outputs.shape[:1] or labels.is_floating_point():
            got = f"shape {tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
            raise expected("labels", wanted, got, remedy)
        if len(labels) and not bool(((labels >= 0) & (labels < outputs.shape[1])).all()):
            wanted = f"class indices within 0 to {outputs.shape[1] - 1}"
            raise expected("labels", wanted, f"{int(labels.min())} to {int(labels.max())}", remedy)

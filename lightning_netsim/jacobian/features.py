"""What a sample is turned into: a unit vector, from the gradients of the outputs or from activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_layer, expected
from lightning_netsim.jacobian import Directions, JacobianOperator
from lightning_netsim.jacobian.capture import differentiable
from lightning_netsim.jacobian.directions import DirectionsLike
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch, GradientFeatureBatch, Normalization


class GradientFeatures:
    """Turn batches into gradient features: two inputs are similar when the same change of the weights moves both outputs.

    φ(x) = vec(G M)/√r, with G = ∂(Vᵀf)/∂θ of shape (P, d), M the pseudo-inverse root of GᵀG and r its rank; then ‖φ‖ = 1, and
    ⟨φ(x), φ(x')⟩ is the scalar similarity k^C of the paper wherever r = d, the cosine of two gradients where d = 1.

    Args:
        model: the module whose parameters are differentiated.
        forward: inputs -> outputs (B, D); default a plain call of the model.
        directions: which functions of the output are differentiated, see `Directions`.
        parameters: ``"trainable"``, or names of parameters or of modules.
        seed: seed of random directions.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019, sections 2 and 3.

    Example:
        >>> features = GradientFeatures(nn.Linear(3, 2))
        >>> batch = features(torch.randn(5, 3))
        >>> torch.allclose(batch.inner(batch).diagonal(), torch.ones(5), atol=1e-5)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Any], Any] | None = None,
        directions: DirectionsLike | Directions = "auto",
        parameters: str | Iterable[str] = "trainable",
        seed: int = 0,
    ) -> None:
        self.operator = JacobianOperator(model, forward, directions, parameters, seed)
        self.notes: set[str] = set()

    def prepare(self, inputs: Any, labels: Tensor | None = None) -> None:
        """Check the model and find the right path for every parameter, on at most 8 samples of a batch."""
        self.operator.prepare(inputs, labels)

    def __call__(
        self, inputs: Any, labels: Tensor | None = None, normalization: Normalization | None = None, form: bool = False
    ) -> GradientFeatureBatch:
        """Return the features of a batch; remarks on the outputs are collected in `notes`.

        Args:
            inputs: the batch.
            labels: shape (B,), only for ``directions="target"`` and ``"contrast"``.
            normalization: of the same samples under the same weights, from an earlier sweep: it is then not computed again.
            form: form at once what `PerSampleJacobian.packed` forms to be fast: where that is stored, it serves all else too.
        """
        jacobian = self.operator(inputs, labels)
        if form:
            jacobian = jacobian.packed(fast=True)
        features = GradientFeatureBatch(jacobian, normalization)
        outputs = jacobian.outputs
        if outputs.shape[1] > 1 and bool((outputs >= 0).all()) and torch.allclose(outputs.sum(1), outputs.new_ones(())):
            self.notes.add("The outputs sum to one: probabilities make the kernel ill-conditioned; compare logits instead.")
        if bool((features.valid & (features.rank < features.num_directions)).any()):
            self.notes.add(
                "The gradients of some samples are linearly dependent (rank below the number of directions); their similarity "
                "is that of the subspace they span. If the outputs are probabilities, compare logits instead."
            )
        return features


class ActivationFeatures:
    """Turn batches into the normalized activations of one layer, for comparison with gradient features.

    Args:
        model: the module.
        forward: inputs -> outputs, running the model.
        layer: the name of a module whose *output* is taken; None for the *input* of the last linear layer that is called, the
            penultimate activations of a classifier.

    Raises:
        ValueError: for an unknown layer, or if no linear layer is called.
    """

    def __init__(self, model: nn.Module, forward: Callable[[Any], Any], layer: str | None = None) -> None:
        names = dict(model.named_modules())
        if layer is not None:
            check_layer("layer", layer, names)
        self._watched = [m for m in names.values() if isinstance(m, nn.Linear)] if layer is None else [names[layer]]
        self._takes_input = layer is None
        self._forward = forward

    @property
    def is_possible(self) -> bool:
        """Return whether there is a layer to take activations from."""
        return bool(self._watched)

    def __call__(self, inputs: Any) -> DenseFeatureBatch:
        """Return the activations of a batch, normalized."""
        with differentiable(), torch.no_grad(), self.watch() as seen:
            self._forward(inputs)
        return self.read(seen)

    @contextmanager
    def watch(self) -> Iterator[list[Tensor]]:
        """Collect the activations of every forward pass inside the block, for `read`."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = args[0] if self._takes_input and args else output
            if isinstance(value, Tensor):
                seen.append(value.detach())

        with ExitStack() as stack:
            for module in self._watched:
                stack.callback(module.register_forward_hook(hook).remove)
            yield seen

    def read(self, seen: Sequence[Tensor]) -> DenseFeatureBatch:
        """Return the activations that `watch` saw last, normalized."""
        if not seen:
            raise expected("layer", "a module that the forward pass calls", "none", "Name one by `activation_layer=`.")
        return DenseFeatureBatch(seen[-1].flatten(1))

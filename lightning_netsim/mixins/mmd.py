"""Match the features of two domains, or a latent and its prior, while a LightningModule trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_netsim._checks import check_choice, check_seed, expected
from lightning_netsim.data.batches import run_model, split_batch
from lightning_netsim.data.trees import batch_size
from lightning_netsim.losses import AbstractEmbeddingLoss, AbstractImageLoss, AbstractSimilarityLoss, MMDLoss
from lightning_netsim.mixins.layers import AbstractLayerRegularizer
from lightning_netsim.mixins.regularized import RegularizedModule, made_criterion
from lightning_netsim.mixins.schedule import ScheduleLike

PRIORS = ("normal", "uniform")
#: (number of samples, their width) -> samples.
Prior = Callable[[int, int], Tensor]


class MMDMixin(RegularizedModule):
    """Add weight · maximum mean discrepancy to the loss of a LightningModule: two sets of features are to be distributed alike.

    ``class Mine(MMDMixin, MyModule)`` compares what `mmd_layer` puts out

    - for two domains (the default): let ``train_dataloader`` return ``{"source": loader, "target": other_loader}``. The
      training step of ``MyModule`` gets the batch of the source alone, as if there were no other; the module is then run on the
      inputs of the target, whose labels are not looked at. What the step does to inputs before it calls the module is not done
      to these: put it into ``forward``, or set `mmd_whole_batch`. The second pass costs a forward and a backward pass, and
      batch norm in training mode takes its statistics, and keeps them, from it too;
    - for a latent and a prior (`mmd_prior`): for the batch as it is, against as many samples of the prior.

    The unweighted term is logged as ``netsim/mmd_loss``. In several processes each compares its own samples, and terms are
    averaged.

    Args:
        args: passed on.
        mmd_criterion: what is minimized: `MMDLoss` (by default with five Gaussian bandwidths around the median distance), or a
            function of (features, features) that returns a scalar.
        mmd_weight: the weight: a number, points [step, weight] joined by straight lines, or a function of the step.
        mmd_layer: the name of the module that puts out the features, for example "network.6"; None for what the
            LightningModule returns.
        mmd_domains: the keys of both batches, the source first.
        mmd_whole_batch: give the training step the batches of both domains; it runs the layer on all of the source first, then
            on all of the target, in one call or two.
        mmd_prior: "normal" (mean 0, variance 1) or "uniform" (within [−1, 1]) in each coordinate, or a function of (number of
            samples, width); None for two domains.
        mmd_every_n_steps: add the term to every n-th optimizer step only.
        mmd_seed: of the draws from the prior, others in each process, which begin anew where a run is resumed.
        kwargs: passed on.

    Raises:
        ValueError: for a value out of range, a mixin to the right of the module in the bases, manual optimization; before
            training begins for an unknown layer, or a module without `forward` where the target has to be run; at the first
            step for batches without both domains, or with an empty one.

    Source: Gretton et al., JMLR 2012; domains: Long et al., Deep Adaptation Networks, ICML 2015; prior: Tolstikhin et al.,
    Wasserstein Auto-Encoders, ICLR 2018.

    Example:
        >>> from lightning_netsim.demos import ImageClassifier
        >>> class Adapted(MMDMixin, ImageClassifier):
        ...     "The hidden layer is not to know where an image comes from."
        >>> model = Adapted(network="digits", mmd_layer="network.6", mmd_weight=0.5)
        >>> batch = {"source": (torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])), "target": torch.rand(6, 1, 8, 8)}
        >>> loss = model.training_step(batch, 0)
    """

    is_mixin = True

    def __init__(
        self,
        *args: Any,
        mmd_criterion: MMDLoss | Callable[..., Any] | None = None,
        mmd_weight: ScheduleLike = 1.0,
        mmd_layer: str | None = None,
        mmd_domains: Sequence[str] = ("source", "target"),
        mmd_whole_batch: bool = False,
        mmd_prior: Callable[..., Any] | str | None = None,  # In this order, a file can name a function.
        mmd_every_n_steps: int = 1,
        mmd_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._keep_hyperparameters(mmd_criterion=mmd_criterion, mmd_weight=mmd_weight, mmd_prior=mmd_prior)
        wanted = "`lightning_netsim.losses.MMDLoss`, or a function of (features, features)"
        self.mmd_criterion = made_criterion("mmd_criterion", mmd_criterion, wanted) or MMDLoss()
        if isinstance(self.mmd_criterion, AbstractSimilarityLoss | AbstractEmbeddingLoss | AbstractImageLoss):
            raise expected("mmd_criterion", wanted, f"{type(self.mmd_criterion).__name__}, which is of something else")
        regularizer: AbstractLayerRegularizer
        if mmd_prior is not None:
            if mmd_whole_batch:
                raise expected("mmd_whole_batch", "False with `mmd_prior`, as there is one domain", "True")
            regularizer = PriorRegularizer("mmd", mmd_weight, mmd_every_n_steps, mmd_layer, mmd_prior, mmd_seed)
        else:
            regularizer = DomainRegularizer("mmd", mmd_weight, mmd_every_n_steps, mmd_layer, mmd_domains, mmd_whole_batch)
        self._regularizers.append(regularizer)


class DomainRegularizer(AbstractLayerRegularizer):
    """A term of the features of two domains.

    Args:
        name: the prefix of its settings.
        weight: of the term.
        every_n_steps: how often it is added.
        layer: the module whose output are the features; None for what the LightningModule returns.
        domains: the keys of both batches.
        whole_batch: whether the training step runs the module on both.
    """

    sees_whole_batch = True

    def __init__(
        self,
        name: str,
        weight: ScheduleLike,
        every_n_steps: int,
        layer: str | None,
        domains: Sequence[str],
        whole_batch: bool,
    ) -> None:
        super().__init__(name, weight, every_n_steps, layer)
        is_pair = not isinstance(domains, str) and len(domains) == 2 and domains[0] != domains[1]
        if not is_pair or not all(isinstance(domain, str) for domain in domains):
            raise expected(f"{name}_domains", "two different keys, of the source and of the target", repr(domains))
        self._domains, self._whole_batch = tuple(domains), whole_batch

    def prepare(self, module: LightningModule) -> None:
        super().prepare(module)
        if not self._whole_batch and type(module).forward is LightningModule.forward:
            remedy = f"Define it, or run both domains in the training step and set `{self.name}_whole_batch=True`."
            raise expected("forward", "defined, so that the module can be run on the target", "none", remedy)

    def part_for_step(self, batch: Any) -> Any:
        if not torch.is_grad_enabled() and not self._has_both(batch):  # Validation by the training step.
            return batch
        source = self._parts(batch)[0]
        return batch if self._whole_batch else source

    def term(self, module: RegularizedModule, batch: Any, seen: list[Tensor]) -> Tensor:
        source, target = self._parts(batch)
        rows = self.joined(seen)
        if self._whole_batch:
            sizes = [batch_size(split_batch(part)[0]) or 0 for part in (source, target)]
            if sum(sizes) != len(rows):
                wanted = f"one row for each of {sizes[0]} samples of the source and {sizes[1]} of the target"
                remedy = f"With `{self.name}_whole_batch`, let the training step run the layer on both, the source first."
                raise expected(f"{self.name}_layer", wanted, f"{len(rows)} rows", remedy)
            features = rows[: sizes[0]], rows[sizes[0] :]
        else:
            remedy = f"Run both domains in the training step, and set `{self.name}_whole_batch=True`."
            with self.capturing(module, lambda: True) as seen_of_target:
                run_model(module, split_batch(target, remedy)[0], remedy)
            features = rows, self.joined(seen_of_target)
        term: Tensor = self.criterion(module)(*features)
        return term

    def _has_both(self, batch: Any) -> bool:
        return isinstance(batch, Mapping) and all(batch.get(domain) is not None for domain in self._domains)

    def _parts(self, batch: Any) -> tuple[Any, Any]:
        """Return the batches of source and target."""
        first, second = self._domains
        if not self._has_both(batch):
            wanted = f"a mapping with a batch of each domain, {first!r} and {second!r}"
            got = f"a {type(batch).__name__}"
            if isinstance(batch, Mapping):
                got = "{" + ", ".join(f"{key}: {type(part).__name__}" for key, part in batch.items()) + "}"
            if isinstance(batch, Mapping) and first in batch and second in batch:  # One loader has come to its end.
                remedy = "Let the shorter loader begin again: `CombinedLoader(..., 'max_size_cycle')`, which is the default."
                raise expected("batch", wanted, got, remedy)
            remedy = f"Let `train_dataloader` return {{{first!r}: loader, {second!r}: other_loader}}."
            raise expected("batch", wanted, got, remedy)
        return batch[first], batch[second]


class PriorRegularizer(AbstractLayerRegularizer):
    """A term of features and samples of a prior.

    Args:
        name: the prefix of its settings.
        weight: of the term.
        every_n_steps: how often it is added.
        layer: the module whose output are the features; None for what the LightningModule returns.
        prior: "normal", "uniform", or a function of (number of samples, width).
        seed: of the draws.
    """

    def __init__(
        self, name: str, weight: ScheduleLike, every_n_steps: int, layer: str | None, prior: str | Prior, seed: int
    ) -> None:
        super().__init__(name, weight, every_n_steps, layer)
        self._prior = prior if callable(prior) else check_choice(f"{name}_prior", prior, PRIORS)
        self._seed = check_seed(f"{name}_seed", seed)
        self._generator: torch.Generator | None = None

    def term(self, module: RegularizedModule, batch: Any, seen: list[Tensor]) -> Tensor:
        features = self.joined(seen)
        if self._generator is None:  # Processes draw different samples.
            self._generator = torch.Generator().manual_seed(self._seed + module.global_rank)
        number, width = features.shape
        if callable(self._prior):
            samples: Any = self._prior(number, width)
            if not isinstance(samples, Tensor) or samples.ndim != 2 or samples.shape[1] != width:
                got = f"shape {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
                raise expected(f"{self.name}_prior", f"a function that returns samples of width {width}", got)
        elif self._prior == "normal":
            samples = torch.randn(number, width, generator=self._generator)
        else:
            samples = 2 * torch.rand(number, width, generator=self._generator) - 1
        term: Tensor = self.criterion(module)(features, samples.to(features.device))
        return term

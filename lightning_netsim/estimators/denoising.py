"""Average labels over the kernel neighbors of every sample, as the network itself does."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, check_positive_int, check_seed, check_tensor, expected
from lightning_netsim.functional._precision import to_double
from lightning_netsim.functional.denoising import distance_root, sum_inverse
from lightning_netsim.functional.results import LabelDenoisingResult
from lightning_netsim.jacobian import PerSampleJacobian

KERNELS = ("matrix", "outputs")
# Elements of a tile of kernels (Q, N, D, D) that is formed at a time.
_TILE_ELEMENTS = 2**24


class LabelDenoising:
    """Smooth the labels of a reference set at every query, with the kernel by which the network learned them.

    E_k[ỹ]_i = Σ_j a_ij ỹ_j with a_ij = (Σ_j K_ij)⁺ K_ij and K_ij = G(x_i)ᵀ G(x_j), which is not normalized. `update` with
    every batch of the reference set, then `query` with every batch of the query set, then `compute`.

    With the kernel "matrix" everything is linear in the reference set, two sweeps and O(P·(D + m)) memory: Σ_j K_ij ỹ_j =
    G_iᵀ Σ_j G_j ỹ_j. The denoising factor is not; it is estimated from m random signs ε, as E‖Σ_j a_ij ε_j‖² = Σ_j ‖a_ij‖²_F,
    with a relative standard error of at most 1/√(2m), or computed of all pairs.

    Args:
        kernel: "matrix" averages all outputs together, by matrices K_ij; "outputs" each by itself, by the numbers
            ∇f_o(x_i)·∇f_o(x_j), where negative ones are put to 0: weights are then distributions, as the paper's bound needs.
        all_pairs: compute the factor exactly, of all pairs; the gradients of the reference set are kept, in factored form. The
            kernel "outputs" is always of all pairs.
        num_probes: m, how many random signs of each label estimate the factor otherwise.
        seed: theirs.

    Raises:
        ValueError: for an unknown kernel, or m below 1.

    Source: Charpiat et al., NeurIPS 2019, section 5 (Self-denoising), and section 6.3 of the supplementary material.

    Example:
        >>> from lightning_netsim import per_sample_jacobian
        >>> jacobian = per_sample_jacobian(torch.nn.Linear(3, 1), torch.ones(4, 3))
        >>> denoising = LabelDenoising(all_pairs=True)
        >>> denoising.update(jacobian, torch.tensor([[0.0], [0.0], [1.0], [1.0]]), jacobian.outputs)
        >>> denoising.query(jacobian, jacobian.outputs)
        >>> denoising.compute().smoothed_targets.flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    def __init__(self, kernel: str = "matrix", all_pairs: bool = False, num_probes: int = 32, seed: int = 0) -> None:
        self.kernel = check_choice("kernel", kernel, KERNELS)
        self.all_pairs = all_pairs or kernel == "outputs"
        self.num_probes = 0 if self.all_pairs else check_positive_int("num_probes", num_probes)
        self.seed = check_seed("seed", seed)
        self.reset()

    def reset(self) -> None:
        """Forget the reference set and all queries."""
        self._generator = torch.Generator().manual_seed(self.seed)
        self._total: dict[str, Tensor] = {}
        self._held: list[tuple[PerSampleJacobian, Tensor, Tensor]] = []
        self._seen: tuple[dict[str, torch.Size], int] | None = None
        self._num_reference = 0
        self._answers: list[dict[str, Tensor]] = []

    def update(self, jacobian: PerSampleJacobian, targets: Tensor, outputs: Tensor) -> None:
        """Add a batch of the reference set; a sample with anything that is not finite is left out.

        Args:
            jacobian: G of all D outputs; of the logits where the outputs are probabilities.
            targets: shape (B, D), ỹ: values, or classes as rows with a single one.
            outputs: shape (B, D), ŷ: what the loss compares with `targets`; probabilities for classes.

        Raises:
            ValueError: if a shape does not fit.
        """
        targets = self._check("targets", targets, jacobian).to(jacobian.outputs)
        outputs = self._check("outputs", outputs, jacobian).to(jacobian.outputs)
        self._seen = (jacobian.shapes, jacobian.num_directions)
        valid = jacobian.finite() & torch.isfinite(targets).all(1) & torch.isfinite(outputs).all(1)
        if not bool(valid.all()):
            jacobian, targets, outputs = jacobian.select(valid), targets[valid], outputs[valid]
        self._num_reference += len(targets)
        if self.all_pairs:
            self._held.append((jacobian.packed(fast=True), targets, outputs))
            return
        size, number = targets.shape
        signs = torch.randint(2, (size, number, self.num_probes), generator=self._generator) * 2 - 1
        identity = torch.eye(number, dtype=targets.dtype, device=targets.device).expand(size, -1, -1)
        columns = torch.cat([identity, targets.unsqueeze(2), outputs.unsqueeze(2), signs.to(targets)], 2)
        for name, value in jacobian.weighted_sum(columns).items():
            self._total[name] = self._total[name] + value if name in self._total else value

    def query(self, jacobian: PerSampleJacobian, outputs: Tensor) -> None:
        """Ask for a batch of the query set.

        Args:
            jacobian: G of all D outputs.
            outputs: shape (B, D), ŷ.

        Raises:
            ValueError: if there is no reference set, or a shape does not fit.
        """
        outputs = self._check("outputs", outputs, jacobian).to(jacobian.outputs)
        if not self._num_reference:
            raise expected("reference", "updated with at least one usable sample", "none", "Call `update` before `query`.")
        answer = {"matrix": self._by_sums, "outputs": self._by_outputs}[self.kernel](jacobian)
        answer["consistency"] = torch.linalg.vector_norm(to_double(outputs) - answer["smoothed_outputs"], dim=1)
        finite = jacobian.finite() & torch.isfinite(answer["factor"])
        for value in answer.values():
            value[~finite] = torch.nan
        self._answers.append({name: value.to(outputs) for name, value in answer.items()})

    def compute(self, lipschitz: Tensor | None = None) -> LabelDenoisingResult:
        """Return what was found of all queries so far, in the order in which they were asked.

        Args:
            lipschitz: shape (D,), C of each output, see `lipschitz_constant`; gives the bound with the kernel "outputs".

        Raises:
            ValueError: if nothing was asked, or a Lipschitz constant comes with the kernel "matrix".
        """
        if not self._answers:
            raise expected("queries", "asked before `compute`", "none", "Call `query` first.")
        joined = {name: torch.cat([answer[name] for answer in self._answers]) for name in self._answers[0]}
        bound = None
        if lipschitz is not None:
            check_tensor("lipschitz", lipschitz, 1, like="(D,)")
            if self.kernel != "outputs":
                raise expected("kernel", '"outputs" for a bound', repr(self.kernel))
            spread = joined["spread"]
            if lipschitz.shape != spread.shape[1:]:
                raise expected("lipschitz", f"of shape {tuple(spread.shape[1:])}", f"shape {tuple(lipschitz.shape)}")
            bound = math.sqrt(2) * lipschitz.to(spread) * spread
        negative = joined.pop("negative", None)
        return LabelDenoisingResult(
            **joined,
            factor_error=0.0 if self.all_pairs else 1 / math.sqrt(2 * self.num_probes),
            num_reference=self._num_reference,
            clamped=None if negative is None else negative.nanmean(0),
            bound=bound,
            lipschitz=lipschitz,
        )

    def _by_sums(self, jacobian: PerSampleJacobian) -> dict[str, Tensor]:
        """Return what the matrix kernel gives: by the sums over the reference set, or of all pairs."""
        number = jacobian.num_directions
        if self.all_pairs:
            # Σ_j K_ij [Id, ỹ_j, ŷ_j], shape (B, D, D + 2), and Σ_j K_ij K_ijᵀ, shape (B, D, D).
            empty = to_double(jacobian.outputs[:0])
            summed = empty.new_zeros(jacobian.num_samples, number, number + 2)
            squared = empty.new_zeros(jacobian.num_samples, number, number)
            for kernel, targets, outputs in self._tiles(jacobian):
                values = to_double(torch.stack([targets, outputs], 2))
                summed[..., :number] += kernel.sum(1)
                summed[..., number:] += torch.einsum("qnab,nbc->qac", kernel, values)
                squared += torch.einsum("qnab,qncb->qac", kernel, kernel)
        else:
            summed = to_double(jacobian.dot(self._total))
        inverse = sum_inverse(summed[..., :number], jacobian.outputs.dtype)
        targets, outputs = summed[..., number], summed[..., number + 1]
        if self.all_pairs:
            variance = (inverse @ squared @ inverse.mT).diagonal(dim1=1, dim2=2).sum(1)
        else:
            variance = (inverse @ summed[..., number + 2 :]).square().sum(1).mean(1)
        return {
            "smoothed_targets": (inverse @ targets.unsqueeze(2)).squeeze(2),
            "smoothed_outputs": (inverse @ outputs.unsqueeze(2)).squeeze(2),
            "factor": (variance / number).sqrt(),
            "residual": outputs - targets,
        }

    def _by_outputs(self, jacobian: PerSampleJacobian) -> dict[str, Tensor]:
        """Return what the kernels of single outputs give, negative ones put to 0."""
        own = to_double(jacobian.gram()).diagonal(dim1=1, dim2=2).sqrt()
        sums = {name: torch.zeros_like(own) for name in ("one", "target", "output", "square", "spread", "negative")}
        residual = torch.zeros_like(own)
        start = 0
        norms = torch.cat([to_double(held.gram()).diagonal(dim1=1, dim2=2).sqrt() for held, _, _ in self._held])
        for kernel, targets, outputs in self._tiles(jacobian):
            size = len(targets)
            single = kernel.diagonal(dim1=2, dim2=3)
            cosine = single / (own.unsqueeze(1) * norms[start : start + size]).clamp_min(torch.finfo(own.dtype).tiny)
            weight, targets, outputs = single.clamp_min(0), to_double(targets), to_double(outputs)
            sums["one"] += weight.sum(1)
            sums["target"] += (weight * targets).sum(1)
            sums["output"] += (weight * outputs).sum(1)
            sums["square"] += weight.square().sum(1)
            sums["spread"] += (weight * distance_root(cosine)).sum(1)
            sums["negative"] += (single < 0).double().sum(1)
            residual += torch.einsum("qnab,nb->qa", kernel, outputs - targets)
            start += size
        one = sums["one"].masked_fill(sums["one"] <= 0, torch.nan)
        return {
            "smoothed_targets": sums["target"] / one,
            "smoothed_outputs": sums["output"] / one,
            "factor": (sums["square"] / one.square()).mean(1).sqrt(),
            "residual": residual,
            "spread": sums["spread"] / one,
            "negative": sums["negative"] / self._num_reference,
        }

    def _tiles(self, jacobian: PerSampleJacobian) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the kernels of the queries and some reference samples at a time, in float64, with labels and outputs."""
        size = max(1, _TILE_ELEMENTS // max(1, jacobian.num_samples * jacobian.num_directions**2))
        for held, targets, outputs in self._held:
            for start in range(0, len(targets), size):
                part = slice(start, min(start + size, len(targets)))
                yield to_double(jacobian.inner(held.select(part))), targets[part], outputs[part]

    def _check(self, name: str, values: Tensor, jacobian: PerSampleJacobian) -> Tensor:
        """Return values with one row for each sample and one column for each output."""
        if self._seen not in (None, (jacobian.shapes, jacobian.num_directions)):
            got = f"{jacobian.num_directions} directions of {len(jacobian.shapes)} tensors"
            raise expected("jacobian", "of the same parameters and directions in every call", got)
        check_tensor(name, values, 2, like="(B, D)")
        shape = (jacobian.num_samples, jacobian.num_directions)
        if values.shape != shape:
            remedy = 'Differentiate every output: directions="all".' if values.shape[0] == shape[0] else ""
            raise expected(name, f"of shape {shape} to fit the gradients", f"shape {tuple(values.shape)}", remedy)
        return values

"""The unit vectors of a batch of samples, dense or in factored form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import expected
from lightning_netsim.functional import inverse_root
from lightning_netsim.functional.kernel import FLOOR_FLOAT32
from lightning_netsim.jacobian import PerSampleJacobian, SketchProjection
from lightning_netsim.jacobian.factors import product

#: A sum of features, in the form that `AbstractFeatureBatch.dot` takes: one tensor for each parameter, or one in all.
FeatureSum = dict[str, Tensor]

# Below this λ_min/λ_max, float32 sums have too few digits for the root of C.
_ILL_CONDITIONED = 1e-5


class AbstractFeatureBatch(ABC):
    """The unit vectors φ(x_i) of B samples, dense or factored; ⟨φ(x), φ(x')⟩ is the similarity.

    Attributes:
        valid: shape (B,), bool, False where the vector is zero or not finite: such a sample is left out.
        norm: shape (B,), the length before normalization: ‖G(x_i)‖_F of gradients.
        rank: shape (B,), int64, the rank of C(x_i); 1 for activations, 0 where left out.
    """

    valid: Tensor
    norm: Tensor
    rank: Tensor

    @property
    @abstractmethod
    def sum_nbytes(self) -> int:
        """Return the bytes of a sum of features."""

    @abstractmethod
    def sum(self) -> FeatureSum:
        """Return Σ φ(x_i) over the valid samples."""

    @abstractmethod
    def dot(self, total: FeatureSum) -> Tensor:
        """Return ⟨φ(x_i), total⟩, shape (B,); NaN where left out."""

    @abstractmethod
    def inner(self, other: AbstractFeatureBatch) -> Tensor:
        """Return ⟨φ(x_i), φ(x'_j)⟩, shape (B, B'); NaN where left out."""

    @abstractmethod
    def vectors(self, projection: SketchProjection | None = None) -> Tensor:
        """Return φ(x_i), or its sketch, as rows, shape (number of valid samples, K)."""

    @abstractmethod
    def select(self, rows: Tensor) -> AbstractFeatureBatch:
        """Return some of the valid samples: shape (B',), int64, their numbers among these."""

    def spread(self, values: Tensor) -> Tensor:
        """Put values of the valid samples, shape (V, ...), among all, shape (B, ...); NaN for the others."""
        if bool(self.valid.all()):
            return values
        spread = values.new_full((len(self.valid), *values.shape[1:]), torch.nan)
        spread[self.valid.to(values.device)] = values
        return spread

    def spread_pairs(self, other: AbstractFeatureBatch, values: Tensor) -> Tensor:
        """Put values of pairs of valid samples among those of all, shape (B, B'); NaN for the others."""
        return self.spread(other.spread(values.mT).mT)


class DenseFeatureBatch(AbstractFeatureBatch):
    """Vectors kept as rows of a matrix.

    Args:
        vectors: shape (B, K); zero and non-finite rows are left out.
        normalize: whether to divide each row by its length; sketches of unit vectors are used as they are.
    """

    def __init__(self, vectors: Tensor, normalize: bool = True) -> None:
        vectors = vectors.float() if vectors.dtype in (torch.float16, torch.bfloat16) else vectors
        self.norm = torch.linalg.vector_norm(vectors, dim=1)
        self.valid = torch.isfinite(self.norm) & (self.norm > 0)
        self.rank = self.valid.long()
        kept = vectors[self.valid]
        self._vectors = kept / self.norm[self.valid].unsqueeze(1) if normalize else kept

    @property
    def sum_nbytes(self) -> int:
        return self._vectors[:1].nbytes if len(self._vectors) else 0

    def sum(self) -> FeatureSum:
        return {"vector": self._vectors.sum(0)}

    def dot(self, total: FeatureSum) -> Tensor:
        return self.spread(product(self._vectors, total["vector"].unsqueeze(0)).squeeze(1))

    def inner(self, other: AbstractFeatureBatch) -> Tensor:
        return self.spread_pairs(other, product(self._vectors, other.vectors()))

    def vectors(self, projection: SketchProjection | None = None) -> Tensor:
        return self._vectors

    def select(self, rows: Tensor) -> DenseFeatureBatch:
        return DenseFeatureBatch(self._vectors[rows.to(self._vectors.device)], normalize=False)


class UnitFeatureBatch(AbstractFeatureBatch):
    """The gradient features φ of samples that are all valid, as they are stored: G M/√r in factored form.

    Args:
        unit: φ, see `GradientFeatureBatch.unit`.
    """

    def __init__(self, unit: PerSampleJacobian) -> None:
        self.unit = unit
        self.norm = unit.outputs.new_ones(unit.num_samples)
        self.rank = self.norm.long()
        self.valid = self.rank > 0

    @property
    def sum_nbytes(self) -> int:
        return self.unit.num_directions * self.unit.num_parameters * self.norm.element_size()

    def sum(self) -> FeatureSum:
        number = self.unit.num_directions
        identity = torch.eye(number, dtype=self.norm.dtype, device=self.norm.device)
        return self.unit.weighted_sum(identity.expand(self.unit.num_samples, -1, -1))

    def dot(self, total: FeatureSum) -> Tensor:
        return self.unit.trace_dot(total)

    def inner(self, other: AbstractFeatureBatch) -> Tensor:
        return self.spread_pairs(other, self.unit.trace_inner(_unit(other)))

    def vectors(self, projection: SketchProjection | None = None) -> Tensor:
        return (self.unit.materialize() if projection is None else self.unit.sketch(projection)).flatten(1)

    def select(self, rows: Tensor) -> UnitFeatureBatch:
        return UnitFeatureBatch(self.unit.select(rows))


@dataclass(frozen=True, eq=False)
class Normalization:
    """What makes unit vectors of the gradients of B samples.

    Attributes:
        root: M/√r, shape (B, d, d); zero where a sample is left out.
        rank: r, shape (B,), int64.
        norm: ‖G‖_F, shape (B,).
    """

    root: Tensor
    rank: Tensor
    norm: Tensor

    @classmethod
    def of(cls, jacobian: PerSampleJacobian) -> Normalization:
        """Return the normalization of the samples of a Jacobian."""
        gram, floor = accurate_gram(jacobian)
        root, rank = scaled_root(gram, floor)
        norm = gram.diagonal(dim1=1, dim2=2).sum(1).sqrt()
        return cls(root.to(jacobian.outputs.dtype), rank, norm.to(jacobian.outputs.dtype))


class GradientFeatureBatch(AbstractFeatureBatch):
    """The gradient features φ(x) = vec(G M)/√r of a batch, in factored form: the d·P numbers are formed only on request.

    Args:
        jacobian: G of the B samples.
        normalization: that of the same samples, if an earlier sweep has found it.

    Attributes:
        jacobian: G of the valid ones.
        normalization: M/√r, r and ‖G‖ of all B.
        num_directions: d.
    """

    def __init__(self, jacobian: PerSampleJacobian, normalization: Normalization | None = None) -> None:
        self.normalization = normalization or Normalization.of(jacobian)
        self.norm, self.rank = self.normalization.norm, self.normalization.rank
        self.valid = self.rank > 0
        self.num_directions = jacobian.num_directions
        everything = bool(self.valid.all())
        # 0 · NaN is NaN: a bad sample must not come near a sum.
        self.jacobian = jacobian if everything else jacobian.select(self.valid)
        self._root = self.normalization.root[self.valid]
        self._unit: PerSampleJacobian | None = None

    @property
    def unit(self) -> PerSampleJacobian:
        """Return φ of the valid samples as a Jacobian: G M/√r."""
        if self._unit is None:
            self._unit = self.jacobian.mix(self._root)
        return self._unit

    @property
    def sum_nbytes(self) -> int:
        return self.num_directions * self.jacobian.num_parameters * self.norm.element_size()

    def sum(self) -> FeatureSum:
        return self.jacobian.weighted_sum(self._root)

    def dot(self, total: FeatureSum) -> Tensor:
        if self.num_directions == 1:
            return self.spread(self.jacobian.trace_dot(total) * self._root[:, 0, 0])
        return self.spread(self.unit.trace_dot(total))

    def inner(self, other: AbstractFeatureBatch) -> Tensor:
        return self.spread_pairs(other, self.unit.trace_inner(_unit(other)))

    def vectors(self, projection: SketchProjection | None = None) -> Tensor:
        sketched = self.jacobian.materialize() if projection is None else self.jacobian.sketch(projection)
        return (self._root.mT @ sketched).flatten(1)

    def shortlist_vectors(self, projection: SketchProjection, mixture: Tensor | None) -> Tensor:
        """Return sketches of φ(x_i) to find candidates by, unit vectors, shape (number of valid samples, K).

        The cosine of two sketches stays within [-1, 1], and at similarity k its variance is about (1 − k²)²/K, that of their
        inner product (1 + k²)/K: for near neighbors, which are what is sought, many times as large.

        Args:
            projection: sketches each column.
            mixture: shape (d, d'), orthonormal columns V: φ V is sketched in place of φ, at d'/d of the cost; d/d' times
                its inner products are those of φ on average over V. None for φ itself.
        """
        if mixture is None:
            return F.normalize(self.vectors(projection), dim=1)
        mixed = self.jacobian.mix(self._root @ mixture.to(self._root))
        return F.normalize(mixed.sketch(projection).flatten(1), dim=1)

    def select(self, rows: Tensor) -> GradientFeatureBatch:
        kept = self.valid.nonzero().squeeze(1)[rows.to(self.valid.device)]
        normal = self.normalization
        part = Normalization(normal.root[kept], normal.rank[kept], normal.norm[kept])
        return GradientFeatureBatch(self.jacobian.select(rows), part)

    def energy(self) -> dict[str, float]:
        """Return the mean share of ‖φ‖² = 1 that lies in each parameter tensor."""
        return self.unit.energy()


def scaled_root(gram: Tensor, floor: float | None) -> tuple[Tensor, Tensor]:
    """Return M/√r of Gram matrices (B, d, d), differentiable, and the ranks r, shape (B,)."""
    root, rank = inverse_root(gram, floor)
    return root / rank.clamp_min(1).to(root.dtype).sqrt()[:, None, None], rank


def accurate_gram(jacobian: PerSampleJacobian) -> tuple[Tensor, float | None]:
    """Return C(x_i), summed in float64 where float32 has too few digits for its root, and the relative floor of its rank.

    The floor stays that of the gradients' own precision: a sum in float64 does not make them more precise.
    """
    gram = jacobian.gram()
    if gram.dtype == torch.float64 or jacobian.num_directions == 1:
        return gram, None
    exact = gram.double()
    finite = torch.isfinite(gram).all(2).all(1)
    values = torch.linalg.eigvalsh(exact.where(finite[:, None, None], 0.0))
    poor = finite & (values[:, 0] < _ILL_CONDITIONED * values[:, -1])
    if bool(poor.any()):
        exact[poor] = jacobian.select(poor).to(torch.float64).gram()
    return exact, FLOOR_FLOAT32


def _unit(features: AbstractFeatureBatch) -> PerSampleJacobian:
    """Return φ of the valid samples as a Jacobian."""
    if not isinstance(features, (UnitFeatureBatch, GradientFeatureBatch)):
        raise expected("other", "gradient features", type(features).__name__)
    return features.unit

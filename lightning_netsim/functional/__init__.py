"""Pure functions of tensors: each concept is one module, and needs no model and no Trainer."""

from __future__ import annotations

from lightning_netsim.functional.contrastive import contrastive_loss
from lightning_netsim.functional.difference_alignment import ctv_norm, difference_alignment_loss
from lightning_netsim.functional.kernel import (
    inverse_root,
    kernel_matrix,
    normalized_kernel_matrix,
    orthonormal_gradients,
    pairwise_similarity,
    transfer,
)
from lightning_netsim.functional.kernel_neighbors import kernel_neighbors
from lightning_netsim.functional.kernel_scalars import (
    effective_rank,
    identity_distance_similarity,
    rotation_similarity,
    subspace_similarity,
    trace_similarity,
)
from lightning_netsim.functional.neighbor_count import hard_count, neighbor_count, power_count, soft_count
from lightning_netsim.functional.similarity import (
    density_loss,
    group_mean_similarity,
    group_similarity_loss,
    minibatch_similarity_loss,
    pair_similarity_loss,
    tangent_loss,
)

__all__ = [
    "contrastive_loss",
    "ctv_norm",
    "density_loss",
    "difference_alignment_loss",
    "effective_rank",
    "group_mean_similarity",
    "group_similarity_loss",
    "hard_count",
    "identity_distance_similarity",
    "inverse_root",
    "kernel_matrix",
    "kernel_neighbors",
    "minibatch_similarity_loss",
    "neighbor_count",
    "normalized_kernel_matrix",
    "orthonormal_gradients",
    "pair_similarity_loss",
    "pairwise_similarity",
    "power_count",
    "rotation_similarity",
    "soft_count",
    "subspace_similarity",
    "tangent_loss",
    "trace_similarity",
    "transfer",
]

"""Pure functions of tensors: each concept is one module, and needs no model and no Trainer."""

from __future__ import annotations

from lightning_netsim.functional.arc_cosine import arc_cosine, arc_cosine_kernel
from lightning_netsim.functional.contrastive import contrastive_loss
from lightning_netsim.functional.denoising import (
    denoising_bound,
    denoising_factor,
    denoising_weights,
    lipschitz_constant,
    neighbor_consistency,
    smooth,
)
from lightning_netsim.functional.difference_alignment import ctv_norm, difference_alignment_loss
from lightning_netsim.functional.expected_neighbors import expected_neighbors, neighbor_dimension, neighbor_radius
from lightning_netsim.functional.kernel import (
    effective_rank,
    identity_distance_similarity,
    inverse_root,
    kernel_matrix,
    normalized_kernel_matrix,
    orthonormal_gradients,
    pairwise_similarity,
    rotation_similarity,
    subspace_similarity,
    trace_similarity,
    transfer,
)
from lightning_netsim.functional.kernel_neighbors import kernel_neighbors
from lightning_netsim.functional.label_quality import label_quality, label_votes
from lightning_netsim.functional.mmd import gaussian_kernel, median_distance, random_feature_mmd, squared_mmd
from lightning_netsim.functional.neighbor_count import hard_count, neighbor_count, power_count, soft_count
from lightning_netsim.functional.patch_mmd import exact_patch_mmd, pool_windows, random_patch_mmd
from lightning_netsim.functional.random_features import draw_frequencies, fourier_features
from lightning_netsim.functional.similarity import (
    density_loss,
    group_mean_similarity,
    group_similarity_loss,
    minibatch_similarity_loss,
    pair_similarity_loss,
    tangent_loss,
)
from lightning_netsim.functional.wasserstein import laplacian_pyramid, sliced_wasserstein

__all__ = [
    "arc_cosine",
    "arc_cosine_kernel",
    "contrastive_loss",
    "ctv_norm",
    "denoising_bound",
    "denoising_factor",
    "denoising_weights",
    "density_loss",
    "difference_alignment_loss",
    "draw_frequencies",
    "effective_rank",
    "exact_patch_mmd",
    "expected_neighbors",
    "fourier_features",
    "gaussian_kernel",
    "group_mean_similarity",
    "group_similarity_loss",
    "hard_count",
    "identity_distance_similarity",
    "inverse_root",
    "kernel_matrix",
    "kernel_neighbors",
    "label_quality",
    "label_votes",
    "laplacian_pyramid",
    "lipschitz_constant",
    "median_distance",
    "minibatch_similarity_loss",
    "neighbor_consistency",
    "neighbor_count",
    "neighbor_dimension",
    "neighbor_radius",
    "normalized_kernel_matrix",
    "orthonormal_gradients",
    "pair_similarity_loss",
    "pairwise_similarity",
    "pool_windows",
    "power_count",
    "random_feature_mmd",
    "random_patch_mmd",
    "rotation_similarity",
    "sliced_wasserstein",
    "smooth",
    "soft_count",
    "squared_mmd",
    "subspace_similarity",
    "tangent_loss",
    "trace_similarity",
    "transfer",
]

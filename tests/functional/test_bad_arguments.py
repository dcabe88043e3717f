from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_netsim import NetsimError
from lightning_netsim import functional as F
from lightning_netsim.functional.retrieval import mean_average_precision_at_r, neighbor_vote, recall_at_k

ROWS, WIDER, SAME, ROW = torch.ones(3, 2), torch.ones(4, 3), torch.arange(3), torch.ones(3)
NONE, WHOLE, GRADIENTS = torch.ones(0, 2), torch.ones(3, 2).long(), torch.ones(2, 3, 4)
BROKEN = torch.tensor([[1.0, math.nan], [math.inf, 0.0], [0.0, 1.0]])
SQUARE, KERNEL, VOTES = torch.ones(3, 3), torch.ones(2, 3, 2, 2), torch.zeros(2, 2)
IMAGE, WAVES, MATCHES = torch.rand(2, 3, 10, 9), torch.ones(4, 3, 3, 3), torch.zeros(2, 4, dtype=torch.bool)
SOURCE = torch.Generator()

#: Name of the module -> (call, message).
ROWS_OF: dict[str, list[tuple[Callable[[], Any], str]]] = {
    "arc_cosine": [
        (lambda: F.arc_cosine(0.5), "`cosine` to be a floating-point tensor, but got float"),
        (lambda: F.arc_cosine(ROW, 0), "`depth` to be a positive int, but got 0"),
        (lambda: F.arc_cosine_kernel(ROW), r"`x` .* of shape \(N, K\), but got shape \(3,\)"),
        (lambda: F.arc_cosine_kernel(ROWS, WIDER), "`y` to be of the same size as `x`"),
        (lambda: F.arc_cosine_kernel(ROWS, depth=True), "`depth` .* but got True"),
    ],
    "contrastive": [
        (lambda: F.contrastive_loss(BROKEN, SAME), "`embeddings` to be finite, but got 2 non-finite of 6"),
        (lambda: F.contrastive_loss(ROWS, SAME[:2]), r"`labels` .* of 3 class numbers, .* got torch.int64 of shape \(2,\)"),
        (lambda: F.contrastive_loss(ROWS, SAME, 0.0), "`margin` to be a positive number, but got 0.0"),
    ],
    "denoising": [
        (lambda: F.denoising_weights(GRADIENTS), "`kernel` to be a floating-point tensor of shape"),
        (lambda: F.denoising_weights(KERNEL[..., :1]), r"`kernel` to be of shape \(Q, N, d, d\) or \(Q, N\), but got"),
        (lambda: F.denoising_weights(KERNEL, clamp=True), "`clamp` to be False for kernels of several outputs"),
        (lambda: F.smooth(KERNEL, torch.ones(3, 1)), r"`values` to be of shape \(3, 2\) to fit `weights`"),
        (lambda: F.neighbor_consistency(SQUARE, ROWS, torch.ones(3, 1)), r"`outputs` to be of shape \(3, 1\)"),
        (lambda: F.denoising_bound(ROWS, SQUARE, 1.0), "`similarity` to be of the same size as `weights`"),
        (lambda: F.lipschitz_constant(ROWS, ROW[:2], ROWS), "`gradient_norm` to be of the same size"),
        (lambda: F.lipschitz_constant(SQUARE, ROW, ROWS), r"`gradient_norm` to be of shape \(N, 3\)"),
    ],
    "difference_alignment": [
        (lambda: F.ctv_norm(ROW), r"`differences` to be a floating-point tensor of shape \(H, h\), but got shape"),
        (lambda: F.ctv_norm(BROKEN), "`differences` to be finite, but got 2 non-finite of 6 entries"),
        (lambda: F.ctv_norm(ROWS, "squared"), "but got 'squared'. Did you mean 'squared_l2'?"),
        (lambda: F.ctv_norm(ROWS, reduction="none"), "`reduction` to be one of 'sum', 'mean', but got 'none'"),
        (lambda: F.difference_alignment_loss(ROWS, SAME * 1j), "`labels`"),
        (lambda: F.difference_alignment_loss(ROWS, difference="distances"), "Did you mean 'distance'?"),
        (lambda: F.difference_alignment_loss(NONE, norm="l3"), "`norm`"),
        (lambda: F.difference_alignment_loss(ROWS, None, WHOLE), r"an int64 tensor of shape \(2, n\), .* \(3, 2\)"),
        (lambda: F.difference_alignment_loss(ROWS, None, WHOLE.mT.bool()), r"`pairs` .* torch.bool of shape \(2, 3\)"),
        (lambda: F.difference_alignment_loss(ROWS, None, [(0, 1)]), "`pairs` .* but got list"),
        (lambda: F.difference_alignment_loss(ROWS, None, WHOLE.mT * 3), "`pairs` to be numbers of the 3 samples, .* 3 to 3"),
        (lambda: F.difference_alignment_loss(ROWS, None, -WHOLE.mT), "`pairs` to be numbers of the 3 samples"),
    ],
    "expected_neighbors": [
        (lambda: F.neighbor_dimension(ROW), r"`distance` .* \(N, k\)"),
        (lambda: F.neighbor_dimension(ROWS[:, :1]), "with k of at least 2"),
    ],
    "kernel": [
        (lambda: F.pairwise_similarity(GRADIENTS, scalar="trce"), "`scalar` to be one of .* Did you mean 'trace'"),
        (lambda: F.pairwise_similarity(GRADIENTS, GRADIENTS[..., 1:]), "`y` .* along dimension 2"),
        (lambda: F.pairwise_similarity(GRADIENTS, GRADIENTS[:, 1:]), "`y` .* along dimension 1"),
        (lambda: F.pairwise_similarity(GRADIENTS, scalar="rotation"), r"of shape \(\.\.\., 2, 2\)"),
        (lambda: F.kernel_matrix(GRADIENTS.long()), "`x` to be a floating-point tensor"),
        (lambda: F.inverse_root(ROWS), "`gram`"),
        (lambda: F.inverse_root(SQUARE, floor=1.0), r"`floor` to be in \[0, 1\)"),
        (lambda: F.normalized_kernel_matrix(KERNEL, VOTES.expand(2, 2, 2), VOTES.expand(2, 2, 2)), "`root_y`"),
        (lambda: F.transfer(SQUARE, VOTES), "`kernel`"),
    ],
    "kernel_neighbors": [
        (lambda: F.kernel_neighbors(ROWS, k=3), "`k` to be at most 2"),
        (lambda: F.kernel_neighbors(ROWS, ROWS, k=4), "`k` to be at most 3"),
        (lambda: F.kernel_neighbors(ROWS, WIDER, k=1), "`reference`"),
        (lambda: F.kernel_neighbors(ROWS, k=1, chunk_size=0), "`chunk_size`"),
    ],
    "label_quality": [
        (lambda: F.label_votes(SAME, 3), r"`neighbor_labels` to be of shape \(Q, k\)"),
        (lambda: F.label_votes(2 * WHOLE, 2), "`neighbor_labels` to be integers within -1 to 1, but got 2 to 2"),
        (lambda: F.label_votes(-2 * WHOLE, 2), "`neighbor_labels` to be integers within -1 to 1"),
        (lambda: F.label_votes(WHOLE, 2, SAME, ROW), "`predictions`.*within -1 to 1"),
        (lambda: F.label_votes(WHOLE, 3, SAME[:2], ROW), r"`predictions`.*\(3,\)"),
        (lambda: F.label_votes(WHOLE, 3, SAME, ROWS), r"`margin`.*\(3,\)"),
        (lambda: F.label_quality(ROW, SAME), r"`votes`.*\(Q, C\)"),
        (lambda: F.label_quality(VOTES, SAME), r"`labels`.*\(2,\)"),
        (lambda: F.label_quality(VOTES, SAME[:2] - 1), "`labels`.*within 0 to 1"),
    ],
    "mmd": [
        (lambda: F.squared_mmd(NONE, ROWS), r"`x` to be one or more samples, but got shape \(0, 2\)"),
        (lambda: F.squared_mmd(ROWS, ROWS[:1], unbiased=True), r"`y` to be two or more samples.*shape \(1, 2\)"),
        (lambda: F.squared_mmd(ROW, ROWS), r"`x` .* of shape \(N, K\), but got shape \(3,\)"),
        (lambda: F.squared_mmd(BROKEN, ROWS), "`x` to be finite, but got 2 non-finite of 6 entries"),
        (lambda: F.squared_mmd(ROWS, WIDER), "`y` to be of the same size as `x` along dimension 1"),
        (lambda: F.squared_mmd(ROWS, ROWS, lambda x, y: (x * y).sum(1)), r"`kernel` .* here of shape \(3, 3\), .* \(3,\)"),
        (lambda: F.squared_mmd(ROWS, ROWS, lambda x, y: 1), "similarities of all pairs, here of shape .* but got int"),
        (lambda: F.gaussian_kernel(ROWS, bandwidths=[1.0, -1.0]), "`bandwidths` to be a positive number, but got -1.0"),
        (lambda: F.gaussian_kernel(ROWS, bandwidths=[]), r"`bandwidths` to be one or more positive numbers, but got \[\]"),
        (lambda: F.gaussian_kernel(ROWS, bandwidths="1"), "`bandwidths` .* but got '1'"),
        (lambda: F.median_distance(BROKEN), "`x` to be finite"),
        (lambda: F.random_feature_mmd(ROWS, ROWS, WIDER), "`frequencies` to be of the same size as `x`"),
    ],
    "neighbor_count": [
        (lambda: F.soft_count(ROW), "`query`"),
        (lambda: F.soft_count(ROWS, WIDER), "`reference`"),
        (lambda: F.soft_count(ROWS, chunk_size=0), "`chunk_size` to be a positive int"),
        (lambda: F.neighbor_count(ROWS, thresholds=[1.5]), r"`thresholds` to be numbers within \[-1, 1\]"),
        (lambda: F.neighbor_count(ROWS, powers=[0]), "`powers` to be a positive number"),
        (lambda: F.power_count(ROWS, power=-1), "`power` to be a positive number"),
    ],
    "patch_mmd": [
        (lambda: F.random_patch_mmd(IMAGE[0], IMAGE, WAVES), r"`input` .* of shape \(B, C, H, W\), but got shape"),
        (lambda: F.random_patch_mmd(IMAGE, IMAGE.byte(), WAVES), "`target` .* but got dtype torch.uint8"),
        (lambda: F.random_patch_mmd(IMAGE[:0], IMAGE, WAVES), r"`input` to be one or more images, .*\(0, 3, 10, 9\)"),
        (lambda: F.random_patch_mmd(IMAGE, IMAGE[..., :8], WAVES), "`input` to be of the shape of `target`"),
        (lambda: F.random_patch_mmd(IMAGE, IMAGE[[0, 1, 1]], WAVES), "`input` to be of the shape of `target`"),
        (lambda: F.random_patch_mmd(IMAGE, IMAGE, WAVES[:, :1]), "`frequencies` to be .* of 3 channels"),
        (lambda: F.random_patch_mmd(IMAGE, IMAGE, WAVES[:, :, :2]), "`frequencies`"),
        (lambda: F.random_patch_mmd(IMAGE, IMAGE, WAVES, 8, 2), "`window` to be at most 7, .* of 10×9, but got 8"),
        (lambda: F.random_patch_mmd(IMAGE, IMAGE, WAVES, 4, 5), r"`stride` to be at most `window` \(4\), but got 5"),
        (lambda: F.random_patch_mmd(IMAGE, IMAGE, WAVES, 4, 2, "sum"), "`reduction` to be one of 'mean', 'none'"),
        (lambda: F.exact_patch_mmd(IMAGE * math.nan, IMAGE, F.gaussian_kernel, 3, 4, 2), "to be finite"),
        (lambda: F.exact_patch_mmd(IMAGE, IMAGE, F.gaussian_kernel, 1, 4, 2, True), "`patch_size` to be at least 2"),
        (lambda: F.exact_patch_mmd(IMAGE, IMAGE, F.gaussian_kernel, 10, 4, 2), "`patch_size` to be at most the shorter side"),
        (lambda: F.pool_windows(IMAGE, 10, 2), "`window` to be at most 9"),
    ],
    "random_features": [
        (lambda: F.draw_frequencies(7, 2, 1.0, SOURCE), "`num_features` to be an even number, .* but got 7"),
        (lambda: F.draw_frequencies(2, 2, [1.0, 2.0], SOURCE), "`num_features` to be at least 4, two for each bandwidth"),
        (lambda: F.draw_frequencies(8, 0, 1.0, SOURCE), "`num_inputs` to be a positive int, but got 0"),
        (lambda: F.fourier_features(ROW, ROWS), r"`x` .* of shape \(N, K\)"),
        (lambda: F.fourier_features(ROWS, WIDER), "`frequencies` to be of the same size as `x`"),
        (lambda: F.fourier_features(ROWS, NONE), "`frequencies` to be one or more rows"),
    ],
    "retrieval": [
        (lambda: recall_at_k(MATCHES.float(), 1), r"`matches` to be a boolean tensor of shape \(Q, K\), but got"),
        (lambda: mean_average_precision_at_r([[True]], SAME), "`matches` .* but got list"),
        (lambda: recall_at_k(MATCHES, 5), "`k` to be at most 4, the number of neighbors, but got 5"),
        (lambda: mean_average_precision_at_r(MATCHES, SAME), "`num_relevant` to be at most 4 for each of 2 queries"),
        (lambda: mean_average_precision_at_r(MATCHES, SAME[:2] + 4), "`num_relevant` to be at most 4"),
        (lambda: neighbor_vote(ROWS, WHOLE, 0.0), "`temperature` to be a positive number"),
        (lambda: neighbor_vote(ROWS, ROWS), "`neighbor_labels` .*float32"),
        (lambda: neighbor_vote(ROWS, [[1, 3, 2]]), r"`neighbor_labels` .*\(1, 3\)"),
    ],
    "similarity": [
        (lambda: F.pair_similarity_loss(SQUARE), r"`similarity` to be a floating-point tensor of shape \(n,\)"),
        (lambda: F.group_mean_similarity(ROW, SAME), "`size` to be at least 2 samples in each group, but got 0"),
        (lambda: F.group_similarity_loss(ROWS, SAME), "`similarity`"),
        (lambda: F.group_similarity_loss(SQUARE, SAME[:2]), r"`labels` .* of shape \(3,\) .* got shape \(2,\)"),
        (lambda: F.group_similarity_loss(SQUARE, [0, 0, 1]), "`labels`"),
        (lambda: F.minibatch_similarity_loss(ROW, ROW[:2], 2), "`second` to be of the same size as `first`"),
        (lambda: F.minibatch_similarity_loss(ROW, ROW, 0), "`batch_size` to be a positive int, but got 0"),
        (lambda: F.density_loss(SQUARE, 0.1), r"`fraction` to be a floating-point tensor of shape \(B,\)"),
        (lambda: F.density_loss(ROW, 2), r"`target` to be numbers within \[0, 1\], but got 2"),
        (lambda: F.density_loss(ROW, (0.5, 0.1)), "`target` to be a share"),
        (lambda: F.density_loss(ROW, (0.1, 0.2, 0.3)), "`target` to be a share"),
        (lambda: F.density_loss(ROW, 0.1, "none"), "`reduction` to be one of 'mean', 'sum', but got 'none'"),
        (lambda: F.tangent_loss(SQUARE), r"`derivative` to be a floating-point tensor of shape \(B, d, P\)"),
    ],
    "wasserstein": [
        (lambda: F.sliced_wasserstein(ROWS, BROKEN, ROWS), "`y` to be finite, but got 2 non-finite of 6"),
        (lambda: F.sliced_wasserstein(NONE, NONE, ROWS), "`x` to be one or more rows, but got none"),
        (lambda: F.sliced_wasserstein(ROWS, ROWS, NONE), "`directions` to be one or more rows, but got none"),
        (lambda: F.sliced_wasserstein(ROWS, ROWS[:2], ROWS), "`y` to be of the same size as `x` along dimension 0"),
        (lambda: F.sliced_wasserstein(ROWS, SQUARE, ROWS), "`y` to be of the same size as `x` along dimension 1"),
        (lambda: F.sliced_wasserstein(ROWS, ROWS, SQUARE), "`directions` to be of the same size as `x`"),
        (lambda: F.laplacian_pyramid(IMAGE, 0), "`num_levels` to be a positive int, but got 0"),
        (lambda: F.laplacian_pyramid(IMAGE[..., :8], 3), "`images` to be large enough for 3 levels"),
        (lambda: F.laplacian_pyramid(IMAGE[..., :4], 2), "`images` to be large enough for 2 levels"),
    ],
}


@pytest.mark.parametrize(
    ("call", "message"), [pytest.param(*row, id=f"{name} {i}") for name, rows in ROWS_OF.items() for i, row in enumerate(rows)]
)
def test_bad_arguments_are_refused_in_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message) as caught:
        call()
    assert str(caught.value).startswith("Expected `")
    assert "\n" not in str(caught.value)

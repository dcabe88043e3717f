"""Find the exact kernel neighbors of samples, block by block.

Source: Charpiat et al., NeurIPS 2019, section 6 (nearest neighbors under the kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_neighbors_fit, check_positive_int
from lightning_netsim.functional._blocks import check_features, usable_rows
from lightning_netsim.functional._precision import full_precision, to_double
from lightning_netsim.functional.results import KernelNeighborsResult


def kernel_neighbors(
    query: Tensor, reference: Tensor | None = None, k: int = 10, chunk_size: int = 1024
) -> KernelNeighborsResult:
    """Find the k reference samples of highest similarity φ(x) · φ(x') for each query, exactly.

    Similarities are formed in float64 and rounded to float32, so that duplicates tie exactly whatever the `chunk_size`; ties
    break by the lower index. Without `reference`, a sample is not its own neighbor (its duplicates are). A row that is zero or
    not finite stands for a sample that was left out: as a query it has no neighbors, and it is nobody's neighbor. Not
    differentiable.

    Args:
        query: shape (Q, K), unit features φ(x).
        reference: shape (N, K); by default the query set itself.
        k: number of neighbors, in [1, N], or [1, N - 1] without `reference`.
        chunk_size: rows of a block of similarities, at least 1; memory grows with its square.

    Returns:
        Similarities (Q, k), float32, descending, and indices (Q, k), int64; NaN and -1 where there is no neighbor. The recall
        is 1.

    Raises:
        NetsimError: the shapes do not fit, or `k` exceeds the number of other samples.

    Source: Charpiat et al., NeurIPS 2019, section 6.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> kernel_neighbors(features, k=2).index.tolist()
        [[1, 2], [0, 2], [1, 0]]
    """
    is_self = reference is None
    reference = check_features(query, reference)
    check_neighbors_fit(k, reference.shape[0], is_self)
    check_positive_int("chunk_size", chunk_size)
    similarities, indices = [], []
    with torch.no_grad(), full_precision(query):
        places = torch.arange(max(len(query), len(reference)), device=query.device)
        blocks = list(zip(torch.split(reference, chunk_size), torch.split(places[: len(reference)], chunk_size), strict=True))
        for rows, own in zip(torch.split(query, chunk_size), torch.split(places[: len(query)], chunk_size), strict=True):
            usable = usable_rows(rows).unsqueeze(1)
            wide = to_double(torch.where(usable, rows, 0.0))
            best = wide.new_zeros(len(rows), 0, dtype=torch.float32)
            best_index = torch.zeros_like(best, dtype=torch.int64)
            for columns, index in blocks:
                present = usable_rows(columns)
                safe = to_double(torch.where(present.unsqueeze(1), columns, 0.0))
                similarity = (wide @ safe.mT).float().masked_fill(~present.to(wide.device), -torch.inf)
                if is_self:
                    similarity = similarity.masked_fill((own.unsqueeze(1) == index).to(wide.device), -torch.inf)
                candidates = torch.cat([best, similarity], dim=1)
                candidate_index = torch.cat([best_index, index.to(wide.device).expand(len(rows), -1)], dim=1)
                chosen = _stable_topk(candidates, min(k, candidates.shape[1]))
                best, best_index = candidates.gather(1, chosen), candidate_index.gather(1, chosen)
            missing = (best == -torch.inf) | ~usable.to(best.device)
            similarities.append(torch.where(missing, torch.nan, best).to(query.device))
            indices.append(torch.where(missing, -1, best_index).to(query.device))
    return KernelNeighborsResult(torch.cat(similarities), torch.cat(indices), recall=1.0)


def _stable_topk(values: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest of each row, descending, ties by position (`torch.topk` leaves ties open)."""
    top, position = values.topk(k, dim=1)
    position = position.sort(dim=1).values
    order = values.gather(1, position).sort(dim=1, descending=True, stable=True).indices
    position = position.gather(1, order)
    # Where the last value is shared with samples beyond the first k, topk may have kept any of them: sort these rows.
    open_rows = ((values >= top[:, -1:]).sum(dim=1) > k).nonzero().squeeze(1)
    if open_rows.numel():
        position[open_rows] = values[open_rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return position

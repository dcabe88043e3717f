"""Give samples without labels the clusters that they belong to in place of classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_embeddings, check_positive_int, check_same_size, check_seed, check_tensor, expected
from lightning_netsim.data.processes import Processes
from lightning_netsim.estimators.index import find_clusters
from lightning_netsim.functional._precision import unit_rows

# What k-means makes use of, for each center.
_SAMPLES_PER_CLUSTER = 256


class PseudoLabels(nn.Module):
    """Cluster the embeddings of an epoch, and label those of the next one by the nearest center.

    `update` with the embeddings of every batch, `refresh` when an epoch has ended, or `begin_epoch` at every step; `assign` at
    any time. The embeddings of the 256·k samples that came last are kept. A sample is labeled by its own embedding at the time,
    so that it needs no name. Each cluster keeps the number of the nearest one before, so that a loss may learn something of it.
    All this belongs to the state of a module, so that a resumed run goes on with it: a checkpoint grows by those embeddings.

    Args:
        num_clusters: k, at least 2.
        seed: of the first centers.

    Raises:
        NetsimError: for a value out of range.

    Source: "cluster-used" of Chen et al., ICLR 2024; clusters as pseudo-labels: Caron et al., DeepCluster, ECCV 2018.

    Example:
        >>> labels = PseudoLabels(num_clusters=2)
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> labels.update(embeddings)
        >>> labels.assign(embeddings).tolist()
        [-1, -1, -1]
        >>> labels.refresh()
        >>> first, second, third = labels.assign(embeddings).tolist()
        >>> first == second != third
        True
    """

    def __init__(self, num_clusters: int, seed: int = 0) -> None:
        super().__init__()
        if check_positive_int("num_clusters", num_clusters) < 2:
            raise expected("num_clusters", "at least 2", "1")
        self.num_clusters = num_clusters
        self.seed = check_seed("seed", seed)
        self.centers: Tensor | None = None
        self.epoch: int | None = None
        self._kept: list[Tensor] = []

    def update(self, embeddings: Tensor) -> None:
        """Add the embeddings of a batch, shape (B, h); zero vectors and those that are not finite are left out.

        Raises:
            NetsimError: they are no floating-point matrix, or of another width than before.
        """
        vectors = check_tensor("embeddings", embeddings, 2, like="(B, h)").detach().float()
        if self._kept:
            check_same_size("embeddings", vectors, "earlier embeddings", self._kept[-1], dim=1)
        usable = torch.isfinite(vectors).all(1) & vectors.any(1)
        self._kept.append(unit_rows(vectors[usable]).cpu())
        excess = sum(map(len, self._kept)) - len(self._kept[0])
        while excess >= _SAMPLES_PER_CLUSTER * self.num_clusters:
            self._kept.pop(0)
            excess -= len(self._kept[0])

    def begin_epoch(self, epoch: int) -> None:
        """Refresh, unless `epoch` is the one of the last call, or the first."""
        if self.epoch is not None and epoch != self.epoch:
            self.refresh()
        self.epoch = epoch

    def refresh(self) -> None:
        """Cluster what was added since the last time, in all processes.

        Raises:
            NetsimError: there never were as many samples as clusters.
        """
        processes = Processes.current()
        kept = [part for parts in processes.gather(self._kept) for part in parts]
        self._kept = []
        size = sum(map(len, kept))
        if size < self.num_clusters:
            if self.centers is None:
                raise expected("num_clusters", f"at most {size}, the number of samples so far", str(self.num_clusters))
            return
        centers = find_clusters(torch.cat(kept), self.num_clusters, self.seed) if processes.rank == 0 else None
        if centers is not None and self.centers is not None:
            centers = _in_order(centers, self.centers.cpu())
        self.centers = processes.broadcast(centers)

    def assign(self, embeddings: Tensor) -> Tensor:
        """Return the cluster of each embedding, shape (B,), int64; -1 before the first refresh.

        Raises:
            NetsimError: embeddings are not a finite floating-point matrix, or of another width than the centers.
        """
        embeddings = check_embeddings("embeddings", embeddings).detach()
        if self.centers is None:
            return torch.full((len(embeddings),), -1, device=embeddings.device)
        check_same_size("embeddings", embeddings, "centers", self.centers, dim=1)
        self.centers = self.centers.to(embeddings.device)
        return (embeddings.float() @ self.centers.mT).argmax(1)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold, as plain values."""
        return {"centers": self.centers, "kept": self._kept, "epoch": self.epoch}

    def set_extra_state(self, state: Any) -> None:
        """Take it from a checkpoint."""
        self.centers, self._kept, self.epoch = state["centers"], list(state["kept"]), state["epoch"]


def _in_order(centers: Tensor, before: Tensor) -> Tensor:
    """Return centers in the order of those before: the nearest pair of both first, then the nearest of what remains."""
    similarity = before @ centers.mT
    order = torch.zeros(len(centers), dtype=torch.int64)
    for _ in range(len(centers)):
        old, new = divmod(int(similarity.argmax()), len(centers))
        order[old] = new
        similarity[old, :] = -torch.inf
        similarity[:, new] = -torch.inf
    return centers[order]

"""Search the kernel neighbors of samples in an index of unit features.

A thin layer over faiss, which is imported on first use. Similarity is the inner product of features (the kernel k^C, where
they are unit vectors); what the index adds to faiss is sample ids, the removal of a sample itself, a fixed order of ties and
one file that knows what it is.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import (
    NetsimError,
    check_finite,
    check_neighbors_fit,
    check_positive_int,
    check_same_size,
    check_seed,
    check_tensor,
    expected,
)
from lightning_netsim.estimators.neighbor_table import in_order
from lightning_netsim.functional.results import KernelNeighborsResult

FORMAT_VERSION = 1
_MAGIC = b"NETSIMIX"
_LENGTH_BYTES = 8
_SLACK = 4  # Fetched beyond k and the sample itself, so that a tie at the k-th place is seen.
_TIE_TOLERANCE = 2e-6  # Duplicates differ by this much at most, by the order of summation in float32.
_MAX_TIED = 64
_BLOCK_ELEMENTS = 2**24


def _faiss() -> Any:
    """Import faiss on first use, after torch: the other order can crash, and most users of the package never need it."""
    return importlib.import_module("faiss")


class NeighborIndex:
    """Hold the features of a reference set and find the nearest of them: add, search, save, load.

    Neighbors are those of highest inner product φ(x) · φ(x'). Ties break by the lower id: similarities within 2e-6 of each
    other are recomputed in float64 where the index keeps the features themselves ("Flat"), and of more than 64 samples tied
    at the k-th place, those that faiss returns first are kept.

    Args:
        dim: K, the number of features per sample.
        index_factory: a faiss `index_factory` string: "Flat" (exact, the default), "HNSW32", "IVF256,Flat", ... Inverted
            files visit √nlist of their lists. An index that needs training is trained at the first search or save, on all
            features added until then.
        fingerprint: names what the features come from (the run, its checkpoint, the version of the data), so that the file is
            not taken for that of another; None leaves it unnamed.

    Raises:
        NetsimError: `dim` is not a positive int, or faiss cannot build such an index for the inner product.

    Source: Charpiat et al., NeurIPS 2019, section 6 (nearest neighbors under the kernel).

    Example:
        >>> index = NeighborIndex(dim=2)
        >>> index.add(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), ids=torch.tensor([10, 11, 12]))
        >>> index.search(torch.tensor([[1.0, 0.0]]), k=2, exclude=torch.tensor([10])).index.tolist()
        [[11, 12]]
    """

    def __init__(self, dim: int, index_factory: str = "Flat", fingerprint: str | None = None) -> None:
        self.dim = check_positive_int("dim", dim)
        self.index_factory = index_factory
        self.fingerprint = fingerprint
        faiss = _faiss()
        remedy = "Use 'Flat', 'HNSW32', 'IVF256,Flat' or another of faiss's strings without an IDMap."
        refusal = expected(
            "index_factory", f"a faiss index_factory string for the inner product and dim={dim}", repr(index_factory), remedy
        )
        if not isinstance(index_factory, str):
            raise refusal
        try:
            self._index: Any = faiss.index_factory(dim, index_factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise refusal from error
        if self._index.metric_type != faiss.METRIC_INNER_PRODUCT or "IDMap" in type(self._index).__name__:
            raise refusal
        inverted = faiss.try_extract_index_ivf(self._index)
        if inverted is not None:
            inverted.nprobe = math.isqrt(inverted.nlist - 1) + 1
        self._ids: list[Tensor] = []
        self._known: set[int] = set()
        self._pending: list[Tensor] = []

    def __len__(self) -> int:
        """Return N, the number of samples added."""
        return len(self._known)

    @property
    def ids(self) -> Tensor:
        """Return the ids of the samples in the order in which they were added, shape (N,), int64."""
        self._ids = [torch.cat(self._ids)] if self._ids else [torch.zeros(0, dtype=torch.int64)]
        return self._ids[0]

    def add(self, features: Tensor, ids: Tensor | None = None) -> None:
        """Add the features of samples.

        Args:
            features: shape (n, K), floating-point, finite and not zero; stored in float32 unless the factory compresses.
            ids: shape (n,), int64, at least 0 and never added before; by default the position in the index.

        Raises:
            NetsimError: a shape does not fit, a row is zero or not finite, or an id is negative or repeated.
        """
        rows = _float32("features", features, self.dim)
        check_finite("features", rows)
        zero = int((rows == 0).all(dim=1).sum())
        if zero:
            raise expected("features", "non-zero in every row", f"{zero} zero rows", "Leave samples without a gradient out.")
        ids = torch.arange(len(self), len(self) + rows.shape[0]) if ids is None else _check_ids("ids", ids, rows)
        new = set(ids.tolist())
        if len(new) < len(ids) or not self._known.isdisjoint(new) or bool((ids < 0).any()):
            remedy = "Number the samples by their position in the data set."
            raise expected("ids", "at least 0, without repetition and new to the index", "ids that are not", remedy)
        if self._index.is_trained:
            self._index.add(rows.numpy())
        else:
            self._pending.append(rows.clone())
        self._ids.append(ids.clone())
        self._known |= new

    def search(
        self, features: Tensor, k: int = 10, exclude: Tensor | None = None, settle_ties: bool = True
    ) -> KernelNeighborsResult:
        """Find the `k` samples of highest similarity for each query, `exclude` left out.

        Args:
            features: shape (Q, K), floating-point. A row that is zero or not finite stands for a sample that was left out.
            k: number of neighbors, in [1, N], or [1, N - 1] with `exclude`.
            exclude: shape (Q,), int64, for each query the id that is not to be found: its own.
            settle_ties: whether ties break by the lower id. Where similarities are only estimates, that is not worth its cost:
                as many as are found more.

        Returns:
            Similarities (Q, k), float32, descending, and ids (Q, k), int64, on the CPU; NaN and -1 where there is no
            neighbor: for a query that was left out, and where an approximate index finds fewer than `k`. The recall is 1 for
            "Flat", else not measured (None).

        Raises:
            NetsimError: a shape does not fit, or `k` exceeds the number of other samples.
        """
        rows = _float32("features", features, self.dim)
        check_neighbors_fit(k, len(self), exclude is not None)
        exclude = torch.full((rows.shape[0],), -1) if exclude is None else _check_ids("exclude", exclude, rows)
        self._settle()
        similarity = torch.full((rows.shape[0], k), math.nan)
        index = torch.full((rows.shape[0], k), -1, dtype=torch.int64)
        open_rows = (torch.isfinite(rows).all(dim=1) & (rows != 0).any(dim=1)).nonzero().squeeze(1)
        fetch, limit = min(len(self), k + 1 + _SLACK), min(len(self), max(4 * (k + 1), _MAX_TIED))
        if not settle_ties:
            fetch = limit = min(len(self), k + 1)
        while open_rows.numel():
            found, ids, tied = self._search_once(rows[open_rows], exclude[open_rows], fetch, k, settle_ties)
            similarity[open_rows], index[open_rows] = found, ids
            open_rows = open_rows[tied] if fetch < limit else open_rows[:0]
            fetch = limit
        return KernelNeighborsResult(similarity, index, recall=1.0 if self._stored() is not None else None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file, complete or not at all.

        The file is a faiss index (`faiss.read_index` reads it) followed by the ids and a note of version, dim, size and
        fingerprint.

        Args:
            path: the file, overwritten if it exists; its directory must exist.
        """
        self._settle()
        target = Path(path)
        if not target.parent.is_dir():
            raise expected("path", "in an existing directory", repr(str(path)), "Make the directory first.")
        temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        note = {
            "version": FORMAT_VERSION,
            "dim": self.dim,
            "num_samples": len(self),
            "index_factory": self.index_factory,
            "fingerprint": self.fingerprint,
        }
        try:
            _faiss().write_index(self._index, str(temporary))
            data = json.dumps({**note, "index_bytes": temporary.stat().st_size}).encode()
            with temporary.open("ab") as file:
                file.write(self.ids.numpy().tobytes() + data + len(data).to_bytes(_LENGTH_BYTES, "little") + _MAGIC)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str | None = None) -> NeighborIndex:
        """Read an index that `save` wrote.

        Args:
            path: the file.
            fingerprint: what the features have to come from; None takes any.

        Returns:
            The index, ready to search and to grow.

        Raises:
            NetsimError: the file does not exist, is not such an index, is cut short, was written by a newer version, or has
                another fingerprint.
        """
        note, ids = _read_note(Path(path))
        found = note.get("fingerprint")
        if fingerprint is not None and found != fingerprint:
            got = f"{str(path)!r}, which " + ("does not say of what it is" if found is None else f"is of {found!r}")
            raise expected("path", f"an index of {fingerprint!r}", got, "Build the index again, or name the right file.")
        try:
            index = _faiss().read_index(str(path))
        except RuntimeError as error:
            raise _wrong_file(path, "one that faiss cannot read") from error
        if (index.d, index.ntotal) != (note["dim"], note["num_samples"]):
            raise _wrong_file(path, "one whose note does not fit its content")
        loaded = cls(note["dim"], note["index_factory"], found)
        loaded._index, loaded._ids, loaded._known = index, [ids], set(ids.tolist())
        return loaded

    def _settle(self) -> None:
        """Train the index if it needs training and add what waits for it."""
        if not self._pending:
            return
        rows = torch.cat(self._pending).numpy()
        try:
            self._index.train(rows)
        except RuntimeError as error:
            remedy = "Add more samples, or choose fewer lists or 'Flat'."
            raise expected("index_factory", f"trainable on {len(rows)} samples", repr(self.index_factory), remedy) from error
        self._index.add(rows)
        self._pending = []

    def _stored(self) -> Tensor | None:
        """Return a view of the features themselves, shape (N, K), if the index keeps them as they are."""
        faiss = _faiss()
        if not isinstance(self._index, faiss.IndexFlat):
            return None
        values = faiss.rev_swig_ptr(self._index.get_xb(), self._index.ntotal * self.dim)
        return torch.from_numpy(values).view(-1, self.dim)

    def _search_once(
        self, rows: Tensor, exclude: Tensor, fetch: int, k: int, settle_ties: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return similarities and ids (Q, k), and for each query whether a tie reaches beyond the `fetch` samples seen."""
        values, places = self._index.search(rows.numpy(), fetch)
        similarity, position = torch.from_numpy(values), torch.from_numpy(places)
        last = similarity[:, -1].clone()
        near = ((similarity[:, :-1] - similarity[:, 1:]) <= _TIE_TOLERANCE).any(dim=1).nonzero().squeeze(1)
        stored = self._stored()
        if settle_ties and stored is not None:
            # Of duplicates, similarities in float64 that are rounded to float32 tie exactly.
            for some in torch.split(near, max(1, _BLOCK_ELEMENTS // (fetch * self.dim))):
                exact = torch.einsum("qk,qfk->qf", rows[some].double(), stored[position[some]].double())
                similarity[some] = exact.float()
        ids = self.ids[position.clamp_min(0)]
        gone = (position < 0) | (ids == exclude.unsqueeze(1))
        similarity, ids = similarity.masked_fill(gone, -math.inf), ids.masked_fill(gone, -1)
        similarity, ids = in_order(similarity, ids, k)
        tied = (position[:, -1] >= 0) & (similarity[:, -1] - last <= _TIE_TOLERANCE)
        return similarity.masked_fill(ids < 0, math.nan), ids, tied


def find_clusters(features: Tensor, num_clusters: int, seed: int = 0, num_starts: int = 1) -> Tensor:
    """Find centers of clusters of unit vectors by spherical k-means, started by k-means++.

    Args:
        features: shape (n, K), floating-point, rows of length 1.
        num_clusters: in [1, n].
        seed: of the first centers, in [0, 2^31).
        num_starts: how often to start anew, at least 1; the best is kept.

    Returns:
        The centers, shape (num_clusters, K), unit vectors on the device of `features`; a sample belongs to the center with the
        highest inner product.

    Raises:
        NetsimError: there are fewer samples than clusters, a row is zero or not finite, or a number is out of range.

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.

    Example:
        >>> centers = find_clusters(torch.eye(3)[[0, 0, 1]], num_clusters=2)
        >>> (torch.eye(3)[[0, 0, 1]] @ centers.mT).argmax(1).unique().numel()
        2
    """
    check_tensor("features", features, 2, like="(n, K)")
    rows = check_finite("features", _float32("features", features, features.shape[1]))
    if not bool(rows.any(1).all()):
        raise expected("features", "non-zero in every row", "a zero row", "Leave such samples out.")
    check_positive_int("num_clusters", num_clusters)
    check_positive_int("num_starts", num_starts)
    check_seed("seed", seed)
    if num_clusters > len(rows):
        remedy = "Ask for fewer clusters, or give more samples."
        raise expected("num_clusters", f"at most {len(rows)}, the number of samples", str(num_clusters), remedy)
    faiss = _faiss()
    settings = {"niter": 25, "nredo": num_starts, "seed": seed, "spherical": True, "min_points_per_centroid": 1}
    k_means = faiss.Kmeans(rows.shape[1], num_clusters, init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, **settings)
    k_means.train(rows.numpy())
    return torch.from_numpy(k_means.centroids).to(features)


def _float32(name: str, features: Tensor, dim: int) -> Tensor:
    """Return the features as contiguous float32 on the CPU."""
    check_tensor(name, features, 2, like=f"(n, {dim})")
    if features.shape[1] != dim:
        raise expected(name, f"of shape (n, {dim})", f"shape {tuple(features.shape)}")
    return features.detach().to("cpu", torch.float32).contiguous()


def _check_ids(name: str, ids: Tensor, rows: Tensor) -> Tensor:
    """Return the ids as int64 on the CPU if there is one for each row."""
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point():
        raise expected(name, "an int64 tensor of shape (n,)", repr(ids) if not isinstance(ids, Tensor) else str(ids.dtype))
    check_same_size(name, ids, "features", rows, dim=0)
    return ids.detach().to("cpu", torch.int64)


def _wrong_file(path: str | os.PathLike[str], got: str) -> NetsimError:
    return expected("path", f"a file written by `NeighborIndex.save` (version {FORMAT_VERSION})", f"{str(path)!r}, {got}")


def _read_note(path: Path) -> tuple[dict[str, Any], Tensor]:
    """Return the note at the end of the file and the ids before it, checked."""
    if not path.is_file():
        raise _wrong_file(path, "which is not a file")
    tail = _LENGTH_BYTES + len(_MAGIC)
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - tail))
        end = file.read()
        length = int.from_bytes(end[:_LENGTH_BYTES], "little")
        if len(end) < tail or end[_LENGTH_BYTES:] != _MAGIC or length > size - tail:
            raise _wrong_file(path, "another kind of file or one cut short")
        file.seek(size - tail - length)
        note: dict[str, Any] = json.loads(file.read(length))
        if note["version"] > FORMAT_VERSION:
            raise _wrong_file(path, f"version {note['version']}")
        if note["index_bytes"] + 8 * note["num_samples"] != size - tail - length:
            raise _wrong_file(path, "one cut short")
        file.seek(note["index_bytes"])
        ids = array("q", file.read(8 * note["num_samples"]))
    return note, torch.tensor(ids.tolist(), dtype=torch.int64)

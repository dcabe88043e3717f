"""Predict what else moves if one sample is corrected: the least change of the parameters that does it, felt by all others."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_choice, check_positive_int, check_writable, expected
from lightning_netsim.analysis.borrowed import borrowed, to_device_of
from lightning_netsim.data.batches import SimilarityBatch, read_batch
from lightning_netsim.data.samples import Samples, check_positions
from lightning_netsim.data.sources import Chunk
from lightning_netsim.jacobian.capture import differentiable, full_float32, plain_attention, without_inference
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
from lightning_netsim.measurement.plan import chunk_of, memory_budget
from lightning_netsim.measurement.progress import Progress
from lightning_netsim.measurement.sample_table import SampleTable, describe
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.measurement.sweep import Sweeper
from lightning_netsim.report.answers import format_transfer, plot_transfer
from lightning_netsim.report.figures import save_figure
from lightning_netsim.report.pictures import Thumbnails, thumbnails

_DIRECTIONS = ("all", "change")


@dataclass(frozen=True, eq=False)
class TransferAnswer:
    """What else moves if one sample is corrected.

    Attributes:
        samples: one row for each sample of the reference set but the corrected one, the most moved first: `index`; `label`
            and `prediction`, if there are labels; `moved`, ‖f(x') moved by‖; `along`, the part of that along v, in units of
            ‖v‖; and where labels are classes `margin`, the output of the label less the strongest other output, and
            `margin_change`. Of a single output with labels 0 and 1, the margin is ±f(x').
        step: the change of each parameter, by name.
        meta: what the table was made with: query, change (v), along (that of the corrected sample itself, 1 unless its
            outputs depend on each other), length (of the step), directions, ...
        tables: title -> the samples that stand out, at most k each.
        pictures: what a person sees of the corrected sample, and of those in `tables`.
    """

    samples: pd.DataFrame
    step: Mapping[str, Tensor]
    meta: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    pictures: tuple[Thumbnails | None, Thumbnails | None]

    def __str__(self) -> str:
        return format_transfer(self.meta, self.tables)

    def plot(self) -> Any:
        """Return a matplotlib figure: the corrected sample, and rows of those that stand out."""
        return plot_transfer(self.meta, self.tables, *self.pictures)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write transfer.parquet (`samples`), meta.json and transfer.png to a directory."""
        path = check_writable("directory", directory)
        staging = path / ".transfer.writing"
        self.samples.to_parquet(staging, index=False)
        staging.replace(path / "transfer.parquet")
        staging.write_text(json.dumps(dict(self.meta), indent=2) + "\n", encoding="utf-8")
        staging.replace(path / "meta.json")
        save_figure(self.plot(), path / "transfer.png")
        return path


def find_transfer(
    model: nn.Module,
    loader: Iterable[Any],
    query: int,
    change: Tensor | Sequence[float] | None = None,
    reference: Iterable[Any] | None = None,
    k: int = 10,
    *,
    directions: str = "all",
    parameters: str | Iterable[str] = "trainable",
    max_samples: int | None = None,
    render: Callable[[Any], Any] | None = None,
    class_names: Iterable[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> TransferAnswer:
    """Predict how the outputs of all samples move if those of one sample x are moved by v.

    Of all changes of the parameters that move f(x) by v, to first order, the least is Δθ = G(x) C(x)⁺ v, of length
    √(vᵀ C(x)⁺ v). It moves f(x') by G(x')ᵀ Δθ = K(x', x) C(x)⁺ v. That is what a gradient step on x alone does to the others,
    up to its length, and exact in the limit of small v. Nothing is changed; Δθ is returned as `step`.

    The moves of all outputs are one derivative of the network along Δθ: one sweep, at the cost of about two training steps on
    each sample, whatever the number of outputs.

    Args:
        model: a LightningModule or any module; see `read_batch` for how batches are read.
        loader: where the sample is; see `find_neighbors`.
        query: its position in the data set of `loader`.
        change: v, shape (D,). By default of length 1 and, of several outputs, from the strongest other class (which is the
            predicted one, where that is wrong) towards the label: (e_label − e_other)/√2. Of a single output, upwards: +1.
        reference: the samples whose moves are predicted; None for those of `loader`.
        k: how many samples stand in each list of the answer.
        directions: "all" moves f(x) by v and nothing else, which takes D gradients of that one sample. "change" moves it by v
            along v and leaves its other outputs open, which takes one. Random directions would leave most of v open.
        parameters: "trainable", or names of parameters or modules: the others are held.
        max_samples: predict for a fixed random subset of this many samples.
        render: turns one sample of the inputs into a picture (array) or a text.
        class_names: names of the classes 0, 1, 2, ...
        progress: show a progress bar.
        seed: seed of the subset.

    Returns:
        a table of the samples, the most moved first; a figure and a text.

    Raises:
        ValueError: for a position out of range, a `change` of another length, a sample without a gradient, one without a
            class label where `change` is None, or for a model or batch that cannot be compared.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019, section 2, for several outputs
    section 3.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> loader = torch.utils.data.DataLoader(data)
        >>> answer = find_transfer(nn.Linear(3, 2), loader, query=0, progress=False)
        >>> [round(moved, 3) for moved in answer.samples["moved"]]  # by the bias, which they share
        [0.5, 0.5]
    """
    move = to_device_of(model)
    asked = Samples(loader, move)
    context = {
        "reference": "the loader" if reference is None else "the reference",
        "class_names": None if class_names is None else list(class_names),
    }
    return answer_transfer(
        model,
        asked,
        Samples(loader if reference is None else reference, move, max_samples, seed),
        check_positions("query", [query], asked.source.extent)[0],
        SweepSettings(k=k, parameters=parameters, compare_activations=False, seed=seed),
        change=change,
        directions=directions,
        same=reference is None,
        render=render,
        context=context,
        progress=progress,
    )


def answer_transfer(
    model: nn.Module,
    asked: Samples,
    compared: Samples,
    position: int,
    settings: SweepSettings,
    *,
    change: Tensor | Sequence[float] | None,
    directions: str,
    same: bool,
    render: Callable[[Any], Any] | None = None,
    context: Mapping[str, Any],
    progress: bool = True,
) -> TransferAnswer:
    """Predict what `find_transfer` predicts, of sets that are open already.

    Args:
        model: the network.
        asked: where the sample is.
        compared: the reference set.
        position: that of the sample in `asked`.
        settings: k, parameters and seed.
        change: see `find_transfer`.
        directions: likewise.
        same: whether both sets are the same.
        render: see `find_transfer`.
        context: reference and class_names, for the text.
        progress: show a progress bar.
    """
    start = time.perf_counter()
    check_choice("directions", directions, _DIRECTIONS)
    budget = memory_budget(settings)
    with borrowed(model, progress) as tell, full_float32():
        table = SampleTable(budget, render)
        shown = describe(model, asked, [position], table)
        [chunk] = asked.pick([position])
        correction = _Correction(model, settings, tell)
        v = _change(change, correction.outputs(chunk), None if shown.labels is None else shown.labels[0])
        along, size = correction.take(chunk, compared.first(), v, directions)
        samples = correction.predict(compared, size)
        samples = samples[samples["index"] != position] if same else samples
        samples = samples.sort_values(["moved", "index"], ascending=[False, True]).reset_index(drop=True)
        tables = _tables(samples, settings.k)
        listed = sorted({int(index) for table in tables.values() for index in table["index"]})
        others = describe(model, compared, listed, SampleTable(budget, render))
    meta = {
        "query": position,
        "label": None if shown.labels is None else shown.labels[0],
        "prediction": None if shown.labels is None else table.predictions()[0],
        "change": v.tolist(),
        "along": along,
        "length": correction.length,
        "directions": directions,
        "num_reference": len(samples),
        **context,
        "seconds": time.perf_counter() - start,
    }
    pictures = thumbnails(shown, asked.dataset), thumbnails(others, compared.dataset)
    return TransferAnswer(samples, correction.step, meta, tables, pictures)


class _Correction:
    """The least change of the parameters that moves one sample, and what it does to others.

    Args:
        model: the network, in eval mode.
        settings: parameters and seed.
        progress: told about the work as it goes on.

    Attributes:
        step: the change of each parameter, by name.
    """

    def __init__(self, model: nn.Module, settings: SweepSettings, progress: Progress) -> None:
        self.model, self.settings, self.progress = model, settings, progress
        self.step: dict[str, Tensor] = {}
        self._change = torch.zeros(0)

    @property
    def length(self) -> float:
        """Return ‖Δθ‖."""
        return math.sqrt(sum(float(value.double().square().sum()) for value in self.step.values()))

    def outputs(self, chunk: Chunk) -> Tensor:
        """Return f(x) of the only sample of a chunk, shape (D,)."""
        with torch.no_grad():
            return read_batch(self.model, chunk.batch, chunk.batch_idx).outputs[0]

    def take(self, chunk: Chunk, first: Chunk, change: Tensor, directions: str) -> tuple[float, int]:
        """Find the step for the only sample of a chunk.

        Returns:
            how far it moves the sample along `change`, in units of its length, and how many samples to move at a time.
        """
        length = torch.linalg.vector_norm(change)
        matrix = (change / length).unsqueeze(1)
        settings = replace(self.settings, directions="all" if directions == "all" else matrix)
        sweeper = Sweeper(self.model, settings)
        sweeper.prepare(first)
        features = sweeper.features(chunk)
        if not bool(features.valid.all()):
            raise expected("query", "a sample that can be moved", f"{int(chunk.index)}, whose gradient is zero or not finite")
        # The root is M/√r, and C⁺ = M M.
        root = features.normalization.root[0].double() * features.rank[0].double().sqrt()
        target = change.double() if directions == "all" else length.double().unsqueeze(0)
        weight = root @ root @ target.to(root.device)
        summed = features.jacobian.weighted_sum(weight.to(features.jacobian.outputs).reshape(1, -1, 1))
        self.step = {name: value.squeeze(0) for name, value in summed.items()}
        self._change = change
        moved = self._move(chunk)[1][0]
        return float(moved @ change.to(moved) / length.to(moved) ** 2), chunk_of(
            features.jacobian, memory_budget(self.settings, features.jacobian.outputs.device)
        )

    def predict(self, compared: Samples, size: int) -> pd.DataFrame:
        """Return one row for each sample of a set."""
        done, tables = 0, []
        torch.manual_seed(self.settings.seed)  # A data set may draw random numbers too.
        for whole in compared.source:
            for chunk in whole.split(size):
                read, moves = self._move(chunk)
                tables.append(_rows(chunk, read, moves, self._change.to(moves)))
                done += len(chunk.index)
                self.progress("transfer", done, compared.source.num_samples)
        return pd.concat(tables, ignore_index=True)

    def _move(self, chunk: Chunk) -> tuple[SimilarityBatch, Tensor]:
        """Return what was read of a chunk, and G(x)ᵀ Δθ, shape (B, D).

        Σ_i G(x_i) u_i is linear in u, and the derivative with respect to u_i of its product with Δθ is G(x_i)ᵀ Δθ.
        """
        torch.manual_seed(self.settings.seed + int(chunk.index[0]))
        parameters = [self.model.get_parameter(name) for name in self.step]
        with differentiable(self.model), plain_attention():
            read = read_batch(self.model, without_inference(chunk.batch), chunk.batch_idx)
            weight = torch.zeros_like(read.outputs, requires_grad=True)
            gradients = torch.autograd.grad(read.outputs, parameters, weight, create_graph=True, allow_unused=True)
            pairs = zip(gradients, self.step.values(), strict=True)
            products = [(found * step.to(found)).sum() for found, step in pairs if found is not None]
            [moves] = torch.autograd.grad(torch.stack(products).sum(), [weight])
        return replace(read, outputs=read.outputs.detach()), moves.detach()


def _change(change: Tensor | Sequence[float] | None, outputs: Tensor, label: Any) -> Tensor:
    """Return v, shape (D,), on the CPU: as given, or from the strongest other class towards the label."""
    number = len(outputs)
    if change is not None:
        v = torch.as_tensor(change).detach().float().cpu()
        if v.shape != (number,) or not bool(torch.isfinite(v).all()) or not bool(v.any()):
            raise expected("change", f"a vector of {number} numbers, finite and not all 0", f"{change}")
        return v
    if number == 1:
        return torch.ones(1)
    if not _is_class(label, number):
        wanted = f"a vector of {number} numbers, since the sample has no label among the classes 0 to {number - 1}"
        raise expected("change", wanted, "None")
    other = outputs.float().cpu().index_fill(0, torch.tensor([int(label)]), -torch.inf).argmax()
    v = torch.zeros(number)
    v[int(label)], v[other] = 1, -1
    return v / 2**0.5


def _is_class(label: Any, number: int) -> bool:
    return isinstance(label, int) and 0 <= label < number


def _rows(chunk: Chunk, read: SimilarityBatch, moves: Tensor, change: Tensor) -> pd.DataFrame:
    """Return the rows of the samples of one chunk."""
    table = SampleTable(budget=0.0)
    table.add(chunk, replace(read, inputs=None), DenseFeatureBatch(moves, normalize=False))
    labels = table.sample_set().labels
    columns: dict[str, Any] = {"index": chunk.index.tolist()}
    if labels is not None:
        columns |= {"label": labels, "prediction": table.predictions()}
    columns |= {"moved": table.norm.double().numpy(), "along": (moves @ change / (change @ change)).double().cpu().numpy()}
    margins = _margins(torch.stack([read.outputs, moves]).double().cpu(), labels)
    if margins is not None:
        columns |= {"margin": margins[0].numpy(), "margin_change": margins[1].numpy()}
    return pd.DataFrame(columns)


def _margins(values: Tensor, labels: list[Any] | None) -> Tensor | None:
    """Return the margins of the outputs and how they change, shape (2, B), from both, shape (2, B, D)."""
    number = values.shape[2]
    if labels is None or not all(_is_class(label, max(2, number)) for label in labels):
        return None
    own = torch.tensor(labels).long().expand(2, -1).unsqueeze(2)
    if number == 1:
        return values.squeeze(2) * (2 * own.squeeze(2) - 1)
    other = values[:1].scatter(2, own[:1], -torch.inf).argmax(2, keepdim=True).expand(2, -1, 1)
    return (values.gather(2, own) - values.gather(2, other)).squeeze(2)


def _tables(samples: pd.DataFrame, k: int) -> dict[str, pd.DataFrame]:
    """Return the samples that stand out: those that move most, and of each sign those that change most."""
    check_positive_int("k", k)
    column, names = "along", ("Moved most against v", "Moved most along v")
    if "margin_change" in samples:
        column, names = "margin_change", ("Margins that fall most", "Margins that grow most")
    falling, growing = samples[samples[column] < 0], samples[samples[column] > 0]
    return {
        "Moved most": samples.head(k),
        names[0]: falling.nsmallest(k, column),
        names[1]: growing.nlargest(k, column),
    }

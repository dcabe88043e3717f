"""Predict what else moves if one sample is corrected: the least change of the parameters that does it, felt by all others."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_choice, check_positive_int, check_writable, expected
from lightning_netsim.analysis.borrowed import borrowed, to_device_of
from lightning_netsim.data.batches import SimilarityBatch, read_batch
from lightning_netsim.data.labels import is_class_number
from lightning_netsim.data.samples import Samples, check_positions
from lightning_netsim.data.sources import Chunk
from lightning_netsim.jacobian.capture import differentiable, full_float32, plain_attention, without_inference
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
from lightning_netsim.measurement.plan import chunk_of, memory_budget
from lightning_netsim.measurement.sample_table import SampleTable, describe
from lightning_netsim.measurement.settings import SweepSettings, takes_settings
from lightning_netsim.measurement.sweep import FeatureReader
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


@takes_settings("k", "parameters", "max_samples", "render", "class_names", "seed")
def find_transfer(
    model: nn.Module,
    loader: Iterable[Any],
    query: int,
    change: Tensor | Sequence[float] | None = None,
    reference: Iterable[Any] | None = None,
    k: int = SweepSettings.k,
    *,
    directions: str = "all",
    progress: bool = True,
    **settings: Any,
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
        reference: the samples whose moves are predicted; None for those of `loader`. `max_samples` is of these.
        directions: "all" moves f(x) by v and nothing else, which takes D gradients of that one sample. "change" moves it by v
            along v and leaves its other outputs open, which takes one. Random directions would leave most of v open.
        k: how many samples stand in each list of the answer.
        progress: show a progress bar.
        **settings: see `SweepSettings`; parameters that are not named are held.

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
    chosen = SweepSettings(k=k, compare_activations=False, **settings)
    move = to_device_of(model)
    asked = Samples(loader, move)
    return answer_transfer(
        model,
        asked,
        Samples(loader if reference is None else reference, move, chosen.max_samples, chosen.seed),
        check_positions("query", [query], asked.source.extent)[0],
        chosen,
        change=change,
        directions=directions,
        same=reference is None,
        context={"reference": "the loader" if reference is None else "the reference"},
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
    context: Mapping[str, Any],
    progress: bool = True,
) -> TransferAnswer:
    """Predict what `find_transfer` predicts, of sets that are open already.

    Args:
        model: the network.
        asked: where the sample is.
        compared: the reference set.
        position: that of the sample in `asked`.
        settings: those that `find_transfer` takes.
        change: see `find_transfer`.
        directions: likewise.
        same: whether both sets are the same.
        context: reference, for the text.
        progress: show a progress bar.
    """
    start = time.perf_counter()
    check_choice("directions", directions, _DIRECTIONS)
    budget = memory_budget(settings)
    with borrowed(model, progress) as tell, full_float32():
        table = SampleTable(budget, settings.render)
        shown = describe(model, asked, [position], table)
        label = None if shown.labels is None else shown.labels[0]
        [chunk] = asked.pick([position])
        with torch.no_grad():
            outputs = read_batch(model, chunk.batch, chunk.batch_idx).outputs[0]
        v = _change(change, outputs, label)
        step, size = _least_step(model, settings, compared.first(), chunk, v, directions)
        own = _moves(model, step, settings.seed, chunk)[1][0]
        length = torch.linalg.vector_norm(v)
        along = float(own @ v.to(own) / length.to(own) ** 2)
        done, tables = 0, []
        torch.manual_seed(settings.seed)  # A data set may draw random numbers too.
        for whole in compared.source:
            for part in whole.split(size):
                tables.append(_rows(part, *_moves(model, step, settings.seed, part), v))
                done += len(part.index)
                tell("transfer", done, compared.source.num_samples)
        samples = pd.concat(tables, ignore_index=True)
        samples = samples[samples["index"] != position] if same else samples
        samples = samples.sort_values(["moved", "index"], ascending=[False, True]).reset_index(drop=True)
        lists = _tables(samples, settings.k)
        listed = sorted({int(index) for rows in lists.values() for index in rows["index"]})
        others = describe(model, compared, listed, SampleTable(budget, settings.render))
    meta = {
        "query": position,
        "label": label,
        "prediction": None if shown.labels is None else table.predictions()[0],
        "change": v.tolist(),
        "along": along,
        "length": math.sqrt(sum(float(value.double().square().sum()) for value in step.values())),
        "directions": directions,
        "num_reference": len(samples),
        "class_names": settings.class_names,
        **context,
        "seconds": time.perf_counter() - start,
    }
    pictures = thumbnails(shown, asked.dataset), thumbnails(others, compared.dataset)
    return TransferAnswer(samples, step, meta, lists, pictures)


def _least_step(
    model: nn.Module, settings: SweepSettings, first: Chunk, chunk: Chunk, change: Tensor, directions: str
) -> tuple[dict[str, Tensor], int]:
    """Return the least change of the parameters that moves the only sample of a chunk, by name: Δθ = G(x) C(x)⁺ v.

    Also how many samples may be differentiated at a time.
    """
    length = torch.linalg.vector_norm(change)
    matrix = (change / length).unsqueeze(1)
    reader = FeatureReader(model, replace(settings, directions="all" if directions == "all" else matrix))
    reader.prepare(first)
    features = reader.read(chunk).features
    if not bool(features.valid.all()):
        raise expected("query", "a sample that can be moved", f"{int(chunk.index)}, whose gradient is zero or not finite")
    # The root is M/√r, and C⁺ = M M.
    root = features.normalization.root[0].double() * features.rank[0].double().sqrt()
    target = change.double() if directions == "all" else length.double().unsqueeze(0)
    weight = root @ root @ target.to(root.device)
    jacobian = features.jacobian
    summed = jacobian.weighted_sum(weight.to(jacobian.outputs).reshape(1, -1, 1))
    size = chunk_of(jacobian, memory_budget(settings, jacobian.outputs.device))
    return {name: value.squeeze(0) for name, value in summed.items()}, size


def _moves(model: nn.Module, step: Mapping[str, Tensor], seed: int, chunk: Chunk) -> tuple[SimilarityBatch, Tensor]:
    """Return what was read of a chunk, and G(x)ᵀ Δθ, shape (B, D).

    Σ_i G(x_i) u_i is linear in u, and the derivative with respect to u_i of its product with Δθ is G(x_i)ᵀ Δθ.
    """
    torch.manual_seed(seed + int(chunk.index[0]))
    parameters = [model.get_parameter(name) for name in step]
    with differentiable(model), plain_attention():
        read = read_batch(model, without_inference(chunk.batch), chunk.batch_idx)
        weight = torch.zeros_like(read.outputs, requires_grad=True)
        gradients = torch.autograd.grad(read.outputs, parameters, weight, create_graph=True, allow_unused=True)
        pairs = zip(gradients, step.values(), strict=True)
        products = [(found * change.to(found)).sum() for found, change in pairs if found is not None]
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
    if not is_class_number(label, number):
        wanted = f"a vector of {number} numbers, since the sample has no label among the classes 0 to {number - 1}"
        raise expected("change", wanted, "None")
    other = outputs.float().cpu().index_fill(0, torch.tensor([int(label)]), -torch.inf).argmax()
    v = torch.zeros(number)
    v[int(label)], v[other] = 1, -1
    return v / 2**0.5


def _rows(chunk: Chunk, read: SimilarityBatch, moves: Tensor, change: Tensor) -> pd.DataFrame:
    """Return the rows of the samples of one chunk."""
    change = change.to(moves)
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
    if labels is None or not all(is_class_number(label, max(2, number)) for label in labels):
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

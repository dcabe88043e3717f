from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_netsim._checks import NetsimError
from lightning_netsim.records.view import RecordView
from lightning_netsim.report import style
from lightning_netsim.report.figures import (
    bin_representatives,
    figure_to_array,
    plot_count_histogram,
    plot_counts_over_epochs,
    plot_neighbor_rows,
    plot_similarity_histograms,
    save_figure,
)
from tests.report.made_up import NAMES, make_record, thumbnail


def canvas(figure: Figure) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_label() == "canvas"]
    return found


def texts(figure: Figure) -> list[str]:
    """Return the texts that the figure shows, after drawing it once."""
    figure_to_array(figure)
    own = [text.get_text() for text in figure.texts]
    return own + [text.get_text() for axes in figure.axes for text in axes.texts]


def pictures(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in canvas(figure).images]


def red_frames(figure: Figure) -> int:
    return sum(to_hex(patch.get_edgecolor()) == style.MISMATCH for patch in canvas(figure).patches)


def test_bin_representatives_are_nearest_the_right_edge_within_the_bin() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, 50) / 8  # some of them on the edges
    edges = np.linspace(values.min(), values.max(), 9)
    chosen = bin_representatives(values, edges)
    counts, _ = np.histogram(values, edges)
    for place in range(8):
        last = place == 7
        inside = [i for i, v in enumerate(values) if edges[place] <= v and (v < edges[place + 1] or last)]
        assert len(inside) == counts[place]
        assert chosen[place] == (min(inside, key=lambda i: edges[place + 1] - values[i]) if inside else -1)


def test_histogram_shows_the_right_sample_above_each_bin() -> None:
    record = make_record(n=60)
    figure = plot_count_histogram(record, thumbnail, bins=6)
    fractions = record.samples["neighbor_fraction"].to_numpy()
    counts, edges = np.histogram(fractions, bins=6)
    chosen = [i for i in bin_representatives(fractions, edges) if i >= 0]
    shown = pictures(figure)
    assert len(shown) == len(chosen) == (counts > 0).sum()
    for picture, index in zip(shown, chosen, strict=True):
        np.testing.assert_array_equal(picture, thumbnail(index))
    words = texts(figure)
    assert [f"#{i}" for i in chosen] == [word for word in words if word.startswith("#")]
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights == counts.tolist()


def test_neighbor_rows_show_each_sample_with_its_neighbors_in_order() -> None:
    record = make_record(n=60, k=4)
    queries = [31, 7]
    figure = plot_neighbor_rows(record, thumbnail, queries=queries)
    expected = []
    for query in queries:
        rows = record.neighbors[record.neighbors["index"] == query].sort_values("rank")
        expected += [query, *rows["neighbor"]]
        shown = texts(figure)
        assert all(f"{value:.3f}" in shown for value in rows["similarity"])
    assert len(pictures(figure)) == 2 * (1 + 4)
    for picture, index in zip(pictures(figure), expected, strict=True):
        np.testing.assert_array_equal(picture, thumbnail(index))
    assert texts(figure).count("gradient") == 2
    assert "activations" not in texts(figure)


def test_neighbors_of_another_label_are_marked() -> None:
    record = make_record(n=60, k=5)
    label = record.samples["label"]
    queries = list(range(0, 60, 4))
    expected = [
        NAMES[label[pair.neighbor]]
        for query in queries
        for pair in record.neighbors[record.neighbors["index"] == query].itertuples()
        if label[pair.neighbor] != label[query]
    ]
    figure = plot_neighbor_rows(record, thumbnail, queries=queries)
    marked = [text for text in canvas(figure).texts if text.get_text().startswith("≠")]
    assert 0 < len(expected) < 75
    assert [text.get_text() for text in marked] == [f"≠ {name}" for name in expected]
    assert {to_hex(text.get_color()) for text in marked} == {style.MISMATCH}
    assert red_frames(figure) == len(expected)


def test_neighbors_in_another_set_use_its_pictures_and_labels() -> None:
    record = make_record(n=20, k=2, reference="train")
    unlabeled = plot_neighbor_rows(record, thumbnail, queries=[0])
    assert len(pictures(unlabeled)) == 1  # the query's alone: its pictures are not those of the other set
    assert red_frames(unlabeled) == 0
    labeled = dataclasses.replace(record, neighbors=record.neighbors.assign(neighbor_label=[0, 9] * 20))
    figure = plot_neighbor_rows(labeled, thumbnail, queries=[0], reference_thumbnails=lambda index: thumbnail(100 + index))
    first = int(record.neighbors["neighbor"][0])
    np.testing.assert_array_equal(pictures(figure)[1], thumbnail(100 + first))
    assert red_frames(figure) == 1
    assert "≠ nine" in texts(figure)


def test_texts_and_unusual_names_are_drawn_as_they_are() -> None:
    record = make_record(n=30, class_names=["$a_b$ " + "long name " * 9] * 9 + ["\\frac{"], activations=True)
    for figure in (
        plot_neighbor_rows(record, lambda i: f"costs ${i}_ and $more", num_rows=2),
        plot_count_histogram(record, str),
    ):
        words = texts(figure)
        assert any("$" in word for word in words)
        assert all(len(word) < 30 for word in words if word.startswith("$a"))
    assert "costs $3_ and $more" in texts(plot_neighbor_rows(record, lambda i: f"costs ${i}_ and $more", queries=[3]))


def history(epochs: int = 3, **meta: object) -> pd.DataFrame:
    row = RecordView(make_record(n=60, **meta)).history_row()
    return pd.DataFrame([row | {"epoch": epoch, "mean": row["mean"] - 0.1 * epoch} for epoch in range(epochs)])


def test_counts_over_epochs_draw_mean_median_and_classes() -> None:
    table = history()
    figure = plot_counts_over_epochs(table.sample(frac=1, random_state=0))
    left, right = figure.axes
    mean = next(line for line in left.lines if line.get_label() == "mean")
    np.testing.assert_allclose(mean.get_xydata(), table[["epoch", "mean"]])
    assert len(left.collections) == 2
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(NAMES)
    np.testing.assert_allclose(right.lines[3].get_ydata(), table["three"])


def test_figures_are_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    figure = plot_count_histogram(make_record(n=5, k=2))
    path = save_figure(figure, tmp_path / "counts.png", dpi=50)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def fail(target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        save_figure(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_sample_left_out_has_no_bar_and_no_neighbors() -> None:
    record = make_record(n=5, k=2, activations=True)
    record.samples.loc[2, ["soft_count", "neighbor_fraction"]] = np.nan
    record.neighbors.loc[record.neighbors["index"] == 2, ["neighbor", "similarity"]] = (-1, np.nan)
    figure = plot_count_histogram(record, bins=4)
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 4
    assert any("4 samples (1 left out)" in word.replace("\n", " ") for word in texts(figure))
    edges = [float(label.get_text().split("\n")[0]) for label in figure.axes[0].get_xticklabels()]
    np.testing.assert_allclose(edges, np.histogram(record.samples["neighbor_fraction"].dropna(), bins=4)[1], atol=0.006)
    rows = plot_neighbor_rows(record, queries=[2, 3])
    assert {"left out", "no neighbors: the sample was left out"} <= set(texts(rows))
    height = {text.get_text(): text.get_position()[1] for text in canvas(rows).texts}
    assert height["gradient"] < height["activations"]  # inches from the top
    record.samples["soft_count"] = np.nan
    assert "No sample has a count." in texts(plot_count_histogram(record))
    assert "No sample has neighbors." in texts(plot_neighbor_rows(record))


def test_similarity_histograms_share_their_axis_and_mark_the_mean() -> None:
    values = {"a": np.random.default_rng(0).random(50), "b": np.array([0.5, np.nan, -0.6]), "c": np.array([])}
    figure = plot_similarity_histograms(values)
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert figure.axes[0].lines[0].get_xdata()[0] == pytest.approx(values["a"].mean())
    assert figure.axes[1].lines[0].get_xdata()[0] == pytest.approx(-0.05)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plot_neighbor_rows(make_record(n=5, k=2), queries=[77]), r"`queries`.*77"),
        (lambda: plot_neighbor_rows(make_record(n=5, k=2), lambda index: np.zeros((1, 8, 8))), "to_image"),
        (lambda: plot_count_histogram(make_record(n=5, k=2), bins=0), "`bins`"),
        (lambda: plot_counts_over_epochs(history(1).drop(columns="q90")), "q90"),
        (lambda: plot_similarity_histograms({}), "at least one"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Figure], words: str) -> None:
    with pytest.raises(NetsimError, match=words):
        call()


def test_a_figure_becomes_an_array_and_leaves_settings_and_pyplot_alone() -> None:
    with matplotlib.rc_context({"font.size": 31.0, "text.parse_math": True}):
        figure = plot_count_histogram(make_record(n=5, k=2), thumbnail)
        assert matplotlib.rcParams["font.size"] == 31.0
    assert max(text.get_fontsize() for text in figure.axes[0].texts) < 13
    width, height = figure.get_size_inches() * figure.dpi
    image = figure_to_array(figure)
    assert image.shape == (int(height), int(width), 3)
    assert (np.abs(image.astype(int) - [47, 109, 179]).sum(axis=2) < 6).any()  # the bars' blue
    assert pyplot.get_fignums() == []

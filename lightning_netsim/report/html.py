"""Show a record in a notebook: one self-contained fragment of HTML, with its pictures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from lightning_netsim.records.record import Record
from lightning_netsim.records.view import NeighborView, RecordView, SampleView, shorten
from lightning_netsim.report.figures import plot_count_histogram
from lightning_netsim.report.pictures import Thumbnails, thumbnail_of

_LARGEST = 96  # pixels of a picture's longer side
_SHOWN_NEIGHBORS, _SHOWN_WORDS = 5, 3
_STYLE = """<style>
.netsim{font:13px/1.45 system-ui,sans-serif;color:#22262b;background:#fff;padding:12px 16px;border:1px solid #d6d9de;
border-radius:6px;max-width:1120px}
.netsim h4{margin:0 0 2px;font-size:15px}.netsim h5{margin:12px 0 4px;font-size:13px}
.netsim p{margin:2px 0;color:#5b636e}.netsim .pair{display:flex;flex-wrap:wrap;gap:4px 24px}
.netsim table{border-collapse:collapse;font-size:12px;margin:0;color:inherit;background:#fff}
.netsim th{font-weight:600;color:#5b636e;text-align:left;border-bottom:1px solid #d6d9de;padding:2px 8px 3px 0;background:#fff}
.netsim td{padding:3px 8px 3px 0;border-bottom:1px solid #eef0f2;text-align:left;vertical-align:middle;background:#fff}
.netsim .number{text-align:right;font-variant-numeric:tabular-nums}.netsim .differs{color:#c8102e;font-weight:600}
.netsim img.thumb{height:30px;max-width:60px;image-rendering:pixelated;border:1px solid #d6d9de;margin:0 2px 0 0;
display:inline-block;vertical-align:middle}
.netsim img.thumb.differs{border:2px solid #c8102e}.netsim .text{color:#5b636e;display:inline-block;max-width:190px}
.netsim img.figure{width:100%;max-width:860px;margin-top:8px}
</style>"""


def record_to_html(record: Record, thumbnails: Thumbnails | None = None, reference_thumbnails: Thumbnails | None = None) -> str:
    """Return a record as a fragment of HTML for a notebook: the extremes with their neighbors, and the histogram of counts.

    Every string of the record is escaped, every picture is inline; the fragment loads nothing.

    Args:
        record: what to show.
        thumbnails: gives the picture or text of the sample of an index.
        reference_thumbnails: the same for the reference set, where that is another set; by default `thumbnails`.
    """
    view = RecordView(record)
    if reference_thumbnails is None and view.reference == "self":
        reference_thumbnails = thumbnails
    title = "Input similarity" + (f" · {view.title()}" if view.title() else "")
    facts, fraction, recall = [view.compared()], view.ranked["neighbor_fraction"], record.meta.get("recall")
    if len(fraction):
        facts.append(f"neighbor fraction {fraction.mean():.3f} on average, {fraction.min():.3f} to {fraction.max():.3f}")
    facts.append(f"recall {recall:.3f}" if isinstance(recall, (int, float)) else "recall not measured")
    facts.append(f"{view.num_left_out:,} left out")
    parts = [_STYLE, '<div class="netsim">', f"<h4>{escape(title)}</h4>\n<p>{escape(' · '.join(facts))}</p>"]
    if len(view.ranked):
        isolated = _table(view, "Most isolated: fewest neighbors", view.isolated(5), thumbnails, reference_thumbnails)
        crowded = _table(view, "Most crowded: most neighbors", view.crowded(5), thumbnails, reference_thumbnails)
        histogram = _inline(plot_count_histogram(record, thumbnails), "Histogram of neighbor fractions")
        parts += ['<div class="pair">', isolated, crowded, "</div>", histogram]
    return "\n".join([*parts, "</div>"])


def _table(
    view: RecordView,
    title: str,
    samples: Sequence[SampleView],
    thumbnails: Thumbnails | None,
    reference: Thumbnails | None,
) -> str:
    """Return one table of samples, each with its first neighbors."""
    shown = {"label": view.has_labels, "predicted": view.has_predictions}
    names = [*([""] if thumbnails else []), "sample", *(name for name, has in shown.items() if has)]
    head = "".join(f"<th>{name}</th>" for name in names)
    head += '<th class="number">count</th><th class="number">fraction</th><th>nearest neighbors</th>'
    rows = []
    for sample in samples:
        cells = [_picture(thumbnails, sample)] if thumbnails else []
        cells.append(escape(shorten(sample.name, 24)))
        if view.has_labels:
            cells.append(_name(sample.label, False))
        if view.has_predictions:
            cells.append(_name(sample.prediction, sample.is_wrong))
        numbers = f'<td class="number">{sample.count:,.1f}</td><td class="number">{sample.fraction:.3f}</td>'
        near = _neighbors(reference, view.neighbors(sample.index)[:_SHOWN_NEIGHBORS])
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"{numbers}<td>{near or '-'}</td></tr>")
    body = "\n".join(rows)
    return f"<div><h5>{escape(title)}</h5><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def _name(name: str | None, differs: bool) -> str:
    text = escape("-" if name is None else shorten(name, 24))
    return f'<span class="differs">≠ {text}</span>' if differs else text


def _neighbors(thumbnails: Thumbnails | None, neighbors: Sequence[NeighborView]) -> str:
    """Return the first neighbors: pictures in a row, or words below each other, which are fewer."""
    cells: list[str] = []
    words_shown = 0
    for neighbor in neighbors:
        label = "" if neighbor.label is None else f", {neighbor.label}"
        words = f"{neighbor.name} ({neighbor.similarity:.3f}{label})"
        picture = thumbnail_of(thumbnails, neighbor.index)
        differs = neighbor.agrees is False
        if isinstance(picture, np.ndarray):
            cells.append(_image(picture, words, differs))
        elif words_shown < _SHOWN_WORDS:
            words_shown += 1
            mark = ' class="differs"' if differs else ""
            tip = f' title="{escape(picture)}"' if picture else ""
            cells.append(f"<span{mark}{tip}>{'≠ ' * differs}{escape(shorten(words, 40))}</span><br>")
    return "".join(cells)


def _picture(thumbnails: Thumbnails, sample: SampleView) -> str:
    """Return the picture of a sample, or the beginning of its text."""
    picture = thumbnail_of(thumbnails, sample.index)
    if isinstance(picture, np.ndarray):
        return _image(picture, sample.name, False)
    if picture is None:
        return ""
    line = " ".join(picture.split())
    beginning = line if len(line) <= 90 else line[:89].rstrip() + "…"
    return f'<span class="text" title="{escape(picture)}">{escape(beginning)}</span>'


def _image(picture: npt.NDArray[np.uint8], words: str, differs: bool) -> str:
    """Return an inline picture, with a red frame if its label differs."""
    image = Image.fromarray(picture)
    image.thumbnail((_LARGEST, _LARGEST))
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    kind = "thumb differs" if differs else "thumb"
    return f'<img class="{kind}" src="{_data_url(stream.getvalue())}" title="{escape(words)}" alt="{escape(words)}">'


def _inline(figure: Figure, words: str) -> str:
    """Return a figure as an inline picture."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return f'<img class="figure" src="{_data_url(stream.getvalue())}" alt="{words}">'


def text_and_figure(text: str, figure: Figure) -> str:
    """Return plain text and a figure below it as a fragment of HTML, whose width is that of its surroundings."""
    picture = _inline(figure, "The worst samples of each issue")
    return f'{_STYLE}\n<div class="netsim"><pre>{escape(text)}</pre>\n{picture}</div>'


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

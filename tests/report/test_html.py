from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from lightning_netsim.report.html import record_to_html
from tests.report.made_up import extremes, make_record, thumbnail


class Page(HTMLParser):
    """Collect the tags, the rows of tables and the pictures of a fragment, and see that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))
        elif tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.rows[-1][-1] += data


def decode(picture: dict[str, str | None]) -> np.ndarray:
    head, data = str(picture["src"]).split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_right_samples_are_shown_with_their_pictures() -> None:
    record = make_record(n=60)
    page = Page(record_to_html(record, thumbnail))
    rows = [row for row in page.rows if row]
    isolated, crowded = extremes(record)
    assert [row[1] for row in rows] == [str(index) for index in isolated + crowded]
    assert float(rows[0][4]) == round(record.samples["soft_count"][isolated[0]], 1)
    assert len(page.pictures) == 10 * (1 + 5) + 1
    np.testing.assert_array_equal(decode(page.pictures[0]), thumbnail(isolated[0]))
    nearest = record.neighbors[record.neighbors["index"] == isolated[0]].iloc[0]
    np.testing.assert_array_equal(decode(page.pictures[1]), thumbnail(int(nearest["neighbor"])))
    assert f"({nearest['similarity']:.3f}" in str(page.pictures[1]["title"])


def test_labels_that_differ_are_marked() -> None:
    record = make_record(n=60)
    label = record.samples["label"]
    isolated, crowded = extremes(record)
    shown = isolated + crowded
    pairs = record.neighbors[record.neighbors["rank"] <= 5]
    expected = sum(
        int((label[group["neighbor"]].to_numpy() != label[index]).sum())
        for index, group in pairs.groupby("index")
        if index in shown
    )
    page = Page(record_to_html(record, thumbnail))
    assert expected > 0
    assert sum("differs" in str(picture["class"]) for picture in page.pictures) == expected


def test_everything_is_escaped() -> None:
    evil = "<script>alert('x')</script>&\"><b>"
    record = make_record(n=8, k=2, class_names=[evil] * 10, stage=evil, reference=evil)
    record.samples["sample_id"] = [f"{evil}{i}" for i in range(8)]
    for pictures in (None, lambda index: evil, thumbnail):
        text = record_to_html(record, pictures, pictures)
        assert not Page(text).tags & {"script", "b"}
    assert "&lt;script" in text


def test_the_fragment_loads_nothing() -> None:
    text = record_to_html(make_record(n=8, k=2), thumbnail)
    assert not re.search(r"https?:|url\(|@import|<link|<script", text)
    assert all(str(picture["src"]).startswith("data:image/png;base64,") for picture in Page(text).pictures)


def test_large_pictures_are_made_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 400, 3), dtype=np.uint8)
    page = Page(record_to_html(make_record(n=8, k=2), lambda index: noise))
    assert decode(page.pictures[0]).shape == (96, 64, 3)


def test_without_pictures_labels_or_counts() -> None:
    record = make_record(n=5, k=2, labels=False)
    page = Page(record_to_html(record))
    assert len(page.pictures) == 1  # the histogram
    assert [row[0] for row in page.rows if row][:5] == [str(index) for index in extremes(record)[0]]
    assert re.search(r"\d \(0\.\d{3}\)", page.rows[1][-1])
    record.samples["soft_count"] = np.nan
    text = record_to_html(record)
    assert "5 left out" in text
    assert Page(text).pictures == []

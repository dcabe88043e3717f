"""Tables, in one form for the terminal and for pages; and the places in pages that scripts write to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path


def format_table(head: Sequence[str], rows: Sequence[Sequence[object]], formats: Sequence[str] = (), left: int = 1) -> str:
    """Return a Markdown table, its columns aligned, with a minus sign before numbers below 0.

    Args:
        head: titles of the columns.
        rows: cells: text, numbers, `Mean`, or None for "-".
        formats: how numbers of each column are written, as in an f-string; by default as `format_number` writes them.
        left: how many columns are aligned to the left.
    """
    plain = [[_text(cell, form) for cell, form in zip_longest(row, formats[: len(row)], fillvalue="")] for row in rows]
    texts = [[re.sub(r"(?<!\w)-(?=[\d.])", "−", cell) for cell in line] for line in plain]
    widths = [max(3, *(len(line[column]) for line in [head, *texts])) for column in range(len(head))]
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = []
    for line in (head, rule, *texts):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(cell: object, form: str) -> str:
    if isinstance(cell, str):
        return cell
    if cell is None:
        return "-"
    if form:
        return format(cell, form)
    return f"{cell:,}" if isinstance(cell, int) else format_number(cell) if isinstance(cell, float) else f"{cell:.3g}"


def format_number(value: float | None) -> str:
    """Return a number with three digits, or without decimals from 100 on; "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_section(page: Path, name: str, text: str) -> bool:
    """Write text between the lines `<!-- table: NAME -->` and `<!-- end -->` of a page; return whether the page has these."""
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    section = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    after, found = section.subn(lambda match: f"{match[1]}\n{text.strip()}\n\n{match[2]}", before, count=1)
    if found:
        page.write_text(after, encoding="utf-8")
    return bool(found)

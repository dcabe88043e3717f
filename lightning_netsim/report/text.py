"""What all texts for the terminal share: their width, and tables in columns."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 100


def align(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return rows of cells in columns, the first `left` of them flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        pairs = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in pairs]
        lines.append(("  " + "   ".join(cells)).rstrip())
    return lines

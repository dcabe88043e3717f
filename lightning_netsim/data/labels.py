"""What the label of a sample is: a class, a value, or a name."""

from __future__ import annotations

#: The label of a class.
ClassLabel = int | str

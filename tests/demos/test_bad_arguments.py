"""Arguments that demos refuse when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_netsim import NetsimError
from lightning_netsim.demos import (
    DigitsDataModule,
    EmbeddingModule,
    ImageClassifier,
    PhotographDataModule,
    SinusoidDataModule,
    SinusoidRegressor,
    SuperResolver,
)


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        *[(DigitsDataModule, *pair) for pair in (("val_fraction", 1.0), ("batch_size", 0), ("validate_on", "test"))],
        *[(DigitsDataModule, "unseen_classes", value) for value in ([10], list(range(10)))],
        *[(EmbeddingModule, *pair) for pair in (("network", "none"), ("embedding_dim", 0), ("learning_rate", 0))],
        *[(ImageClassifier, *pair) for pair in (("network", "digit"), ("learning_rate", 0.0))],
        *[(PhotographDataModule, *pair) for pair in (("crop_size", 30), ("batch_size", 0), ("val_fraction", 1), ("seed", -1))],
        *[(SinusoidDataModule, *pair) for pair in (("frequency", 0), ("num_points", 0))],
        *[(SinusoidRegressor, *pair) for pair in (("width", 0), ("learning_rate", -1.0))],
        *[(SuperResolver, *pair) for pair in (("num_blocks", 0), ("pixel_weight", -1), ("criterion", 3))],
    ],
)
def test_bad_arguments(kind: Any, argument: str, value: Any) -> None:
    with pytest.raises(NetsimError, match=f"Expected `{argument}` to be"):
        kind(**{argument: value})

"""Fit a sinusoid on the circle: the toy problem on which neighbor counts can be read against position and curvature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim._checks import check_positive_int, check_positive_number

PointBatch = tuple[Tensor, Tensor]
"""Points of the circle, shape (B, 2), and targets, shape (B, 1)."""


def sinusoid(alpha: Tensor, frequency: float) -> tuple[Tensor, Tensor]:
    """Return the points and targets of the toy problem, x = (cos 2πα, sin 2πα) and y = sin(2πfα).

    Source: Charpiat et al., NeurIPS 2019, section 3.

    Args:
        alpha: position on the circle in turns, shape (N,), in [0, 1).
        frequency: f, the number of periods around the circle.

    Returns:
        x, shape (N, 2), and y, shape (N, 1).

    Example:
        >>> import torch
        >>> x, y = sinusoid(torch.tensor([0.0, 0.25]), frequency=1)
        >>> y.squeeze(1)
        tensor([0., 1.])
    """
    angle = 2 * math.pi * alpha
    return torch.stack([angle.cos(), angle.sin()], dim=1), (frequency * angle).sin().unsqueeze(1)


class SinusoidDataModule(LightningDataModule):
    """Serve the points of one sinusoid, all of them for training (shuffled) and all for validation (in order of α).

    The positions α are the first `num_points` of the Sobol sequence, sorted; for a power of two they are the multiples of
    1/num_points. Targets are numbers, so there are no class names.

    Args:
        frequency: f, periods of the target around the circle, > 0.
        num_points: N, >= 1.
        batch_size: points in a training batch, >= 1; validation takes sixteen times as many at once.

    Attributes:
        alpha: the positions, shape (N,), sorted, in [0, 1).

    Example:
        >>> data = SinusoidDataModule(frequency=2, num_points=8)
        >>> data.alpha[:3]
        tensor([0.0000, 0.1250, 0.2500])
        >>> x, y = next(iter(data.val_dataloader()))
        >>> x.shape, y.shape
        (torch.Size([8, 2]), torch.Size([8, 1]))
    """

    class_names: list[str] | None = None

    def __init__(self, frequency: float = 1.0, num_points: int = 2048, batch_size: int = 64) -> None:
        super().__init__()
        self.frequency = check_positive_number("frequency", frequency)
        self.batch_size = check_positive_int("batch_size", batch_size)
        engine = SobolEngine(dimension=1)  # type: ignore[no-untyped-call]
        drawn = engine.draw(check_positive_int("num_points", num_points))
        self.alpha: Tensor = drawn.squeeze(1).sort().values
        self.points = TensorDataset(*sinusoid(self.alpha, self.frequency))
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all points, shuffled."""
        return DataLoader(self.points, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all points, in order of α."""
        return DataLoader(self.points, batch_size=16 * self.batch_size, shuffle=False)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all points, in order of α."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all points, in order of α."""
        return self.val_dataloader()


class SinusoidRegressor(LightningModule):
    """Train a ReLU network, 2 inputs, hidden layers, 1 output, by the L1 loss; `forward` returns shape (B, 1).

    Source: Charpiat et al., NeurIPS 2019, section 3. The text has 5 hidden layers, the released code 6.

    Args:
        num_hidden_layers: number of hidden layers, >= 1.
        width: units in each hidden layer, >= 1.
        learning_rate: step size of Adam, > 0.

    Example:
        >>> model = SinusoidRegressor(num_hidden_layers=5)
        >>> sum(parameter.numel() for parameter in model.parameters())
        16897
    """

    def __init__(self, num_hidden_layers: int = 6, width: int = 64, learning_rate: float = 1e-4) -> None:
        super().__init__()
        check_positive_int("num_hidden_layers", num_hidden_layers)
        check_positive_int("width", width)
        self.learning_rate = check_positive_number("learning_rate", learning_rate)
        self.save_hyperparameters()
        sizes = [2] + [width] * num_hidden_layers
        hidden = [layer for size in sizes[:-1] for layer in (nn.Linear(size, width), nn.ReLU())]
        self.network = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, points: Tensor) -> Tensor:
        """Return the value at each of `points`, shape (B, 1)."""
        values: Tensor = self.network(points)
        return values

    def training_step(self, batch: PointBatch, batch_idx: int) -> Tensor:
        """Return the L1 loss of one batch and log it as `train_loss`."""
        points, targets = batch
        loss = F.l1_loss(self(points), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: PointBatch, batch_idx: int) -> None:
        """Log `val_loss`."""
        self._evaluate("val", batch)

    def test_step(self, batch: PointBatch, batch_idx: int) -> None:
        """Log `test_loss`."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: PointBatch) -> None:
        points, targets = batch
        self.log(f"{stage}_loss", F.l1_loss(self(points), targets), prog_bar=True)

    def predict_step(self, batch: PointBatch, batch_idx: int) -> Tensor:
        """Return the value at each point, shape (B, 1)."""
        values: Tensor = self(batch[0])
        return values

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over every parameter."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

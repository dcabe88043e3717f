"""See which inputs a network treats as the same thing: similarity by normalized gradients, for PyTorch Lightning.

The measure is that of Charpiat et al., "Input Similarity from the Neural Network Perspective", NeurIPS 2019.
"""

from __future__ import annotations

__version__ = "0.1.0"

from lightning_netsim._checks import NetsimError
from lightning_netsim.results import KernelNeighborsResult, NeighborCountResult

__all__ = [
    "KernelNeighborsResult",
    "NeighborCountResult",
    "NetsimError",
    "__version__",
]

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_netsim.demos import DigitsNetwork, ImageClassifier, MNISTNetwork


@pytest.mark.parametrize(("network", "parameters", "size"), [(DigitsNetwork, 38_282, 8), (MNISTNetwork, 317_069, 28)])
def test_networks_have_the_stated_size_and_give_logits(network: type[nn.Module], parameters: int, size: int) -> None:
    module = network()
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    logits = module(torch.rand(3, 1, size, size))
    assert logits.shape == (3, 10)
    assert not torch.allclose(logits.exp().sum(1), torch.ones(3)), "logits, not log-probabilities"


def test_predictions_are_probabilities_of_the_logits() -> None:
    model = ImageClassifier()
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    probabilities = model.predict_step((images, labels), 0)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    torch.testing.assert_close(probabilities.argmax(1), model(images).argmax(1))

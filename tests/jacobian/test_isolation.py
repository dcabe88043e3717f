"""A model is left as it was found, whatever its forward pass does."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_netsim.jacobian.isolation import mute, unchanged


class Busy(nn.Module):
    """Change everything that a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.metric = MulticlassAccuracy(3)
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)
        self.calls: list[int] = [1]
        self.table = {"a": 1}
        self.names = {"x"}
        self.cache = torch.zeros(3)
        self.mask: Tensor | None = torch.ones(2)
        self.number = 3

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.metric.update(out, torch.zeros(len(x), dtype=torch.long))
        self.count += 1
        self.replaced = self.replaced + 1
        self.absent = torch.ones(1)
        self.calls.append(len(x))
        self.table["b"] = 2
        self.names.add("y")
        self.cache.fill_(7)
        self.mask = None
        self.number += 1
        self.layer[0].last_input = x
        return out


def state(model: Busy) -> dict[str, object]:
    return {
        "buffers": {name: value.tolist() for name, value in model.named_buffers()},
        "plain": (list(model.calls), dict(model.table), set(model.names), model.cache.tolist(), model.number),
        "mask": model.mask,
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "metric": [torch.as_tensor(value).tolist() for value in model.metric.metric_state.values()],
        "updates": model.metric.update_count,
        "absent": model.absent,
    }


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails: bool) -> None:
    model = Busy()
    model.layer[2].eval()
    before = state(model)
    objects = (model.calls, model.table, model.names, model.cache, model.mask, model.count, model.replaced)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        with unchanged(model):
            model(torch.randn(4, 2))
            model.eval()
            assert state(model) != before
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state(model) == before
    after = (model.calls, model.table, model.names, model.cache, model.mask, model.count, model.replaced)
    assert all(now is then for now, then in zip(after, objects, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))


def test_parameters_and_buffers_that_nobody_changed_are_not_written() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    parameter, kept = model[0].weight, [*model.parameters(), *model.buffers()]
    versions = [tensor._version for tensor in kept]
    parameter.grad = torch.ones(2, 2)
    with unchanged(model):
        model(torch.ones(1, 2))
    assert model[0].weight is parameter
    assert [tensor._version for tensor in kept] == versions
    assert torch.equal(parameter.grad, torch.ones(2, 2))


class Talking(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.inner = Quiet()

    def forward(self, x: Tensor) -> Tensor:
        self.log("mean", x.mean())
        self.log_dict({"a": 1.0})
        return self.layer(x) + self.inner.log(x)


class Quiet(nn.Module):
    def log(self, x: Tensor) -> Tensor:
        return x.exp()


def test_muted_modules_do_not_log_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(Talking, "log", lambda self, name, value, *args, **kwargs: logged.append(name))
    model, x = Talking(), torch.ones(1, 2)
    with unchanged(model):
        mute(model, LightningModule)
        assert torch.equal(model(x), model.layer(x) + x.exp())  # `log` of a module that means the logarithm still works
    assert logged == []
    model(x)
    assert logged[0] == "mean"

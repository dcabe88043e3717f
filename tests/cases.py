"""Models and batches on which every path to a per-sample gradient is held to the oracle, each built when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Case = tuple[nn.Module, Any]
CASES: dict[str, Callable[[], Case]] = {}
#: Cases whose oracle (a loop in float64) takes more than a second.
LARGE = {"resnet18", "vit"}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__] = build
    return build


def build(name: str) -> Case:
    """Return the model of a case in eval mode, its norms away from their initial values, and a batch."""
    torch.manual_seed(1)
    model, inputs = CASES[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval(), inputs


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _mlp(outputs: int) -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))
    return model, torch.randn(7, 4)


def _convolutional(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Case:
    layer, inputs = make(), torch.randn(4, *shape)
    with torch.no_grad():
        channels = layer(inputs).shape[1]
    return nn.Sequential(layer, nn.Tanh(), Lambda(lambda x: x.flatten(2).mean(2)), nn.Linear(channels, 2)), inputs


_CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 8)),
    "conv2d_small_output": (lambda: nn.Conv2d(8, 16, 3), (8, 4, 4)),
    "conv2d_one_channel": (lambda: nn.Conv2d(1, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=1), (1, 9, 8)),
    "conv2d_groups_2": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 6, 6)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1), (4, 7, 7)),
    "conv2d_dilation_stride": (lambda: nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=(2, 1)), (3, 11, 10)),
    "conv2d_same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (3, 7, 7)),
    "conv2d_valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 7, 7)),
    "conv2d_reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (3, 7, 7)),
    "conv2d_same_reflect": (lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="reflect"), (3, 7, 7)),
    "conv2d_circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 7, 7)),
    "conv2d_replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (3, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 11)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 3), groups=2, padding=(0, 1, 1)), (2, 4, 5, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=3, output_padding=2, dilation=2), (3, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 4, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=1), (2, 3, 3, 3)),
    "transposed2d_bare": (lambda: nn.ConvTranspose2d(3, 2, 3, dilation=2, bias=False), (3, 4, 4)),
}
CASES |= {f"mlp_{outputs}": partial(_mlp, outputs) for outputs in (1, 2, 10)}
CASES |= {name: partial(_convolutional, *of) for name, of in _CONVOLUTIONS.items()}


@case
def no_bias() -> Case:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 2, bias=False)), torch.randn(5, 4)


@case
def batch_norm() -> Case:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(100, 3), nn.BatchNorm1d(3))
    nn.init.normal_(norm.weight)
    return model, torch.randn(5, 3, 7, 7)


@case
def batch_norm_zero_gamma() -> Case:
    model, inputs = batch_norm()
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, 0.3)
    return model, inputs


@case
def layer_norm() -> Case:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 7, 4)[:, 0]


@case
def layer_norm_2d() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 5, 5]), nn.ReLU(), nn.Flatten(), nn.Linear(100, 2))
    return model, torch.randn(5, 3, 7, 7)


@case
def group_norm() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 2))
    return model, torch.randn(5, 3, 7, 7)


@case
def instance_norm() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(100, 2))
    return model, torch.randn(5, 3, 7, 7)


@case
def instance_norm_tracked() -> Case:
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(20, 2))
    return model, torch.randn(5, 3, 7)


@case
def rms_norm() -> Case:
    return nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4)


@case
def prelu() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(4, 3, 3), nn.PReLU(3), nn.Flatten(), nn.Linear(27, 6))
    return nn.Sequential(model, nn.PReLU(6), nn.Linear(6, 2)), torch.randn(5, 3, 7, 7)


@case
def embedding() -> Case:
    model = nn.Sequential(
        nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 5), nn.Tanh(), Lambda(lambda x: x.mean(1)), nn.Linear(5, 3)
    )
    return model, torch.tensor([[1, 2, 2, 0], [3, 4, 1, 8], [0, 0, 5, 5], [2, 1, 7, 0]])


@case
def positions() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), Lambda(lambda x: x.amax((1, 2))), nn.Linear(5, 3))
    return model, torch.randn(4, 3, 2, 4)


class Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.group, self.first, self.last = nn.GroupNorm(2, 4), nn.Linear(100, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(F.relu(self.conv(x), inplace=True)), inplace=True)
        h = F.relu(self.group(h).flatten(1), inplace=True)
        h = F.relu(self.first(h), inplace=True)
        y = self.last(h)
        y *= 2
        y += 1
        return y


@case
def inplace_relu() -> Case:
    return Inplace(), torch.randn(5, 3, 7, 7)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.embed(x).mean(1))), self.embed.weight)


@case
def tied_through_function() -> Case:
    return Tied(), torch.tensor([[0, 1, 1], [2, 3, 5], [4, 4, 0], [5, 1, 2], [1, 3, 2]])


class Shared(nn.Module):
    """Two modules that hold the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@case
def shared_parameter() -> Case:
    return Shared(), torch.randn(5, 4)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.norm = nn.Conv1d(2, 2, 3, padding=1), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        h = self.norm(self.linear(torch.tanh(self.norm(self.linear(h)))))
        return self.head(h.flatten(1))


@case
def called_twice() -> Case:
    return Twice(), torch.randn(5, 2, 6)


class BareParameter(nn.Module):
    """A scale of its own beside a child, as a class token or a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.linear = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.scale * torch.tanh(self.linear(h)).sum(1)


@case
def bare_parameter() -> Case:
    return nn.Sequential(nn.Linear(4, 4), BareParameter(), nn.Linear(4, 2)), torch.randn(5, 3, 4)


@case
def bare_parameter_on_root() -> Case:
    return BareParameter(), torch.randn(5, 3, 4)


@case
def weight_norm() -> Case:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)), torch.randn(5, 4)


@case
def spectral_norm() -> Case:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)), torch.randn(5, 4)


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=batch_first), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.batch_first else x.transpose(0, 1)
        h, _ = self.attention(h, h, h)
        return self.head(h.mean(1 if self.batch_first else 0))


@case
def attention() -> Case:
    return Attention(batch_first=True), torch.randn(5, 3, 4)


@case
def attention_time_first() -> Case:
    return Attention(batch_first=False), torch.randn(5, 3, 4)


@case
def transformer_layer() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(layer, Lambda(lambda x: x[:, 0]), nn.Linear(4, 2)), torch.randn(5, 3, 4)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@case
def lstm() -> Case:
    return Recurrent(nn.LSTM), torch.randn(5, 6, 3)


@case
def gru() -> Case:
    return Recurrent(nn.GRU), torch.randn(5, 6, 3)


class TimeFirst(nn.Module):
    """A linear layer that sees (T, B, q)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.transpose(0, 1))).mean(0))


@case
def time_first() -> Case:
    return TimeFirst(), torch.randn(5, 6, 3)


@case
def time_first_square() -> Case:
    return TimeFirst(), torch.randn(5, 5, 3)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(a) * self.right(input=b)))


@case
def keywords() -> Case:
    return Keywords(), {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}


class Subclassed(nn.Linear):
    """A subclass that runs its parent's forward."""


class LowRank(nn.Linear):
    """A subclass with a forward of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + self.up @ self.down, self.bias)


@case
def subclassed() -> Case:
    return nn.Sequential(Subclassed(4, 5), nn.Tanh(), LowRank(5, 2)), torch.randn(5, 4)


@case
def hooked() -> Case:
    """A user's forward hook replaces the output of a layer."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].register_forward_hook(lambda module, args, output: output * 2 + 1)
    return model, torch.randn(5, 4)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.tanh(self.frozen(x)))


@case
def unused_and_frozen() -> Case:
    return Unused(), torch.randn(5, 4)


@case
def softmax() -> Case:
    model, inputs = _mlp(4)
    return nn.Sequential(model, nn.Softmax(1)), inputs


@case
def resnet18() -> Case:
    import torchvision

    model = torchvision.models.resnet18()
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, 2)  # The last stage has three of four parameters.
    return model, torch.randn(3, 3, 32, 32)


@case
def vit() -> Case:
    import torchvision

    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=2
    )
    nn.init.normal_(model.heads.head.weight)
    return model, torch.randn(3, 3, 32, 32)

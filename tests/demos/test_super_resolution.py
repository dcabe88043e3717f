from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.transforms.v2.functional import pil_to_tensor

from lightning_netsim.demos import PhotographDataModule, SuperResolutionNetwork, SuperResolver
from lightning_netsim.demos.photographs import upscale
from lightning_netsim.losses import PatchMMDLoss

TINY: dict[str, Any] = {"num_blocks": 1, "width": 4}
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
Pairs = DataLoader[tuple[Tensor, Tensor]]


@pytest.fixture
def pairs() -> Pairs:
    """Return a loader of two batches of one image each, of different size."""
    batches = [(torch.rand(1, 3, *low), torch.rand(1, 3, *(4 * side for side in low))) for low in ((12, 8), (6, 9))]
    return DataLoader(batches, batch_size=None)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def mean_difference(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).mean()


def test_the_published_network() -> None:
    network = SuperResolutionNetwork(num_blocks=16, width=64, adds_bicubic=False)
    wide = 64 * 64 * 9 + 64
    block = 2 * wide + 2 * 2 * 64 + 1
    first, doubling, last = 3 * 64 * 81 + 64 + 1, 64 * 256 * 9 + 256 + 1, 64 * 3 * 9 + 3
    assert count(network) == first + 16 * block + wide + 2 * 64 + 2 * doubling + last
    assert sum(isinstance(layer, nn.PReLU) for layer in network.modules()) == 1 + 16 + 2


def test_what_the_network_adds_to() -> None:
    low = torch.rand(2, 3, 10, 7)
    bare, adding = (SuperResolutionNetwork(**TINY, adds_bicubic=adds).eval() for adds in (False, True))
    adding.load_state_dict(bare.state_dict())
    torch.testing.assert_close(adding(low), bare(low) + upscale(low))


def test_loss_is_criterion_plus_weighted_squared_error() -> None:
    output, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    squared = ((output - target) ** 2).sum() / output.numel()
    both = SuperResolver(**TINY, criterion=mean_difference, pixel_weight=3.0)
    torch.testing.assert_close(both.loss(output, target), 3 * squared + (output - target).mean())
    alone = SuperResolver(**TINY, pixel_weight=3.0)
    torch.testing.assert_close(alone.loss(output, target), 3 * squared)


def test_training_enlarges_better_and_writes_a_picture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = PhotographDataModule(crop_size=32, crops_per_epoch=160)
    data.setup("fit")
    model = SuperResolver(num_blocks=1, width=8, learning_rate=3e-3)
    with torch.no_grad():
        pairs = list(data.val_dataloader())
        before = sum(F.mse_loss(model.eval()(low), high) for low, high in pairs) / len(pairs)
    trainer = Trainer(max_epochs=2, logger=CSVLogger(tmp_path), enable_checkpointing=False, **QUIET)
    trainer.fit(model.train(), data)
    assert trainer.callback_metrics["val_loss"] < before
    assert trainer.log_dir is not None
    shown = pil_to_tensor(Image.open(Path(trainer.log_dir) / "super_resolution.png"))
    assert shown.shape == (3, 256 + 4, 4 * 258 + 2)
    original = shown[:, 2:-2, -258:-2] / 255
    torch.testing.assert_close(original, pairs[0][1][0, :, 84:340, 32:288], atol=0.003, rtol=0)


def test_learning_rate_is_halved_three_times(tmp_path: Path) -> None:
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    data = PhotographDataModule(crop_size=16, crops_per_epoch=8, batch_size=2)
    options = {**QUIET, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    Trainer(max_epochs=2, callbacks=[Watch()], default_root_dir=tmp_path, **options).fit(SuperResolver(**TINY), data)
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4, 1.25e-4, 1.25e-4])
    assert not list(tmp_path.iterdir()), "without a logger no picture"


def test_metrics_are_means_over_images_of_clamped_outputs(pairs: Pairs) -> None:
    model = SuperResolver(**TINY)
    nn.init.constant_(model.network.last[-1].bias, 0.4)  # outputs leave [0, 1]
    trainer = Trainer(logger=False, **QUIET)
    [found] = trainer.test(model, pairs, verbose=False)
    with torch.no_grad():
        outputs = [model.eval()(low) for low, _ in pairs]
    assert max(output.max() for output in outputs) > 1
    for name, metric in (("psnr", peak_signal_noise_ratio), ("ssim", structural_similarity_index_measure)):
        each = [metric(out.clamp(0, 1), high, data_range=1.0) for out, (_, high) in zip(outputs, pairs, strict=True)]
        assert found[f"test_{name}"] == pytest.approx(float(sum(each) / 2), rel=1e-5)
    predicted = trainer.predict(model, pairs)
    assert all(torch.equal(ours, theirs.clamp(0, 1)) for ours, theirs in zip(predicted, outputs, strict=True))


def test_checkpoint_holds_the_criterion_as_plain_values(tmp_path: Path) -> None:
    data = PhotographDataModule(crop_size=64, crops_per_epoch=2, batch_size=2)
    model = SuperResolver(
        **TINY, criterion=PatchMMDLoss(num_features=16, remove_mean=True, local_weight=0.025), pixel_weight=2.0
    )
    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, limit_val_batches=0, **QUIET)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = SuperResolver.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert again.criterion.config() == model.criterion.config()
    assert again.pixel_weight == 2
    torch.testing.assert_close(again.network.state_dict(), model.network.state_dict())

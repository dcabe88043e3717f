from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from lightning_netsim import NetsimError
from lightning_netsim.demos import PhotographDataModule
from lightning_netsim.demos.photographs import downscale, upscale


def write_photographs(path: Path, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Write files photo0.png, photo1.jpg, photo2.png, ... of the given heights and widths, each of one color."""
    photographs = [torch.full((3, *size), 10 * (place + 1), dtype=torch.uint8) for place, size in enumerate(sizes)]
    for place, photograph in enumerate(photographs):
        to_pil_image(photograph).save(path / f"photo{place}.{'jpg' if place % 2 else 'png'}")
    return photographs


def read(path: Path, **arguments: int | float) -> PhotographDataModule:
    data = PhotographDataModule(str(path), crop_size=16, **arguments)
    data.setup("fit")
    return data


def test_sample_photographs_need_no_files() -> None:
    data = PhotographDataModule(crop_size=32, batch_size=4, crops_per_epoch=8)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [(low.shape, high.shape) for low, high in batches] == [((4, 3, 8, 8), (4, 3, 32, 32))] * 2
    assert not torch.equal(batches[0][1], batches[1][1]), "crops are drawn anew"
    held_out = list(data.val_dataloader())
    assert [(low.shape, high.shape) for low, high in held_out] == [((1, 3, 106, 80), (1, 3, 424, 320))] * 2
    assert all(0 <= images.min() < images.max() <= 1 for images in (*held_out[0], *batches[0]))


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    written = write_photographs(tmp_path, [(20, 24), (33, 18), (16, 16), (21, 23), (40, 40)])
    (tmp_path / "notes.txt").write_text("no photograph")
    data = read(tmp_path, val_fraction=0.4, crops_per_epoch=64)
    colors = {round(255 * high.mean().item()) for batch in data.train_dataloader() for high in batch[1]}
    held_out = {round(255 * high.mean().item()): high.shape[2:] for _, high in data.val_dataloader()}
    assert len(held_out) == 2
    assert colors | held_out.keys() == {10, 20, 30, 40, 50}
    assert not colors & held_out.keys()
    for color, shape in held_out.items():
        assert shape == tuple(side // 4 * 4 for side in written[color // 10 - 1].shape[1:])
    assert len({float(read(tmp_path, seed=seed).val_set.photographs[0].float().mean()) for seed in range(8)}) > 1
    assert len(read(tmp_path, val_fraction=0.99).train_set.photographs) == 1


def test_crops_come_from_everywhere_and_from_torchs_random_state(tmp_path: Path) -> None:
    ramp = torch.arange(24, dtype=torch.uint8).view(1, 1, 24).expand(1, 17, 24)  # Gray files become color.
    for name in ("a.png", "b.PNG"):
        to_pil_image(ramp).save(tmp_path / name)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        data = read(tmp_path, crops_per_epoch=100, batch_size=100)
        [(_, high)] = data.train_dataloader()
        drawn.append(high)
    assert torch.equal(*drawn)
    assert high.shape == (100, 3, 16, 16)
    assert set((255 * drawn[0][:, 0, 0, 0]).round().int().tolist()) == set(range(9))


def test_reduction_keeps_means_and_takes_out_what_is_too_fine() -> None:
    stripes = (torch.arange(64) % 2).float().view(1, 1, 1, 64).expand(1, 3, 32, 64)
    reduced = downscale(stripes)
    assert reduced.shape == (1, 3, 8, 16)
    torch.testing.assert_close(reduced[..., 2:-2], torch.full((1, 3, 8, 12), 0.5), atol=0.02, rtol=0)
    wide = ((torch.arange(64) + 1) // 2 % 2).float().view(1, 1, 1, 64).expand(1, 3, 32, 64)
    assert (downscale(wide)[..., 2:-2] - 0.5).abs().max() < 0.1, "what is between the points that would be read counts too"
    ramp = torch.linspace(0.2, 0.8, 64).view(1, 1, 1, 64).expand(1, 3, 32, 64)
    again = upscale(downscale(ramp))
    torch.testing.assert_close(again[..., 12:-12], ramp[..., 12:-12], atol=5e-3, rtol=0)


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match=r"at least two PNG or JPEG files, but got '.*nowhere', which is none"):
        read(tmp_path / "nowhere")
    write_photographs(tmp_path, [(20, 12), (20, 12)])
    with pytest.raises(NetsimError, match=r"at least 16×16 pixels, but got photo[01]\.(png|jpg) of 20×12.*Choose a smaller"):
        read(tmp_path)
    (tmp_path / "photo0.png").write_bytes(b"no picture")
    with pytest.raises(NetsimError, match=r"readable PNG and JPEG files, but got '.*photo0\.png'"):
        read(tmp_path)

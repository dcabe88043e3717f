from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from sklearn.datasets import load_digits

from lightning_netsim import NetsimError, SimilarityMonitor
from lightning_netsim.demos import DigitsDataModule, ImageClassifier, MNISTDataModule
from lightning_netsim.records.record import Record, list_records, read_record


class Drawn(Callback):
    """Write down, epoch by epoch, which training images each batch holds."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        images = trainer.datamodule.train_set.tensors[0].flatten(1)  # type: ignore[attr-defined]
        rows = torch.cdist(batch[0].flatten(1), images).argmin(1)
        self.epochs.setdefault(trainer.current_epoch, []).extend(rows.tolist())


def fit(path: Path, data: DigitsDataModule, callback: Callback, epochs: int, ckpt_path: Path | None = None) -> Trainer:
    torch.manual_seed(0)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=path, callbacks=[callback], **quiet)
    model = ImageClassifier(network="digits", learning_rate=3e-3)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=bool(ckpt_path))
    return trainer


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that counted its 89 training images."""
    path = tmp_path_factory.mktemp("counted")
    data = DigitsDataModule(batch_size=16, val_fraction=0.95, validate_on="train")
    monitor = SimilarityMonitor(
        k=3, every_n_epochs=3, directions=2, figures=False, summary=False, compare_activations=False, dirpath=path / "netsim"
    )
    fit(path, data, monitor, epochs=6)
    return path


def digits(**arguments: Any) -> DigitsDataModule:
    data = DigitsDataModule(batch_size=100, **arguments)
    data.setup("fit")
    return data


def test_digits_are_split_by_class_and_keep_their_order() -> None:
    everything = load_digits()
    data = digits()
    train, val = (part.tensors[1].bincount(minlength=10) for part in (data.train_set, data.val_set))
    assert (val / (train + val)).sub(0.4).abs().max() < 0.01
    place = {tuple(row.tolist()): index for index, row in enumerate(torch.from_numpy(everything.data).float() / 16)}
    found = [[place[tuple(image.flatten().tolist())] for image in part.tensors[0]] for part in (data.train_set, data.val_set)]
    assert sorted(found[0] + found[1]) == list(range(1797))
    for indices, part in zip(found, (data.train_set, data.val_set), strict=True):
        assert indices == sorted(indices)
        assert part.tensors[0].shape[1:] == (1, 8, 8)
        assert part.tensors[1].tolist() == everything.target[indices].tolist()
    torch.manual_seed(123)
    assert torch.equal(data.val_set.tensors[0], digits().val_set.tensors[0])
    assert not torch.equal(data.val_set.tensors[0], digits(seed=1).val_set.tensors[0])


def test_held_out_digits_come_in_order_and_training_digits_do_not() -> None:
    data, validated = digits(), digits(validate_on="train")
    for loader, images in (
        (data.val_dataloader(), data.val_set),
        (validated.val_dataloader(), validated.train_set),
        (validated.predict_dataloader(), validated.val_set),
    ):
        assert torch.equal(torch.cat([batch for batch, _ in loader]), images.tensors[0])
    assert not torch.equal(torch.cat([batch for batch, _ in data.train_dataloader()]), data.train_set.tensors[0])


def test_missing_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    data = MNISTDataModule(str(tmp_path))
    with pytest.raises(NetsimError, match="set `download: true`"):
        data.prepare_data()
    assert not list(tmp_path.iterdir()), "nothing is written where nothing was asked for"


def test_mnist_has_its_two_parts(data_dir: Path) -> None:
    data = MNISTDataModule(str(data_dir), batch_size=500)
    data.prepare_data()
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (60_000, 10_000)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (500, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4], "the first test images, in the order of the file"


def newest(path: Path) -> Record:
    return read_record(list_records(path / "netsim")[-1])


def test_a_run_draws_by_the_counts_of_the_last(counted: Path, tmp_path: Path) -> None:
    samples = newest(counted).samples
    drawn, data = Drawn(), DigitsDataModule(batch_size=16, val_fraction=0.95, counts=str(counted))
    fit(tmp_path, data, drawn, epochs=1)
    assert samples["index"].tolist() == sorted(drawn.epochs[0]) == list(range(len(data.train_set)))
    assert samples["label"].tolist() == data.train_set.tensors[1].tolist(), "the counts are of the training images"
    assert samples.set_index("index")["soft_count"][drawn.epochs[0]].is_monotonic_increasing


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_fit_draws_as_one_that_was_not_interrupted(counted: Path, tmp_path: Path, num_workers: int) -> None:
    def data() -> DigitsDataModule:
        return DigitsDataModule(batch_size=16, val_fraction=0.95, counts=str(counted), num_workers=num_workers)

    whole, first, second = Drawn(), Drawn(), Drawn()
    fit(tmp_path, data(), whole, epochs=3)
    fit(tmp_path, data(), first, epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    fit(tmp_path, data(), second, epochs=3, ckpt_path=tmp_path / "one.ckpt")
    assert {**first.epochs, **second.epochs} == whole.epochs
    assert sorted(second.epochs) == [1, 2]


def test_counts_are_checked_in_setup(counted: Path, tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match="which does not exist"):
        DigitsDataModule(counts=str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(NetsimError, match="but got 1078: counts of another data set"):
        DigitsDataModule(val_fraction=0.4, counts=str(counted)).setup("fit")


def test_classes_can_be_held_out() -> None:
    data = DigitsDataModule(unseen_classes=[7, 2])
    data.setup("fit")
    assert set(data.val_set.tensors[1].tolist()) == {2, 7}
    assert set(data.train_set.tensors[1].tolist()) == set(range(10)) - {2, 7}
    assert len(data.train_set) + len(data.val_set) == 1797


def test_views_are_of_the_same_images() -> None:
    data = DigitsDataModule(batch_size=50, num_views=3)
    data.setup("fit")
    torch.manual_seed(0)
    views, labels = next(iter(data.train_dataloader()))
    assert [view.shape for view in views] == [(len(labels), 1, 8, 8)] * 3
    assert not torch.equal(views[0], views[1])
    closest = torch.cdist(views[0].flatten(1), views[1].flatten(1)).argmin(1)
    assert (closest == torch.arange(50)).float().mean() > 0.1, "by chance it would be 0.02"

"""What the monitor writes, logs, draws and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_netsim import SimilarityBatch, SimilarityMonitor, analyze
from lightning_netsim.records.record import SAMPLE_COLUMNS
from tests.callbacks.runs import SAMPLES, Points, Stream, quiet_trainer
from tests.callbacks.small import Keyed, Small, expected_neighbors, oracle, points, records, train, watching


class Named(LightningDataModule):
    class_names = ("ant", "bee", "cat")

    def train_dataloader(self) -> DataLoader[Any]:
        return points(16, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return points()


class Run:
    """Two epochs with everything switched on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.monitor = SimilarityMonitor(k=3, directions="all", thresholds=[0.5], powers=[2], summary=False)
        self.checkpoint = ModelCheckpoint(path / "ckpt", monitor="netsim/neighbor_fraction", mode="max", save_top_k=1)
        self.stopping = EarlyStopping("netsim/same_class_fraction", mode="max", patience=5)
        self.module = Small()
        self.logger = TensorBoardLogger(path)
        callbacks = [self.monitor, self.checkpoint, self.stopping]
        self.trainer = quiet_trainer(path, callbacks, logger=self.logger, enable_checkpointing=True, max_epochs=2)
        self.trainer.fit(self.module, datamodule=Named())
        self.root = Path(self.logger.log_dir) / "netsim"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    return Run(tmp_path_factory.mktemp("run"))


def test_a_record_is_written_after_each_epoch(run: Run) -> None:
    assert sorted(place.name for place in run.root.iterdir()) == ["epoch=0-step=2", "epoch=1-step=4"]
    first, second = records(run.root)
    tables = {"samples.parquet", "neighbors.parquet", "activation_neighbors.parquet", "classes.parquet", "meta.json"}
    files = tables | {"counts.png", "neighbors.png"}
    assert {file.name for file in first.path.iterdir()} == files
    assert {file.name for file in second.path.iterdir()} == files | {"counts_over_epochs.png"}
    assert not first.samples["soft_count"].equals(second.samples["soft_count"])


def test_tables_have_the_columns_of_the_schema_and_one_row_for_each_sample(run: Run) -> None:
    record = records(run.root)[-1]
    names = [column.name for column in SAMPLE_COLUMNS]
    assert set(record.samples.columns) == {*names, "hard_count_0.5", "power_count_2"}
    assert record.samples["index"].tolist() == record.samples["sample_id"].tolist() == list(range(SAMPLES))
    assert record.samples["label"].tolist() == Points().labels.tolist()
    for table in (record.neighbors, record.activation_neighbors):
        assert list(table.columns) == ["index", "rank", "neighbor", "similarity"]
        assert table["rank"].tolist() == [1, 2, 3] * SAMPLES
        assert (table["index"] != table["neighbor"]).all()


def test_numbers_are_those_of_the_weights_at_the_end_of_the_epoch(run: Run) -> None:
    record = records(run.root)[-1]
    similarity = oracle(run.module)
    np.testing.assert_allclose(record.samples["soft_count"], similarity.sum(1), rtol=0, atol=1e-4 * SAMPLES)
    np.testing.assert_allclose(record.samples["neighbor_fraction"], similarity.mean(1), atol=1e-4)
    np.testing.assert_allclose(record.samples["power_count_2"], similarity.clamp_min(0).square().sum(1), atol=1e-3)
    assert record.samples["hard_count_0.5"].tolist() == (similarity >= 0.5).sum(1).tolist()
    table = record.neighbors.pivot(index="index", columns="rank", values="neighbor").to_numpy().tolist()
    assert table == expected_neighbors(similarity, 3)
    listed = similarity[record.neighbors["index"].tolist(), record.neighbors["neighbor"].tolist()]
    np.testing.assert_allclose(record.neighbors["similarity"], listed, atol=1e-5)
    predictions = run.module.net(Points().points).argmax(1)
    assert record.samples["prediction"].tolist() == predictions.tolist()


def test_same_class_fraction_is_the_share_of_listed_neighbors(run: Run) -> None:
    record, labels = records(run.root)[-1], Points().labels.numpy()
    same = labels[record.neighbors["neighbor"]] == labels[record.neighbors["index"]]
    np.testing.assert_allclose(record.samples["same_class_fraction"], same.reshape(-1, 3).mean(1))


def test_meta_says_what_the_tables_were_made_with(run: Run) -> None:
    meta = json.loads((run.root / "epoch=1-step=4" / "meta.json").read_text())
    wanted = {
        "epoch": 1,
        "global_step": 4,
        "stage": "validate",
        "num_samples": SAMPLES,
        "num_reference": SAMPLES,
        "num_left_out": 0,
        "reference": "self",
        "parameters": "trainable",
        "precision": "float32",
        "weights": "raw",
        "recall": 1.0,
        "k": 3,
        "class_names": ["ant", "bee", "cat"],
    }
    assert {key: meta[key] for key in wanted} == wanted
    assert meta["directions"] == {"kind": "all", "count": 3, "seed": 0}
    assert meta["versions"]["torch"] == torch.__version__.partition("+")[0] or meta["versions"]["torch"] == torch.__version__
    assert meta["plan"]["kind"] == "store"
    assert meta["seconds"] > 0


def test_scalars_are_logged_and_usable_by_other_callbacks(run: Run) -> None:
    first, second = (record.samples["neighbor_fraction"].mean() for record in records(run.root))
    metrics = run.trainer.callback_metrics
    assert float(metrics["netsim/neighbor_fraction"]) == pytest.approx(second, abs=1e-6)
    assert float(metrics["netsim/recall"]) == 1.0
    assert float(metrics["netsim/left_out"]) == 0.0
    assert float(run.checkpoint.best_model_score) == pytest.approx(max(first, second), abs=1e-6)
    best = max(record.samples["same_class_fraction"].mean() for record in records(run.root))
    assert float(run.stopping.best_score) == pytest.approx(best, abs=1e-6)


def test_tensorboard_shows_figures_and_scalars(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run.logger.log_dir)
    events.Reload()
    assert set(events.Tags()["images"]) == {"netsim/counts", "netsim/neighbors", "netsim/counts_over_epochs"}
    assert [image.step for image in events.Images("netsim/counts")] == [2, 4]
    assert events.Images("netsim/counts")[0].width > 300
    values = [event.value for event in events.Scalars("netsim/neighbor_fraction")]
    assert values == pytest.approx([record.samples["neighbor_fraction"].mean() for record in records(run.root)], abs=1e-6)


def test_history_has_a_row_for_each_epoch_with_the_mean_of_each_class(run: Run) -> None:
    assert [row["epoch"] for row in run.monitor.history] == [0, 1]
    samples = records(run.root)[0].samples
    row = run.monitor.history[0]
    assert row["mean"] == pytest.approx(samples["neighbor_fraction"].mean())
    assert row["bee"] == pytest.approx(samples[samples["label"] == 1]["neighbor_fraction"].mean())


def test_analyze_gives_the_same_tables(run: Run) -> None:
    record = records(run.root)[-1]
    analysis = analyze(run.module, points(shuffle=True), k=3, directions="all", progress=False)
    np.testing.assert_allclose(analysis.samples["soft_count"], record.samples["soft_count"], atol=1e-4)
    assert analysis.neighbors["neighbor"].tolist() == record.neighbors["neighbor"].tolist()


def shuffled_by_a_batch_sampler() -> DataLoader[Any]:
    return DataLoader(Points(), batch_sampler=BatchSampler(RandomSampler(Points()), 8, False))


@pytest.mark.parametrize("loader", [lambda: points(shuffle=True), shuffled_by_a_batch_sampler, lambda: points(drop_last=True)])
def test_a_sample_is_known_by_its_index_however_it_is_loaded(loader: Any, tmp_path: Path) -> None:
    module = Small()
    val = loader()
    trainer = train(tmp_path, watching(), val, module)
    size = 16 if val.batch_sampler.drop_last else SAMPLES
    record = records(tmp_path / "netsim")[-1]
    assert record.samples["index"].tolist() == list(range(size))
    assert record.samples["label"].tolist() == Points().labels[:size].tolist()
    counts = oracle(module, Points().points[:size]).sum(1)
    np.testing.assert_allclose(record.samples["soft_count"], counts, atol=1e-3)
    assert trainer.current_epoch == 2


def test_a_subset_is_the_same_in_every_epoch_and_for_every_order(tmp_path: Path) -> None:
    seen = []
    for name, options in {"plain": {}, "shuffled": {"shuffle": True}}.items():
        train(tmp_path / name, watching(max_samples=7), points(**options))
        for record in records(tmp_path / name / "netsim"):
            seen.append(record.samples["index"].tolist())
            assert set(record.neighbors["neighbor"]) <= set(seen[-1])
            assert record.meta["num_reference"] == 7
    assert len(seen) == 4
    assert len(set(seen[0])) == 7
    assert all(index == seen[0] for index in seen)


@pytest.mark.parametrize(
    ("options", "epochs", "kept"),
    [
        ({"every_n_epochs": 2}, [1], [1]),
        ({"max_overhead": 1e-9}, [0], [0]),
        ({"max_overhead": 1e9}, [0, 1, 2], [0, 1, 2]),
        ({"keep": "last"}, [0, 1, 2], [2]),
    ],
)
def test_which_epochs_are_measured_and_kept(
    options: dict[str, Any], epochs: list[int], kept: list[int], tmp_path: Path
) -> None:
    monitor = watching(dirpath=tmp_path / "tables", **options)
    train(tmp_path / "run", monitor, max_epochs=3)
    assert [row["epoch"] for row in monitor.history] == epochs
    assert [record.meta["epoch"] for record in records(tmp_path / "tables")] == kept
    assert not (tmp_path / "run" / "netsim").exists()


@pytest.mark.parametrize(("scores", "mode", "best"), [((2, 1, 3), "max", 2), ((float("nan"), 1, 2), "min", 1)])
def test_only_the_best_record_is_kept(scores: tuple[float, ...], mode: str, best: int, tmp_path: Path, capsys: Any) -> None:
    monitor = watching(keep="best", monitor="score", mode=mode, summary=True)
    train(tmp_path, monitor, module=Small(scores), max_epochs=3)
    kept = records(tmp_path / "netsim")
    assert [record.meta["epoch"] for record in kept] == [best]
    printed = capsys.readouterr().out
    assert f"epoch {best}" in printed
    assert str(kept[0].path) in printed


def test_the_best_record_is_known_after_a_resume_in_another_directory(tmp_path: Path) -> None:
    first = watching(keep="best", monitor="score")
    trainer = train(tmp_path / "one", first, module=Small((1, 2)), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = watching(keep="best", monitor="score")
    train(tmp_path / "two", again, module=Small((1, 2)), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert [record.meta["epoch"] for record in records(tmp_path / "one" / "netsim")] == [0]
    assert records(tmp_path / "two" / "netsim") == []
    assert [row["epoch"] for row in again.history] == [0, 1]


def test_history_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = watching()
    train(tmp_path, first, max_epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    again = watching(figures=True)
    train(tmp_path, again, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert again.history[0] == first.history[0]
    assert [row["epoch"] for row in again.history] == [0, 1]
    assert (tmp_path / "netsim" / "epoch=1-step=2" / "counts_over_epochs.png").is_file()
    assert len(records(tmp_path / "netsim")) == 2


@pytest.mark.parametrize("named", [False, True])
def test_fast_dev_run_measures_and_writes_nothing(named: bool, tmp_path: Path) -> None:
    monitor = watching(figures=True, dirpath=tmp_path / "tables" if named else None)
    train(tmp_path, monitor, fast_dev_run=True)
    assert monitor.record is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reference", ["train", "loader"])
def test_neighbors_are_sought_in_another_set(reference: str, tmp_path: Path) -> None:
    module = Small()
    others = points(16, shuffle=True)
    train(tmp_path, watching(reference="train" if reference == "train" else others), module=module, max_epochs=1)
    record = records(tmp_path / "netsim")[0]
    similarity = oracle(module, Points().points, Points(16).points)
    np.testing.assert_allclose(record.samples["soft_count"], similarity.sum(1), atol=1e-3)
    nearest = record.neighbors[record.neighbors["rank"] == 1]
    np.testing.assert_allclose(nearest["similarity"], similarity.max(1).values, atol=1e-5)
    assert nearest["neighbor"].tolist()[:16] == list(range(16))  # the first points are in both sets
    assert record.neighbors["neighbor_label"].tolist() == Points(16).labels[record.neighbors["neighbor"].tolist()].tolist()
    assert (record.meta["num_samples"], record.meta["num_reference"]) == (SAMPLES, 16)
    assert record.meta["reference"] == ("train" if reference == "train" else "other")


def two_loaders() -> list[DataLoader[Any]]:
    return [points(12), points(10, shuffle=True)]


@pytest.mark.parametrize("loaders", [two_loaders, lambda: CombinedLoader(two_loaders(), "sequential")])
def test_two_loaders_are_one_set_with_unique_indices(loaders: Any, tmp_path: Path) -> None:
    module = Small()
    train(tmp_path, watching(), loaders(), module, max_epochs=1)
    record = records(tmp_path / "netsim")[0]
    assert record.samples["dataloader"].tolist() == [0] * 12 + [1] * 10
    assert record.samples["index"].tolist() == list(range(22))
    counts = oracle(module, torch.cat([Points(12).points, Points(10).points])).sum(1)
    np.testing.assert_allclose(record.samples["soft_count"], counts, atol=1e-3)


@pytest.mark.parametrize("given", [None, ["x", "y", "z"]])
def test_names_of_classes_are_those_given_or_of_the_data_set(given: list[str] | None, tmp_path: Path) -> None:
    monitor, val = watching(class_names=given), points()
    val.dataset.classes = ("ant", "bee", "cat")
    train(tmp_path, monitor, val, max_epochs=1)
    assert monitor.record is not None
    assert monitor.record.meta["class_names"] == (given or ["ant", "bee", "cat"])


@pytest.mark.parametrize("precision", ["float32", "inherit"])
def test_the_precision_of_the_trainer_counts_only_where_it_is_inherited(precision: str, tmp_path: Path) -> None:
    module, monitor = Small(), watching(precision=precision)
    train(tmp_path, monitor, module=module, precision="bf16-mixed", max_epochs=1)
    assert monitor.result is not None
    difference = float((monitor.result.counts.soft - oracle(module).sum(1)).abs().max())
    assert (difference < 1e-3) == (precision == "float32")


class KeyedModel(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()


def test_mappings_lose_their_labels_and_ids(tmp_path: Path) -> None:
    module = KeyedModel()
    train(tmp_path, watching(), DataLoader(Keyed(), batch_size=8), module, max_epochs=1)
    record = records(tmp_path / "netsim")[0]
    assert record.samples["sample_id"].tolist() == [f"point-{i}.png" for i in range(SAMPLES)]
    assert record.samples["label"].tolist() == Points().labels.tolist()
    np.testing.assert_allclose(record.samples["soft_count"], oracle(module).sum(1), atol=1e-3)


class Stepping(Small):
    def similarity_step(self, batch: Any, batch_idx: int) -> SimilarityBatch:
        outputs = self.net(batch[0])[:, :2]
        names = [f"{batch_idx}/{row}" for row in range(len(outputs))]
        return SimilarityBatch(outputs, ["odd" if label % 2 else "even" for label in batch[1].tolist()], names, names)


def test_similarity_step_says_what_is_compared(tmp_path: Path) -> None:
    monitor = watching(figures=True)
    train(tmp_path, monitor, DataLoader(Stream(), batch_size=8), Stepping(), max_epochs=1)
    record = records(tmp_path / "netsim")[0]
    assert record.samples["sample_id"].tolist() == [f"{i // 8}/{i % 8}" for i in range(SAMPLES)]
    assert record.samples["label"].tolist() == ["odd" if label % 2 else "even" for label in Points().labels]
    assert record.meta["directions"]["count"] == 2
    assert record.meta["notes"] == []
    assert monitor.result is not None
    assert monitor.result.queries.shown == record.samples["sample_id"].tolist()


def test_samples_of_a_stream_without_names_are_named_by_position_which_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="named by their position") as caught:
        train(tmp_path, watching(max_samples=10), DataLoader(Stream(), batch_size=8))
    assert sum("named by their position" in str(warning.message) for warning in caught) == 1
    record = records(tmp_path / "netsim")[-1]
    assert record.samples["index"].tolist() == list(range(10))
    assert "named by their position" in record.meta["notes"][0]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_are_measured(stage: str, tmp_path: Path) -> None:
    module, monitor = Small(), watching(summary=True)
    trainer = quiet_trainer(tmp_path, [monitor])
    (logged,) = getattr(trainer, stage)(module, points(), verbose=False)
    (record,) = records(tmp_path / "netsim" / "test" if stage == "test" else tmp_path / "netsim")
    similarity = oracle(module)
    assert logged["netsim/neighbor_fraction"] == pytest.approx(float(similarity.mean()), abs=1e-5)
    np.testing.assert_allclose(record.samples["soft_count"], similarity.sum(1), atol=1e-3)
    assert record.meta["stage"] == stage
    assert monitor.history == []


def test_the_summary_is_printed_once_at_the_end(tmp_path: Path, capsys: Any) -> None:
    train(tmp_path, watching(summary=True))
    printed = capsys.readouterr().out
    assert printed.count("Input similarity") == 1
    assert "epoch 1" in printed
    assert "Five most isolated samples" in printed
    assert str(tmp_path / "netsim" / "epoch=1-step=2") in printed


def test_the_plan_is_said_before_the_first_measurement(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, watching())
    said = [message for message in caplog.messages if message.startswith("SimilarityMonitor")]
    assert len(said) == 1
    assert said[0].startswith("SimilarityMonitor: 22 samples, 3 directions, 203 parameters: one sweep")


class ShowsImages(CSVLogger):
    """A logger with the method for images that several experiment trackers share."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.shown: list[tuple[str, tuple[int, ...], int | None]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.shown += [(key, image.shape, step) for image in images]


def test_a_logger_with_log_image_gets_the_figures(tmp_path: Path) -> None:
    logger = ShowsImages(tmp_path)
    train(tmp_path, watching(figures=True), logger=logger, max_epochs=1)
    assert [(key, shape[2], step) for key, shape, step in logger.shown] == [("netsim/counts", 3, 1), ("netsim/neighbors", 3, 1)]


def test_progress_is_shown_by_the_bar_of_lightning(tmp_path: Path, capfd: Any) -> None:
    train(tmp_path, watching(), callbacks=[TQDMProgressBar()], enable_progress_bar=True, max_epochs=1)
    assert "netsim features" in capfd.readouterr().err


def test_progress_is_shown_by_the_rich_bar_which_keeps_its_own_tasks(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    bar, tasks = RichProgressBar(), []

    class Look(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            tasks.extend((task.description, task.visible) for task in bar.progress.tasks)

    train(tmp_path, watching(), callbacks=[bar, Look()], enable_progress_bar=True)
    shown = [(text, visible) for text, visible in tasks if text.startswith("netsim")]
    assert shown
    assert not any(visible for _, visible in shown)


class Breaking(Small):
    """Weights that are not finite from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            with torch.no_grad():
                self.net[1].weight.fill_(float("nan"))


def test_training_goes_on_when_the_weights_are_not_finite(tmp_path: Path) -> None:
    module = Breaking()
    trainer = train(tmp_path, watching(figures=True, summary=True), module=module, max_epochs=3)
    assert module.steps == 3
    assert float(trainer.callback_metrics["netsim/left_out"]) == SAMPLES
    good, bad, _ = records(tmp_path / "netsim")
    assert good.meta["num_left_out"] == 0
    assert bad.samples["soft_count"].isna().all()
    assert len(bad.neighbors) == 0
    assert bad.meta["num_reference"] == 0


def test_a_fit_without_validation_says_that_nothing_is_measured(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing is measured"):
        train(tmp_path, watching(), limit_val_batches=0, max_epochs=1)


def test_a_measurement_in_the_middle_of_an_epoch_has_its_own_record(tmp_path: Path) -> None:
    train(tmp_path, watching(), limit_train_batches=2, val_check_interval=1, max_epochs=1)
    assert [record.path.name for record in records(tmp_path / "netsim")] == ["epoch=0-step=1", "epoch=0-step=2"]

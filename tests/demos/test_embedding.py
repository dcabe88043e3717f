from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_netsim.demos import DigitsDataModule, EmbeddingModule, MetricLearner
from lightning_netsim.losses import MetricLearningLoss

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}


def test_unseen_digits_are_told_apart() -> None:
    torch.manual_seed(0)
    model = MetricLearner(contrastive_criterion=MetricLearningLoss("NPairsLoss"))
    trainer = Trainer(max_epochs=4, check_val_every_n_epoch=4, **QUIET)
    trainer.fit(model, DigitsDataModule(unseen_classes=[5, 6, 7, 8, 9]))
    figures = trainer.callback_metrics
    assert {"val_recall@1", "val_recall@8", "val_map@r", "val_nmi", "val_knn_accuracy"} <= figures.keys()
    assert figures["val_recall@1"] > 0.8


def test_evaluation_sees_what_is_before_the_projection() -> None:
    model = EmbeddingModule(embedding_dim=12, projection_dim=5)
    images = torch.rand(3, 1, 8, 8)
    assert model.train()(images).shape == (3, 5)
    assert model.eval()(images).shape == (3, 12)
    torch.testing.assert_close(model(images), model.network(images))
    assert model.predict_step((images, torch.zeros(3)), 0).shape == (3, 12)

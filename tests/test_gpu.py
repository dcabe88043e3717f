"""On a CUDA device: the same tables as on the CPU, computed there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_netsim import DifferenceAlignmentMixin, EmbeddingMetrics, MMDMixin, SimilarityMonitor, analyze, denoise_labels
from lightning_netsim.data import trees
from lightning_netsim.data.sources import from_loader
from lightning_netsim.functional.difference_alignment import DIFFERENCES, NORMS, difference_alignment_loss
from lightning_netsim.jacobian import JacobianOperator
from lightning_netsim.jacobian.features import GradientFeatures
from lightning_netsim.losses import (
    AbstractImageLoss,
    AbstractSimilarityLoss,
    DensityLoss,
    GradientBatch,
    GroupSimilarityLoss,
    MinibatchSimilarityLoss,
    MMDLoss,
    PatchMMDLoss,
    RandomNetworkLoss,
    VGGLoss,
)
from lightning_netsim.measurement.measure import measure_similarity
from lightning_netsim.measurement.plan import measure_rates, memory_budget
from lightning_netsim.measurement.settings import SweepSettings
from tests import cases
from tests.callbacks.small import Small, points
from tests.measuring import classifier, loader
from tests.mixins.modules import Embedded, Plain, Regularized, trainer
from tests.mixins.modules import loader as regularized_loader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

CUDA = torch.device("cuda")


def measured(device: torch.device, plan: str, **settings: Any) -> Any:
    inputs = torch.randn(150, 6, generator=torch.Generator().manual_seed(0))

    def move(batch: Any, batch_idx: int) -> Any:
        return [part.to(device) for part in batch]

    chosen = SweepSettings(k=5, directions="all", plan=plan, projection_dim=60, thresholds=(0.5,), powers=(2.0,), **settings)
    return measure_similarity(classifier().to(device), from_loader(loader(inputs), move), settings=chosen)


@pytest.mark.parametrize("plan", ["store", "sketch", "reiterate"])
def test_tables_are_those_of_the_cpu(plan: str) -> None:
    there, here = measured(CUDA, plan), measured(torch.device("cpu"), plan)
    torch.testing.assert_close(there.counts.soft.cpu(), here.counts.soft, rtol=1e-4, atol=1e-3)
    assert float((there.neighbors.index == here.neighbors.index).float().mean()) > 0.99
    torch.testing.assert_close(there.neighbors.similarity, here.neighbors.similarity, rtol=0, atol=1e-5)
    assert there.neighbors.recall is not None
    assert there.classes is not None
    assert here.classes is not None
    torch.testing.assert_close(there.classes.similarity, here.classes.similarity, rtol=0, atol=1e-4)
    torch.testing.assert_close(there.same_class, here.same_class, rtol=0, atol=1e-4)
    torch.testing.assert_close(there.margin, here.margin, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", ["matrix", "outputs"])
def test_labels_are_denoised_as_on_the_cpu(kernel: str) -> None:
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    here = denoise_labels(classifier(), loader(inputs), kernel=kernel, progress=False)
    there = denoise_labels(classifier().to(CUDA), loader(inputs), kernel=kernel, progress=False)
    for name in ("smoothed_targets", "smoothed_outputs", "consistency", "factor"):
        torch.testing.assert_close(getattr(there.result, name).cpu(), getattr(here.result, name), rtol=1e-3, atol=1e-4)
    assert there.neighbors.recall > 0.95


@pytest.mark.parametrize("name", sorted(cases.CASES))
def test_kernels_are_those_of_the_cpu(name: str) -> None:
    model, inputs = cases.build(name)
    here = GradientFeatures(model, directions="all")(inputs)
    wanted = here.inner(here).float()
    there = GradientFeatures(model.to(CUDA), directions="all")(trees.moved(inputs, CUDA))
    found = there.inner(there)
    model.to("cpu")
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=0, atol=1e-4)


def test_the_monitor_in_mixed_precision() -> None:
    for precision in ("float32", "inherit"):
        monitor = SimilarityMonitor(k=3, precision=precision, figures=False, summary=False)
        trainer = Trainer(
            accelerator="gpu", devices=1, precision="16-mixed", max_epochs=1, logger=False, callbacks=[monitor],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Small(), points(8, batch_size=4), points(11, batch_size=4))
        assert monitor.result is not None
        assert bool(monitor.result.counts.soft.isfinite().all())


def test_analyze_leaves_the_model_where_it_is() -> None:
    model = classifier().to(CUDA)
    analysis = analyze(model, loader(torch.randn(40, 6)), k=3, progress=False)
    assert next(model.parameters()).device.type == "cuda"
    assert len(analysis.neighbors) == 120


def test_the_budget_is_that_of_the_device() -> None:
    assert 0 < memory_budget(SweepSettings(), CUDA) <= torch.cuda.mem_get_info()[1]
    assert measure_rates(CUDA).products > 1e10


def test_a_chunk_that_does_not_fit_is_halved() -> None:
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2**31 / torch.cuda.mem_get_info()[1]))
    try:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 256, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        images = torch.randn(64, 3, 128, 128)
        analysis = analyze(model.to(CUDA), loader(images, size=64), k=3, directions=1, progress=False)
        assert analysis.meta["plan"]["chunk_size"] < 64
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("criterion", [GroupSimilarityLoss(), MinibatchSimilarityLoss(), DensityLoss(0.5)])
@pytest.mark.parametrize("name", ["conv2d", "batch_norm", "attention", "embedding", "layer_norm"])
def test_criteria_and_their_gradients_are_those_of_the_cpu(name: str, criterion: AbstractSimilarityLoss) -> None:
    model, inputs = cases.build(name)
    labels = torch.arange(trees.batch_size(inputs) or 0) % 2

    def differentiated(device: torch.device) -> Tensor:
        there = copy.deepcopy(model).to(device)
        operator = JacobianOperator(there, directions=1, create_graph=True)
        loss = criterion(GradientBatch(operator, trees.moved(inputs, device), labels.to(device)))
        found = torch.autograd.grad(loss, list(there.parameters()), allow_unused=True)
        return torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in found if gradient is not None)]).detach().cpu()

    here = differentiated(torch.device("cpu"))
    torch.testing.assert_close(differentiated(CUDA), here, rtol=0, atol=1e-4 * max(1.0, float(here.abs().max())))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_regularized_module_trains_there(precision: Any) -> None:
    module = Regularized(norm=True)
    fitting = trainer(max_epochs=2, accelerator="gpu", devices=1, precision=precision)
    fitting.fit(module, regularized_loader())
    assert -1.01 <= float(fitting.callback_metrics["netsim/similarity_loss"]) < 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_alignment_and_its_gradient_are_those_of_the_cpu(difference: str, norm: str) -> None:
    embeddings = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 5

    def differentiated(device: torch.device) -> Tensor:
        there = embeddings.to(device).requires_grad_()
        loss = difference_alignment_loss(there, labels.to(device), difference=difference, norm=norm)
        [gradient] = torch.autograd.grad(loss, there)
        return torch.cat([loss.reshape(1), gradient.flatten()]).detach().cpu()

    torch.testing.assert_close(differentiated(CUDA), differentiated(torch.device("cpu")), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("labels", ["batch", "instance", 3])
def test_embeddings_are_trained_there(labels: int | str, precision: Any) -> None:
    class Aligned(DifferenceAlignmentMixin, Embedded):
        """Both terms."""

    source: Any = "batch" if labels == "instance" else labels
    module = Aligned(contrastive_labels=source, alignment_labels=labels)
    fitting = trainer(max_epochs=2, accelerator="gpu", devices=1, precision=precision)
    fitting.fit(module, regularized_loader())
    for term in ("contrastive", "alignment"):
        assert torch.isfinite(fitting.callback_metrics[f"netsim/{term}_loss"])


def test_metrics_of_embeddings_are_those_of_the_cpu() -> None:
    embeddings = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 4
    here, there = EmbeddingMetrics(), EmbeddingMetrics().to(CUDA)
    here.update(embeddings, labels)
    there.update(embeddings.to(CUDA), labels.to(CUDA))
    for name, value in here.compute().items():
        torch.testing.assert_close(there.compute()[name].cpu(), value)


@pytest.mark.parametrize(
    "criterion",
    [MMDLoss(), MMDLoss("arc_cosine", depth=2), MMDLoss(unbiased=True), MMDLoss(num_features=64)],
    ids=["gaussian", "arc_cosine", "unbiased", "features"],
)
def test_discrepancies_and_their_gradients_are_those_of_the_cpu(criterion: MMDLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(1100, 9, generator=generator), torch.randn(300, 9, generator=generator) + 0.5
    criterion.eval()

    def differentiated(device: torch.device) -> Tensor:
        sets = [some.to(device).requires_grad_() for some in samples]
        loss = criterion(*sets)
        gradients = torch.autograd.grad(loss, sets)
        return torch.cat([loss.reshape(1), *(1000 * gradient.flatten() for gradient in gradients)]).detach().cpu()

    torch.testing.assert_close(differentiated(CUDA), differentiated(torch.device("cpu")), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "criterion",
    [
        PatchMMDLoss(remove_mean=True, local_weight=0.025),
        PatchMMDLoss(num_features=64, redraw=False),
        RandomNetworkLoss(width=64),
        RandomNetworkLoss(width=64, pooling=False),
        VGGLoss(mode="random", network="vgg11", layers=["conv1_1", "conv3_2"]),
    ],
    ids=["patch_mmd++", "patch_mmd", "network", "local network", "vgg"],
)
def test_distances_of_images_and_their_gradients_are_those_of_the_cpu(criterion: AbstractImageLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 50, 41, generator=generator), torch.rand(3, 3, 50, 41, generator=generator)
    criterion.eval()

    def differentiated(device: torch.device) -> Tensor:
        pair = [some.to(device).requires_grad_() for some in images]
        loss = criterion(*pair)
        gradients = torch.autograd.grad(loss, pair)
        return torch.cat([loss.reshape(1), *(1000 * gradient.flatten() for gradient in gradients)]).detach().cpu()

    with torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(differentiated(CUDA), differentiated(torch.device("cpu")), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("prior", [None, "normal"])
def test_features_are_matched_there(prior: str | None, precision: Any) -> None:
    class Adapted(MMDMixin, Plain):
        """Matched to another domain, or to a prior."""

    module = Adapted(mmd_prior=prior)
    fitting = trainer(max_epochs=2, accelerator="gpu", devices=1, precision=precision)
    other = regularized_loader()
    fitting.fit(module, other if prior else {"source": regularized_loader(), "target": other})
    assert torch.isfinite(fitting.callback_metrics["netsim/mmd_loss"])

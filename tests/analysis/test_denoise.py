"""Labels of a data set as a network sees them: table and tensors against the oracle, the bound, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import DenoisedLabels, SimilarityBatch, denoise_labels
from lightning_netsim._checks import NetsimError
from tests.denoising_oracles import by_matrices, by_outputs
from tests.oracles import loop_jacobian

SAMPLES, FEATURES = 14, 4
EXACT = {"rtol": 1e-8, "atol": 1e-8}


def points(size: int = SAMPLES, seed: int = 1, features: int = FEATURES) -> Tensor:
    return torch.randn(size, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, outputs)).double()


def loader(inputs: Tensor, labels: Tensor | None = None, size: int = 5, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, *([] if labels is None else [labels])), size, shuffle)


def ask(model: nn.Module, asked: Any, *more: Any, **options: Any) -> DenoisedLabels:
    return denoise_labels(model, asked, *more, **{"progress": False, **options})


def labels_of(kind: str, outputs: int, size: int = SAMPLES, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return labels as a data set has them, and as ỹ, shape (N, D)."""
    if kind == "values":
        values = points(size, seed, outputs)
        return (values[:, 0] if outputs == 1 else values), values
    numbers = torch.arange(seed, seed + size) % max(2, outputs)
    return numbers, numbers.double().unsqueeze(1) if outputs == 1 else nn.functional.one_hot(numbers, outputs).double()


def fit(model: nn.Module, inputs: Tensor, kind: str) -> Tensor:
    outputs = model.eval()(inputs).detach()
    return outputs if kind == "values" else outputs.sigmoid() if outputs.shape[1] == 1 else outputs.softmax(1)


def column(found: DenoisedLabels, name: str) -> Tensor:
    return torch.tensor(found.samples[name].tolist(), dtype=torch.float64)


KINDS = [("classes", 1), ("classes", 2), ("classes", 3), ("values", 1), ("values", 3)]


@pytest.mark.parametrize(("kernel", "all_pairs"), [("matrix", False), ("matrix", True), ("outputs", False)])
@pytest.mark.parametrize(("kind", "outputs"), KINDS)
@pytest.mark.parametrize("other", [False, True])
def test_against_the_oracle(kind: str, outputs: int, kernel: str, all_pairs: bool, other: bool) -> None:
    model, inputs, (labels, targets) = network(outputs), points(), labels_of(kind, outputs)
    own_labels = labels_of(kind, outputs, 6, 5)[0] if other else labels
    asked = points(6, 4) if other else inputs
    sets = [loader(asked, own_labels, shuffle=True), *([loader(inputs, labels, 4)] if other else [])]
    found = ask(model.train(), *sets, kernel=kernel, all_pairs=all_pairs)
    fitted, own, oracle = fit(model, inputs, kind), fit(model, asked, kind), by_matrices if kernel == "matrix" else by_outputs
    wanted = oracle(loop_jacobian(model, asked), loop_jacobian(model, inputs), targets, fitted, own)
    for name in ("smoothed_targets", "smoothed_outputs", "consistency", "residual"):
        torch.testing.assert_close(getattr(found.result, name), getattr(wanted, name), **EXACT)
    if kernel == "outputs" or all_pairs:
        torch.testing.assert_close(found.result.factor, wanted.factor, **EXACT)
    assert found.result.factor_error == (0.0 if kernel == "outputs" or all_pairs else 1 / 8)
    table = found.samples
    assert table["sample_id"].tolist() == table["index"].tolist() == list(range(len(asked)))
    assert table["dataloader"].tolist() == [0] * len(asked)
    torch.testing.assert_close(column(found, "denoising_factor"), found.result.factor)
    torch.testing.assert_close(column(found, "neighbor_consistency"), wanted.consistency, **EXACT)
    smoothed = wanted.smoothed_targets
    if kind == "classes":
        shares = torch.cat([1 - smoothed, smoothed], 1) if outputs == 1 else smoothed
        assert table["label"].tolist() == own_labels.tolist()
        assert table["prediction"].tolist() == ((own[:, 0] > 0.5).long() if outputs == 1 else own.argmax(1)).tolist()
        assert table["denoised_label"].tolist() == shares.argmax(1).tolist()
        torch.testing.assert_close(column(found, "label_share"), shares[range(len(asked)), own_labels], **EXACT)
    else:
        names = ["denoised_label"] if outputs == 1 else [f"denoised_label_{o}" for o in range(outputs)]
        torch.testing.assert_close(torch.stack([column(found, name) for name in names], 1), smoothed, **EXACT)
        assert "label_share" not in table
    assert [found.meta[key] for key in ("kernel", "targets", "num_reference")] == [kernel, kind, SAMPLES]


def test_single_precision_and_the_size_of_batches() -> None:
    model, inputs, (labels, targets) = network().float(), points().float(), labels_of("classes", 3)
    dense, fitted = loop_jacobian(model.eval(), inputs), fit(model, inputs, "classes")
    wanted = by_matrices(dense, dense, targets, fitted, fitted)
    for size in (1, SAMPLES):
        found = ask(model, loader(inputs, labels, size), all_pairs=True).result
        for name in ("smoothed_targets", "smoothed_outputs", "consistency", "factor", "residual"):
            torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), rtol=1e-4, atol=1e-4)


@settings(max_examples=4, deadline=None)
@given(size=st.integers(1, SAMPLES), seed=st.integers(0, 50))
def test_the_seed_and_not_the_batches_decide(size: int, seed: int) -> None:
    model, inputs, (labels, _) = network(), points(), labels_of("classes", 3)
    whole = ask(model, loader(inputs, labels, SAMPLES), seed=seed)
    torch.rand(3)
    parts = ask(model, loader(inputs, labels, size, shuffle=True), seed=seed)
    torch.testing.assert_close(parts.result.factor, whole.result.factor, **EXACT)
    torch.testing.assert_close(parts.result.smoothed_targets, whole.result.smoothed_targets, **EXACT)


def test_wrong_labels_are_put_right() -> None:
    """Two groups of points and a linear network: a wrong label is outvoted by those of its neighbors."""
    clean = torch.arange(60) % 2
    inputs = 0.3 * points(60, 7, 2) + 4.0 * clean.unsqueeze(1) - 2
    given_labels = clean.clone()
    wrong = [0, 11, 22, 33, 44, 55]
    given_labels[wrong] = 1 - clean[wrong]
    for outputs in (1, 2):
        found = ask(nn.Linear(2, outputs).double(), loader(inputs, given_labels))
        assert found.samples["denoised_label"].tolist() == clean.tolist()
        share = column(found, "label_share")
        assert sorted(share.argsort()[: len(wrong)].tolist()) == wrong
        assert float(share[wrong].max()) < 0.5


# The bound


class Skip(nn.Module):
    """A network whose outputs are not those of its last layer alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.wide = nn.Linear(FEATURES, 1)
        self.deep = network(1)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        added = {"inputs": 1000 * x[:, :1], "head": self.wide(x), "sine": 0.3 * x[:, :1].sin()}
        return self.deep(x) + added[self.kind]


class HeadFirst(nn.Module):
    """A network whose last layer is not the last that was registered."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2, bias=bias)
        self.body = nn.Linear(FEATURES, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize(("kind", "outputs"), [("values", 1), ("values", 3), ("classes", 1)])
@pytest.mark.parametrize("last_layer", [None, "3"])
def test_the_bound_holds(kind: str, outputs: int, last_layer: str | None) -> None:
    model, inputs, asked = network(outputs), points(), 3 * points(40, 6)
    labels, own = labels_of(kind, outputs)[0], labels_of(kind, outputs, 40)[0]
    whole = ask(model, loader(asked, own), loader(inputs, labels), kernel="outputs", last_layer=last_layer)
    both, found = torch.cat([inputs, asked]), whole.result
    gradients, head = loop_jacobian(model.eval(), both), model[3].weight.detach()
    slope = 1 / 4 if kind == "classes" else 1.0
    constant = slope * head.norm(dim=1) * gradients.norm(dim=2).amax(0) * (1 + model[:3](both).norm(dim=1).max().detach())
    assert found.bound is not None
    assert found.spread is not None
    torch.testing.assert_close(found.lipschitz, constant, **EXACT)
    torch.testing.assert_close(found.bound, math.sqrt(2) * constant * found.spread, **EXACT)
    # |ŷ_i − E_k[ŷ]| and |E_k[ŷ_i − ŷ]| are one: the weights sum to one.
    assert bool(((fit(model, asked, kind) - found.smoothed_outputs).abs() <= found.bound).all())
    torch.testing.assert_close(column(whole, "consistency_bound"), found.bound.norm(dim=1), **EXACT)
    # So does that of any two samples, with weights 1 and 0.
    unit, fitted = nn.functional.normalize(gradients, dim=2), fit(model, both, kind)
    distance = (unit[:, None] - unit[None]).norm(dim=3)
    assert bool(((fitted[:, None] - fitted[None]).abs() <= constant * distance + 1e-12).all())


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (network(1), {"kernel": "matrix"}),
        (network(1), {"parameters": "0"}),
        (nn.Sequential(network(1), nn.Tanh()), {}),
        (nn.Sequential(network(1)[0], nn.Tanh(), nn.Linear(6, 1, bias=False).double()), {}),
        (nn.Sequential(nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 1, FEATURES), nn.Flatten()), {}),
        (Skip("inputs"), {}),
        (Skip("head"), {}),
        (Skip("sine"), {}),
    ],
)
def test_no_bound_where_nothing_is_known(model: nn.Module, options: dict[str, Any]) -> None:
    found = ask(model.double(), loader(points(), labels_of("values", 1)[0]), **{"kernel": "outputs", **options})
    assert found.result.bound is None
    assert found.result.lipschitz is None
    assert "consistency_bound" not in found.samples


def test_the_last_layer_by_its_name() -> None:
    model, values = HeadFirst().double(), loader(points(), points(features=2))
    assert ask(model, values, kernel="outputs").result.bound is None
    assert ask(model, values, kernel="outputs", last_layer="head").result.bound is not None
    several = ask(network(3), loader(points(), labels_of("classes", 3)[0]), kernel="outputs")
    assert several.result.bound is None  # Of a softmax that mixes the outputs.
    for wrong, bad in ((model, "body"), (model, "nowhere"), (HeadFirst(bias=False).double(), "head"), (Skip("sine"), "deep.3")):
        labels = points(features=2) if isinstance(wrong, HeadFirst) else points(features=1)
        with pytest.raises(NetsimError, match="Expected `last_layer` to be the name of a linear layer"):
            ask(wrong.double(), loader(points(), labels), kernel="outputs", last_layer=bad)
    with pytest.raises(NetsimError, match="Expected `last_layer` to be None"):
        ask(model, values, last_layer="head")


# What is in the sets


@pytest.mark.parametrize("kernel", ["matrix", "outputs"])
@pytest.mark.parametrize(("kind", "outputs"), [("classes", 3), ("classes", 1), ("values", 1)])
def test_a_sample_that_is_not_finite_is_left_out(kind: str, outputs: int, kernel: str) -> None:
    model, inputs, labels = network(outputs), points(), labels_of(kind, outputs)[0]
    inputs[3, 2] = torch.nan
    kept = torch.arange(SAMPLES) != 3
    found = ask(model, loader(inputs, labels), kernel=kernel, all_pairs=True)
    wanted = ask(model, loader(inputs[kept], labels[kept]), kernel=kernel, all_pairs=True)
    names = ["smoothed_targets", "smoothed_outputs", "consistency", "factor", "residual", *(["spread"] * (kernel == "outputs"))]
    for name in names:
        value = getattr(found.result, name)
        assert bool(value[3].isnan().all())
        tolerance = EXACT if name != "spread" else {"rtol": 0.0, "atol": 1e-7}
        torch.testing.assert_close(value[kept], getattr(wanted.result, name), **tolerance)
    assert found.samples.loc[3, ["denoised_label", "denoising_factor", "neighbor_consistency"]].isna().all()
    assert found.samples["denoised_label"].notna().sum() == SAMPLES - 1
    later = ask(model, [(inputs[3:4], labels[3:4]), (inputs[kept], labels[kept])], kernel=kernel, all_pairs=True)
    torch.testing.assert_close(later.result.factor[1:], wanted.result.factor, **EXACT)
    nothing = ask(model, loader(inputs * torch.nan, labels), loader(inputs[kept], labels[kept]), kernel=kernel)
    assert nothing.samples["denoising_factor"].isna().all()


def test_a_value_that_is_missing_is_left_out_of_the_average_only() -> None:
    labels = labels_of("values", 1)[0].clone()
    labels[4] = torch.nan
    found = ask(network(1), loader(points(), labels))
    assert found.meta["num_reference"] == SAMPLES - 1
    assert found.samples["denoised_label"].notna().all()
    assert found.samples["label"].isna().sum() == 1


def test_subset_streams_mappings_and_names() -> None:
    model, inputs, (labels, _) = network(), points(), labels_of("classes", 3)
    some = ask(model, loader(inputs, labels), max_samples=6, all_pairs=True)
    rows = some.samples["index"].tolist()
    assert len(set(rows)) == some.meta["num_reference"] == 6
    assert rows == ask(model, loader(inputs, labels), max_samples=6).samples["index"].tolist()
    alone = ask(model, loader(inputs[rows], labels[rows]), all_pairs=True)
    torch.testing.assert_close(some.result.factor, alone.result.factor, **EXACT)
    whole = ask(model, loader(inputs, labels))
    stream = ask(model, [(inputs[:9], labels[:9]), (inputs[9:], labels[9:])])
    names = [f"image-{row}" for row in range(SAMPLES)]
    mapped = ask(model, [{"input": inputs, "label": labels, "id": names, "unused": labels}])
    for same in (stream, mapped):
        torch.testing.assert_close(same.result.smoothed_targets, whole.result.smoothed_targets, **EXACT)
        assert same.samples["label"].tolist() == labels.tolist()
    assert mapped.samples["sample_id"].tolist() == names
    two = ask(model, [loader(inputs[:9], labels[:9]), loader(inputs[9:], labels[9:])])
    assert two.samples["dataloader"].tolist() == [0] * 9 + [1] * 5
    assert two.samples["index"].tolist() == list(range(SAMPLES))


def test_labels_of_queries_need_not_be_classes() -> None:
    model, inputs, (labels, _) = network(), points(), labels_of("classes", 3)
    reference = loader(inputs, labels)
    wanted = ask(model, reference).samples
    for given_labels in (None, labels + 5, labels - 7, labels + 0.5, labels * math.nan):
        found = ask(model, loader(inputs, given_labels), reference).samples
        assert found["denoised_label"].tolist() == wanted["denoised_label"].tolist()
        assert found["label_share"].isna().all() if given_labels is not None else "label" not in found
    words = ask(model, [(inputs, ["cat"] * SAMPLES)], reference).samples
    assert words["label"].tolist() == ["cat"] * SAMPLES
    assert words["label_share"].isna().all()


def test_forms_of_labels() -> None:
    model, inputs, numbers = network(1), points(), torch.arange(SAMPLES) % 2
    wanted = ask(model, loader(inputs, numbers))
    for same in (numbers.bool(), numbers.to(torch.uint8), numbers.unsqueeze(1)):
        found = ask(model, loader(inputs, same))
        assert found.meta["targets"] == "classes"
        torch.testing.assert_close(found.result.smoothed_targets, wanted.result.smoothed_targets, **EXACT)
    floats = ask(model, loader(inputs, numbers.double()), targets="classes")
    torch.testing.assert_close(floats.result.consistency, wanted.result.consistency, **EXACT)
    assert floats.samples["prediction"].tolist() == wanted.samples["prediction"].tolist()
    assert ask(model, loader(inputs, numbers.double())).meta["targets"] == "classes"
    assert ask(model, loader(inputs, 2.0 * numbers)).meta["targets"] == "values"
    # Whole numbers that are values: the prediction is one too.
    values = ask(model, loader(inputs, numbers), targets="values")
    assert values.samples["prediction"].tolist() == pytest.approx(model.eval()(inputs)[:, 0].tolist(), rel=1e-5)
    listed = ask(model, [(inputs, [float(number) for number in numbers])])
    torch.testing.assert_close(listed.result.smoothed_targets, values.result.smoothed_targets, **EXACT)


class Own(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(), nn.Linear(4, 2))

    def similarity_step(self, batch: Any, batch_idx: int) -> SimilarityBatch:
        self.log("seen", 1.0)
        torch.rand(3)
        return SimilarityBatch(self.layer(batch[0]), batch[1], [f"image-{int(10 * x)}" for x in batch[0][:, 0]])


@pytest.mark.parametrize("kernel", ["matrix", "outputs"])
def test_the_model_and_the_random_state_are_left_as_they_were(kernel: str) -> None:
    model = Own().train()
    model.layer[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    data = loader(points().float(), labels_of("classes", 2)[0])
    first = ask(model, data, kernel=kernel)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert first.samples["sample_id"][0].startswith("image-")
    torch.rand(9)
    assert ask(model, data, kernel=kernel).samples.equals(first.samples)
    with torch.no_grad():
        assert ask(model, data, kernel=kernel).samples.equals(first.samples)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ask(model, data, kernel=kernel).result.factor, first.result.factor)


# Bad input


X, Y, V = points(), labels_of("classes", 3)[0], points(features=1)[:, 0]


@pytest.mark.parametrize(
    ("outputs", "data", "options", "complaint"),
    [
        (3, [X], {}, "`labels` to be one for each sample, but got none"),
        (3, [(X[:5], Y[:5]), (X[5:],)], {}, "`labels` to be one for each sample, but got none"),
        (3, [(X, ["cat"] * SAMPLES)], {}, "Expected `labels` to be"),
        (1, [(X, 3)], {"targets": "values"}, "Expected `labels` to be"),
        (3, [(X, Y + 1)], {}, '`labels` to be class numbers within 0 to 2, but got 1 to 3.*targets="values"'),
        (1, [(X, Y)], {}, "within 0 to 1, but got 0 to 2"),
        (3, [(X, Y[:5])], {}, "Expected `labels` to be class numbers of shape"),
        (3, [(X, V)], {"targets": "classes"}, "`labels` to be class numbers of shape"),
        (3, [(X, Y)], {"targets": "class"}, "`targets` to be one of .* Did you mean 'classes'"),
        (3, [(X, Y)], {"memory_budget": 10}, "`memory_budget` to be at least .* but got 10"),
        (3, [(X, Y)], {"memory_budget": 10, "kernel": "outputs"}, "`memory_budget` to be at least"),
        (3, [], {}, "`loader` to be one that gives at least one batch"),
        (3, [(X * math.nan, Y)], {}, "`reference` to be updated with at least one usable sample"),
        (1, [(X, V * math.nan)], {}, "`reference` to be updated with at least one usable sample"),
        (3, ((X, Y) for _ in range(2)), {}, "`loader` to be one that can be gone through again"),
    ],
)
def test_bad_input_is_named(outputs: int, data: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NetsimError, match=complaint):
        ask(network(outputs), data, **options)


@pytest.mark.parametrize("kernel", ["matrix", "outputs"])
def test_the_budget_that_is_asked_for_is_enough(kernel: str) -> None:
    with pytest.raises(NetsimError, match="`memory_budget`") as refused:
        ask(network(3), [(X, Y)], kernel=kernel, memory_budget=10)
    needed = int(str(refused.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    ask(network(3), [(X, Y)], kernel=kernel, memory_budget=needed)
    with pytest.raises(NetsimError, match="`memory_budget`"):
        ask(network(3), [(X, Y)], kernel=kernel, memory_budget=needed - 1)


@pytest.mark.gpu
def test_on_the_device() -> None:
    wanted = ask(network(), loader(X, Y), all_pairs=True)
    found = ask(network().cuda(), loader(X, Y), all_pairs=True)
    torch.testing.assert_close(found.result.factor.cpu(), wanted.result.factor, **EXACT)

"""Scores of a label that were tried before `find_issues` took one, all from the same record of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from experiments.label_noise_training import CLASSES, Ask, Case, Findings, apply
from lightning_netsim import SimilarityAnalysis, analyze, denoise_labels
from lightning_netsim.functional import label_quality, label_votes

NEIGHBORS = (10, 20, 30, 50)
DEFAULT = 30
PROTOCOLS = ("out of sample", "in sample")


def nearest(analysis: SimilarityAnalysis, k: int) -> SimilarityAnalysis:
    """Return the same analysis with the `k` nearest neighbors of each sample alone."""
    neighbors = analysis.neighbors[analysis.neighbors["rank"] <= k]
    return SimilarityAnalysis(replace(analysis.record, neighbors=neighbors))


def issues(analysis: SimilarityAnalysis, k: int = DEFAULT) -> Tensor:
    """Return the score of `find_issues`."""
    return torch.tensor(nearest(analysis, k).find_issues(["label"]).table["label_score"].to_numpy())


def neighbor_labels(analysis: SimilarityAnalysis) -> Tensor:
    """Return the labels of the neighbors, shape (N, k), nearest first."""
    near = analysis.neighbors.sort_values(["index", "rank"])
    if "neighbor_label" in near:
        labels = near["neighbor_label"].to_numpy()
    else:
        labels = analysis.samples.set_index("index")["label"].loc[near["neighbor"]].to_numpy()
    return torch.tensor(labels).view(len(analysis.samples), -1)


def given(analysis: SimilarityAnalysis) -> Tensor:
    return torch.tensor(analysis.samples["label"].to_numpy())


def votes_alone(analysis: SimilarityAnalysis) -> Tensor:
    """Return the score of the neighbors' votes, without that of the network."""
    return label_quality(label_votes(neighbor_labels(nearest(analysis, DEFAULT)), CLASSES), given(analysis))


def share(analysis: SimilarityAnalysis, weighted: bool = False) -> Tensor:
    """Return the share of neighbors that have the label, each counted once or by its similarity."""
    found = nearest(analysis, DEFAULT)
    same = neighbor_labels(found) == given(found).unsqueeze(1)
    similarity = found.neighbors.sort_values(["index", "rank"])["similarity"].to_numpy()
    weight = torch.tensor(np.clip(similarity, 0, None)).view(same.shape) if weighted else torch.ones(same.shape).double()
    return (weight * same).sum(1) / weight.sum(1)


def class_similarity(analysis: SimilarityAnalysis) -> Tensor:
    """Return by how much a sample is nearer to its class than to the others, on average over all their samples."""
    samples = analysis.samples
    return torch.tensor((samples["same_class_similarity"] - samples["other_class_similarity"]).to_numpy())


#: Of an analysis with the most neighbors.
SCORES: dict[str, Callable[[SimilarityAnalysis], Tensor]] = {
    **{f"`find_issues`, k={k}": partial(issues, k=k) for k in NEIGHBORS},
    "the same without the network's vote": votes_alone,
    "share of the label": share,
    "share, weighted by similarity": partial(share, weighted=True),
    "similarity to its class less others": class_similarity,
}
CONFIDENCE, MEAN, SMOOTHED = "probability of the label", "√(share · probability)", "smoothed label, un-normalized kernel"
TRIED = (*SCORES, CONFIDENCE, MEAN, SMOOTHED)


def try_scores(case: Case) -> dict[tuple[str, str], Findings]:
    """Return what each score finds, by protocol and name."""

    def measured(network: nn.Module, asked: Tensor, others: Tensor | None) -> dict[str, Tensor]:
        reference = None if others is None else case.loader(others)
        settings = {"k": max(NEIGHBORS), "compare_activations": False, "progress": False}
        analysis = analyze(network, case.loader(asked), reference, **settings)
        smoothed = denoise_labels(network, case.loader(asked), reference, num_probes=1, progress=False)
        found = {name: score(analysis) for name, score in SCORES.items()}
        probabilities = apply(network, case.data.images[asked]).double().softmax(1)
        confidence = probabilities.gather(1, case.given[asked].unsqueeze(1)).squeeze(1)
        found |= {CONFIDENCE: confidence, MEAN: (share(analysis) * confidence).sqrt()}
        return found | {SMOOTHED: torch.tensor(smoothed.samples["label_share"].to_numpy())}

    answers: dict[int, dict[str, Tensor]] = {}

    def ask(name: str) -> Ask:
        def asked_for(network: nn.Module, asked: Tensor, others: Tensor | None) -> Findings:
            if id(network) not in answers:
                answers[id(network)] = measured(network, asked, others)
            return Findings(answers[id(network)][name], case.given[asked])

        return asked_for

    by_fold = {(PROTOCOLS[0], name): case.by_fold(ask(name)) for name in TRIED}
    return by_fold | {(PROTOCOLS[1], name): case.in_sample(ask(name)) for name in TRIED}

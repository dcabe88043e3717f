"""The public names: what users import, where it stands, and nothing beside it."""

from __future__ import annotations

import importlib
import types

import pytest

PUBLIC = {
    "lightning_netsim": """
        ActivationFeatures ContrastiveMixin DenoisedLabels DifferenceAlignmentMixin EmbeddingMetrics GradientFeatures
        IssueReport JacobianOperator KernelNeighbors KernelNeighborsResult LabelDenoising MMDMixin NeighborAnswer NeighborCount
        NeighborCountResult NeighborIndex NetsimError PerSampleJacobian RareFirstSampler ReviewedDataset SimilarityAnalysis
        SimilarityBatch SimilarityMixin SimilarityMonitor TransferAnswer __version__ analyze apply_review denoise_labels
        find_issues find_neighbors find_transfer kernel_neighbors load_run neighbor_count pairwise_similarity
        per_sample_jacobian transfer
    """,
    "lightning_netsim.functional": """
        arc_cosine arc_cosine_kernel contrastive_loss ctv_norm denoising_bound denoising_factor denoising_weights density_loss
        difference_alignment_loss draw_frequencies effective_rank exact_patch_mmd expected_neighbors fourier_features
        gaussian_kernel group_mean_similarity group_similarity_loss hard_count identity_distance_similarity inverse_root
        kernel_matrix kernel_neighbors label_quality label_votes laplacian_pyramid lipschitz_constant median_distance
        minibatch_similarity_loss neighbor_consistency neighbor_count neighbor_dimension neighbor_radius
        normalized_kernel_matrix orthonormal_gradients pair_similarity_loss pairwise_similarity pool_windows power_count
        random_feature_mmd random_patch_mmd rotation_similarity sliced_wasserstein smooth soft_count squared_mmd
        subspace_similarity tangent_loss trace_similarity transfer
    """,
    "lightning_netsim.losses": """
        AbstractCriterion AbstractEmbeddingLoss AbstractImageLoss AbstractSimilarityLoss ContrastiveLoss DensityLoss
        DifferenceAlignmentLoss GradientBatch GroupSimilarityLoss InvarianceLoss MMDLoss MetricLearningLoss
        MinibatchSimilarityLoss PairSimilarityLoss PatchMMDLoss RandomNetworkLoss TangentLoss VGGLoss
    """,
    "lightning_netsim.estimators": """
        ClassSimilarity EmbeddingMetrics KernelNeighbors LabelDenoising LinearProbe NeighborCount NeighborTable PseudoLabels
        SlicedWassersteinDistance
    """,
    "lightning_netsim.jacobian": "Directions JacobianOperator PerSampleJacobian SketchProjection per_sample_jacobian",
    "lightning_netsim.mixins": "ContrastiveMixin DifferenceAlignmentMixin MMDMixin SimilarityMixin",
    "lightning_netsim.callbacks": "SimilarityMonitor",
    "lightning_netsim.demos": """
        DigitsDataModule DigitsNetwork DomainClassifier EmbeddingModule ImageClassifier MNISTDataModule MNISTNetwork
        MetricLearner PhotographDataModule ShiftedMNISTDataModule SimilarityClassifier SinusoidDataModule SinusoidRegressor
        SuperResolutionNetwork SuperResolver sinusoid
    """,
    "lightning_netsim.analysis": """
        DenoisedLabels IssueReport NeighborAnswer RareFirstSampler ReviewedDataset SimilarityAnalysis TransferAnswer analyze
        apply_review denoise_labels find_issues find_neighbors find_transfer load_run review
    """,
    "lightning_netsim.data": "SimilarityBatch read_batch",
    "lightning_netsim.measurement": "SampleSet SimilarityResult SweepSettings check_model measure_similarity",
    "lightning_netsim.records": "Record newest_record read_record write_record",
    "lightning_netsim.report": "",
}


@pytest.mark.parametrize("place", PUBLIC)
def test_the_public_names_are_these(place: str) -> None:
    module = importlib.import_module(place)
    wanted = set(PUBLIC[place].split())
    assert set(getattr(module, "__all__", ())) == wanted
    assert all(hasattr(module, name) for name in wanted)
    seen = {name for name, value in vars(module).items() if not isinstance(value, types.ModuleType) and name[0] != "_"}
    assert seen - {"annotations"} == wanted - {"__version__"}

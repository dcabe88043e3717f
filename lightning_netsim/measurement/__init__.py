"""One measurement from start to end: settings, plan, sweeps, exact counts and neighbors, result."""

from lightning_netsim.measurement.measure import check_model, measure_similarity
from lightning_netsim.measurement.result import SampleSet, SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings

__all__ = ["SampleSet", "SimilarityResult", "SweepSettings", "check_model", "measure_similarity"]

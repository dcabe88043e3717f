"""A model and a batch -> the per-sample Jacobian, in factored form."""

from lightning_netsim.jacobian.directions import Directions
from lightning_netsim.jacobian.operator import JacobianOperator, per_sample_jacobian
from lightning_netsim.jacobian.per_sample import PerSampleJacobian
from lightning_netsim.jacobian.sketch import SketchProjection

__all__ = ["Directions", "JacobianOperator", "PerSampleJacobian", "SketchProjection", "per_sample_jacobian"]

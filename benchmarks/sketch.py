"""Measure what the sketch of a batch of gradients costs, against the random projection of TRAK on a CPU.

64 MNIST images, the network of 317,069 parameters, briefly trained, one random direction of its outputs (d = 1), 2,048 numbers
for each image. TRAK's `BasicProjector`, what its package offers without CUDA, multiplies by a matrix of random signs, which it
draws anew in blocks; it is handed the gradients as a matrix, made outside the time. `ours` starts from the same gradients as
this package keeps them; `ours_with_jacobian` starts from the images.

    python benchmarks/sketch.py [--quick] [--data-dir DIRECTORY] [--threads 2]

That the inner products of the sketches are those of the gradients, up to the error of a random projection of this width, is
checked before anything is timed. The last line printed is one JSON object.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problems import mnist
from lab import Bound, Size, Study, medians, ratio, script, time_interleaved
from lightning_netsim.jacobian import SketchProjection
from lightning_netsim.jacobian.features import GradientFeatures

SIZES = {
    "images": Size(64, 16, "images in the batch"),
    "width": Size(2048, 256, "numbers in a sketch"),
    "rounds": Size(5, 2, "timings of each method"),
    "steps": Size(300, 20, "training steps of the network"),
}
BOUNDS = {"speedup_trak": Bound(30, 100, at_least=True, what="sketch of a batch against TRAK's `BasicProjector`")}
# With K random signs, the error of the inner product of two unit vectors is about 1/√K, that of the square of one √(2/K).
TOLERANCE = 2.0


def trak_projector(num_parameters: int, width: int) -> Any:
    """Return TRAK's projector for CPUs, with its own block size."""
    from trak.projectors import BasicProjector, ProjectionType

    return BasicProjector(num_parameters, width, seed=0, proj_type=ProjectionType.rademacher, device=torch.device("cpu"))


def sketch_error(sketch: Tensor, gradients: Tensor, width: int) -> float:
    """Return the root mean square error of the inner products of sketches, those of each with itself included.

    Raises:
        RuntimeError: if it is above what a random projection of this width has.
    """
    error = float((sketch.double() @ sketch.double().T - gradients.double() @ gradients.double().T).square().mean().sqrt())
    if not error <= TOLERANCE / width**0.5:
        raise RuntimeError(f"Inner products of the sketches are off by {error:.1e}, more than {TOLERANCE:g}/√{width}.")
    return error


@script(SIZES, BOUNDS, threads=2, page="benchmarks")
def main(study: Study) -> dict[str, Any]:
    """Check and time both sketches."""
    options = study.options
    problem = mnist(options.data_dir, options.images, options.steps)
    inputs, features = problem.inputs(), GradientFeatures(problem.network, directions=1, seed=0)
    print(f"{len(problem)} {problem.what}; {options.width:,} numbers a sketch; {options.threads} threads.")
    batch = features(inputs)
    gradients = batch.vectors()
    projection = SketchProjection(batch.jacobian.shapes, options.width, 0, batch.energy())
    trak = trak_projector(problem.num_parameters, options.width)

    def project() -> Tensor:
        return trak.project(gradients, model_id=0) / options.width**0.5

    sketches = {"trak": project(), "ours": batch.vectors(projection)}
    errors = {name: sketch_error(found, gradients, options.width) for name, found in sketches.items()}
    functions = {
        "trak": project,
        "ours": lambda batch: batch.vectors(projection),
        "ours_with_jacobian": lambda: features(inputs).vectors(projection),
    }
    # A batch may keep what a first sketch of it has formed: each is sketched once.
    prepare = {"ours": lambda: features(inputs)}
    seconds, _ = time_interleaved(functions, options.rounds, warm_up=False, prepare=prepare)  # The check has done that.
    typical = medians(seconds)
    rows = [(f"`{name}`", value, errors[name.split("_")[0]], typical["trak"] / value) for name, value in typical.items()]
    study.table("sketch", ("sketch", "median seconds", "rms error", "times as fast as TRAK"), rows)
    return {
        "speedup_trak": ratio(seconds, "trak", "ours"),
        "speedup_trak_with_jacobian": ratio(seconds, "trak", "ours_with_jacobian"),
        "rms_error": errors,
        "median_seconds": typical,
        "width": {"trak": options.width, "ours": projection.dim},
        "images": problem.what,
        "options": study.sizes,
    }


if __name__ == "__main__":
    main()

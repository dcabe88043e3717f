"""What the scripts in `experiments/` and `benchmarks/` share.

A whole script:

    from lab import Size, Study, difference, mean_of, script

    SIZES = {"steps": Size(300, 20, "steps of training"), "seeds": Size(range(8), range(2), "of the networks")}

    def run(weight: float, steps: int, seed: int) -> dict[str, float]:
        ...  # train; return what was measured

    @script(sizes=SIZES)
    def main(study: Study) -> dict[str, Any]:
        steps, seeds = study.options.steps, study.options.seeds
        runs = {
            weight: study.log.by_seed({"weight": weight, "steps": steps}, seeds, partial(run, weight, steps))
            for weight in (0.0, 1.0)
        }
        rows = [
            (f"{weight:g}", 100 * mean_of(some, "accuracy"), difference(some, runs[0.0], "loss"))
            for weight, some in runs.items()
        ]
        study.table("accuracy", ("weight", "accuracy, %", "loss, change"), rows, formats=("", ".1f", "+.3f"))
        study.figure(plot(runs))
        return {"accuracy": {weight: mean_of(some, "accuracy") for weight, some in runs.items()}, "options": study.sizes}

    if __name__ == "__main__":
        main()

`main` is then called with a list of arguments, or with none for those of the command line. It takes `--steps`, `--seeds`,
`--quick` (the second number of each `Size`), `--data-dir`, `--out`, `--threads` and `--write`; runs of networks that stand in
`OUT/runs.csv` are not repeated; the last line that it prints is what it returns, as one JSON object. A full run writes its
tables to `docs/results/NAME.md`, each between the lines `<!-- table: accuracy -->` and `<!-- end -->`, where these are; what
stands around them stays. NAME is that of the file, and the help its docstring.

Beside what stands here: `lab.data` and `lab.networks` (what several scripts read and measure on), `lab.training`,
`lab.figures`, and `lab.affine` (random maps of images).

The first lines of a script make `lab` and its neighbors known where it is run as a file, before they are imported:

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
"""

# ruff: noqa: F401

from lab.log import RunLog
from lab.memory import growth_megabytes, peaks_megabytes
from lab.statistics import Mean, difference, mean_of, spearman
from lab.study import Bound, Script, Size, Study, script
from lab.tables import format_number, format_table, write_section
from lab.timing import Seconds, medians, ratio, ratios, time_interleaved

"""Print a table and draw AP50 over steps, of detectors that were trained from several starts, each with several seeds.

    python tests/makers/detectors.py runs/detectors .github/assets/detectors.png

RUNS has a folder START-SEED for each run of recipes/detect.py. Intervals are of 95 %, Student's t over the seeds.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from d2v_composer.evaluation.run_log import read_jsonl
from d2v_composer.report.plots import STYLE

# Half the width of a 95 % interval of the mean, in standard errors, by number of seeds.
STUDENTS_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
TITLES = {"scratch": "random weights", "toy": "student of the toy teacher", "vit": "student of the ViT-S"}

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("runs", type=Path)
parser.add_argument("out", type=Path, help="the picture")


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of the seeds' values and half the width of its interval; NaN for one seed."""
    half = STUDENTS_T[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(half)


def main() -> None:
    args = parser.parse_args()
    curves: dict[str, list[dict[int, float]]] = defaultdict(list)
    for log in sorted(args.runs.glob("*/log.jsonl")):
        if points := read_jsonl(log).get("metrics/test/map_50"):
            curves[log.parent.name.rpartition("-")[0]].append(points)
    figure = Figure(figsize=(6.4, 3.9))
    axes = figure.subplots()
    for start, seeds in curves.items():
        steps = sorted(set.intersection(*map(set, seeds)))
        cells = {step: interval([100 * points[step] for points in seeds]) for step in steps}
        means, halves = np.array([*cells.values()]).T
        (line,) = axes.plot(steps, means, marker="o", label=f"{TITLES.get(start, start)}, {len(seeds)} seeds")
        axes.fill_between(steps, means - halves, means + halves, color=line.get_color(), alpha=0.2)
        row = " | ".join(f"{mean:.1f} ± {half:.1f}" for mean, half in cells.values())
        print(f"| {TITLES.get(start, start)} ({len(seeds)}) | {row} |  steps {steps}")
    axes.set(xlabel="step", ylabel="AP50, %", title="Detectors from three starts, with 95 % intervals")
    axes.set_ylim(bottom=0)
    axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        main()

"""Print tables and draw AP50 over steps, of detectors with several backbones, starts and seeds.

    python tests/makers/detectors.py runs/detectors .github/assets/detectors.png

RUNS has a folder BACKBONE/START-SEED for each run of recipes/detect.py. Intervals are of 95 %, Student's t over the
seeds. A gain is the mean over seeds of what a start ends above random weights.
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
TITLES = {"mobilenetv4": "MobileNetV4", "resnet18": "ResNet-18"}
TITLES |= {"scratch": "random weights", "toy": "student of the toy teacher", "vit": "student of the ViT-S"}

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("runs", type=Path)
parser.add_argument("out", type=Path, help="the picture")


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of the seeds' values and half the width of its interval; NaN for one seed."""
    half = STUDENTS_T[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(half)


def main() -> None:
    args = parser.parse_args()
    curves: dict[str, dict[str, dict[str, dict[int, float]]]] = defaultdict(lambda: defaultdict(dict))
    for log in sorted(args.runs.glob("*/*/log.jsonl")):
        start, _, seed = log.parent.name.rpartition("-")
        if points := read_jsonl(log).get("metrics/test/map_50"):
            curves[log.parent.parent.name][start][seed] = {step: 100 * value for step, value in points.items()}
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (backbone, starts) in zip(panels, curves.items(), strict=True):
        steps, last = list[int](), {}
        for shift, (start, seeds) in zip((-4, 0, 4), starts.items(), strict=True):  # apart, so that all are seen
            steps = sorted(set.intersection(*map(set, seeds.values())))
            cells = {step: interval([points[step] for points in seeds.values()]) for step in steps}
            means, halves = np.array([*cells.values()]).T
            axes.errorbar(np.add(steps, shift), means, halves, marker="o", capsize=3, label=TITLES[start])
            row = " | ".join(f"{mean:.1f} ± {half:.1f}" for mean, half in cells.values())
            print(f"| {TITLES[start]} | {row} |  {backbone}, seeds {', '.join(seeds)}, steps {steps}")
            last[start] = {seed: points[steps[-1]] for seed, points in seeds.items()}
        scratch = last.pop("scratch")
        for start, ends in last.items():
            gain, half = interval([ends[seed] - scratch[seed] for seed in ends])
            print(f"{backbone}, {TITLES[start]}: gain {gain:.1f} ± {half:.1f}")
        axes.set(xlabel="step", title=TITLES[backbone], xticks=steps)
    panels[0].set_ylabel("AP50, %")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(loc="upper left")
    figure.suptitle("Detectors from three starts: means over seeds, with 95 % intervals")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        main()

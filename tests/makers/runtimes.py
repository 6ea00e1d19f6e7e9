"""Draw .github/assets/runtimes.png from the speeds in runtimes.csv beside it.

python tests/makers/runtimes.py
"""

import csv
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from d2v_composer.report.plots import to_png

ASSETS = Path(__file__).parents[2] / ".github" / "assets"


def runtimes() -> Figure:
    """Plot samples per second by runtime from runtimes.csv, whose cells are 'batches of 1 / of 16', a panel a file."""
    with (ASSETS / "runtimes.csv").open() as table:
        (_, *files), *rows = csv.reader(table)
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    for column, (axes, file) in enumerate(zip(figure.subplots(2, 3).flat, files, strict=True), start=1):
        speeds = {row[0]: tuple(map(int, row[column].split("/"))) for row in rows if "/" in row[column]}
        places = np.arange(len(speeds))
        for shift, batch_size, values in zip((-0.2, 0.2), (1, 16), zip(*speeds.values(), strict=True), strict=True):
            bars = axes.barh(places + shift, values, 0.38, color=f"C{int(batch_size == 1)}", label=batch_size)
            axes.bar_label(bars, padding=2, fontsize=7)
        names = [re.sub(r"( in PyTorch)? [\d.]+|, by the kit| by default", "", name) for name in speeds]
        axes.set_yticks(places, names, fontsize=8)
        axes.set(xlim=(0, 1.15 * max(map(max, speeds.values()))), xticks=[])
        axes.invert_yaxis()
        axes.set_title(file, loc="left", fontsize=10)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    title = "Samples per second, in batches of"
    figure.legend(handles, labels, title=title, ncols=2, loc="outside upper left", frameon=False, alignment="left")
    return figure


if __name__ == "__main__":
    (ASSETS / "runtimes.png").write_bytes(to_png(runtimes()))

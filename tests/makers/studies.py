"""Draw the plots of the studies, .github/assets/{share,images,students}.png, from the CSVs in yamls/ablations.

python tests/makers/studies.py

The speeds of speeds.csv are measured with random weights, and do not depend on them:

d2v random-teacher timm/vit_small_patch14_dinov2 vit_s.safetensors
python tests/makers/studies.py vit_s.safetensors
"""

import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2v_composer import load_teacher
from d2v_composer.report.plots import gap_plot

ROOT = Path(__file__).parents[2]
ASSETS, STUDIES = ROOT / ".github" / "assets", ROOT / "yamls" / "ablations"
# Column of cifar10_steps.csv → its line's name and color: a color per target and seed, no dashes.
LINES = {
    "output_mean_gap_seed_17": ("last block as the target, seed 17", "C0"),
    "output_mean_gap_seed_18": ("last block as the target, seed 18", "C5"),
    "chapter_target_output_mean_gap": ("thesis's target, read at the output", "C1"),
    "chapter_target_layer_mean_cls_gap": ("thesis's target, read where it is trained", "C3"),
}
# Row of objectives.csv → the images that it trains on.
NUM_IMAGES = {"500 images": 500, "2,000 images": 2000, "base": 10_000, "50,000 images": 50_000}
# Study → the row of objectives.csv → its name, and what builds it.
STUDENTS = {
    "data2vec2": {
        "base": ("3 blocks", {"depth": 3}),
        "half the width": ("3 narrow blocks", {"depth": 3, "embed_dim": 96}),
        "ResNet-18": ("ResNet-18", {"model": "timm/resnet18"}),
        "MobileNetV4 small": ("MobileNetV4 small", {"model": "timm/mobilenetv4_conv_small"}),
    },
    "timm": {
        "base": ("4 blocks", {"depth": 4}),
        "half the width": ("4 narrow blocks", {"depth": 4, "embed_dim": 192}),
        "ResNet-18": ("ResNet-18", {"model": "timm/resnet18"}),
        "MobileNetV4 small": ("MobileNetV4 small", {"model": "timm/mobilenetv4_conv_small"}),
    },
}
TITLES = {"data2vec2": "small data2vec 2.0 teacher, 32 px", "timm": "ViT-S/14 teacher, 112 px"}
STANDARD_ERROR = 1.1  # of an accuracy of 2,000 images, in points
ROUNDS = 7


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a study's CSV."""
    with (STUDIES / name).open() as file:
        return list(csv.DictReader(file))


def share() -> Figure:
    """Plot the teacher gap closed over the steps of two targets."""
    rows = read("cifar10_steps.csv")
    lines = {
        label: ({0: 0.0} | {int(row["batch"]): float(row[column]) / 100 for row in rows}, {"color": color})
        for column, (label, color) in LINES.items()
    }
    figure = gap_plot("How much of the teacher gap is closed?\nCIFAR-10, top-1, mean of both banks", lines)
    figure.set_size_inches(8, 3.9)
    return figure


def panels(ylabel: str) -> Iterator[tuple[str, Axes]]:
    """Yield each study, and the axes of its panel: one figure for both."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for study, axes in zip(TITLES, figure.subplots(1, 2, sharey=True), strict=True):
        yield study, axes
        axes.set_title(TITLES[study], fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_ylabel(ylabel if study == "data2vec2" else "")


def images() -> Figure:
    """Plot the teacher gap closed over the number of training images, from untrained student to teacher."""
    for study, axes in panels("teacher gap closed, in %"):
        rows = {row["row"]: row for row in read("objectives.csv") if (row["study"], row["model"]) == (study, "student")}
        for embedding, color in (("output_cls", "C0"), ("output_mean", "C1")):
            column = f"{embedding}_gap"
            heights = [float(rows[row][column]) for row in NUM_IMAGES]
            axes.plot([*NUM_IMAGES.values()], heights, "o-", color=color, label=embedding)
            axes.plot(NUM_IMAGES["base"], float(rows["another seed"][column]), "o", mec=color, mfc="none")
        for height, name in ((100, "teacher"), (0, "untrained student")):
            axes.axhline(height, color="k", linewidth=1)
            axes.annotate(name, (500, height), (0, 3), textcoords="offset points", fontsize=9)
        axes.set(xscale="log", xlabel="training images (hollow: another seed)", ylim=(-5, 112))
        axes.set_xticks([*NUM_IMAGES.values()], [f"{number:,}" for number in NUM_IMAGES.values()])
        axes.minorticks_off()
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08), frameon=False, fontsize=9)
    return axes.figure


def students() -> Figure:
    """Plot the students' top-1 over their speed, with 95 % intervals, beside their teacher's."""
    speeds = {(row["study"], row["row"]): float(row["images_per_second"]) for row in read("speeds.csv")}
    for study, axes in panels("top-1 of output_cls, in %"):
        rows = {(row["row"], row["model"]): row for row in read("objectives.csv") if row["study"] == study}
        teacher = float(rows["base", "teacher"]["output_cls_train"])
        axes.axhline(teacher, color="C1")
        axes.plot(speeds[study, "teacher"], teacher, "o", color="C1")
        axes.annotate("teacher", (speeds[study, "teacher"], teacher), (0, 5), textcoords="offset points", color="C1")
        for row, (name, _) in STUDENTS[study].items():
            speed = speeds[study, row]
            before, after = (float(rows[row, of]["output_cls_train"]) for of in ("untrained student", "student"))
            axes.plot([speed, speed], [before, after], color="0.8")
            axes.plot(speed, before, "o", mec="C0", mfc="white")
            axes.errorbar(speed, after, 1.96 * STANDARD_ERROR, fmt="o", color="C0")
            offset, side = ((0, 12), "center") if row == "base" else ((6, 3), "left")
            axes.annotate(name, (speed, after), offset, textcoords="offset points", fontsize=9, ha=side)
        axes.set(
            xlabel="images/s on one core (hollow: untrained)",
            xlim=(0, 1.5 * max(speeds[study, row] for row in STUDENTS[study])),
            ylim=(10, 62),
        )
    return axes.figure


def measure(vit_s: Path) -> None:
    """Measure how many images each model embeds in a second of CPU time, in turns, the median of the rounds."""
    torch.set_num_threads(1)
    teachers = {
        "data2vec2": load_teacher(ROOT / "yamls" / "quickstart" / "teacher.safetensors"),
        "timm": load_teacher(vit_s, model="timm/vit_small_patch14_dinov2", first_blocks=2, image_size=112),
    }
    with (STUDIES / "speeds.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["study", "row", "images_per_second"])
        for study, teacher in teachers.items():
            side = {"data2vec2": 32, "timm": 112}[study]
            batch = torch.randint(256, (64, 3, side, side), dtype=torch.uint8)
            models = {row: teacher.build_student(**options).eval() for row, (_, options) in STUDENTS[study].items()}
            models["teacher"] = teacher
            rates: dict[str, list[float]] = {row: [] for row in models}
            for _ in range(ROUNDS):
                for row, model in models.items():
                    start = time.thread_time()
                    with torch.inference_mode():
                        model.embed(batch)
                    rates[row].append(len(batch) / (time.thread_time() - start))
            writer.writerows([study, row, f"{median(rates[row]):.0f}"] for row in models)


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(Path(sys.argv[1]))
    for draw in (share, images, students):
        draw().savefig(ASSETS / f"{draw.__name__}.png", dpi=100)

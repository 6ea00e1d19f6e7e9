"""Draw the README's pictures: .github/assets from a finished run of the quickstart, share.png from the ablations' CSV.

composer recipes/train.py yamls/quickstart.yaml
python tests/makers/pictures.py runs/quickstart
"""

import csv
import shutil
import sys
from pathlib import Path

from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

from d2v_composer.evaluation.rows import ROWS, UNTRAINED
from d2v_composer.evaluation.run_log import read_jsonl
from d2v_composer.report.plots import gap_plot, to_png

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / ".github" / "assets"
QUERIES = 3
# What the page shows of the gallery: its note, and the first queries.
SHOW = """count => {
    const shown = document.createElement("div"), rows = document.querySelector(".rows");
    shown.id = "shown";
    shown.style.padding = "8px";
    [...rows.children].slice(count).forEach(row => row.remove());
    rows.before(shown);
    shown.append(shown.previousElementSibling, rows);
}"""
# Column of cifar10_steps.csv → its line's name and color: a color per target and seed, no dashes.
LINES = {
    "output_mean_gap_seed_17": ("last block as the target, seed 17", "C0"),
    "output_mean_gap_seed_18": ("last block as the target, seed 18", "C5"),
    "chapter_target_output_mean_gap": ("thesis's target, read at the output", "C1"),
    "chapter_target_layer_mean_cls_gap": ("thesis's target, read where it is trained", "C3"),
}


def curve(run: Path) -> Figure:
    """Plot top-1 over the training steps; each line is labeled where it ends."""
    log, figure = read_jsonl(run / "log.jsonl"), Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in ROWS.values():
        values = log.get("/".join(filter(None, ["metrics/cifar10", row.key, "bank_train/top1"])), {})
        if not values or not row.color:
            continue
        accuracies = [100 * value for value in values.values()]
        first, last = accuracies[0], accuracies[-1]
        if row.moves:
            axes.plot([*values], accuracies, "o-", color=row.color)
            axes.annotate(f"{UNTRAINED} {first:.1f} %", (0, first), (8, -14), textcoords="offset points")
        else:
            axes.axhline(last, color=row.color)
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{row.title} {last:.1f} %", (1, last), (6, 0), color=row.color, **place)
    axes.set(xlabel="training step", xlim=(-15, 610))
    axes.set_title("Top-1 on CIFAR-10's test images, in %,\nby their nearest train image", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def share() -> Figure:
    """Plot the teacher gap closed over the steps, from the ablations' CSV."""
    with (ROOT / "yamls" / "ablations" / "cifar10_steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = {
        label: ({0: 0.0} | {int(row["batch"]): float(row[column]) / 100 for row in rows}, {"color": color})
        for column, (label, color) in LINES.items()
    }
    figure = gap_plot("How much of the teacher gap is closed?\nCIFAR-10, top-1, mean of both banks", lines)
    figure.set_size_inches(8, 3.9)
    return figure


def main(run: Path) -> None:
    (ASSETS / "retrieval.png").write_bytes(to_png(curve(run)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900}, device_scale_factor=1.5)
        page.goto((run / "report.html").resolve().as_uri())
        page.evaluate(SHOW, QUERIES)
        page.locator("#shown").screenshot(path=ASSETS / "gallery.png")
    (ASSETS / "share.png").write_bytes(to_png(share()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

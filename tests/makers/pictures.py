"""Draw the pictures of a finished run of the quickstart, .github/assets/{retrieval,gallery}.png.

composer recipes/train.py yamls/quickstart.yaml
python tests/makers/pictures.py runs/quickstart
"""

import shutil
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from playwright.sync_api import sync_playwright

from d2v_composer.evaluation.rows import ROWS, UNTRAINED
from d2v_composer.evaluation.run_log import read_jsonl
from d2v_composer.report.plots import to_png

ASSETS = Path(__file__).parents[2] / ".github" / "assets"
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


def curve(run: Path) -> Figure:
    """Plot top-1 over the training steps; each line is labeled where it ends."""
    log, figure = read_jsonl(run / "log.jsonl"), Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in ROWS.values():
        values = log.get("/".join(filter(None, ["metrics/cifar10", row.key, "bank_train/top1"])), {})
        if not values or not row.color or len(row.models) > 1:
            continue
        accuracies = [100 * value for value in values.values()]
        first, last = accuracies[0], accuracies[-1]
        if row.changes_in_training:
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


def main(run: Path) -> None:
    (ASSETS / "retrieval.png").write_bytes(to_png(curve(run)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 800, "height": 900})
        page.goto((run / "report.html").resolve().as_uri())
        page.evaluate(SHOW, QUERIES)
        page.locator("#shown").screenshot(path=ASSETS / "gallery.png")
    Image.open(ASSETS / "gallery.png").quantize(256).save(ASSETS / "gallery.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

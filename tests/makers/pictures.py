"""Draw the README's pictures: .github/assets from a finished run of the quickstart, share.png from the ablations' CSV.

composer recipes/train.py yamls/quickstart.yaml
python tests/makers/pictures.py runs/quickstart
"""

import csv
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from d2v_composer.report.plots import gap_plot, to_png

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / ".github" / "assets"
QUERIES = 8
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
    "chapter_target_output_mean_gap": ("chapter's target, read at the output", "C1"),
    "chapter_target_layer_mean_cls_gap": ("chapter's target, read where it is trained", "C3"),
}


def main(run: Path) -> None:
    shutil.copy(run / "report" / "retrieval_cifar10_bank_train.png", ASSETS / "retrieval.png")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900}, device_scale_factor=1.5)
        page.goto((run / "report.html").resolve().as_uri())
        page.evaluate(SHOW, QUERIES)
        page.locator("#shown").screenshot(path=ASSETS / "gallery.png")
    with (ROOT / "yamls" / "ablations" / "cifar10_steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = {
        label: ({0: 0.0} | {int(row["batch"]): float(row[column]) / 100 for row in rows}, {"color": color})
        for column, (label, color) in LINES.items()
    }
    figure = gap_plot("How much of the teacher gap is closed?\nCIFAR-10, top-1, mean of both banks", lines)
    figure.set_size_inches(8, 3.9)
    (ASSETS / "share.png").write_bytes(to_png(figure))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

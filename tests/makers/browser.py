"""Draw the guide's picture of the browser page, .github/assets/browser.png, with the quickstart's student.

composer recipes/train.py yamls/quickstart.yaml
d2v export runs/quickstart/latest-rank0.pt student.safetensors
python tests/makers/browser.py images
(the commands of "In a browser" in recipes/guides/search.md)
python tests/makers/browser.py picture
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from torchvision.io import write_png

from d2v_composer.sources.labeled import load_labeled_set

ROOT = Path(__file__).parents[2]
CIFAR10 = ROOT / "yamls" / "quickstart" / "cifar10"
PICTURE = ROOT / ".github" / "assets" / "browser.png"
QUERY = 14  # a truck, of the test images; no run has trained on them


def write_images() -> None:
    """Write the train images as photos/CLASS/N.png, and the query as query.png."""
    cifar10 = load_labeled_set("mds", CIFAR10, image_size=32, interpolation="bicubic")
    for number, (image, label) in enumerate(zip(*cifar10.train, strict=True)):
        path = Path("photos", cifar10.class_names[int(label)], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(image, str(path))
    write_png(cifar10.test.samples[QUERY], "query.png")


def draw() -> None:
    """Choose the query on the page that is served, and save what it shows, 800 pixels wide, in 128 colors."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 960, "height": 690}, device_scale_factor=800 / 960)
        page.goto("http://localhost:8000")
        page.locator("input:enabled").set_input_files("query.png")
        page.wait_for_selector("#found button")
        page.wait_for_load_state("networkidle")
        page.screenshot(path=PICTURE)
    Image.open(PICTURE).quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    {"images": write_images, "picture": draw}[sys.argv[1]]()

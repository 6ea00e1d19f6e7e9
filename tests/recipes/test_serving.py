"""The browser page of the guide on searching finds what numpy finds in the embeddings of ``d2v embed``."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import skimage
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from d2v_composer.commands import embed
from helpers import ROOT
from small_students import student_with_program

GUIDES = ROOT / "recipes" / "guides"
PHOTOS = Path(skimage.__file__).parent / "data"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def lines(page: str, section: str, language: str) -> list[str]:
    """The blocks of a language in a section of a guide."""
    text = (GUIDES / page).read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student, also in ONNX, and photos of several sizes with its embeddings."""
    folder = Path(shutil.copytree(student_with_program(tmp_path_factory), tmp_path_factory.mktemp("serving") / "here"))
    (folder / "photos" / "a b").mkdir(parents=True)
    for name in ("camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"):
        shutil.copyfile(PHOTOS / name, folder / "photos" / name)
    rocket, record = Image.open(PHOTOS / "rocket.jpg"), Image.Exif()
    record[0x0112] = 6  # on its side
    rocket.save(folder / "photos" / "a b" / "turned é.jpg", exif=record)
    (folder / "photos" / ".trash").mkdir()
    shutil.copyfile(PHOTOS / "cell.png", folder / "photos" / ".trash" / "cell.png")  # hidden
    Image.open(PHOTOS / "astronaut.png").resize((32, 32)).save(folder / "photos" / "small.png")  # the student's size
    gray = np.asarray(Image.open(PHOTOS / "camera.png"), np.uint16)
    Image.fromarray(257 * gray).save(folder / "photos" / "sixteen bits.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        embed.main(["student.safetensors", "photos", "photos.npy"])
    return folder


def load(folder: Path, name: str) -> tuple[list[str], np.ndarray]:
    """Return ids, and embeddings of length 1."""
    rows = np.load(folder / f"{name}.npy")
    return np.load(folder / f"{name}.ids.npy").tolist(), rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Page]:
    """The browser page, made by the commands of the guide but with an onnxruntime-web that is here, and served."""
    [code] = lines("search.md", "In a browser", "sh")
    package = ROOT / ".web" / re.findall(r"onnxruntime-web-[\d.]+tgz", code)[0]
    if CHROMIUM is None or not package.exists():
        pytest.skip("needs Chromium, and onnxruntime-web in .web/, where .ci/run puts it")
    for written, here in (
        (r"npm pack .* && tar -xzf \S+", f"tar -xzf '{package}'"),
        (r"python -m http.server.*", ""),
        (r"^d2v ", f"'{sys.executable}' -m d2v_composer.commands "),
        (r"recipes/", f"'{ROOT}'/recipes/"),
    ):
        code, count = re.subn(written, here, code, flags=re.MULTILINE)
        assert count
    subprocess.run(["bash", "-ec", code], cwd=folder, check=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder / "page")))
    Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}")
        yield page
        browser.close()
    server.shutdown()
    server.server_close()


def check_neighbors(page: Page, folder: Path, name: str, tolerance: float = 1e-3) -> None:
    """The page shows for one of the photos what numpy finds in the embeddings of the command."""
    ids, unit = load(folder, "photos")
    cosines = dict(zip(ids, unit @ unit[ids.index(name)], strict=True))
    page.wait_for_function("document.querySelector('#found b')")
    cells = [text.split(" ", 1) for text in page.locator("#found button").all_text_contents()]
    shown = {text: float(cosine) for cosine, text in cells}
    assert shown == pytest.approx(cosines, abs=tolerance)
    # Of two that are closer than the tolerance, another machine's browser may show either first.
    assert [*shown.values()] == sorted(shown.values(), reverse=True)
    assert next(iter(shown)) == name
    page.evaluate("document.querySelector('#found').replaceChildren()")


@pytest.mark.slow
def test_the_page_finds_what_numpy_finds(page: Page, folder: Path) -> None:
    """For images that are chosen and dropped, larger than the student's and of its size."""
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_selector("input:enabled", state="attached")
    for name in ("rocket.jpg", "a b/turned é.jpg", "motorcycle_left.png"):
        page.set_input_files("input", folder / "photos" / name)
        check_neighbors(page, folder, name)
    page.set_input_files("input", folder / "photos" / "small.png")
    check_neighbors(page, folder, "small.png", tolerance=1e-4)
    dropped = page.evaluate_handle(
        """async () => {
            const transfer = new DataTransfer(), response = await fetch("photos/coffee.png");
            transfer.items.add(new File([await response.blob()], "coffee.png"));
            return transfer;
        }"""
    )
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    check_neighbors(page, folder, "coffee.png")
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    name = page.locator("#found button:nth-child(2)").inner_text().split("\n")[-1].strip()
    page.click("#found button:nth-child(2)")  # a neighbor is the next query
    page.wait_for_function(f"document.querySelector('#found button').innerText.endsWith('{name}')")
    check_neighbors(page, folder, name)
    assert all(url.removeprefix("blob:").startswith(page.url) for url in asked)


@pytest.mark.slow
def test_the_page_says_what_is_wrong(page: Page, folder: Path) -> None:
    page.set_input_files("input", folder / "student.onnx")
    page.wait_for_function("document.querySelector('#status').textContent.includes('could not be decoded')")
    for name in ("photos.npy", "ort.wasm.bundle.min.mjs"):
        (folder / "page" / name).rename(folder / "page" / "away")
        assert page.context.browser
        another = page.context.browser.new_page()  # without this one's cache
        another.goto(page.url)
        another.wait_for_function(f"document.querySelector('#status').textContent.includes('{name}')")
        (folder / "page" / "away").rename(folder / "page" / name)

"""The programs and the lines of the guides on serving and searching give what ``d2v embed`` and numpy give."""

import os
import re
import shutil
import subprocess
import sys
from ast import literal_eval
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import skimage
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from d2v_composer.commands import embed
from d2v_composer.data.images import Images
from d2v_composer.sources.open import open_source
from helpers import ROOT, truncated, write_files
from recipes import onnx_embed
from small_students import student_with_program

GUIDES = ROOT / "recipes" / "guides"
PHOTOS = Path(skimage.__file__).parent / "data"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Embeds in a process that can import neither torch nor the package; the lines of the guide replace its functions.
EMBED = """
import sys
sys.modules.update(torch=None, d2v_composer=None)
import onnx_embed
exec(sys.argv.pop(1), vars(onnx_embed))
onnx_embed.main(*sys.argv[1:])
"""


def lines(page: str, section: str, language: str) -> list[str]:
    """The blocks of a language in a section of a guide."""
    text = (GUIDES / page).read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_python(folder: Path, code: str, *arguments: str) -> str:
    paths = os.pathsep.join([str(ROOT / "recipes"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def check_program(folder: Path, name: str, replaced: str = "") -> None:
    run_python(folder, EMBED, replaced, "student.onnx", "photos", f"{name}.npy")
    (ids, ours), (their_ids, theirs) = load(folder, "photos"), load(folder, name)
    assert their_ids == ids
    assert len(ids) == 8
    assert (ours * theirs).sum(axis=1).min() > 0.99999


def test_onnxruntime_alone_embeds_as_the_command_does(folder: Path) -> None:
    check_program(folder, "alone")


def test_onnxruntime_alone_lists_what_the_command_lists(tmp_path: Path) -> None:
    """Each image once, whatever links there are: to its folder, to a parent, to another folder, to itself."""
    write_files(tmp_path, dict.fromkeys(("photos/a/b/b.jpg", "photos/.trash/c.jpg", "others/others.jpg"), b""))
    for name, target in {"0": "photos", "1": "photos/a", "2": "others", "3.jpg": "photos/a/b/b.jpg"}.items():
        (tmp_path / "photos" / "a" / name).symlink_to(tmp_path / target)
    expected = ["a/2/others.jpg", "a/b/b.jpg"]
    assert onnx_embed.list_images(tmp_path / "photos") == expected
    assert [*open_source(str(tmp_path / "photos"), Images()).ids] == expected


@pytest.mark.parametrize("name", ["photos.npy", "photos.ids.npy"])
def test_onnxruntime_alone_replaces_nothing(tmp_path: Path, name: str) -> None:
    """It says so before it reads a file."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match=rf"^{tmp_path / name} exists; choose another OUT$"):
        onnx_embed.main("none.onnx", "none", str(tmp_path / "photos.npy"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_onnxruntime_alone_skips_what_it_cannot_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_files(tmp_path / "photos", {"cut.jpg": truncated((PHOTOS / "rocket.jpg").read_bytes())})
    arguments = str(folder / "student.onnx"), str(photos), str(tmp_path / "photos.npy")
    with pytest.raises(SystemExit, match=f"^{photos}: no image can be read; supported suffixes are .jpg, "):
        onnx_embed.main(*arguments)
    shutil.copy(folder / "photos" / "small.png", photos)
    onnx_embed.main(*arguments)
    assert capsys.readouterr().err.startswith("skipped cut.jpg: image file is truncated")
    (ids, rows), (their_ids, theirs) = load(tmp_path, "photos"), load(folder, "photos")
    assert ids == ["small.png"]
    np.testing.assert_allclose(rows[0], theirs[their_ids.index("small.png")], atol=1e-5)


@pytest.mark.slow
def test_openvino_by_the_lines_of_the_guide(folder: Path) -> None:
    if find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    [code] = lines("deploy.md", "In Python, without torch", "python")
    check_program(folder, "openvino", code)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["faiss", "lancedb"])
def test_search_by_the_lines_of_the_guide(folder: Path, tmp_path: Path, package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shutil.copytree(folder, tmp_path / "folder"))
        embed.main(["student.safetensors", "photos", "photos.parquet"])
    [code] = [block for block in lines("search.md", "Nearest neighbors", "python") if f"import {package}" in block]
    cosine_of = literal_eval(run_python(tmp_path / "folder", code))
    ids, unit = load(folder, "photos")
    cosines = unit @ unit[0]
    nearest = np.argsort(-cosines)[:6]
    assert list(cosine_of) == [ids[i] for i in nearest]
    assert list(cosine_of.values()) == pytest.approx(cosines[nearest].tolist(), abs=1e-6)


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
    ids, rows = np.load(folder / "photos.ids.npy").tolist(), np.load(folder / "photos.npy").astype(float)
    rows -= rows.mean(axis=0)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
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

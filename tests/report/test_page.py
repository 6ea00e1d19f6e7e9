"""The report of a run: its plots, how it looks in a browser, and corrupt logs."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
import yaml
from playwright.sync_api import Browser, Page, sync_playwright
from torchvision.io import ImageReadMode, decode_png, write_png

from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.commands import report
from d2v_composer.data.audio import Audio
from d2v_composer.evaluation.metrics.metric import BANKS
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.results import Result
from d2v_composer.evaluation.rows import GAP, STUDENT, TEACHER, metric_key
from d2v_composer.evaluation.run_log import read_jsonl
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.report import page
from d2v_composer.report.gallery import gallery
from d2v_composer.report.page import write_report
from d2v_composer.report.plots import accuracy_plots
from d2v_composer.report.run import Run, read_run
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.system.command_line import d2v
from helpers import ROOT, small_run
from made_once import made_once
from recipes import train

WEAK = "output_mean"
INFO = EmbeddingInfo("output_cls", "alignment", 48, "")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_squares(root: Path) -> None:
    """Write thirty colored squares in three classes: root/{train,test}/CLASS/*.png."""
    cifar10 = load_labeled_set("mds", ROOT / "yamls" / "quickstart" / "cifar10", image_size=32, interpolation="bicubic")
    for split in ("train", "test"):
        for i in range(30):
            folder = root / split / ("cat", "dog", "<ship>")[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            write_png(getattr(cifar10, split).samples[i], str(folder / f"{i}.png"))


def train_with_retrieval(folder: Path, data: Path, images: Path) -> None:
    """Train a small run with retrieval and health, and check what it prints of its report."""
    sets = f"retrieval.datasets={{squares: {{format: folder, root: {images}}}}}"
    measures = sets, "retrieval.interval=6ba", "retrieval.probes=[knn, agreement, instance]", "retrieval.max_images=24"
    arguments = small_run(folder, data, *measures, "callbacks.health.interval=2ba", "run_name=mine", "report=true")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(sys, "argv", ["recipes/train.py", *arguments])
        train.main(arguments)
    said, report = stdout.getvalue().splitlines()[-4:-2]
    assert said.startswith("On squares, the student scores ")
    assert report == f"report: {folder / 'report.html'}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The squares, in a folder whose name is no HTML."""
    return made_once(tmp_path_factory, "squares", lambda folder: write_squares(folder / "<b>")) / "<b>"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path, images: Path) -> Path:
    """A finished run with retrieval and health; read-only."""
    make = partial(train_with_retrieval, data=small_data, images=images)
    return made_once(tmp_path_factory, "reported", lambda folder: make(folder / "run")) / "run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_training_ends_with_a_report(run_folder: Path) -> None:
    pictures = {path.stem for path in (run_folder / "report").glob("*.png")}
    assert pictures - {"gap_closed_squares"} == {  # if the random teacher is better
        *("loss", "learning_rate", "gradient_norm", "throughput", "data_wait", "variance"),
        *("retrieval_squares_bank_train", "retrieval_squares_bank_test", "probes_squares"),
        "without_labels_squares",
    }
    page = (run_folder / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == len(pictures) + 12 * (1 + 3 + 3)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    for shown in ("recipes/train.py", "mosaicml: 0.32.1", "global_train_batch_size: 16", "tiny_base.pt", "cores:"):
        assert shown in page, shown
    final = read_jsonl(run_folder / "log.jsonl")["metrics/squares/bank_train/top1"][14]
    assert f"{100 * final:.1f} %" in page


@pytest.fixture
def accurate(run_folder: Path) -> Run:
    """The run with accuracies of 20 % before and 40 % after; the teacher has 60 %, and 30 % by ``output_mean``."""
    run = read_run(run_folder)
    accuracies: dict[tuple[str, str], dict[int, float]] = {("", "pixels"): {0: 0.1}}
    for embedding, teacher in {"": 0.6, WEAK: 0.3}.items():
        accuracies |= {(embedding, STUDENT): {0: 0.2, 14: 0.4}, (embedding, TEACHER): {0: teacher}}
    measures = [retrieval_from(bank, k) for bank in BANKS for k in (1, 3)]
    log = {metric_key("squares", measure, *of): curve for of, curve in accuracies.items() for measure in measures}
    hits = {row: torch.arange(1000) < share for row, share in zip(GAP, (200, 400, 600), strict=True)}
    results = [Result(row, "squares", measures[0], "embedding", INFO, True, hits[row], batch=14) for row in GAP]
    return run._replace(log=log, results=results)


def test_the_page_and_its_plots_show_the_log(accurate: Run, tmp_path: Path) -> None:
    write_report(accurate, tmp_path)
    page = (tmp_path / "report.html").read_text()
    verdict = (
        "On squares, the student scores 40.0 %, and its teacher 60.0 %",
        "that is 50 [",
        "untrained student&#39;s 20.0 %",
    )
    for shown in (*verdict, "<td>20.0 [", "teacher gap closed"):
        assert shown in page, shown
    drawn = {
        name: {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines}
        for name, figure in accuracy_plots(accurate)
    }
    closed = drawn["gap_closed_squares"]
    assert (closed[STUDENT], closed[WEAK]) == (pytest.approx([0, 0.5]), pytest.approx([0, 2]))
    expected = {"student": [0.2, 0.4], "pixels": [0.1, 0.1], "teacher": [0.6, 0.6]}
    assert drawn["retrieval_squares_bank_train"] == expected


def write_tones(folder: Path) -> None:
    """Write six high and low tones to train, and five to test."""
    for split, i in [*product(("train",), range(6)), *product(("test",), range(5))]:
        path = folder / split / ("high", "low")[i % 2] / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        seconds = np.arange(int((0.3 + i) * 22_050)) / 22_050
        soundfile.write(path, 0.1 * np.sin(2 * np.pi * (3000, 300)[i % 2] * seconds), 22_050)


@pytest.fixture(scope="module")
def sound_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose samples are tones: each of the first four queries found high ones, the last one low ones."""
    folder = tmp_path_factory.mktemp("sound")
    write_tones(folder / "tones")
    record = yaml.safe_load((run_folder / "run.yaml").read_text())
    record["data"]["modality"] = "audio"
    record["config"]["retrieval"]["datasets"] = {"tones": {"format": "folder", "root": str(folder / "tones")}}
    measure, nearest = retrieval_from("train", 1), torch.tensor([[0, 1, 2]] * 4 + [[3, 4, 5]])
    result = Result(
        STUDENT, "tones", measure, "", INFO, True, torch.ones(5, dtype=torch.bool), batch=14, nearest=nearest
    )
    images = load_labeled_set("folder", folder / "tones", Audio()).numbered().fingerprint()
    saved = {"conditions": {"tones.images": images}, "results": [result.plain()]}
    torch.save({"state": {"callbacks": {"ZeroShotRetrieval": saved}}}, folder / LATEST)
    (folder / "run.yaml").write_text(yaml.safe_dump(record))
    shutil.copy(run_folder / "log.jsonl", folder)
    report.main([str(folder)])
    return folder


def opened(browser: Browser, report: Path, width: int) -> tuple[Page, list[str]]:
    """Open a report in a window of a width; return the page, and what it complains of or fetches from elsewhere."""
    page, complaints = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.extend([request.url] * (request.url[:5] not in ("file:", "data:"))))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    return page, complaints


def shown_neighbors(label: str, seconds: list[float]) -> list[tuple[str, float]]:
    """Return the texts and durations of a query's neighbors in the gallery."""
    return [(f"student\n{label}", duration) for duration in seconds]


@pytest.mark.slow
def test_sound_is_seen_and_heard(sound_run: Path, browser: Browser) -> None:
    """Each clip of a gallery plays directly below its spectrogram, from the page alone."""
    page, complaints = opened(browser, sound_run / "report.html", width=390)
    page.wait_for_function("[...document.querySelectorAll('audio')].every(each => each.readyState > 0)")
    boxes = "all => all.map(each => each.getBoundingClientRect()).map(({left, width}) => [left, width])"
    assert page.eval_on_selector_all(".row img", boxes) == page.eval_on_selector_all("audio", boxes)
    clips = page.eval_on_selector_all(
        ".row figure", "all => all.map(f => [f.innerText.trim(), f.querySelector('img ~ audio').duration])"
    )
    heard = [(text, round(seconds, 1)) for text, seconds in clips]
    rows = [heard[i : i + 4] for i in range(0, len(heard), 4)]  # a query and three neighbors
    high_tones, low_tones = [0.3, 2.3, 4.3], [1.3, 3.3, 5.3]
    expected = [[("query\nhigh", seconds), *shown_neighbors("✓ high", high_tones)] for seconds in high_tones]
    expected += [
        [("query\nlow", 1.3), *shown_neighbors("✗ high", high_tones)],
        [("query\nlow", 3.3), *shown_neighbors("✓ low", low_tones)],
    ]
    assert sorted(rows) == sorted(expected)
    assert page.locator("h2", has_text="What the student finds in tones").is_visible()
    assert complaints == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_a_browser_window(browser: Browser, run_folder: Path, width: int) -> None:
    """It shows every picture, logs no error and loads nothing else."""
    page, complaints = opened(browser, run_folder / "report.html", width)
    assert page.title() == "mine"
    assert page.locator("summary").count() == 9
    page.locator("summary", has_text="How training went").click()
    widths = "all => all.map(img => [img.complete && img.naturalWidth, img.width])"
    shown = page.eval_on_selector_all(".plots img", widths)
    assert len(shown) == len(list((run_folder / "report").glob("*.png"))) >= 10
    assert all(natural > 0 and 0.7 * min(width, 500) < displayed <= width for natural, displayed in shown)
    pictures = page.eval_on_selector_all(".row img", widths)
    assert all(natural > 0 and displayed > 60 for natural, displayed in pictures)
    places = "all => new Set(all.map(f => Math.round(f.offsetLeft))).size"
    assert page.eval_on_selector_all("details figure", places) == (2 if width > 1000 else 1)
    page.locator(".row img").first.click()
    assert page.locator("dialog img").evaluate("img => img.width") > pictures[0][1]
    page.keyboard.press("Escape")
    assert page.locator("dialog").is_hidden()
    assert page.locator("h1").is_visible()
    page.locator("summary", has_text="Config").click()
    assert page.locator("pre", has_text="global_train_batch_size: 16").is_visible()
    assert complaints == []


def copy_of_run(run_folder: Path, folder: Path, root: Path) -> Path:
    """Copy a run; the images that it measured are in another folder."""
    shutil.copytree(run_folder, folder, symlinks=True)
    record = yaml.safe_load((folder / "run.yaml").read_text())
    record["config"]["retrieval"]["datasets"]["squares"]["root"] = str(root)
    (folder / "run.yaml").write_text(yaml.safe_dump(record))
    return folder


def test_draws_an_interrupted_run_without_its_images(run_folder: Path, tmp_path: Path) -> None:
    """With lines that are truncated or no entries, NaN and a warning, but no checkpoint."""
    folder = copy_of_run(run_folder, tmp_path / "run", tmp_path / "gone")
    for checkpoint in folder.glob("*.pt"):
        checkpoint.unlink()
    lines = (run_folder / "log.jsonl").read_text().splitlines()
    more = [json.dumps({"step": step, "loss/train/total": float("nan"), "health/diverging": 1.0}) for step in (7, 9)]
    text = "\n".join([*lines[: len(lines) // 2], *more, '{"step": 8, "loss/tr'])
    (folder / "log.jsonl").write_bytes(text.encode() + b"\n\xff\n7\n")
    written = report.main([str(folder)])
    assert {path.stem for path in written} >= {"report", "loss", "retrieval_squares_bank_train"}
    assert "What the student finds" not in (folder / "report.html").read_text()
    assert "(health/diverging in the log): first at batch 7, last at batch 9" in (folder / "report.html").read_text()


def test_a_data_set_that_was_rebuilt_has_no_gallery(
    run_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The neighbors are numbers of images, and would show others."""
    rebuilt = shutil.copytree(images, tmp_path / "images")
    for number in (0, 3, 6):
        (rebuilt / "train" / "cat" / f"{number}.png").rename(rebuilt / "train" / "dog" / f"{number}.png")
    assert read_run(copy_of_run(run_folder, tmp_path / "run", rebuilt)).datasets == {}
    said = "report: no gallery for squares: the images have changed since the run\n"
    assert said in capsys.readouterr().out


def test_a_class_may_have_a_name_that_is_no_text(
    run_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for plots in ("accuracy_plots", "curves"):  # they take seconds
        monkeypatch.setattr(page, plots, lambda run: [])
    renamed = shutil.copytree(images, tmp_path / "images")
    for split in ("train", "test"):
        (renamed / split / "dog").rename(renamed / split / "do\udce7g")
    folder = copy_of_run(run_folder, tmp_path / "run", renamed)
    report.main([str(folder)])
    assert r"do\udce7g" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("model", "key"), [(STUDENT, ""), (TEACHER, "teacher/")])
def test_galleries_show_the_neighbors_that_were_counted(model: str, key: str, run_folder: Path) -> None:
    run = read_run(run_folder)
    squares, measure = run.datasets["squares"], retrieval_from("train", 1)
    bank, queries, names, _ = squares
    assert names == ("<ship>", "cat", "dog")
    [nearest] = [result.nearest for result in run.results if (result.row, result.column) == (model, measure)]
    assert nearest is not None
    first = nearest[:, 0].long()
    hits = bank.labels[first] == queries.labels
    assert hits.double().mean().item() == max(run.log[f"metrics/squares/{key}bank_train/top1"].items())[1]
    rows = gallery(squares, torch.arange(4), {model: first[:, None]})
    for (query, neighbor), hit in zip(rows, hits, strict=False):
        assert (query.title, neighbor.title) == ("query", model)
        assert (query.mark, neighbor.mark, neighbor.sound) == ("", "✓" if hit else "✗", b"")
        assert query.label in names
        assert (neighbor.label == query.label) == hit
    shown = decode_png(torch.frombuffer(bytearray(rows[0][1].picture), dtype=torch.uint8), ImageReadMode.RGB)
    assert torch.equal(shown, bank.samples[first[0]])


def test_a_set_without_labels_has_a_gallery(small_data: Path, images: Path, tmp_path: Path) -> None:
    """The neighbors are those whose agreement was counted; the ones that the teacher finds, too, are marked."""
    (plain := tmp_path / "plain").mkdir()
    for path in (images / "test").rglob("*.png"):
        shutil.copy(path, plain / f"{path.parent.name}{path.name}".replace("<ship>", "ship"))
    sets = f"retrieval.datasets={{plain: {{format: folder, root: {plain}}}}}"
    train.main(small_run(tmp_path / "run", small_data, sets, "max_duration=2ba", "scheduler.t_warmup=1ba"))
    run = read_run(tmp_path / "run")
    nearest = {result.row: result.nearest for result in run.results if result.nearest is not None}
    students, teachers = nearest[STUDENT][:, :3], nearest[TEACHER][:, :3]
    assert not (students == torch.arange(30)[:, None]).any()  # an image is not its own neighbor
    rows = gallery(run.datasets["plain"], torch.arange(30), {STUDENT: students, TEACHER: teachers})
    shared = [len({*ours} & {*theirs}) for ours, theirs in zip(students.tolist(), teachers.tolist(), strict=True)]
    for model in (STUDENT, TEACHER):
        assert [sum(each.title == model and each.mark == "✓" for each in row) for row in rows] == shared
    assert 0 < sum(shared) < 90
    page.write_report(run, tmp_path / "run")
    assert "its nearest other test images" in (tmp_path / "run" / "report.html").read_text()


def test_training_succeeds_even_if_its_report_fails(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "write_report", Mock(side_effect=OSError(28, "No space left on device")))
    trainer = train.main(small_run(tmp_path, small_data, "max_duration=2ba", "scheduler.t_warmup=1ba", "report=true"))
    assert trainer.state.timestamp.batch == 2
    problem = "report: could not be written (OSError: [Errno 28] No space left on device); to try again, run "
    assert capfd.readouterr().err.splitlines()[-1] == problem + d2v("report", tmp_path)

"""d2v search finds the samples nearest to a query, and near-duplicates, shows them, and refuses other spaces."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from d2v_composer import load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import embed, search
from d2v_composer.embedding.search import Found, near_duplicates
from d2v_composer.system.errors import InputError
from gated_store import GatedStore
from helpers import GOLDEN, QUICKSTART, encoded_clip, encoded_image, saved, write_files

TEACHER = QUICKSTART / "teacher.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 photographs, a JPEG of 3.png and a mirrored 5.png; their index in both forms; and a student."""
    folder = tmp_path_factory.mktemp("search")
    images = {f"{number}.png": encoded_image(number) for number in range(12)}
    third, fifth = (Image.open(io.BytesIO(images[name])).convert("RGB") for name in ("3.png", "5.png"))
    copies = {"third.jpg": saved(third, quality=90), "fifth.png": saved(ImageOps.mirror(fifth), "PNG")}
    write_files(folder / "photos", images | copies)
    for name in ("photos.npy", "photos.parquet"):
        embed.main([str(TEACHER), str(folder / "photos"), str(folder / name)])
    student = load_teacher(TEACHER).build_student(depth=1)
    save_student(student, folder / "unaligned.safetensors")
    return folder


def found(*arguments: str | Path) -> list[Found]:
    """Call ``d2v search`` in this process."""
    return search.main([*map(str, arguments)])


def by_hand(rows: NDArray, query: NDArray) -> NDArray[np.float64]:
    """Return each row's cosine with a query, in float64."""
    rows, query = rows.astype(np.float64), query.astype(np.float64)
    return rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_an_image_finds_itself_and_the_nearest_rows(
    indexes: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found(indexes / f"photos.{form}", indexes / "photos/7.png", "--k", "4", "--json")
    ((query, neighbors),) = (each.values() for each in json.loads(capsys.readouterr().out))
    ids, rows = np.load(indexes / "photos.ids.npy").tolist(), np.load(indexes / "photos.npy")
    cosines = by_hand(rows, rows[ids.index("7.png")])
    nearest = np.argsort(-cosines)[:4]
    assert query == str(indexes / "photos/7.png")
    assert [each["id"] for each in neighbors] == [ids[row] for row in nearest]
    np.testing.assert_allclose([each["cosine"] for each in neighbors], cosines[nearest], atol=1e-6)


def test_an_id_finds_the_other_rows(indexes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found(indexes / "photos.npy", "--id", "3.png", "--k", "99")
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "3.png"
    assert len(lines) == 13  # all rows but its own
    assert lines[0].split()[1] == "third.jpg"


def test_a_folder_has_a_query_for_each_image(indexes: Path) -> None:
    each = found(indexes / "photos.npy", indexes / "photos", "--k", "1")
    assert [Path(one.query).name for one in each] == np.load(indexes / "photos.ids.npy").tolist()
    assert [one.rows.tolist() for one in each] == [[number] for number in range(14)]


def test_groups_are_what_pairs_connect() -> None:
    """Rows 0, 7 and 3 form a chain whose ends differ; rows 9 and 5 are equal; blocks are smaller than the index."""
    rows = np.random.default_rng(0).normal(size=(6000, 64)).astype(np.float16)
    step = np.random.default_rng(1).normal(size=64) * 0.3
    rows[4500], rows[5000] = rows[100] + step, rows[100] + 2 * step
    rows[5999] = rows[5]
    rows += np.float16(3)  # what all rows have in common
    groups = near_duplicates(rows, above=0.95)
    assert [group.rows.tolist() for group in groups] == [[100, 4500, 5000], [5, 5999]]
    centered = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    for group in groups:
        np.testing.assert_allclose(group.cosines, by_hand(centered[group.rows], centered[group.rows[0]]), atol=1e-6)
    assert groups[0].cosines[2] < 0.95


def test_near_duplicates_are_listed_in_groups(indexes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found(indexes / "photos.npy", "--duplicates", "--above", "0.9")
    out = capsys.readouterr().out
    assert "2 near-duplicates\n  1.0000  3.png\n" in out
    assert "third.jpg" in out
    assert "groups of near-duplicates:" in out


@pytest.mark.parametrize("query", [["photos/3.png"], ["--id", "3.png"], ["--duplicates", "--above", "0.9"]])
def test_the_page_holds_the_pictures(indexes: Path, tmp_path: Path, query: list[str]) -> None:
    what = [str(indexes / part) if part.startswith("photos") else part for part in query]
    found(indexes / "photos.npy", *what, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "third.jpg" in page
    assert page.count("<img src=") == page.count("data:image/png;base64,") >= 2
    assert "http" not in page.replace("http-equiv", "")  # it needs no network


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_the_folder_of_samples_may_be_no_utf8(indexes: Path, tmp_path: Path, form: str) -> None:
    folder, index = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / f"index.{form}"
    shutil.copytree(indexes / "photos", folder)
    embed.main([str(TEACHER), str(folder), str(index)])
    (first,) = found(index, folder / "3.png", "--k", "1", "--html", tmp_path / "page.html")
    assert first.cosines[0] == pytest.approx(1)


def test_sound_is_shown_and_played(tmp_path: Path) -> None:
    clips = {f"{seed}.wav": encoded_clip(seed, 8000, "WAV") for seed in range(4)}
    write_files(tmp_path / "sounds", clips)
    embed.main([str(GOLDEN / "audio_base.pt"), str(tmp_path / "sounds"), str(tmp_path / "sounds.npy")])
    found(tmp_path / "sounds.npy", tmp_path / "sounds/2.wav", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<audio") == page.count("<img src=") == 5


def test_a_moved_model_or_samples_are_named(indexes: Path, tmp_path: Path) -> None:
    for name in ("photos.npy", "photos.ids.npy", "photos.model.json"):
        (tmp_path / name).write_bytes((indexes / name).read_bytes())
    about = tmp_path / "photos.model.json"
    record = json.loads(about.read_text())
    record["reference"]["model"], record["source"] = "/moved/teacher.safetensors", "/moved/photos"
    about.write_text(json.dumps(record))
    query = (tmp_path / "photos.npy", indexes / "photos/1.png")
    with pytest.raises(InputError, match=r"/moved/teacher\.safetensors.*give its path with --model"):
        found(*query)
    assert found(*query, "--model", TEACHER, "--k", "1")[0].rows.tolist() == [1]
    with pytest.raises(InputError, match="/moved/photos"):
        found(*query, "--model", TEACHER, "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    page = "--html", tmp_path / "page.html", "--source", indexes / "photos"
    found(*query, "--model", TEACHER, *page)
    with pytest.raises(InputError, match=r"page\.html already exists"):
        found(*query, "--model", TEACHER, *page)
    found(*query, "--model", TEACHER, *page, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of QUERY, --id and --duplicates; got none"),
        (["photos/1.png", "--duplicates"], "got QUERY and --duplicates"),
        (["--id", "missing.png"], r"no rows of .*photos.npy have the id 'missing.png'; the first id is"),
        (["photos/1.png", "--model", "unaligned.safetensors"], "another space"),
        (["photos/1.png", "--model", str(GOLDEN / "tiny_base.pt")], "another space"),
        (["photos/none.png"], "none.png"),
        (["photos/1.png", "--above", "0.9"], "--above: can be used only with --duplicates"),
        (["--id", "1.png", "--source", "photos"], "--source: can be used only with --html"),
        (["--duplicates", "--above", "2"], "--above.*less than 1"),
        (["--duplicates", "--above", "nan"], "--above"),
    ],
)
def test_one_line_says_what_is_wrong(
    indexes: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(indexes)
    before = sorted(os.listdir(indexes))
    with pytest.raises(InputError, match=message):
        found("photos.npy", *arguments)
    assert sorted(os.listdir(indexes)) == before


def test_an_index_of_unknown_origin_needs_a_model(indexes: Path, tmp_path: Path) -> None:
    for name in ("photos.npy", "photos.ids.npy"):
        (tmp_path / name).write_bytes((indexes / name).read_bytes())
    index, query = tmp_path / "photos.npy", indexes / "photos/1.png"
    with pytest.raises(InputError, match="does not say which model made it; name the model with --model"):
        found(index, query)
    with pytest.raises(InputError, match=r"rows of 192 channels, but the model's embeddings have 48"):
        found(index, query, "--model", GOLDEN / "tiny_base.pt")
    assert found(index, query, "--model", TEACHER, "--k", "1")[0].rows.tolist() == [1]
    with pytest.raises(InputError, match="has no record of the samples it was made from"):
        found(index, "--duplicates", "--html", tmp_path / "page.html")


def test_an_index_of_a_raw_embedding_is_searched_by_it(indexes: Path, tmp_path: Path) -> None:
    index, photos = tmp_path / "raw.npy", indexes / "photos"
    embed.main([str(GOLDEN / "tiny_base.pt"), str(photos), str(index), "--pooling", "mean"])
    for model in ([], ["--model", GOLDEN / "tiny_base.pt"]):
        (each,) = found(index, photos / "4.png", "--k", "1", *model)
        assert (each.rows.tolist(), each.cosines[0]) == ([6], pytest.approx(1, abs=1e-6))


def test_equal_rows_are_duplicates() -> None:
    rows = np.tile(np.random.default_rng(0).normal(size=8).astype(np.float32), (5, 1))
    assert [group.rows.tolist() for group in near_duplicates(rows, above=0.95)] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((0, 8), np.float32), r"i\.npy cannot be read: it is empty"),
        (np.ones((2, 8), ">f4"), "got >f4"),
        (np.full((2, 8), np.nan, np.float32), "the row with id 'a': expected only zeros, or finite numbers"),
    ],
)
def test_rows_that_cannot_be_compared(tmp_path: Path, rows: NDArray, message: str) -> None:
    np.save(tmp_path / "i.npy", rows)
    np.save(tmp_path / "i.ids.npy", np.array(["a", "b"][: len(rows)], str))
    with pytest.raises(InputError, match=message):
        found(tmp_path / "i.npy", "--duplicates")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("photos.ids.npy", None, r"photos\.ids\.npy"),
        (
            "photos.ids.npy",
            np.full((14, 1), "a"),
            r"photos\.ids\.npy cannot be read: expected one id for each of the 14",
        ),
        ("photos.ids.npy", np.full(14, b"\xff"), r"photos\.ids\.npy cannot be read: 'ascii' codec can't decode"),
        ("photos.model.json", b"{}", r"photos\.model\.json cannot be read"),
        ("photos.model.json", {"reference": {}}, r"photos\.model\.json cannot be read: missing .* 'model'"),
        ("photos.model.json", {"reference": {"model": "", "made": ""}}, r"cannot be read: got .* argument 'made'"),
        ("photos.model.json", {"modality": "video"}, r"photos\.model\.json cannot be read: 1 validation error"),
    ],
    ids=["no ids", "a column of ids", "bytes", "no record", "no model", "another program's", "no modality of ours"],
)
def test_the_damaged_file_beside_an_index_is_named(
    indexes: Path, tmp_path: Path, name: str, contents: NDArray | bytes | dict[str, Any] | None, message: str
) -> None:
    for file in indexes.glob("photos.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if isinstance(contents, dict):
        contents = json.dumps(json.loads(before) | contents).encode()
    if isinstance(contents, bytes):
        (tmp_path / name).write_bytes(contents)
    elif contents is not None:
        np.save(tmp_path / name, contents)
    with pytest.raises(InputError, match=message):
        found(tmp_path / "photos.npy", "--duplicates")


def test_a_page_shows_ids_that_are_not_unicode(tmp_path: Path) -> None:
    images = {f"{number}.png": encoded_image(number) for number in range(3)}
    write_files(tmp_path / "photos", images)
    os.rename(os.fsencode(tmp_path / "photos/2.png"), os.fsencode(tmp_path / "photos") + b"/\xff.png")
    embed.main([str(TEACHER), str(tmp_path / "photos"), str(tmp_path / "i.npy")])
    found(tmp_path / "i.npy", "--id", "1.png", "--html", tmp_path / "page.html")
    assert "\\udcff.png" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_an_index_is_read_from_a_store(
    indexes: Path, reachable_store: GatedStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    address = reachable_store.create_bucket(f"search-{form}")
    for file in indexes.glob("photos.*"):
        reachable_store.client().upload_file(str(file), f"search-{form}", file.name)
    (here,), (there,) = (
        found(f"{place}/photos.{form}", indexes / "photos/7.png", "--k", "4") for place in (indexes, address)
    )
    assert here.rows.tolist() == there.rows.tolist()

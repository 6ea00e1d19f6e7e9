"""Promises 16 and 17: no file runs code or takes all memory or time; what is exported computes the same."""

import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streaming import MDSWriter

import d2v_composer.timm_models  # noqa: F401  (registers the student)
from d2v_composer import load_student, load_teacher
from helpers import (
    D2V,
    GOLDEN,
    Canary,
    d2v,
    datasets_of,
    encoded_image,
    failure,
    load_checkpoint,
    map_of,
    saved,
    slow,
    small_run,
    start_python,
    student_of,
    train_command,
    write_files,
    write_mds,
)
from programs.preloaded import Program

TEACHER = GOLDEN / "tiny_base.pt"
SECONDS, MEGABYTES = 120, 3000
# The functions alone: in 20 seconds of computing, and with the imports' 600 MB.
LOAD_SECONDS, LOAD_MEGABYTES = 20, 1300
LOAD = f"""
import resource, sys
from d2v_composer import load_student, load_teacher
resource.setrlimit(resource.RLIMIT_CPU, ({LOAD_SECONDS}, {LOAD_SECONDS}))
for load in (load_teacher, load_student):
    try:
        load(sys.argv[1])
    except ValueError as error:
        print(error)
"""


def limited(*arguments: str | Path, **options: Any) -> Program:
    """Run a Python program that must end within two minutes and 3 GB."""
    program = start_python(*arguments, **options)
    try:
        program.wait(SECONDS)
    finally:
        program.kill()
    assert program.peak_megabytes < MEGABYTES
    return program


def assert_not_loaded(path: Path) -> None:
    """Load a file as a teacher and as a student: each must be a ValueError of one line with its path."""
    program = limited("-c", LOAD, path)
    assert program.poll() == 0, program.stderr
    assert program.peak_megabytes < LOAD_MEGABYTES
    lines = program.stdout.splitlines()
    assert len(lines) == 2
    assert all(str(path) in line and len(line) < 1000 for line in lines), lines


def terabyte_of_safetensors(path: Path) -> None:
    """A header, followed by a sparse hole."""
    metadata = {"format": "d2v_composer.teacher", "format_version": "1", "config": "{}"}
    metadata["provenance"] = '{"weights": "model"}'
    tensor = {"dtype": "F32", "shape": [1 << 20, 1 << 18], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"__metadata__": metadata, "a": tensor}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 40))


def zip_bomb(path: Path) -> None:
    """A checkpoint of four megabytes whose tensor inflates to four gigabytes of zeros."""
    torch.save({"model": {"a": torch.zeros(16)}, "cfg": {}, "state": {"model": {"a": torch.zeros(16)}}}, path)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = deflate.compress(bytes(1 << 26)) + deflate.flush(zlib.Z_FULL_FLUSH)
    stream = zeros * 64 + deflate.flush()
    replace_part(path, "data/0", stream)
    content = bytearray(path.read_bytes())
    sizes = struct.pack("<II", len(stream), (1 << 32) - 2)
    for signature, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        start = -1
        while (start := content.find(signature, start + 1)) >= 0:
            size = method + 10
            if content[start + size : start + size + 4] == sizes[:4]:
                content[start + method : start + method + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
                content[start + size : start + size + 8] = sizes
    path.write_bytes(content)


def replace_part(path: Path, end: str, content: bytes) -> None:
    """Replace a file in an archive of torch.save."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, content if name.endswith(end) else part)


def with_pickle(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        torch.save({}, path)
        replace_part(path, "data.pkl", content)

    return make


def beyond_its_end(path: Path) -> None:
    """torch reads as many numbers as the pickle claims, even past the end of the storage."""
    torch.save({"model": {"a": torch.zeros(4)}, "cfg": {}}, path)
    with zipfile.ZipFile(path) as archive:
        [pickled] = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    replace_part(path, "data.pkl", pickled.replace(b"K\x04", b"M\xd0\x07"))


def tar_archive(path: Path) -> None:
    """torch extracts a member of a tar archive, which may be a link to any file."""
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, str(path.with_name("secret")), 0o777
        archive.addfile(link)


def code_in_a_teacher(path: Path) -> None:
    teacher = torch.load(TEACHER, weights_only=True)
    torch.save(teacher | {"cfg": Canary(path.with_name("canary"))}, path)


def code_in_a_checkpoint(path: Path) -> None:
    torch.save({"state": {"model": {"a": torch.zeros(1)}, "callbacks": Canary(path.with_name("canary"))}}, path)


PAIR = b"q\x010(h\x01K\x01\x86h\x01K\x02\x86\x91"
HOSTILE: dict[str, Callable[[Path], object]] = {
    "a terabyte of safetensors": terabyte_of_safetensors,
    "a zip bomb": zip_bomb,
    # An object at memo position 2^31, for which C's pickle allocates 16 GB.
    "a huge memo": with_pickle(b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b"."),
    # A dict key of 2^60 tuples: each holds the same one twice.
    "nested tuples": with_pickle(b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01s."),
    # Two equal dict keys of frozensets of pairs, nested 40 deep: comparing them takes 2^40 steps.
    "nested frozensets": with_pickle(b"\x80\x04}(" + 2 * (b"(\x91" + PAIR * 40 + b"K\x01") + b"u."),
    "a huge bytearray": with_pickle(b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."),
    "a tensor beyond its end": beyond_its_end,
    "a tar archive": tar_archive,
    "code in a teacher": code_in_a_teacher,
    "code in a checkpoint": code_in_a_checkpoint,
    "text": lambda path: path.write_text("weights"),
    "nothing": lambda path: path.touch(),
    "a truncated teacher": lambda path: path.write_bytes(TEACHER.read_bytes()[:100_000]),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_model_is_refused(what: str, tmp_path: Path) -> None:
    """Promise 16: the public functions refuse it as a teacher and as a student."""
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "secret").chmod(0o600)
    HOSTILE[what](tmp_path / "model.pt")
    assert_not_loaded(tmp_path / "model.pt")
    assert not (tmp_path / "canary").exists()
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


QUICK = ("a zip bomb", "code in a teacher", "code in a checkpoint", "a truncated teacher", "a link to itself")


@pytest.mark.parametrize("what", [what if what in QUICK else slow(what) for what in HOSTILE])
def test_commands_refuse_a_hostile_model(what: str, small_data: Path, tmp_path: Path) -> None:
    """Promises 16 and 18: it is the model of a command, a run's teacher, or its load_path."""
    path, out = tmp_path / "model.pt", tmp_path / "out"
    HOSTILE[what](path)
    train = train_command(small_run(out / "run", small_data))[1:]
    for arguments in (
        [*D2V, "export", path, out / "student.safetensors"],
        [*train, f"teacher.checkpoint={path}"],
        [*train, f"load_path={path}"],
    ):
        assert str(path) in failure(limited(*arguments), 2)
    assert [file.name for file in out.rglob("*") if file.is_file() and not file.name.startswith(".")] == []
    assert not (tmp_path / "canary").exists()


def change_student(path: Path, change: Callable[[dict[str, Any]], str]) -> None:
    """Write a student whose config is changed."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    text = change(json.loads(metadata["config"]))
    if "config_json" in tensors:
        tensors["config_json"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    save_file(tensors, path, metadata | {"config": text})


SIZES: dict[str, Callable[[dict[str, Any]], str]] = {
    # Blocks of 100 GB, whose layer norms match the file's tensors.
    "wide": lambda sizes: json.dumps(
        {
            "encoder": sizes["encoder"] | {"embed_dim": 1 << 16, "mlp_ratio": 1.0, "num_heads": 1},
            "student": sizes["student"] | {"mlp_ratio": 1.0, "alibi": False},
        }
    ),
    "deep": lambda sizes: json.dumps(sizes | {"student": sizes["student"] | {"depth": 1000}}),
    "endless lists": lambda sizes: "[" * 560_000,
    "a million lists": lambda sizes: f'{{"encoder": [{"[]," * 1_000_000}[]]}}',
    "a number of a million digits": lambda sizes: f'{{"encoder": {"9" * 1_000_000}}}',
}


@pytest.mark.parametrize("what", [slow(what) if what == "a million lists" else what for what in SIZES])
def test_sizes_that_would_need_all_memory_or_time_are_refused(what: str, exported: Path, tmp_path: Path) -> None:
    """Promise 16: a student's file claims them in its metadata."""
    path = tmp_path / "student.safetensors"
    path.write_bytes(exported.read_bytes())
    change_student(path, SIZES[what])
    assert_not_loaded(path)
    failure(limited(*D2V, "embed", path, tmp_path, tmp_path / "a.npy"), 2)


def sizes(state: dict[str, Any]) -> dict[str, Any]:
    return state["callbacks"]["RunRecord"]["record"]["student"]["sizes"]["student"]


def with_nan(state: dict[str, Any]) -> None:
    next(iter(state["model"].values())).view(-1)[3] = torch.nan


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no weights": lambda state: state.update(model={}),
    "a number for weights": lambda state: state.update(model=3),
    "text for weights": lambda state: state.update(model=dict.fromkeys(state["model"], "text")),
    "NaN": with_nan,
    "no callbacks": lambda state: state.update(callbacks=[]),
    "no record": lambda state: state["callbacks"].update(RunRecord=None),
    "a number for a config": lambda state: state["callbacks"]["RunRecord"].update(record={"config": 3}),
    "text for a depth": lambda state: sizes(state).update(depth="many"),
    "huge sizes": lambda state: sizes(state).update(mlp_ratio=1000.0, depth=10**9),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_of_wrong_contents_is_refused(
    what: str, uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """Promises 16 and 18: export refuses it; a run's load_path refuses wrong weights, from which it would train on."""
    checkpoint = load_checkpoint(uninterrupted / "latest-rank0.pt")
    CHANGES[what](checkpoint["state"])
    path = tmp_path / "other.pt"
    torch.save(checkpoint, path)
    assert str(path) in failure(limited(*D2V, "export", path, tmp_path / "a.safetensors", "--teacher", TEACHER), 2)
    if "weights" in what or what == "NaN":
        arguments = small_run(tmp_path / "run", small_data, f"load_path={path}")
        ended = limited(*train_command(arguments)[1:])
        assert str(path) in failure(ended, ended.wait(1))
        assert ended.wait(1) == 2 or what == "NaN"
        assert not list(tmp_path.glob("run/ep*.pt"))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of one bit per pixel that claims a size, and has some black rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(min((width // 8 + 2) * height, 100_000_000)), 1))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + rows + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 50).convert("RGB")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def pictures() -> dict[str, dict[str, bytes]]:
    """Return images that cannot be read, odd ones, and the same picture in several formats: folder → name → file."""
    gif, jpeg, tiff = saved(picture(4, 4), "GIF"), saved(picture(8, 8), "JPEG"), saved(picture(64, 64), "TIFF")
    whole = {format: saved(picture(200, 150), format) for format in ("JPEG", "PNG", "GIF", "WEBP")}
    bad = {
        "bomb.png": png(20_000, 20_000),
        "claims.png": png(2**31 - 1, 2**31 - 1),
        "large.png": png(30_000, 3_000),
        "claims.gif": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
        "claims.jpg": jpeg.replace(struct.pack(">HH", 8, 8), struct.pack(">HH", 65500, 65500), 1),
        "strips.tif": tiff.replace(struct.pack("<HHII", 273, 4, 1, 140), struct.pack("<HHII", 273, 4, 1, 2**31)),
        "text.jpg": b"<html>" * 1000,
        "nothing.jpg": b"",
        "floats.tif": saved(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"),
        "postscript.jpg": POSTSCRIPT,
        **{f"{part}.{name}": image[: int(part * len(image))] for name, image in whole.items() for part in (0.01, 0.5)},
    }
    odd = {
        "1.jpg": saved(picture(1, 1), "JPEG"),
        "wide.jpg": saved(picture(30_000, 1), "JPEG"),
        "high.png": saved(picture(1, 30_000), "PNG"),
        "pixels.jpg": saved(Image.new("RGB", (30_000, 2_000)), "JPEG"),
        "ours.jpg": encoded_image(1),
    }
    gradient = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    gray = {
        "8.png": saved(Image.fromarray((gradient >> 8).astype(np.uint8)).convert("RGB"), "PNG"),
        "16.png": saved(Image.fromarray(gradient), "PNG"),
        "16.tif": saved(Image.fromarray(gradient), "TIFF"),
    }
    frames: Any = {"append_images": [Image.new("RGB", (40, 30), (i % 2, 0, 0)) for i in range(100)], "save_all": True}
    first = Image.new("RGB", (40, 30), "gray")
    animated = {f"1.{name}": saved(first, name, **frames) for name in ("png", "webp")}
    return {"bad": bad, "odd": odd, "gray": gray, "animated": animated}


def test_images_are_read_right_or_named(tmp_path: Path) -> None:
    """Promises 16 and 18: bombs and fragments are named; 16 bits do not become white; PostScript reaches no program."""
    contents, photos, out = pictures(), tmp_path / "photos", tmp_path / "photos.npy"
    for folder, files in contents.items():
        write_files(photos / folder, files)
    ghostscript, canary = tmp_path / "gs", tmp_path / "canary"
    ghostscript.write_text(f"#!/bin/sh\ntouch {canary}\n")
    ghostscript.chmod(0o755)
    command = (*D2V, "embed", TEACHER, photos, out, "--workers", "0", "--skip-unreadable")
    program = limited(*command, environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert program.poll() == 0, program.stderr
    rows = dict(zip(np.load(out.with_suffix(".ids.npy")).tolist(), np.load(out), strict=True))
    assert sorted(rows) == sorted(
        f"{folder}/{name}" for folder in contents.keys() - {"bad"} for name in contents[folder]
    )
    for folder in ("gray", "animated"):
        first, *rest = (rows[f"{folder}/{name}"] for name in contents[folder])
        for other in rest:
            np.testing.assert_allclose(other, first, atol=0.02)
    assert not canary.exists()


def write_index(folder: Path, change: Callable[[str], str]) -> None:
    """Write an MDS folder of 32 images with a changed index."""
    index = write_mds(folder, [encoded_image(i) for i in range(32)], [i % 2 for i in range(32)]) / "index.json"
    index.write_text(change(index.read_text()))


def test_an_index_with_false_claims_is_refused(tmp_path: Path) -> None:
    """Promises 16 and 18: it names a file outside of the folder, or nests; tests/sources/test_mds.py has
    other claims.
    """
    write_index(tmp_path / "train", lambda index: index.replace("shard.00000.mds", "../../etc/passwd"))
    write_index(tmp_path / "nested", lambda index: '{"shards": ' + "[" * 100_000)
    for folder in (tmp_path / "train", tmp_path / "nested"):
        ended = limited(*train_command(small_run(tmp_path / "run", folder))[1:])
        assert str(folder) in failure(ended, 2)
    assert not (tmp_path / "run").exists()
    assert str(tmp_path) in failure(limited(*D2V, "evaluate", f"model={TEACHER}", datasets_of(tmp_path)), 2)


def test_a_column_of_pickles_runs_nothing(tmp_path: Path) -> None:
    """Promise 16: Streaming's own reader would run the code."""
    canary = tmp_path / "canary"
    for split in ("train", "test"):
        with MDSWriter(out=str(tmp_path / split), columns={"image": "bytes", "label": "pkl"}) as writer:
            for i in range(16):
                writer.write({"image": encoded_image(i), "label": Canary(canary)})
    assert "pickle" in failure(limited(*D2V, "evaluate", f"model={TEACHER}", datasets_of(tmp_path)), 2)
    failure(limited(*train_command(small_run(tmp_path / "run", tmp_path / "train"))[1:]), 2)
    assert not canary.exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_shard_with_wrong_offsets_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    """Promises 16 and 18: the shard has the right size, and no hash in the index."""
    shard = write_mds(tmp_path, [encoded_image(i) for i in range(32)]) / "shard.00000.mds"
    contents, dice = bytearray(shard.read_bytes()), np.random.default_rng(seed)
    start = int(dice.integers(4, 60))  # in the table of the samples' offsets
    contents[start : start + 4] = dice.integers(0, 256, 4, dtype=np.uint8).tobytes()
    shard.write_bytes(contents)
    ended = limited(*D2V, "embed", TEACHER, tmp_path, tmp_path / "a.npy", "--workers", "0")
    status = ended.wait(1)
    assert status == 0 or (status in (1, 2) and str(tmp_path) in failure(ended, status)), ended.stderr


def test_an_exported_student_computes_the_same(uninterrupted: Path, exported: Path, tmp_path: Path) -> None:
    """Promise 17: it needs no file of the teacher, and is a timm model, too; tests/checkpoints has the other
    formats.
    """
    student, teacher = load_student(exported), load_teacher(TEACHER)
    trained = {name.removeprefix("student."): tensor for name, tensor in student_of(uninterrupted).items()}
    ours = student.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in trained.items())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(student.encode(images), teacher.encode(images))
        again = teacher.build_student(depth=2)
        again.load_state_dict(trained, strict=False)
        fitted = map_of(uninterrupted)
        again.align(fitted["weight"], fitted["bias"], teacher.embedding.of)
        torch.testing.assert_close(student.embed_all(images), again.eval().embed_all(images), rtol=0, atol=1e-6)
        model: Any = timm.create_model("d2v2_student", checkpoint_path=str(exported)).eval()
        assert torch.isfinite(model(images.float())).all()
    assert student.provenance["config"]["run_name"] == "quickstart"


def test_a_teacher_cannot_be_exported(tmp_path: Path) -> None:
    """Promise 18: the line names the file, and none is written."""
    line = failure(d2v("export", TEACHER, tmp_path / "none.safetensors"), 2)
    assert f"{TEACHER} is a teacher" in line
    assert not (tmp_path / "none.safetensors").exists()

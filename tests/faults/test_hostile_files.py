"""Refuse malicious files in one line, or read them harmlessly, within seconds and a memory limit."""

import io
import json
import math
import multiprocessing
import os
import resource
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streaming import MDSWriter
from timm.models import load_checkpoint as load_checkpoint_with_timm

from d2v_composer.checkpoints.export import TimmStudent
from d2v_composer.checkpoints.load import load_any, load_student, load_teacher, save_student
from d2v_composer.checkpoints.safe_load import check_checkpoint, load_untrusted
from d2v_composer.data.images import RandomResizedCropFlip, decode_rgb, sample_rng
from d2v_composer.data.index import read_index
from d2v_composer.data.labeled import load_labeled_set
from d2v_composer.data.streaming import StreamingImages
from d2v_composer.embedding import open_collection
from d2v_composer.models.data2vec2 import ImageEncoderConfig
from d2v_composer.models.student import StudentConfig
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, encoded_image, load_checkpoint

SECONDS, MEGABYTES = 10, 700
FORK = multiprocessing.get_context("fork")


class Answer(NamedTuple):
    """The outcome of a call in a separate process."""

    result: Any
    """The return value, or the message of the InputError."""
    refused: bool
    megabytes: float
    """The increase of the process's peak memory."""


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def send_answers(connection: Any, calls: Sequence[Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the others stay behind in a fork
    warnings.simplefilter("ignore")  # no errors, as in the commands
    before = peak_megabytes()
    for call in calls:
        limit = math.ceil(time.process_time()) + SECONDS  # of computing: others may use this machine
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            result, refused = call(*arguments), False
        except InputError as error:
            result, refused = str(error), True
        connection.send(Answer(result, refused, peak_megabytes() - before))


def answers(calls: Sequence[Callable[..., Any]], *arguments: Any) -> list[Answer]:
    """Call functions in a separate process, each limited to ten seconds and 700 MB."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=send_answers, args=(theirs, calls, arguments))
    process.start()
    theirs.close()
    given: list[Answer] = []
    try:
        for call in calls:
            assert ours.poll(60), f"{call.__name__} waits for ever"
            try:
                given.append(ours.recv())
            except EOFError:
                pytest.fail(f"{call.__name__} ended, or needs more than {SECONDS} s")
    finally:
        process.kill()
        process.join()
    for each in given:
        assert each.megabytes < MEGABYTES
        assert not each.refused or "\n" not in each.result
    return given


def answer(call: Callable[..., Any], *arguments: Any) -> Answer:
    [given] = answers([call], *arguments)
    return given


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of one bit per pixel that claims a size, and has some black rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(min((width // 8 + 2) * height, 100_000_000)), 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + rows + chunk(b"IEND", b"")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((width, height), 50).convert(mode)


def frames(format: str, num: int) -> bytes:
    """An animation whose first frame is gray, and the others black."""
    first, *others = [
        Image.new("RGB", (40, 30), "gray"),
        *(Image.new("RGB", (40, 30), (i % 2, 0, 0)) for i in range(num)),
    ]
    return saved(first, format, save_all=True, append_images=others)


BOMBS = {
    "PNG of 400 megapixels": lambda: png(20_000, 20_000),
    "PNG that claims 2^31 rows": lambda: png(2**31 - 1, 2**31 - 1),
    "PNG a little too large": lambda: png(30_000, 3_000),
    "GIF that claims 65535 x 65535": lambda: (
        saved(picture(4, 4), "GIF")[:6] + struct.pack("<HH", 65535, 65535) + saved(picture(4, 4), "GIF")[10:]
    ),
    "BMP that claims 2^31 columns": lambda: (
        saved(picture(4, 4), "BMP")[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + saved(picture(4, 4), "BMP")[26:]
    ),
    "JPEG that claims 65500 x 65500": lambda: saved(picture(8, 8), "JPEG").replace(
        struct.pack(">HH", 8, 8), struct.pack(">HH", 65500, 65500), 1
    ),
    "TIFF whose strips are elsewhere": lambda: saved(picture(64, 64), "TIFF").replace(
        struct.pack("<HHII", 273, 4, 1, 140), struct.pack("<HHII", 273, 4, 1, 2**31)
    ),
    "text": lambda: b"<html>" * 1000,
    "nothing": lambda: b"",
    "an SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "32-bit TIFF": lambda: saved(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"),
    "TIFF of floating-point numbers": lambda: saved(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"),
    **{
        f"{format} cut at {share} of it": lambda format=format, share=share: (
            encoded := saved(picture(200, 150), format)
        )[: int(len(encoded) * share)]
        for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "PPM")
        for share in (0.01, 0.5, 0.97)
    },
}


def augmented(encoded: bytes) -> tuple[int, ...]:
    return tuple(RandomResizedCropFlip(224)(encoded, sample_rng(0, 0, 0), "sample 3").shape)


def decoded(encoded: bytes) -> tuple[int, ...]:
    return decode_rgb(encoded, "sample 3").size


@pytest.mark.parametrize("name", BOMBS)
def test_malformed_and_huge_images_are_refused(name: str) -> None:
    for given in answers([augmented, decoded], BOMBS[name]()):
        assert given.refused, given
        assert given.result.startswith("sample 3: ")


ODD = {
    "1 x 1 JPEG": lambda: saved(picture(1, 1), "JPEG"),
    "1 x 1 PNG": lambda: saved(picture(1, 1), "PNG"),
    "1 x 1 GIF": lambda: saved(picture(1, 1), "GIF"),
    "30,000 px wide JPEG": lambda: saved(picture(30_000, 1), "JPEG"),
    "30,000 px high PNG": lambda: saved(picture(1, 30_000), "PNG"),
    "30,000 x 2,000 JPEG": lambda: saved(Image.new("RGB", (30_000, 2_000)), "JPEG"),
    "as large as is allowed": lambda: png(29_000, 3_000),
    "animated GIF": lambda: frames("GIF", 1000),
    "animated WebP": lambda: frames("WEBP", 100),
    "animated PNG": lambda: frames("PNG", 100),
    "text of 200 MB in a PNG": lambda: png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))),
    "profile of 200 MB in a PNG": lambda: png(64, 64, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))),
    "16-bit PNG": lambda: saved(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"),
}


@pytest.mark.parametrize("name", ODD)
def test_unusual_images_are_read_within_the_limits(name: str) -> None:
    """Text in a PNG may be refused instead: Pillow has a limit of its own."""
    encoded = ODD[name]()
    given = answer(augmented, encoded)
    assert given.result == (3, 224, 224) or (given.refused and "in a PNG" in name), given


def test_an_animation_is_read_as_its_first_frame() -> None:
    for format in ("GIF", "WEBP", "PNG"):
        assert abs(np.asarray(decode_rgb(frames(format, 20), "")).astype(int) - 128).max() < 3


@pytest.mark.parametrize(("format", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("PPM", np.uint16)])
def test_16_bits_become_8(format: str, dtype: Any) -> None:
    """Pillow alone would clip all pixels to white."""
    values = np.linspace(0, 65535, 64).astype(dtype).reshape(8, 8)
    pixels = np.asarray(decode_rgb(saved(Image.fromarray(values), format), ""))
    np.testing.assert_array_equal(pixels[..., 0], values >> 8)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_an_image_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow passes PostScript to Ghostscript."""
    canary, fake = tmp_path / "canary", tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {canary}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with pytest.raises(InputError, match="not an image that can be read"):
        decode_rgb(POSTSCRIPT, "sample 3")
    with pytest.raises(InputError, match="not an image that can be read"):
        augmented(POSTSCRIPT)
    assert not canary.exists()
    with pytest.raises(OSError, match=r"."):
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert canary.exists()  # Pillow alone runs it


def write_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write an MDS folder of eight images, and change its index."""
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for i in range(8):
            writer.write({"image": encoded_image(i), "label": i % 2})
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))
    return folder


INDEX_LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "climbs": (lambda shard: shard["raw_data"].update(basename="../../etc/passwd"), "names a file outside the folder"),
    "is absolute": (lambda shard: shard["raw_data"].update(basename="/etc/passwd"), "names a file outside the folder"),
    "claims samples": (lambda shard: shard.update(samples=10**15), "claims 1000000000000000 samples in"),
    "claims fewer than none": (lambda shard: shard.update(samples=-1), "claims -1 samples in"),
    "claims bytes": (lambda shard: shard["raw_data"].update(bytes=10**15), "the index says 1000000000000000"),
    "holds pickles": (lambda shard: shard.update(column_encodings=["bytes", "pkl"]), "a column of pickles"),
    "has text for numbers": (lambda shard: shard.update(samples="many"), "corrupt, or not an MDS index"),
    "has no columns": (lambda shard: shard.update(column_names=[]), "no column 'image'"),
}


def labels_of(folder: Path) -> int:
    return len(load_labeled_set("mds", folder, image_size=32, interpolation="bicubic").train.labels)


@pytest.mark.parametrize("lie", INDEX_LIES)
def test_an_index_with_false_claims_is_refused(lie: str, tmp_path: Path) -> None:
    change, message = INDEX_LIES[lie]
    folder = write_index(tmp_path / "train", change)
    given = answer(labels_of, tmp_path)
    assert given.refused, given
    assert message in given.result
    with pytest.raises(InputError):
        read_index(folder, columns=("image",))


def test_an_index_that_nests_endlessly_is_refused(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "train", lambda shard: None)
    (folder / "index.json").write_text('{"shards": ' + "[" * 100_000)
    given = answer(labels_of, tmp_path)
    assert given.refused
    assert "corrupt, or not an MDS index" in given.result


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_column_of_pickles_runs_nothing(tmp_path: Path) -> None:
    """Streaming's own reader would run the code."""
    from streaming.base.format import reader_from_json

    canary = tmp_path / "canary"
    folder = tmp_path / "data" / "train"
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "pkl"}) as writer:
        writer.write({"image": encoded_image(0), "label": Canary(canary)})
    for door in (lambda: labels_of(folder.parent), lambda: read_index(folder, columns=("image",))):
        with pytest.raises(InputError, match="a column of pickles, which may run code"):
            door()
    assert not canary.exists()
    shard = json.loads((folder / "index.json").read_text())["shards"][0]
    assert reader_from_json(str(folder), None, shard)[0]
    assert canary.exists()


@pytest.mark.parametrize("seed", range(20))
def test_a_shard_with_wrong_offsets_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    """The shard has the right size and no hash in the index."""
    folder = write_index(tmp_path / "train", lambda shard: None)
    write_index(tmp_path / "test", lambda shard: None)
    [shard] = folder.glob("*.mds")
    contents = bytearray(shard.read_bytes())
    dice = np.random.default_rng(seed)
    start = int(dice.integers(4, 60))  # in the table of the samples' offsets
    contents[start : start + 4] = dice.integers(0, 256, 4, dtype=np.uint8).tobytes()
    shard.write_bytes(contents)
    given = answer(labels_of, tmp_path)
    assert given.result == 8 or (given.refused and str(folder) in given.result), given


def safetensors(path: Path, tensors: dict[str, Any], size: int, metadata: dict[str, str] | None = None) -> Path:
    """Write a header followed by a sparse hole of this size."""
    header = json.dumps({"__metadata__": metadata or {}, **tensors}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return path


def terabyte_of_safetensors(path: Path) -> Path:
    metadata = {
        "format": "d2v_composer.teacher",
        "format_version": "1",
        "config": "{}",
        "provenance": '{"weights": "model"}',
    }
    shape = [1 << 20, 1 << 18]
    return safetensors(path, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 40]}}, 1 << 40, metadata)


def terabyte_of_zip(path: Path) -> Path:
    """A checkpoint whose tensor of 300 MB of zeros is deflated to some kilobytes."""
    torch.save({"model": {"a": torch.zeros(16)}, "cfg": {}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(300 << 20) if name.endswith("data/0") else content)
    return path


def huge_memo(path: Path) -> Path:
    """A pickle with an object at memo position 2^31, for which C's pickle allocates 16 GB."""
    return with_pickle(path, b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b".")


def nested_tuples(path: Path) -> Path:
    """A dict key of 2^60 tuples: each holds the same one twice."""
    return with_pickle(path, b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01s.")


def huge_bytearray(path: Path) -> Path:
    return with_pickle(path, b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".")


def with_pickle(path: Path, content: bytes) -> Path:
    """Write a file of torch.save, and replace its pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, content if name.endswith("data.pkl") else part)
    return path


def nested_frozensets(path: Path) -> Path:
    """Two equal dict keys of frozensets of pairs, nested 40 deep: comparing them takes 2^40 steps."""
    pair = b"q\x010(h\x01K\x01\x86h\x01K\x02\x86\x91"
    return with_pickle(path, b"\x80\x04}(" + 2 * (b"(\x91" + pair * 40 + b"K\x01") + b"u.")


HUGE = [terabyte_of_safetensors, terabyte_of_zip, huge_memo, nested_tuples, nested_frozensets, huge_bytearray]


@pytest.mark.parametrize("make", HUGE)
def test_files_that_would_need_all_memory_or_time_are_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "ep0-ba1-rank0.pt")
    for given in answers([load_teacher, load_student, load_any, check_checkpoint], path):
        assert given.refused, given
        assert str(path) in given.result


def embed_dim_through_timm(path: Path) -> int:
    model = TimmStudent(
        ImageEncoderConfig(num_extra_tokens=1, embed_dim=8, num_heads=1), StudentConfig(num_heads=1, num_alibi_heads=1)
    )
    load_checkpoint_with_timm(model, str(path))
    return model.num_features


def wide(sizes: dict[str, Any]) -> str:
    """Sizes for blocks of 100 GB, whose layer norms match the file's tensors."""
    return json.dumps(
        {
            "encoder": sizes["encoder"] | {"embed_dim": 1 << 16, "mlp_ratio": 1.0, "num_heads": 1},
            "student": sizes["student"] | {"mlp_ratio": 1.0, "num_heads": 1, "num_alibi_heads": 0},
        }
    )


SIZES: dict[str, Callable[[dict[str, Any]], str]] = {
    "wide": wide,
    "deep": lambda sizes: json.dumps(sizes | {"student": sizes["student"] | {"depth": 1000}}),
    "endless lists": lambda sizes: "[" * 560_000,
    "endless objects": lambda sizes: '{"encoder":' * 50_000,
    "a million lists": lambda sizes: f'{{"encoder": [{"[]," * 1_000_000}[]]}}',
    "a number of a million digits": lambda sizes: f'{{"encoder": {"9" * 1_000_000}}}',
}


@pytest.mark.parametrize("what", SIZES)
def test_sizes_that_would_need_all_memory_or_time_are_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=1), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    text = SIZES[what](json.loads(metadata["config"]))
    stored = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    save_file(load_file(path) | {"config_json": stored}, path, metadata | {"config": text})
    for given in answers([load_student, load_any, embed_dim_through_timm], path):
        assert given.refused, given
        assert len(given.result) < 500


def test_a_checkpoint_of_huge_sizes_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(uninterrupted / "latest-rank0.pt")
    checkpoint["state"]["callbacks"]["RunRecord"]["record"]["config"]["student"].update(mlp_ratio=1000.0, depth=900)
    torch.save(checkpoint, tmp_path / "huge.pt")
    given = answer(load_any, tmp_path / "huge.pt")
    assert given.refused, given
    assert "has shape (144, 48), the sizes ask for (48000, 48)" in given.result or "is missing" in given.result, given


def test_a_tensor_beyond_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    """torch reads as many numbers as the pickle claims, even past the end of the storage."""
    path = tmp_path / "teacher.pt"
    torch.save({"model": {"a": torch.zeros(4)}, "cfg": {}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(b"K\x04", b"M\xd0\x07") if name.endswith("data.pkl") else content)
    assert len(torch.load(path)["model"]["a"]) == 2000
    with pytest.raises(InputError, match="storage 0 has fewer than 2000 numbers"):
        load_untrusted(path)


def test_a_tar_archive_is_refused(tmp_path: Path) -> None:
    """torch extracts a member of a tar archive, which may be a link to any file."""
    ours, path = tmp_path / "ours", tmp_path / "teacher.pt"
    ours.write_text("secret")
    ours.chmod(0o600)
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, str(ours), 0o777
        archive.addfile(link)
    with pytest.raises(InputError, match="a tar archive"):
        load_untrusted(path)
    assert ours.stat().st_mode & 0o777 == 0o600


def train_on(folder: Path) -> None:
    StreamingImages(local=folder, batch_size=1, transform=RandomResizedCropFlip(32), seed=0)[0]


DOORS: dict[str, Callable[[Path], Any]] = {
    "training": lambda folder: train_on(folder / "train"),
    "embedding": lambda folder: open_collection(str(folder / "train"), 32, "bicubic").load(0),
    "retrieval": labels_of,
}


@pytest.mark.parametrize("door", DOORS)
def test_an_image_column_is_decoded_as_files_are(door: str, tmp_path: Path) -> None:
    """Streaming would let Pillow open any format in a column of JPEGs, here PostScript."""
    for split in ("train", "test"):
        with MDSWriter(out=str(tmp_path / split), columns={"image": "bytes", "label": "int"}) as writer:
            writer.write({"image": POSTSCRIPT, "label": 0})
        index = tmp_path / split / "index.json"
        index.write_text(index.read_text().replace('"bytes", "int"', '"jpeg", "int"'))
    with pytest.raises(InputError, match=r"sample 0 of .*: not an image that can be read \(\d+ bytes\)"):
        DOORS[door](tmp_path)


def test_a_checkpoint_of_nan_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(uninterrupted / "latest-rank0.pt")
    name = next(iter(checkpoint["state"]["model"]))
    checkpoint["state"]["model"][name].view(-1)[3] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.pt")
    with pytest.raises(InputError, match="has values that are not finite"):
        load_any(tmp_path / "nan.pt", teacher_path=str(GOLDEN / "tiny_base.pt"))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(model=3),
        lambda state: state.update(callbacks=[]),
        lambda state: state["callbacks"].update(RunRecord=None),
        lambda state: state["callbacks"]["RunRecord"].update(record={"config": 3}),
        lambda state: state["callbacks"]["RunRecord"]["record"]["config"].update(student="none"),
        lambda state: state["callbacks"]["RunRecord"]["record"]["config"]["student"].update(depth="many"),
        lambda state: state["callbacks"]["RunRecord"]["record"]["config"]["student"].update(depth=10**9),
        lambda state: state["callbacks"].update(ZeroShotRetrieval=3),
    ],
)
def test_a_checkpoint_of_wrong_types_is_refused(
    change: Callable[[dict[str, Any]], None], uninterrupted: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(uninterrupted / "latest-rank0.pt")
    change(checkpoint["state"])
    torch.save(checkpoint, tmp_path / "other.pt")
    given = answer(load_any, tmp_path / "other.pt", "model", str(GOLDEN / "tiny_base.pt"))
    assert given.refused
    assert "other.pt" in given.result

"""Teachers are converted, fetched and cached, students exported; unusable files are refused."""

import hashlib
import http.server
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints import student_file
from d2v_composer.checkpoints.fairseq import convert_teacher
from d2v_composer.checkpoints.load import load_any, save_student
from d2v_composer.commands import convert_teacher as convert_teacher_recipe
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.student import Student
from d2v_composer.system import command_line, processes
from d2v_composer.system.errors import InputError, RunError
from helpers import GOLDEN, refused_by, serving

NAMES = ["tiny_base", "tiny_alibi", "tiny_topk_noprenet"]
QKV = "blocks.1.attn.qkv.weight"


def golden(name: str = "tiny_base") -> Path:
    return GOLDEN / f"{name}.pt"


def read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> Path:
    """Replace the file's tensors or metadata."""
    tensors = load_file(path) if tensors is None else tensors
    save_file(tensors, path, read_metadata(path) | metadata)
    return path


def targets(teacher: Data2Vec2) -> torch.Tensor:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return teacher.targets(teacher.encode(images))


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def convert_command(*argv: str | Path) -> Any:
    """Call ``d2v convert-teacher`` in this process."""
    return convert_teacher_recipe.main([str(part) for part in argv])


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.safetensors"
    convert_teacher(golden(), path)
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    save_student(load_teacher(golden()).build_student(depth=2), path)
    return path


# Converting.


@pytest.mark.parametrize("weights", ["model", "ema"])
@pytest.mark.parametrize("name", NAMES)
def test_a_converted_teacher_is_the_same_bit_for_bit(name: str, weights: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "teacher.safetensors"
    conversion = convert_teacher(golden(name), path, weights)
    original, teacher = load_teacher(golden(name), weights), load_teacher(path, weights)
    assert teacher.config == original.config == conversion.config
    assert torch.equal(targets(teacher), targets(original))
    assert files_in(path.parent) == [path.name]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.2)])
def test_a_teacher_stored_in_16_bits_is_float32_and_close(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    convert_teacher(golden(), path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    teacher, original = load_teacher(path), load_teacher(golden())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    torch.testing.assert_close(targets(teacher), targets(original), rtol=0, atol=tolerance)
    assert path.stat().st_size < 0.6 * 4 * sum(parameter.numel() for parameter in original.parameters())


def test_metadata_name_the_source(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    convert_command(golden(), path, "--weights", "ema", "--licence", "none, random numbers")
    provenance = json.loads(read_metadata(path)["provenance"])
    assert provenance["source"] == "tiny_base.pt"
    assert provenance["sha256"] == hashlib.sha256(golden().read_bytes()).hexdigest()
    assert provenance["weights"] == "ema"
    assert provenance["licence"] == "none, random numbers"
    assert load_teacher(path, "ema").provenance == provenance


def test_metadata_name_the_default_licence(converted: Path) -> None:
    assert "NC" in json.loads(read_metadata(converted)["provenance"])["licence"]


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_report_names_what_is_used_and_what_is_left(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversion = convert_command(golden(), tmp_path / "teacher.safetensors", "--weights", weights)
    stored = torch.load(golden(), weights_only=True)["model"]
    stored = stored if weights == "model" else stored["_ema"]
    decoder = {name for name in stored if ".decoder." in name}
    assert set(conversion.left) == decoder
    assert len(conversion.used) + len(decoder) == sum(isinstance(tensor, torch.Tensor) for tensor in stored.values())
    printed = capsys.readouterr().out
    assert f"used {len(conversion.used)} tensors" in printed
    assert f"left {len(decoder)} tensors" in printed
    for group in {name.rsplit(".", 1)[0] for name in decoder}:
        assert group in printed


@pytest.mark.parametrize(("stored", "asked"), [("model", "ema"), ("ema", "model")])
def test_a_converted_file_holds_one_kind_of_weights(stored: Any, asked: Any, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    convert_teacher(golden(), path, stored)
    with pytest.raises(InputError, match=f"--weights {stored}, and holds no {asked} weights"):
        load_teacher(path, asked)


# No partial files.


def damaged(folder: Path) -> Path:
    path = folder / "damaged.pt"
    path.write_bytes(golden().read_bytes()[:-1000])
    return path


def lacking_a_tensor(folder: Path) -> Path:
    checkpoint = torch.load(golden(), weights_only=True)
    del checkpoint["model"][QKV]
    torch.save(checkpoint, folder / "lacking.pt")
    return folder / "lacking.pt"


def converted_already(folder: Path) -> Path:
    convert_teacher(golden(), folder / "converted.safetensors")
    return folder / "converted.safetensors"


def nowhere(folder: Path) -> Path:
    return folder / "nowhere.pt"


@pytest.mark.parametrize("make_source", [damaged, lacking_a_tensor, converted_already, nowhere])
@pytest.mark.parametrize("exists", [False, True])
def test_an_unusable_source_leaves_the_output_as_it_was(
    make_source: Callable[[Path], Path], exists: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "teacher.safetensors"
    if exists:
        out.parent.mkdir()
        out.write_bytes(b"what was there before")
    source = make_source(tmp_path)
    before = files_in(tmp_path)
    refused_by(lambda path: convert_teacher(path, out), source)
    assert files_in(tmp_path) == before
    assert not exists or out.read_bytes() == b"what was there before"


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_the_output_as_it_was(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "teacher.safetensors"
    if exists:
        out.write_bytes(b"what was there before")

    def fill_up(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(student_file, "save_file", fill_up)
    with pytest.raises(RunError, match=rf"^{out}: cannot be written: No space left on device$"):
        convert_teacher(golden(), out)
    assert files_in(tmp_path) == ([out.name] if exists else [])
    assert not exists or out.read_bytes() == b"what was there before"


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "folder"
    out.mkdir()
    refused_by(lambda path: convert_teacher(golden(), path), out)
    assert files_in(tmp_path) == ["folder"]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    refused_by(lambda path: convert_teacher(golden(), path), tmp_path / "file" / "teacher.safetensors")
    assert files_in(tmp_path) == ["file"]


def test_the_command_exits_with_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    monkeypatch.setattr(command_line, "shorten_socket_paths", lambda: None)
    for name in ("handle_signals", "defer_signals"):
        monkeypatch.setattr(processes, name, lambda: None)
    monkeypatch.setattr(sys, "argv", ["convert_teacher.py", str(lacking_a_tensor(tmp_path)), str(out)])
    with pytest.raises(SystemExit, match="2"):
        command_line.run(convert_teacher_recipe.main)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f'Missing key(s) in state_dict: "{QKV}"' in printed.err
    assert not out.exists()


# Corrupt files, false headers, other formats.


@pytest.mark.parametrize("load", [load_teacher, load_student])
@pytest.mark.parametrize("fraction", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    load: Callable[[Path], Any], fraction: float, converted: Path, exported: Path
) -> None:
    path = converted if load is load_teacher else exported
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    assert refused_by(load, path)


def with_header(path: Path, change: Callable[[dict[str, Any]], Any], length: int | None = None) -> Path:
    """The same file with another header."""
    content = path.read_bytes()
    old_length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + old_length])
    change(header)
    encoded = json.dumps(header).encode()
    start = (len(encoded) if length is None else length).to_bytes(8, "little")
    path.write_bytes(start + encoded + content[8 + old_length :])
    return path


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda header: header[QKV].update(shape=[10**6, 10**6]),
    "overflowing_shape": lambda header: header[QKV].update(shape=[2**40, 2**40]),
    "negative_shape": lambda header: header[QKV].update(shape=[-144, -48]),
    "offsets": lambda header: header[QKV].update(data_offsets=[0, 10**12]),
    "overlap": lambda header: header[QKV].update(data_offsets=[0, 4 * 144 * 48]),
    "dtype": lambda header: header[QKV].update(dtype="F64"),
    "unknown_dtype": lambda header: header[QKV].update(dtype="OBJECT"),
    "metadata": lambda header: header.update(__metadata__=[1]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_false_header_is_refused(lie: str, converted: Path) -> None:
    assert refused_by(load_teacher, with_header(converted, LIES[lie]))


@pytest.mark.parametrize("length", [0, 10, 10**6, 10**15, 2**63])
def test_a_wrong_header_length_is_refused(length: int, converted: Path) -> None:
    assert refused_by(load_teacher, with_header(converted, lambda header: None, length))


CONFIGS = ["", "{", "[]", "null", "3", '{"depth": 3}', '{"surprise": 1}', '{"depth": "3"}', '{"depth": 2.5}']
DEEP = "[" * 100_000


@pytest.mark.parametrize("config", [*CONFIGS, DEEP], ids=[*CONFIGS, "deep"])
def test_unusable_sizes_are_refused(config: str, converted: Path) -> None:
    refused_by(load_teacher, rewrite(converted, config=config))


@pytest.mark.parametrize("sizes", [{"embed_dim": 48.0}, {"depth": 10**9}, {"mlp_ratio": math.inf}, {"norm_eps": "x"}])
def test_one_unusable_size_is_refused(sizes: dict[str, Any], converted: Path) -> None:
    config = json.loads(read_metadata(converted)["config"])
    refused_by(load_teacher, rewrite(converted, config=json.dumps(config | sizes)))


@pytest.mark.parametrize("provenance", ["", "[]", "null", '"model"'])
def test_unusable_provenance_is_refused(provenance: str, converted: Path) -> None:
    refused_by(load_teacher, rewrite(converted, provenance=provenance))


@pytest.mark.parametrize("version", ["3", "10", "", "one"])
def test_another_format_version_is_refused(version: str, converted: Path, exported: Path) -> None:
    for load, path in ((load_teacher, converted), (load_student, exported)):
        assert refused_by(load, rewrite(path, format_version=version))


def test_the_other_kind_of_file_is_refused(converted: Path, exported: Path) -> None:
    assert "is the file of a student, expected that of a teacher" in refused_by(load_teacher, exported)
    assert "is the file of a teacher, expected that of a student" in refused_by(load_student, converted)


def test_other_programs_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for load in (load_teacher, load_student):
        assert "is no file of d2v_composer" in refused_by(load, tmp_path / "other.safetensors")
    assert "is a PyTorch file, expected an exported student" in refused_by(load_student, golden())
    assert "no such file" in refused_by(load_student, tmp_path / "nowhere.safetensors")
    assert "is a folder" in refused_by(load_student, tmp_path)


@pytest.mark.parametrize("load", [load_teacher, load_student])
def test_tensors_that_do_not_fit_are_refused(load: Callable[[Path], Any], converted: Path, exported: Path) -> None:
    path = converted if load is load_teacher else exported
    tensors = load_file(path)
    without = {name: tensor for name, tensor in tensors.items() if name != QKV}
    assert f'Missing key(s) in state_dict: "{QKV}"' in refused_by(load, rewrite(path, without))
    message = refused_by(load, rewrite(path, without | {QKV: torch.ones(48, 144)}))
    assert f"size mismatch for {QKV}: " in message
    assert '"surprise"' in refused_by(load, rewrite(path, tensors | {"surprise": torch.ones(2)}))
    not_finite = refused_by(load, rewrite(path, without | {QKV: torch.full((144, 48), torch.nan)}))
    assert f"tensor {QKV} has values that are not finite" in not_finite


# Fetching.


class Server(http.server.ThreadingHTTPServer):
    """Serves bytes by path and records requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut_after: int | None = None

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)
        content = self.server.content.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut_after])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with serving(Server()) as server:
        yield server


def cached_files(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_teacher_is_fetched_once(suffix: str, server: Server, converted: Path, tmp_path: Path) -> None:
    server.content[f"/teacher.{suffix}"] = (golden() if suffix == "pt" else converted).read_bytes()
    address = server.address(f"/teacher.{suffix}")
    first = load_teacher(address)
    server.shutdown()
    server.server_close()
    second = load_teacher(address)
    expected = targets(load_teacher(golden()))
    assert torch.equal(targets(first), expected)
    assert torch.equal(targets(second), expected)
    assert server.requests == [f"/teacher.{suffix}"]
    assert len(cached_files(tmp_path)) == 1


def test_a_fetched_teacher_knows_its_source(server: Server, tmp_path: Path) -> None:
    server.content["/teacher.pt"] = golden().read_bytes()
    conversion = convert_teacher(server.address("/teacher.pt"), tmp_path / "out.safetensors")
    assert conversion.provenance["source"] == "teacher.pt"
    assert conversion.provenance["sha256"] == hashlib.sha256(golden().read_bytes()).hexdigest()


def test_addresses_that_end_alike_are_not_mixed_up(server: Server, tmp_path: Path) -> None:
    for name in NAMES:
        server.content[f"/{name}/teacher.pt"] = golden(name).read_bytes()
    configs = [load_teacher(server.address(f"/{name}/teacher.pt")).config for name in NAMES]
    assert configs == [load_teacher(golden(name)).config for name in NAMES]


def test_a_missing_remote_file_is_not_cached(server: Server, tmp_path: Path) -> None:
    address = server.address("/teacher.pt")
    for _ in range(2):
        with pytest.raises(InputError, match=r"cannot be fetched \(.*404.*\)") as caught:
            load_teacher(address)
        assert "\n" not in str(caught.value)
        assert address in str(caught.value)
        assert cached_files(tmp_path) == []
    server.content["/teacher.pt"] = golden().read_bytes()
    assert load_teacher(address).config.depth == 3


def test_a_broken_download_is_not_cached(server: Server, tmp_path: Path) -> None:
    server.content["/teacher.pt"] = golden().read_bytes()
    server.cut_after = 100_000
    with pytest.raises(InputError):
        load_teacher(server.address("/teacher.pt"))
    assert cached_files(tmp_path) == []
    server.cut_after = None
    assert load_teacher(server.address("/teacher.pt")).config.depth == 3


def test_an_unreachable_server_is_an_error(server: Server, tmp_path: Path) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="cannot be fetched"):
        load_teacher(server.address("/teacher.pt"))
    assert cached_files(tmp_path) == []


# Students.


def embeddings(student: Student) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        images = torch.randint(0, 256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return student.embed_all(images)


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_student_is_the_same(name: str, alibi: bool, tmp_path: Path) -> None:
    source, path = tmp_path / "teacher.pt", tmp_path / "new" / "student.safetensors"
    source.write_bytes(golden(name).read_bytes())
    student = load_teacher(source).build_student(depth=2, mlp_ratio=2.0, alibi=alibi)
    save_student(student, path)
    source.unlink()
    loaded = load_student(path)
    assert loaded.config == student.config
    assert not loaded.training
    expected, found = embeddings(student), embeddings(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert files_in(path.parent) == [path.name]


def test_an_exported_student_keeps_its_normalization(tmp_path: Path) -> None:
    student, path = load_teacher(golden()).build_student(depth=2, normalization="layer"), tmp_path / "layer.safetensors"
    save_student(student, path)
    expected, loaded = embeddings(student), load_student(path)
    assert loaded.normalization == "layer"
    assert all(torch.equal(each, expected[name]) for name, each in embeddings(loaded).items())
    model: Any = timm.create_model("d2v2_student", checkpoint_path=str(path), representation="layer_mean").eval()
    assert model.normalization == "layer"
    images = model.encoder.prepare(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
    with torch.no_grad():
        assert torch.equal(model(images), student.embed(images, "cls", "layer_mean"))
    _, teacher = load_any(path, teacher_path=str(golden()))
    assert teacher is not None
    assert teacher.normalization == "layer"


def test_only_a_loaded_students_blocks_train(exported: Path) -> None:
    student = load_student(exported)
    assert all(parameter.requires_grad for parameter in student.blocks.parameters())
    assert not any(parameter.requires_grad for parameter in student.encoder.parameters())
    assert not student.train().encoder.training


def test_a_student_knows_its_teacher(exported: Path) -> None:
    provenance = load_student(exported).provenance["teacher"]
    assert provenance["source"] == "tiny_base.pt"
    assert provenance["sha256"] == hashlib.sha256(golden().read_bytes()).hexdigest()


def test_a_student_of_a_converted_teacher_knows_the_first_source(converted: Path, tmp_path: Path) -> None:
    save_student(load_teacher(converted).build_student(depth=1), tmp_path / "student.safetensors")
    assert load_student(tmp_path / "student.safetensors").provenance["teacher"]["source"] == "tiny_base.pt"

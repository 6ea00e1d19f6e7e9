"""Files that would run code, or do other harm, if anything but ``checkpoints/safe_load.py`` read them."""

import builtins
import importlib
import io
import os
import pickle
import tarfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._utils import _rebuild_tensor_v2
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from d2v_composer import load_teacher
from d2v_composer.checkpoints.safe_load import load_untrusted, plain
from d2v_composer.models.data2vec2 import Data2Vec2Config
from d2v_composer.system.errors import InputError
from helpers import GOLDEN

SECONDS = 5
QKV = "blocks.1.attn.qkv.weight"


class Call:
    """Pickles as a call of ``function``, which may be another Call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __call__(self) -> None:
        raise AssertionError("only its pickle is used")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


class RunsInNew:
    """Runs code when it is created (NEWOBJ)."""

    def __new__(cls, canary: Path) -> "RunsInNew":
        canary.touch()
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Path]:
        return (Path(self.__dict__["canary"]),)


class RunsInSetstate:
    """Runs code when its state is set (BUILD)."""

    def __getstate__(self) -> dict[str, str]:
        return {"canary": self.__dict__["canary"]}

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["canary"]).touch()


class RunsInAppend(list):
    """Runs code when items are appended (APPENDS)."""

    def extend(self, items: Any) -> None:
        Path(items[0]).touch()

    append = extend


class RunsInSetitem(dict):
    """Runs code when items are set (SETITEMS)."""

    def __setitem__(self, key: Any, value: Any) -> None:
        Path(value).touch()


def new(cls: type, canary: Path) -> Any:
    """Create an instance with the canary's path, without running its code."""
    instance = object.__new__(cls)
    instance.__dict__["canary"] = str(canary)
    return instance


def append(canary: Path) -> Any:
    items = RunsInAppend()
    list.append(items, str(canary))
    return items


def setitem(canary: Path) -> Any:
    items = RunsInSetitem()
    dict.__setitem__(items, "key", str(canary))
    return items


def imported_system(canary: Path) -> Any:
    """A call of what a call returns, of what a call returns."""
    return Call(Call(getattr, Call(importlib.import_module, "os"), "system"), f"touch {canary}")


ARMED: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "exec": lambda canary: Call(builtins.exec, f"open({str(canary)!r}, 'w').close()"),
    "eval": lambda canary: Call(builtins.eval, f"open({str(canary)!r}, 'w').close()"),
    "method": lambda canary: Call(Path.touch, canary),
    "call_of_a_call": imported_system,
    "class": lambda canary: Call(RunsInNew, canary),
    "new": lambda canary: new(RunsInNew, canary),
    "setstate": lambda canary: new(RunsInSetstate, canary),
    "append": append,
    "setitem": setitem,
}


def at_top(checkpoint: dict[str, Any], payload: Any) -> Any:
    return payload


def in_cfg(checkpoint: dict[str, Any], payload: Any) -> Any:
    return checkpoint | {"cfg": checkpoint["cfg"] | {"extra": [payload, {"nested": payload}]}}


def as_key(checkpoint: dict[str, Any], payload: Any) -> Any:
    return checkpoint | {"optimizer_history": [(payload, 1)]}


def as_size(checkpoint: dict[str, Any], payload: Any) -> Any:
    checkpoint["cfg"]["model"]["depth"] = payload
    return checkpoint


def in_model(checkpoint: dict[str, Any], payload: Any) -> Any:
    return checkpoint | {"model": checkpoint["model"] | {"extra": payload}}


def as_tensor(checkpoint: dict[str, Any], payload: Any) -> Any:
    return checkpoint | {"model": checkpoint["model"] | {QKV: payload}}


HARMLESS = [in_cfg, as_key, in_model]
REFUSED = [at_top, as_size, as_tensor]


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    """Every file is read or refused in seconds of computing."""
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def golden_config() -> Data2Vec2Config:
    return load_teacher(GOLDEN / "tiny_base.pt").config


def read() -> dict[str, Any]:
    return torch.load(GOLDEN / "tiny_base.pt", weights_only=True)


def save(content: Any, folder: Path, new_format: bool = True) -> Path:
    path = folder / "teacher.pt"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("way", ARMED)
def test_the_payloads_work(way: str, canary: Path) -> None:
    pickle.loads(pickle.dumps(ARMED[way](canary)))
    assert canary.exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", HARMLESS + REFUSED)
@pytest.mark.parametrize("way", ARMED)
def test_no_code_of_a_file_runs(
    way: str,
    place: Callable[..., Any],
    new_format: bool,
    canary: Path,
    tmp_path: Path,
    golden_config: Data2Vec2Config,
) -> None:
    path = save(place(read(), ARMED[way](canary)), tmp_path, new_format)
    loaded = None
    with suppress(InputError):
        loaded = load_teacher(path).config
    assert loaded is None or (place in HARMLESS and loaded == golden_config)
    assert not canary.exists()


# Hand-made pickles. U: a string, G: a global; the rest are opcodes.


def U(text: str) -> bytes:  # noqa: N802
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def G(module: str, name: str) -> bytes:  # noqa: N802
    return f"c{module}\n{name}\n".encode()


REBUILD = G("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = G("collections", "OrderedDict")


def zipped(body: bytes, folder: Path) -> Path:
    """A file of today's format around a hand-made pickle."""
    plain_path, path = folder / "plain.pt", folder / "teacher.pt"
    torch.save({}, plain_path)
    with zipfile.ZipFile(plain_path) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, body if name.endswith("data.pkl") else source.read(name))
    return path


def legacy(body: bytes, folder: Path) -> Path:
    """A file of the format before it."""
    path = folder / "teacher.pt"
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {}))
    path.write_bytes(head + body + pickle.dumps([], 2))
    return path


def first_pickle(body: bytes, folder: Path) -> Path:
    """A bare pickle, where the older format has its magic number."""
    path = folder / "teacher.pt"
    path.write_bytes(body)
    return path


def tar(body: bytes, folder: Path) -> Path:
    """A file of the oldest format, whose members are all the same pickle."""
    path = folder / "teacher.pt"
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return path


def hand_made(canary: Path) -> dict[str, bytes]:
    command = U(f"touch {canary}")
    stub = G("some.where", "Class") + b")R"
    return {
        "global": G("os", "system") + command + b"\x85R.",
        "dotted_global": U("os") + U("path.os.system") + b"\x93" + command + b"\x85R.",
        "dotted_in_a_known_module": U("torch") + U("serialization.os.system") + b"\x93" + command + b"\x85R.",
        "known_name_of_another_module": G("os", "_rebuild_tensor_v2") + command + b"\x85R.",
        "inst": b"(" + command + b"ios\nsystem\n.",
        "obj": b"(" + G("os", "system") + command + b"o.",
        "newobj_of_a_function": G("os", "system") + command + b"\x85\x81.",
        "newobj_ex": G("subprocess", "Popen") + command + b"\x85}" + U("shell") + b"\x88s\x92.",
        "call_of_an_instance": stub + command + b"\x85R.",
        "setstate_of_an_instance": stub + b"}" + U("__setstate__") + G("os", "system") + b"sb" + command + b"b.",
        "class_of_an_instance": stub
        + b"N}"
        + U("__class__")
        + G("subprocess", "Popen")
        + b"s\x86b"
        + command
        + b"\x85R.",
        "state_of_a_class": G("some.where", "Class")
        + b"}"
        + U("__call__")
        + G("os", "system")
        + b"sb"
        + command
        + b"\x85R.",
        "state_of_a_dict": ORDERED_DICT + b")R}" + U("__setitem__") + G("os", "system") + b"sb" + command + b"Ns.",
        "storage_that_is_a_stub": REBUILD + b"(" + stub + b"K\x00))\x89)tR.",
        "hook": G("torch._utils", "_rebuild_parameter") + b"(" + stub + b"\x88" + G("os", "system") + b"tR.",
        "metadata": REBUILD + b"(" + command + b"K\x00))\x89)" + G("os", "system") + b"tR.",
        "persistent_text": b"Pos.system\n0" + G("os", "system") + command + b"\x85R.",
        "persistent_module": b"(" + U("module") + G("os", "system") + command + command + b"tQ.",
        "persistent_instance": b"("
        + U("module")
        + ORDERED_DICT
        + b")R}"
        + U("dump_patches")
        + b"\x88sb"
        + command * 2
        + b"tQ.",
        "persistent_call": b"(" + U("storage") + G("os", "system") + command + U("cpu") + b"K\x01NtQ.",
        "extension": b"\x82\x01.",
    }


@pytest.mark.parametrize("format", [zipped, legacy, first_pickle, tar])
@pytest.mark.parametrize("name", hand_made(Path()))
def test_no_code_of_a_hand_made_pickle_runs(
    name: str, format: Callable[[bytes, Path], Path], canary: Path, tmp_path: Path
) -> None:
    refusal(format(b"\x80\x02" + hand_made(canary)[name], tmp_path))
    assert not canary.exists()


@pytest.fixture
def _intact_rebuild() -> Iterator[None]:
    """Restore torch's function after a file may have changed it."""
    attributes = ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__")
    before = {name: getattr(_rebuild_tensor_v2, name) for name in attributes}
    yield
    for name, value in before.items():
        setattr(_rebuild_tensor_v2, name, value)
    _rebuild_tensor_v2.__dict__.clear()


def poisoned_rebuild(**attributes: bytes) -> bytes:
    """torch's function, with attributes set by BUILD."""
    return REBUILD + b"N}(" + b"".join(U(name) + value for name, value in attributes.items()) + b"u\x86b"


@pytest.mark.usefixtures("_intact_rebuild")
@pytest.mark.parametrize("format", [zipped, legacy])
@pytest.mark.parametrize("name", ["__name__", "__defaults__", "__wrapped__"])
def test_a_file_cannot_change_what_rebuilds_tensors(
    name: str, format: Callable[[bytes, Path], Path], tmp_path: Path
) -> None:
    before = getattr(_rebuild_tensor_v2, name, None)
    value = U("changed") + (b"\x85" if name == "__defaults__" else b"")
    refusal(format(b"\x80\x02" + poisoned_rebuild(**{name: value}) + b".", tmp_path))
    assert getattr(_rebuild_tensor_v2, name, None) == before


@pytest.mark.usefixtures("_intact_rebuild")
@pytest.mark.filterwarnings("ignore::torch.serialization.SourceChangeWarning")  # how torch tells that it wrote the file
def test_a_file_cannot_write_a_file(canary: Path, tmp_path: Path) -> None:
    """The older format can name source code; where it has changed, torch writes the difference to NAME.patch."""
    poison = poisoned_rebuild(__name__=U(str(canary)), dump_patches=b"\x88")
    source_code = b"(" + U("module") + REBUILD + U("source.py") + U("a line of the file's choice\n") + b"tQ."
    refusal(legacy(b"\x80\x02" + poison + b"0" + source_code, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.pt"]


def test_a_file_cannot_replace_a_dicts_methods(tmp_path: Path) -> None:
    """An OrderedDict takes attributes from its pickle, as torch's state dicts do; ``items`` may be one of them."""
    body = (
        b"\x80\x02}("
        + U("cfg")
        + b"}"
        + U("model")
        + b"}s"
        + U("model")
        + ORDERED_DICT
        + b")R}"
        + U("items")
        + b"K\x05sb"
        + b"u."
    )
    for format in (zipped, legacy):
        refusal(format(body, tmp_path))


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    path = tmp_path / "teacher.pt"
    torch.jit.save(torch.jit.trace(Program(), torch.ones(1)), path)
    assert refusal(path)


def test_a_hidden_torchscript_archive_is_refused(canary: Path, tmp_path: Path) -> None:
    """torch.load hands an archive with a record ``constants.pkl`` to another reader than ours."""
    path = zipped(b"\x80\x02" + hand_made(canary)["global"], tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/constants.pkl", b"\x80\x02" + hand_made(canary)["global"])
    assert "TorchScript" in refusal(path)
    assert not canary.exists()


# Loaded contents.


def test_a_class_is_not_imported(monkeypatch: pytest.MonkeyPatch, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "hostile_module.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Size: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load_untrusted(zipped(b"\x80\x02" + G("hostile_module", "Size") + b")R.", tmp_path))
    assert plain(loaded) == {}
    assert not canary.exists()
    importlib.import_module("hostile_module")
    assert canary.exists()


def test_tensors_next_to_stubs_are_unchanged(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    content = {
        "foreign": types.SimpleNamespace(size=3),
        "parameter": torch.nn.Parameter(base.clone()),
        "shared": [base, base[1:, ::2], base.t()],
        "others": [base.half(), base.bfloat16(), base.long(), base.bool(), torch.tensor(2.5), torch.ones(0, 3)],
        "size": base.shape,
    }
    for new_format in (True, False):
        loaded = load_untrusted(save(content, tmp_path, new_format))
        assert plain(loaded["foreign"]) == {"size": 3}
        assert isinstance(loaded["parameter"], torch.nn.Parameter)
        assert torch.equal(loaded["parameter"], base)
        assert loaded["size"] == torch.Size([3, 4])
        for ours, tensor in zip(
            loaded["shared"] + loaded["others"], content["shared"] + content["others"], strict=True
        ):
            assert (ours.dtype, ours.stride()) == (tensor.dtype, tensor.stride())
            assert torch.equal(ours, tensor)
        assert len({tensor.untyped_storage().data_ptr() for tensor in loaded["shared"]}) == 1

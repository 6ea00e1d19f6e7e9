"""Files that would run code, or do other harm, if anything but ``checkpoints/safe_load.py`` read them."""

import argparse
import builtins
import enum
import pickle
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from d2v_composer import load_teacher
from d2v_composer.checkpoints.safe_load import load_untrusted
from helpers import GOLDEN, refused_by

QKV = "blocks.1.attn.qkv.weight"


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def read() -> dict[str, Any]:
    return torch.load(GOLDEN / "tiny_base.pt", weights_only=True)


def save(content: Any, folder: Path) -> Path:
    path = folder / "teacher.pt"
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    return refused_by(load_teacher, path)


def test_code_beside_a_teacher_does_not_run_nor_change_it(canary: Path, tmp_path: Path) -> None:
    payload = Call(builtins.exec, f"open({str(canary)!r}, 'w').close()")
    expected = load_teacher(GOLDEN / "tiny_base.pt").get_parameter(QKV)
    pickle.loads(pickle.dumps(payload))
    canary.unlink()  # it works
    for section in ("cfg", "model"):
        teacher = read()
        teacher[section] |= {"extra": payload}
        assert torch.equal(load_teacher(save(teacher, tmp_path)).get_parameter(QKV), expected)
        refusal(save(read() | {section: payload}, tmp_path))
    teacher = read()
    teacher["model"][QKV] = payload
    refusal(save(teacher, tmp_path))
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


def hand_made(canary: Path) -> dict[str, bytes]:
    command = U(f"touch {canary}")
    stub, system = G("some.where", "Class") + b")R", G("os", "system")
    return {
        "global": system + command + b"\x85R.",
        "dotted_global": U("os") + U("path.os.system") + b"\x93" + command + b"\x85R.",
        "inst": b"(" + command + b"ios\nsystem\n.",
        "newobj_ex": G("subprocess", "Popen") + command + b"\x85}" + U("shell") + b"\x88s\x92.",
        "class_of_an_instance": stub + b"N}" + U("__class__") + system + b"s\x86b" + command + b"\x85R.",
        "state_of_a_dict": ORDERED_DICT + b")R}" + U("__setitem__") + system + b"sb" + command + b"Ns.",
        "storage_that_is_a_stub": REBUILD + b"(" + stub + b"K\x00))\x89)tR.",
        "hook": G("torch._utils", "_rebuild_parameter") + b"(" + stub + b"\x88" + system + b"tR.",
        "persistent_module": b"(" + U("module") + system + command + command + b"tQ.",
        "persistent_call": b"(" + U("storage") + system + command + U("cpu") + b"K\x01NtQ.",
        "extension": b"\x82\x01.",
    }


def test_no_code_of_a_hand_made_pickle_runs(canary: Path, tmp_path: Path) -> None:
    for name, body in hand_made(canary).items():
        refusal(zipped(b"\x80\x02" + body, tmp_path))
        assert not canary.exists(), name


def test_a_file_cannot_replace_a_dicts_methods(tmp_path: Path) -> None:
    """An OrderedDict takes attributes from its pickle, as torch's state dicts do; ``items`` may be one of them."""
    model = ORDERED_DICT + b")R}" + U("items") + b"K\x05sb"
    body = b"\x80\x02}(" + U("cfg") + b"}" + U("model") + b"}s" + U("model") + model + b"u."
    refusal(zipped(body, tmp_path))


def test_a_file_of_torch_before_1_6_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(read(), path, _use_new_zipfile_serialization=False)
    assert "save an older file again with torch >= 1.6" in refusal(path)


# Loaded contents.


class Kind(enum.Enum):
    IMAGE = "image"


def test_tensors_beside_harmless_objects_are_unchanged(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = [base, base[1:, ::2], base.t(), base.half(), base.bfloat16(), base.bool(), torch.tensor(2.5)]
    content = {
        "fairseq": types.SimpleNamespace(size=3, nested=argparse.Namespace(lr=0.5)),
        "omegaconf": OmegaConf.create({"depth": 3, "name": "a", "none": None}),
        "enum": Kind.IMAGE,
        "numpy": [np.float64(0.5), np.int64(3), np.arange(3)],  # as best losses and states of generators
        "parameter": torch.nn.Parameter(base.clone()),
        "size": base.shape,
        "tensors": tensors,
    }
    loaded = load_untrusted(save(content, tmp_path))
    assert len(loaded["numpy"]) == 3
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["size"] == torch.Size([3, 4])
    for ours, theirs in zip([loaded["parameter"], *loaded["tensors"]], [base, *tensors], strict=True):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(ours, theirs)
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded["tensors"][:3]}) == 1

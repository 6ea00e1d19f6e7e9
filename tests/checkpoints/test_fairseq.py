"""fairseq's checkpoints are read with their sizes, ALiBi and weights; unusable ones are refused, and run no code."""

import argparse
import builtins
import enum
import math
import pickle
import re
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from d2v_composer import load_teacher
from d2v_composer.checkpoints.safe_load import load_untrusted
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, assert_same_numbers, refused_by, time_limit
from steps import random_images

IMAGE = "modality_encoders.IMAGE."
SCALE = f"{IMAGE}alibi_scale"
QKV = "blocks.1.attn.qkv.weight"

Checkpoint = dict[str, Any]


def read(name: str = "tiny_base") -> Checkpoint:
    """A golden checkpoint, to be changed."""
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def image_cfg(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint["cfg"]["model"]["modalities"]["image"]


def save(checkpoint: Any, folder: Path) -> Path:
    path = folder / "teacher.pt"
    torch.save(checkpoint, path)
    return path


def run_teacher(path: Path) -> tuple[Tensor, Tensor]:
    """Return the encoder's and the last block's output."""
    teacher = load_teacher(path)
    encoded = teacher.encode(random_images(2))
    with torch.no_grad():
        return encoded, teacher.forward_blocks(encoded)[0]


def assert_same_bits(path: Path, expected: str) -> None:
    """Compare a teacher with a golden one."""
    assert load_teacher(path).config == load_teacher(GOLDEN / f"{expected}.pt").config
    for ours, theirs in zip(run_teacher(path), run_teacher(GOLDEN / f"{expected}.pt"), strict=True):
        assert torch.equal(ours, theirs)


def refusal(checkpoint: Any, folder: Path) -> str:
    """Return the one line with which a teacher's file is refused."""
    return refused_by(load_teacher, save(checkpoint, folder))


def test_missing_fields_of_alibi_are_data2vecs_defaults(tmp_path: Path) -> None:
    checkpoint = read("tiny_alibi")
    for name in ("alibi_dims", "alibi_distance", "alibi_scale", "num_alibi_heads", "in_chans"):
        del image_cfg(checkpoint)[name]
    for name in ("mlp_ratio", "norm_eps", "layer_norm_first"):
        del checkpoint["cfg"]["model"][name]
    assert_same_bits(save(checkpoint, tmp_path), "tiny_alibi")


def test_a_file_that_does_not_say_how_many_blocks_the_target_averages(tmp_path: Path) -> None:
    """All of an image model's, as the specification says; data2vec's default, 8, of an audio model's 12."""
    images, audio = read("tiny_topk_noprenet"), read("audio_base")
    audio["cfg"]["model"]["depth"] = 12
    first = {name: tensor for name, tensor in audio["model"].items() if name.startswith("blocks.0.")}
    for i in range(12):
        audio["model"] |= {name.replace("0", str(i), 1): tensor for name, tensor in first.items()}
    for checkpoint, expected in ((images, images["cfg"]["model"]["depth"]), (audio, 8)):
        del checkpoint["cfg"]["model"]["average_top_k_layers"]
        assert load_teacher(save(checkpoint, tmp_path)).config.average_top_k_layers == expected


# ALiBi; the reference's numbers, with a scale for each layer and head, are in tests/promises/test_method.py.


@pytest.mark.parametrize("shape", [(5, 1, 1, 1, 1), (1, 1, 12, 1, 1), (1, 1, 1, 1, 1)])
def test_alibi_scales_of_layers_or_heads_alone(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A negative one counts as 0; an older layout has one dimension less."""
    checkpoint = read("tiny_alibi")
    scale = torch.linspace(-0.5, 2, math.prod(shape)).view(shape)
    outputs = []
    for stored in (scale, scale.expand(5, 1, 12, 1, 1).clamp(min=0), *([scale[0]] if shape[0] == 1 else [])):
        checkpoint["model"][SCALE] = stored
        outputs.append(run_teacher(save(checkpoint, tmp_path)))
    for other in outputs[1:]:
        for ours, expanded in zip(outputs[0], other, strict=True):
            assert_same_numbers(ours, expanded)
    assert (outputs[0][0] - run_teacher(GOLDEN / "tiny_alibi.pt")[0]).abs().max() > 0.002


# Which weights.


def test_ema_weights_are_other_weights_and_may_be_missing(tmp_path: Path) -> None:
    checkpoint = read()
    ema = checkpoint["model"].pop("_ema")
    ema[QKV] = torch.randn_like(ema[QKV])
    path = save(checkpoint | {"model": checkpoint["model"] | {"_ema": ema}}, tmp_path)
    model, averaged = load_teacher(path), load_teacher(path, weights="ema")
    assert torch.equal(model.get_parameter(QKV), checkpoint["model"][QKV])
    assert torch.equal(averaged.get_parameter(QKV), ema[QKV])
    alone = load_teacher(save(checkpoint | {"model": checkpoint["model"] | ema}, tmp_path))
    assert torch.equal(averaged.encode(random_images()), alone.encode(random_images()))
    with pytest.raises(InputError, match=r"no EMA weights .*set weights to 'model'"):
        load_teacher(path, weights="ema")


# Tensors that do not fit the sizes.


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "size mismatch for {}: ": lambda tensor: torch.cat([tensor, tensor]),
    "tensor {} has values that are not finite": lambda tensor: tensor / 0,
    "tensor {} is not a dense floating-point tensor": lambda tensor: tensor.to_sparse(),
    "{} is not a dense": lambda tensor: tensor.to("meta"),
    "tensor {} is not": lambda tensor: torch.complex(tensor, tensor),
    "tensor {} has fewer values than its shape needs": lambda tensor: tensor.flatten()[:1].clone().expand(tensor.shape),
}


@pytest.mark.parametrize("name", [QKV, f"{IMAGE}extra_tokens"])
def test_a_tensor_that_is_missing_wrong_or_unknown_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint, ours = read(), name.replace(IMAGE, "encoder.")
    right = checkpoint["model"].pop(name)
    assert f'Missing key(s) in state_dict: "{ours}"' in refusal(checkpoint, tmp_path)
    for message, change in WRONG.items():
        checkpoint["model"][name] = change(right)
        assert message.format(ours) in refusal(checkpoint, tmp_path)
    checkpoint["model"][name] = right
    del checkpoint["model"]["_ema"][name]
    with pytest.raises(InputError, match="Missing key"):
        load_teacher(save(checkpoint, tmp_path), "ema")
    checkpoint["model"][f"{name}.more"] = torch.ones(1, dtype=torch.float16).expand(1 << 44)
    assert f'Unexpected key(s) in state_dict: "{ours}.more"' in refusal(checkpoint, tmp_path)


def test_a_cfg_of_any_form_is_read_or_refused_soon(tmp_path: Path) -> None:
    """With shared parts, itself, and keys that are not strings."""
    checkpoint, nested = read(), [1]
    for _ in range(60):
        nested = [nested, nested]
    sizes = checkpoint["cfg"]["model"]
    sizes |= {"shared": nested, "parent": checkpoint["cfg"], "by_size": {(224, 224): 1, 3: 2, None: 3}}
    with time_limit(20):
        assert load_teacher(save(checkpoint, tmp_path)).config == load_teacher(GOLDEN / "tiny_base.pt").config
    sizes["depth"] = sizes["shared"]
    assert "depth must be a whole number" in refusal(checkpoint, tmp_path)


# Other kinds of checkpoints.


def as_dict_config(cfg: dict[str, Any]) -> Any:
    cfg["model"]["modalities"]["image"]["num_alibi_heads"] = "${model.num_heads}"  # as data2vec's own dataclass has it
    return OmegaConf.create(cfg)


def as_namespaces(cfg: dict[str, Any]) -> Any:
    cfg["model"]["modalities"]["image"] = argparse.Namespace(**cfg["model"]["modalities"]["image"])
    return cfg | {"model": argparse.Namespace(**cfg["model"])}


@pytest.mark.parametrize("wrap", [as_dict_config, as_namespaces])
def test_sizes_are_read_from_objects_of_other_classes(wrap: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = read("tiny_alibi")
    checkpoint["cfg"] = wrap(checkpoint["cfg"])
    path = save(checkpoint, tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert_same_bits(path, "tiny_alibi")


def rescaled(checkpoint: Checkpoint, *shape: int) -> None:
    checkpoint["model"][SCALE] = torch.ones(shape)


def renamed(checkpoint: Checkpoint, old: str, new: str) -> None:
    checkpoint["model"] = {name.replace(old, new, 1): tensor for name, tensor in checkpoint["model"].items()}


# What is changed in a checkpoint with ALiBi → the reason.
REFUSED: dict[str, Callable[[Checkpoint], Any]] = {
    r"alibi_scale_shape must begin.*, got \(4, 1, 12, 1, 1\)$": lambda checkpoint: rescaled(checkpoint, 4, 1, 12, 1, 1),
    r"alibi_scale_shape must be .*, got \(5, 1, 11, 1, 1\)$": lambda checkpoint: rescaled(checkpoint, 5, 1, 11, 1, 1),
    r"alibi_scale_shape must be .*, got \(5, 12\)$": lambda checkpoint: rescaled(checkpoint, 5, 12),
    re.escape(SCALE): lambda checkpoint: checkpoint["model"].pop(SCALE),
    "not a pre-trained data2vec 2.0 or EAT checkpoint": lambda checkpoint: renamed(checkpoint, ".IMAGE.", ".TEXT."),
    "fine-tuned": lambda checkpoint: renamed(checkpoint, "", "model."),
    "pre-norm": lambda checkpoint: checkpoint["cfg"]["model"].update(layer_norm_first=True),
    "ALiBi": lambda checkpoint: image_cfg(checkpoint).update(alibi_dims=1),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unsupported_checkpoints_are_refused_with_the_reason(reason: str, tmp_path: Path) -> None:
    checkpoint = read("tiny_alibi")
    REFUSED[reason](checkpoint)
    assert re.search(reason, refusal(checkpoint, tmp_path))


@pytest.mark.parametrize(
    "checkpoint",
    [
        [1, 2],
        torch.ones(3),
        {"model": []},
        {"model": {}, "cfg": {"model": 3}},
        {"model": {}, "cfg": {"model": {}}},
        {"model": {"weight": torch.ones(2)}, "cfg": {"model": {}}},
    ],
)
def test_other_pytorch_files_are_refused(checkpoint: Any, tmp_path: Path) -> None:
    assert re.search("not a fairseq|not a pre-trained", refusal(checkpoint, tmp_path))


def test_a_file_of_torch_before_1_6_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(read(), path, _use_new_zipfile_serialization=False)
    assert "if torch < 1.6 wrote the file, save it again with a newer torch" in refused_by(load_teacher, path)


# Files that would run code if anything but checkpoints/safe_load.py read them.


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_code_beside_a_teacher_does_not_run_nor_change_it(canary: Path, tmp_path: Path) -> None:
    payload = Call(builtins.exec, f"open({str(canary)!r}, 'w').close()")
    pickle.loads(pickle.dumps(payload))
    canary.unlink()  # it works
    for section in ("cfg", "model"):
        teacher = read()
        teacher[section] |= {"extra": payload}
        assert_same_bits(save(teacher, tmp_path), "tiny_base")
        refusal(read() | {section: payload}, tmp_path)
    teacher = read()
    teacher["model"][QKV] = payload
    refusal(teacher, tmp_path)
    assert not canary.exists()


# Hand-made pickles. U: a string, G: a global; the rest are opcodes.


def U(text: str) -> bytes:  # noqa: N802
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def G(module: str, name: str) -> bytes:  # noqa: N802
    return f"c{module}\n{name}\n".encode()


REBUILD = G("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = G("collections", "OrderedDict")


def refuse_pickle(body: bytes, folder: Path) -> None:
    """Check that a file of today's format around a hand-made pickle is refused."""
    plain_path, path = folder / "plain.pt", folder / "teacher.pt"
    torch.save({}, plain_path)
    with zipfile.ZipFile(plain_path) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"\x80\x02" + body if name.endswith("data.pkl") else source.read(name))
    refused_by(load_teacher, path)


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
        refuse_pickle(body, tmp_path)
        assert not canary.exists(), name


def test_a_file_cannot_replace_a_dicts_methods(tmp_path: Path) -> None:
    """An OrderedDict takes attributes from its pickle, as torch's state dicts do; ``items`` may be one of them."""
    model = ORDERED_DICT + b")R}" + U("items") + b"K\x05sb"
    refuse_pickle(b"}(" + U("cfg") + b"}" + U("model") + b"}s" + U("model") + model + b"u.", tmp_path)


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

"""fairseq's checkpoints are read with their sizes, ALiBi and weights; unusable ones are refused."""

import argparse
import copy
import math
import pickle
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from d2v_composer import load_teacher
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, refused_by, time_limit

IMAGE = "modality_encoders.IMAGE."
SCALE = f"{IMAGE}alibi_scale"
QKV = "blocks.1.attn.qkv.weight"
TOLERANCE = 2e-5

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


def random_images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run_teacher(path: Path) -> tuple[Tensor, Tensor]:
    """Return the encoder's and the last block's output."""
    teacher = load_teacher(path)
    encoded = teacher.encode(random_images())
    with torch.no_grad():
        return encoded, teacher.forward_blocks(encoded)[0]


def refusal(path: Path) -> str:
    """Return the one line with which a teacher's file is refused."""
    return refused_by(load_teacher, path)


# A naive teacher: one image and one head at a time, in double precision.


def naive_slopes(num_heads: int) -> list[float]:
    power = 1
    while 2 * power <= num_heads:
        power *= 2
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    every_second = [2 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * power, 2)]
    return slopes + every_second[: num_heads - power]


def naive_bias(cfg: dict[str, Any], layer: int, scale: Tensor | None) -> Tensor:
    """(H, T, T) of one block, with the scale of that block in it."""
    image, num_heads = cfg["modalities"]["image"], cfg["num_heads"]
    side, num_extra = image["input_size"] // image["patch_size"], image["num_extra_tokens"]
    num_steps = num_extra + side * side
    bias = torch.zeros(num_heads, num_steps, num_steps, dtype=torch.float64)
    if scale is None:
        return bias
    num_alibi_heads = image["num_alibi_heads"]
    for head, slope in enumerate(naive_slopes(num_alibi_heads)):
        factor = scale[layer if len(scale) > 1 else 0, 0, head if scale.shape[2] > 1 else 0, 0, 0]
        factor = max(0.0, float(factor))
        for i in range(side * side):
            for j in range(side * side):
                distance = abs(i // side - j // side) + abs(i % side - j % side)
                bias[head, num_extra + i, num_extra + j] = -slope * distance * factor
    return bias


def naive_layer_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def naive_linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def naive_block(x: Tensor, weights: dict[str, Tensor], name: str, bias: Tensor, eps: float) -> Tensor:
    """x is (T, D)."""
    head_dim = x.shape[1] // len(bias)
    query, key, value = naive_linear(x, weights, f"{name}.attn.qkv").split(x.shape[1], dim=1)
    heads = []
    for head, head_bias in enumerate(bias):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        scores = query[:, columns] @ key[:, columns].T / math.sqrt(head_dim) + head_bias
        exponentials = scores.exp()
        heads.append(exponentials / exponentials.sum(dim=1, keepdim=True) @ value[:, columns])
    x = naive_layer_norm(
        x + naive_linear(torch.cat(heads, 1), weights, f"{name}.attn.proj"), weights, f"{name}.norm1", eps
    )
    hidden = naive_linear(x, weights, f"{name}.mlp.fc1")
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return naive_layer_norm(x + naive_linear(hidden, weights, f"{name}.mlp.fc2"), weights, f"{name}.norm2", eps)


def naive_teacher(checkpoint: Checkpoint, image: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's and the last block's output for one image, (T, D) each."""
    cfg, image = checkpoint["cfg"]["model"], image.double()
    weights = {name: tensor.double() for name, tensor in checkpoint["model"].items() if isinstance(tensor, Tensor)}
    patch, prenet_depth, eps = (
        image_cfg(checkpoint)["patch_size"],
        image_cfg(checkpoint)["prenet_depth"],
        cfg["norm_eps"],
    )
    scale = weights[SCALE] if image_cfg(checkpoint)["use_alibi_encoder"] else None
    kernel, kernel_bias = weights[f"{IMAGE}local_encoder.proj.weight"], weights[f"{IMAGE}local_encoder.proj.bias"]
    steps = []
    for row in range(0, image.shape[1], patch):
        for column in range(0, image.shape[2], patch):
            pixels = image[:, row : row + patch, column : column + patch]
            steps.append((kernel * pixels).sum(dim=(1, 2, 3)) + kernel_bias)
    x = torch.stack(steps) + weights[f"{IMAGE}fixed_positional_encoder.positions"][0]
    if image_cfg(checkpoint)["num_extra_tokens"]:
        x = torch.cat([weights[f"{IMAGE}extra_tokens"][0], x])
    x = naive_layer_norm(x, weights, f"{IMAGE}context_encoder.norm", eps)
    for i in range(prenet_depth):
        x = naive_block(x, weights, f"{IMAGE}context_encoder.blocks.{i}", naive_bias(cfg, i, scale), eps)
    encoded = x
    for i in range(cfg["depth"]):
        x = naive_block(x, weights, f"blocks.{i}", naive_bias(cfg, prenet_depth + i, scale), eps)
    return encoded, x


def assert_computes_what_the_spec_says(checkpoint: Checkpoint, folder: Path) -> None:
    outputs = run_teacher(save(checkpoint, folder))
    naive_outputs = zip(*(naive_teacher(checkpoint, image) for image in random_images()), strict=True)
    for ours, naive in zip(outputs, naive_outputs, strict=True):
        torch.testing.assert_close(ours.double(), torch.stack(naive), rtol=0, atol=TOLERANCE)


# Sizes.


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tiny_base", {"embed_dim": 48, "num_heads": 6, "prenet_depth": 2, "depth": 3, "num_alibi_heads": 0}),
        ("tiny_alibi", {"embed_dim": 48, "num_heads": 12, "prenet_depth": 2, "depth": 3, "num_alibi_heads": 12}),
        ("tiny_topk_noprenet", {"embed_dim": 64, "num_heads": 4, "prenet_depth": 0, "depth": 4, "num_alibi_heads": 0}),
    ],
)
def test_sizes_come_from_the_file(name: str, sizes: dict[str, int]) -> None:
    config = load_teacher(GOLDEN / f"{name}.pt").config
    common = {"mlp_ratio": 4.0, "norm_eps": 1e-6, "image_size": 32, "patch_size": 8, "in_chans": 3}
    expected = sizes | common | {"num_extra_tokens": 1, "average_top_k_layers": 3}
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_teacher_is_frozen_float32_and_in_eval_mode(tmp_path: Path) -> None:
    checkpoint = read()
    halves = {name: tensor.half() for name, tensor in checkpoint["model"].items() if name != "_ema"}
    teacher = load_teacher(save(checkpoint | {"model": halves}, tmp_path))
    assert not teacher.training
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher.get_parameter(QKV), halves[QKV].float())


def test_missing_fields_of_alibi_are_data2vecs_defaults(tmp_path: Path) -> None:
    checkpoint = read("tiny_alibi")
    for name in ("alibi_dims", "alibi_distance", "alibi_scale", "num_alibi_heads", "in_chans"):
        del image_cfg(checkpoint)[name]
    for name in ("mlp_ratio", "norm_eps", "layer_norm_first"):
        del checkpoint["cfg"]["model"][name]
    for ours, whole in zip(run_teacher(save(checkpoint, tmp_path)), run_teacher(GOLDEN / "tiny_alibi.pt"), strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize(("name", "num_extra_tokens"), [("tiny_base", 0), ("tiny_alibi", 4), ("tiny_topk_noprenet", 1)])
def test_any_number_of_extra_tokens(name: str, num_extra_tokens: int, tmp_path: Path) -> None:
    checkpoint = read(name)
    image_cfg(checkpoint)["num_extra_tokens"] = num_extra_tokens
    dim = checkpoint["model"].pop(f"{IMAGE}extra_tokens").shape[-1]
    if num_extra_tokens:
        checkpoint["model"][f"{IMAGE}extra_tokens"] = torch.randn(1, num_extra_tokens, dim)
    assert_computes_what_the_spec_says(checkpoint, tmp_path)


# ALiBi.


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "num_alibi_heads"), [(5, 12, 12), (5, 1, 5), (1, 5, 5), (1, 1, 12)]
)
def test_alibi_scales_per_layer_and_head(num_layers: int, num_heads: int, num_alibi_heads: int, tmp_path: Path) -> None:
    """A negative one counts as 0."""
    checkpoint = read("tiny_alibi")
    image_cfg(checkpoint)["num_alibi_heads"] = num_alibi_heads
    scale = torch.randn(num_layers, 1, num_heads, 1, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    checkpoint["model"][SCALE] = scale
    assert_computes_what_the_spec_says(checkpoint, tmp_path)


@pytest.mark.parametrize("shape", [(4, 1, 12, 1, 1), (5, 1, 11, 1, 1), (5, 12)])
def test_another_shape_of_alibi_scale_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = read("tiny_alibi")
    checkpoint["model"][SCALE] = torch.ones(shape)
    expected = f"alibi_scale_shape must be (5 or 1, 1, 12 or 1, 1, 1), null without ALiBi, got {shape}"
    assert expected in refusal(save(checkpoint, tmp_path))
    del checkpoint["model"][SCALE]
    assert f"ALiBi is on, but tensor {SCALE} is missing" in refusal(save(checkpoint, tmp_path))


# Which weights.


def test_ema_weights_are_other_weights(tmp_path: Path) -> None:
    checkpoint = read()
    ema = checkpoint["model"]["_ema"]
    ema[QKV] = torch.randn_like(ema[QKV])
    path = save(checkpoint, tmp_path)
    model, averaged = load_teacher(path), load_teacher(path, weights="ema")
    assert torch.equal(model.get_parameter(QKV), checkpoint["model"][QKV])
    assert torch.equal(averaged.get_parameter(QKV), ema[QKV])
    assert averaged.config == model.config
    checkpoint["model"] |= ema
    assert torch.equal(
        averaged.encode(random_images()), load_teacher(save(checkpoint, tmp_path)).encode(random_images())
    )


def test_ema_weights_may_be_missing(tmp_path: Path) -> None:
    checkpoint = read()
    del checkpoint["model"]["_ema"]
    path = save(checkpoint, tmp_path)
    assert load_teacher(path).config.depth == 3
    with pytest.raises(InputError, match=r"no ema weights .*weights=model"):
        load_teacher(path, weights="ema")


# Missing classes.

FOREIGN = """
import enum

class Modality(enum.Enum):
    IMAGE = "image"

class Size(enum.IntEnum):
    ONE = 1

class AttributeDict(dict):
    pass

class Record:
    def __init__(self, content):
        self.__dict__.update(content)
"""


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module whose objects can be pickled until :func:`forget` is called."""
    module = types.ModuleType("another_fairseq")
    exec(FOREIGN, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def forget(module: types.ModuleType) -> None:
    del sys.modules[module.__name__]


def as_dict_config(cfg: dict[str, Any], _: Any) -> Any:
    return OmegaConf.create(cfg)


def as_dict_config_with_interpolation(cfg: dict[str, Any], _: Any) -> Any:
    cfg["model"]["modalities"]["image"]["num_alibi_heads"] = "${model.num_heads}"  # as data2vec's own dataclass has it
    return OmegaConf.create(cfg)


def as_namespaces(cfg: dict[str, Any], _: Any) -> Any:
    cfg["model"]["modalities"]["image"] = argparse.Namespace(**cfg["model"]["modalities"]["image"])
    return cfg | {"model": argparse.Namespace(**cfg["model"]), "common": argparse.Namespace()}


def as_foreign_objects(cfg: dict[str, Any], foreign: Any) -> Any:
    cfg["model"]["modalities"] = foreign.Record(cfg["model"]["modalities"])
    return foreign.Record(cfg | {"model": foreign.Record(cfg["model"])})


def as_dict_subclasses(cfg: dict[str, Any], foreign: Any) -> Any:
    cfg["model"]["modalities"] = foreign.AttributeDict(cfg["model"]["modalities"])
    return defaultdict(list, cfg)


def with_enums(cfg: dict[str, Any], foreign: Any) -> Any:
    image = cfg["model"]["modalities"]["image"]
    image["type"], image["num_extra_tokens"] = foreign.Modality.IMAGE, foreign.Size.ONE
    cfg["model"]["supported_modality"] = foreign.Modality.IMAGE
    return cfg | {"by_modality": {foreign.Modality.IMAGE: 1}}


@pytest.mark.parametrize(
    "wrap",
    [
        as_dict_config,
        as_dict_config_with_interpolation,
        as_namespaces,
        as_foreign_objects,
        as_dict_subclasses,
        with_enums,
    ],
)
def test_sizes_are_read_from_missing_classes(
    wrap: Callable[..., Any], foreign: types.ModuleType, tmp_path: Path
) -> None:
    checkpoint = read("tiny_alibi")
    checkpoint["cfg"] = wrap(checkpoint["cfg"], foreign)
    checkpoint["model"] = defaultdict(list, checkpoint["model"])
    path = save(checkpoint, tmp_path)
    forget(foreign)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert load_teacher(path).config == load_teacher(GOLDEN / "tiny_alibi.pt").config
    for ours, plain in zip(run_teacher(path), run_teacher(GOLDEN / "tiny_alibi.pt"), strict=True):
        assert torch.equal(ours, plain)


# Tensors that do not fit the sizes.


NEEDED = [QKV, f"{IMAGE}context_encoder.norm.weight", f"{IMAGE}extra_tokens", f"{IMAGE}local_encoder.proj.weight"]
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "size mismatch for {}: ": lambda tensor: torch.cat([tensor, tensor]),
    "tensor {} has values that are not finite": lambda tensor: tensor / 0,
    "tensor {} is not a dense floating-point tensor": lambda tensor: tensor.to_sparse(),
    "{} is not a dense": lambda tensor: tensor.to("meta"),
    "tensor {} is not": lambda tensor: torch.complex(tensor, tensor),
    "or fewer than its shape": lambda tensor: tensor.flatten()[:1].expand(tensor.shape),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_tensor_or_a_wrong_one_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint, ours = read(), name.replace(IMAGE, "encoder.")
    right = checkpoint["model"].pop(name)
    assert f'Missing key(s) in state_dict: "{ours}"' in refusal(save(checkpoint, tmp_path))
    for message, change in WRONG.items():
        checkpoint["model"][name] = change(right)
        assert message.format(ours) in refusal(save(checkpoint, tmp_path))
    checkpoint["model"][name] = right
    del checkpoint["model"]["_ema"][name]
    with pytest.raises(InputError, match="Missing key"):
        load_teacher(save(checkpoint, tmp_path), "ema")


@pytest.mark.parametrize("name", ["blocks.3.norm1.weight", f"{IMAGE}context_encoder.blocks.2.mlp.fc1.bias", "surprise"])
def test_an_unknown_tensor_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = read()
    checkpoint["model"][name] = torch.ones(1, dtype=torch.float16).expand(1 << 44)
    assert f'Unexpected key(s) in state_dict: "{name.replace(IMAGE, "encoder.")}"' in refusal(
        save(checkpoint, tmp_path)
    )


# Impossible sizes.


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "num_heads", 7),
        ("model", "embed_dim", 6 * 10**18),
        ("model", "depth", "three"),
        ("model", "depth", 2.5),
        ("model", "depth", 10**9),
        ("model", "mlp_ratio", 0.0),
        ("model", "mlp_ratio", float("inf")),
        ("model", "norm_eps", float("nan")),
        ("model", "average_top_k_layers", 0),
        ("image", "patch_size", 5),
        ("image", "input_size", 8 * 10**10),
        ("image", "num_extra_tokens", True),
    ],
)
def test_impossible_sizes_are_refused(section: str, name: str, value: Any, tmp_path: Path) -> None:
    checkpoint = read()
    (checkpoint["cfg"]["model"] if section == "model" else image_cfg(checkpoint))[name] = value
    assert refusal(save(checkpoint, tmp_path))


def shared_lists(depth: int) -> list[Any]:
    """2 ** depth elements in depth lists."""
    nested: list[Any] = [1]
    for _ in range(depth):
        nested = [nested, nested]
    return nested


def test_a_cfg_of_any_form_is_read(tmp_path: Path) -> None:
    """With shared parts, itself, and keys that are not strings."""
    checkpoint = read()
    sizes = checkpoint["cfg"]["model"]
    sizes |= {"shared": shared_lists(60), "parent": checkpoint["cfg"], "by_size": {(224, 224): 1, 3: 2, None: 3}}
    path = save(checkpoint, tmp_path)
    with time_limit(20):
        assert load_teacher(path).config == load_teacher(GOLDEN / "tiny_base.pt").config


# Other kinds of checkpoints.


def renamed(modality: str) -> Checkpoint:
    checkpoint = read()
    names = {name: name.replace(".IMAGE.", f".{modality}.") for name in checkpoint["model"] if name != "_ema"}
    return checkpoint | {"model": {new: checkpoint["model"][old] for old, new in names.items()}}


def fine_tuned() -> Checkpoint:
    checkpoint = read()
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint["model"].items() if name != "_ema"}
    return checkpoint | {"model": {**tensors, "head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}}


def pre_norm() -> Checkpoint:
    checkpoint = read()
    checkpoint["cfg"]["model"]["layer_norm_first"] = True
    return checkpoint


def one_dimensional_alibi() -> Checkpoint:
    checkpoint = read("tiny_alibi")
    image_cfg(checkpoint)["alibi_dims"] = 1
    return checkpoint


@pytest.mark.parametrize(
    ("checkpoint", "kind"),
    [
        (renamed("TEXT"), "text"),
        (renamed("AUDIO"), "audio"),
        (fine_tuned(), "fine-tuned"),
        (pre_norm(), "pre-norm"),
        (one_dimensional_alibi(), "ALiBi"),
    ],
    ids=["text", "audio", "fine_tuned", "pre_norm", "alibi_dims"],
)
def test_unsupported_kinds_are_refused_with_the_reason(checkpoint: Checkpoint, kind: str, tmp_path: Path) -> None:
    message = refusal(save(copy.deepcopy(checkpoint), tmp_path))
    assert kind in message
    assert "not supported, because" in message


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
    assert "not a" in refusal(save(checkpoint, tmp_path))


# Corrupt and missing files.


@pytest.mark.parametrize("fraction", [0.0, 0.00001, 0.1, 0.99, 0.99999])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_truncated_file_is_refused(fraction: float, new_format: bool, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(read(), path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(
    "content", [b"just some text\nof several lines\n", b"{}", b"<html>404</html>" * 99, bytes(4096)]
)
def test_another_format_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    path.write_bytes(content)
    assert "not a PyTorch checkpoint" in refusal(path)


def test_a_folder_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "nowhere.pt")

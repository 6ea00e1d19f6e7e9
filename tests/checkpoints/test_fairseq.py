"""fairseq's checkpoints are read with their sizes, ALiBi and weights; unusable ones are refused."""

import argparse
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from d2v_composer import load_teacher
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, assert_same_numbers, refused_by, time_limit

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
    """A negative one counts as 0."""
    checkpoint = read("tiny_alibi")
    scale = torch.linspace(-0.5, 2, math.prod(shape)).view(shape)
    outputs = []
    for stored in (scale, scale.expand(5, 1, 12, 1, 1).clamp(min=0)):
        checkpoint["model"][SCALE] = stored
        outputs += run_teacher(save(checkpoint, tmp_path))
    for ours, expanded in zip(outputs[:2], outputs[2:], strict=True):
        assert_same_numbers(ours, expanded)
    assert (outputs[0] - run_teacher(GOLDEN / "tiny_alibi.pt")[0]).abs().max() > 0.002


@pytest.mark.parametrize("shape", [(4, 1, 12, 1, 1), (5, 1, 11, 1, 1), (5, 12)])
def test_another_shape_of_alibi_scale_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = read("tiny_alibi")
    checkpoint["model"][SCALE] = torch.ones(shape)
    message = refusal(save(checkpoint, tmp_path))
    assert "alibi_scale_shape must be " in message
    assert message.endswith(f", got {shape}")
    del checkpoint["model"][SCALE]
    assert SCALE in refusal(save(checkpoint, tmp_path))


# Which weights.


def test_ema_weights_are_other_weights_and_may_be_missing(tmp_path: Path) -> None:
    checkpoint = read()
    ema = checkpoint["model"]["_ema"]
    ema[QKV] = torch.randn_like(ema[QKV])
    path = save(checkpoint, tmp_path)
    model, averaged = load_teacher(path), load_teacher(path, weights="ema")
    assert torch.equal(model.get_parameter(QKV), checkpoint["model"][QKV])
    assert torch.equal(averaged.get_parameter(QKV), ema[QKV])
    assert averaged.config == model.config
    checkpoint["model"] |= ema
    del checkpoint["model"]["_ema"]
    path = save(checkpoint, tmp_path)
    assert torch.equal(averaged.encode(random_images()), load_teacher(path).encode(random_images()))
    with pytest.raises(InputError, match=r"no EMA weights .*weights=model"):
        load_teacher(path, weights="ema")


# Tensors that do not fit the sizes.


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "size mismatch for {}: ": lambda tensor: torch.cat([tensor, tensor]),
    "tensor {} has values that are not finite": lambda tensor: tensor / 0,
    "tensor {} is not a dense floating-point tensor": lambda tensor: tensor.to_sparse(),
    "{} is not a dense": lambda tensor: tensor.to("meta"),
    "tensor {} is not": lambda tensor: torch.complex(tensor, tensor),
    "or fewer values than its shape needs": lambda tensor: tensor.flatten()[:1].clone().expand(tensor.shape),
}


@pytest.mark.parametrize("name", [QKV, f"{IMAGE}extra_tokens"])
def test_a_tensor_that_is_missing_wrong_or_unknown_is_refused(name: str, tmp_path: Path) -> None:
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
    checkpoint["model"][f"{name}.more"] = torch.ones(1, dtype=torch.float16).expand(1 << 44)
    assert f'Unexpected key(s) in state_dict: "{ours}.more"' in refusal(save(checkpoint, tmp_path))


def test_a_cfg_of_any_form_is_read_or_refused_soon(tmp_path: Path) -> None:
    """With shared parts, itself, and keys that are not strings."""
    checkpoint, nested = read(), [1]
    for _ in range(60):
        nested = [nested, nested]
    sizes = checkpoint["cfg"]["model"]
    sizes |= {"shared": nested, "parent": checkpoint["cfg"], "by_size": {(224, 224): 1, 3: 2, None: 3}}
    path = save(checkpoint, tmp_path)
    with time_limit(20):
        assert load_teacher(path).config == load_teacher(GOLDEN / "tiny_base.pt").config
    sizes["depth"] = sizes["shared"]
    assert "depth must be a whole number" in refusal(save(checkpoint, tmp_path))


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
    assert load_teacher(path).config == load_teacher(GOLDEN / "tiny_alibi.pt").config
    for ours, plain in zip(run_teacher(path), run_teacher(GOLDEN / "tiny_alibi.pt"), strict=True):
        assert torch.equal(ours, plain)


def renamed(checkpoint: Checkpoint, old: str, new: str) -> None:
    checkpoint["model"] = {name.replace(old, new, 1): tensor for name, tensor in checkpoint["model"].items()}


KINDS: dict[str, Callable[[Checkpoint], Any]] = {
    "neither a data2vec 2.0 nor an EAT checkpoint": lambda checkpoint: renamed(checkpoint, ".IMAGE.", ".TEXT."),
    "fine-tuned": lambda checkpoint: renamed(checkpoint, "", "model."),
    "pre-norm": lambda checkpoint: checkpoint["cfg"]["model"].update(layer_norm_first=True),
    "ALiBi": lambda checkpoint: image_cfg(checkpoint).update(alibi_dims=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unsupported_kinds_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    checkpoint = read("tiny_alibi")
    KINDS[kind](checkpoint)
    assert kind in refusal(save(checkpoint, tmp_path))


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
    assert re.search("not a fairseq|neither a", refusal(save(checkpoint, tmp_path)))

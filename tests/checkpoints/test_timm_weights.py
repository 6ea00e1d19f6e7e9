"""Weights of timm's models: every tensor of a file is used or named, and what does not fit is refused in one line."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import configure_http_backend, constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints import timm_weights
from d2v_composer.checkpoints.export import TimmStudent
from d2v_composer.checkpoints.load import load_any, save_student
from d2v_composer.checkpoints.student_file import add_outputs
from d2v_composer.models import timm_teacher
from d2v_composer.models.classification import randomize
from d2v_composer.models.student import Student
from d2v_composer.models.timm_config import NUM_OUTPUTS, TimmEncoderConfig
from d2v_composer.models.timm_teacher import TimmEncoder, build_timm_model
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, QUICKSTART, ROOT, command_environment, refused_by
from small_vits import RESAMPLED_BILINEARLY, random_vit

NAME = "test_vit"  # timm's own: 6 blocks of width 64, 160 px
MODEL = f"timm/{NAME}"


def save(model: nn.Module, path: Path, **more: Tensor) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in (model.state_dict() | more).items()}, path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(random_vit(NAME), tmp_path / "weights.safetensors")


@torch.no_grad()
def features(teacher: Any, images: Tensor) -> Tensor:
    return teacher.forward_blocks(teacher.encode(images))[0]


def images_of(*shape: int) -> Tensor:
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [NAME, "test_vit3", "small_beit", "small_mixed_rope"])
def test_every_tensor_is_used_or_named(name: str, tmp_path: Path) -> None:
    model = random_vit(name, num_classes=5)
    path, (height, width) = save(model, tmp_path / "weights.safetensors"), model.patch_embed.img_size
    teacher = load_teacher(path, model=f"timm/{name}")
    images = images_of(height, width)
    with torch.no_grad():
        expected = model.forward_features(images)
    assert_close(features(teacher, images), expected, rtol=1e-5, atol=1e-5)


def zeros_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


FILES: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "a state dict": torch.save,
    "nested": lambda tensors, path: torch.save({"state_dict": {"model": tensors}, "epoch": 3}, path),
    "with a program's arguments": lambda tensors, path: torch.save(
        {"model": tensors, "args": argparse.Namespace(lr=0.1)}, path
    ),
    "legacy": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "wrapped": lambda tensors, path: torch.save(
        {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}}, path
    ),
    "DINO's training": lambda tensors, path: torch.save(
        {"student": {}, "teacher": {f"backbone.{name}": tensor for name, tensor in tensors.items()}}, path
    ),
    "I-JEPA's training": lambda tensors, path: torch.save(
        {"encoder": {f"module.{name}": tensor for name, tensor in tensors.items()}, "predictor": {}}, path
    ),
    "timm's training, with averaged weights": lambda tensors, path: torch.save(
        {"state_dict": zeros_like(tensors), "state_dict_ema": tensors}, path
    ),
    "DeiT's training, with averaged weights": lambda tensors, path: torch.save(
        {"model": zeros_like(tensors), "model_ema": tensors}, path
    ),
    "half": lambda tensors, path: torch.save({name: tensor.half() for name, tensor in tensors.items()}, path),
}


@pytest.mark.parametrize("what", FILES)
def test_pytorch_files(what: str, tmp_path: Path) -> None:
    model = random_vit(NAME)
    FILES[what](model.state_dict(), tmp_path / "weights.pth")
    teacher = load_teacher(tmp_path / "weights.pth", model=MODEL)
    assert all(tensor.dtype == torch.float32 for tensor in teacher.state_dict().values())
    tolerance = 0.05 if what == "half" else 1e-5
    expected = model.forward_features(images_of(160, 160))
    assert_close(features(teacher, images_of(160, 160)), expected, rtol=tolerance, atol=tolerance)


def test_tensors_may_be_parts_of_one_memory(tmp_path: Path) -> None:
    """As a program that keeps all weights in one buffer writes them."""
    model = random_vit(NAME)
    state = model.state_dict() | {"mask_token": torch.ones(1, 64)}
    parts = torch.cat([tensor.flatten() for tensor in state.values()]).split([each.numel() for each in state.values()])
    views = {name: part.view(tensor.shape) for (name, tensor), part in zip(state.items(), parts, strict=True)}
    torch.save(views, tmp_path / "flat.pth")
    teacher = load_teacher(tmp_path / "flat.pth", model=MODEL)
    with torch.no_grad():
        expected = model.forward_features(images_of(160, 160))
    assert_close(features(teacher, images_of(160, 160)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RESAMPLED_BILINEARLY)
def test_positions_are_resampled_as_timms_factory_does(name: str, tmp_path: Path) -> None:
    """Bilinearly, which the model's own method does not."""
    path = save(random_vit(name, img_size=64), tmp_path / "weights.safetensors")
    overlay = {"file": str(path), "num_classes": 0}
    expected: Any = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=(48, 80)
    ).eval()
    teacher = load_teacher(path, model=f"timm/{name}", image_size=(48, 80))
    images = images_of(48, 80)
    assert_close(features(teacher, images), expected.forward_features(images), rtol=1e-5, atol=1e-5)


def test_a_default_size_that_the_patch_does_not_divide_is_rounded_down() -> None:
    built: Any = build_timm_model("timm/vit_so400m_patch14_siglip_384")
    assert built.patch_embed.img_size == (378, 378)
    assert built.patch_embed.grid_size == (27, 27)


def test_convolutions_before_the_patches_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_vit("small_hybrid")
    teacher = load_teacher(save(model, tmp_path / "w.safetensors"), model="timm/small_hybrid", image_size=64)
    macs: list[int] = []

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        macs.append(output[0].numel() * module.weight[0].numel())

    for module in model.patch_embed.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model.patch_embed(images_of(64, 64)[:1])
    steps = teacher.encoder.config.num_tokens
    blocks = sum(block.forward_macs(steps) for block in teacher.encoder.block_list)
    assert teacher.encoder.forward_macs() == sum(macs) + blocks
    monkeypatch.delattr(timm_teacher, "build_timm_model")
    assert teacher.encoder.forward_macs() == sum(macs) + blocks


@pytest.mark.parametrize("name", ["small_beit", "small_hybrid"])
def test_from_scratch_forgets_tables_and_statistics(name: str, tmp_path: Path) -> None:
    teacher = load_teacher(save(random_vit(name), tmp_path / "weights.safetensors"), model=f"timm/{name}")
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.fill_(3)
    randomize(teacher)
    learned = [tensor for key, tensor in teacher.named_buffers() if key.endswith(("table", "running_mean"))]
    assert learned
    assert not any(tensor.any() for tensor in learned)


@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # timm's resampling of relative positions
@pytest.mark.parametrize("name", [NAME, "small_beit", "small_mixed_rope"])
@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_positions_are_resampled_as_timm_does(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    model: Any = random_vit(name)
    path = save(model, tmp_path / "weights.safetensors")
    model.set_input_size(shape)
    teacher = load_teacher(path, model=f"timm/{name}", image_size=shape)
    assert teacher.config.grid_size == (shape[0] // 16, shape[1] // 16)
    images = images_of(*shape)
    assert_close(features(teacher, images), model.forward_features(images), rtol=1e-5, atol=1e-5)
    same = load_teacher(path, model=f"timm/{name}", image_size=f"{shape[0]}x{shape[1]}")
    assert torch.equal(features(same, images), features(teacher, images))


def test_files_of_a_models_authors(tmp_path: Path) -> None:
    """DINOv2 with registers has other names, and CLS has a position of its own."""
    model = random_vit("vit_small_patch14_reg4_dinov2", depth=12, img_size=28)
    theirs = model.state_dict()
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["pos_embed"] = torch.cat([torch.full((1, 1, 384), 0.25), theirs["pos_embed"]], dim=1)
    theirs["cls_token"] = theirs["cls_token"] - 0.25
    torch.save(theirs | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    teacher = load_teacher(tmp_path / "dinov2.pth", model="timm/vit_small_patch14_reg4_dinov2", image_size=28)
    expected = model.forward_features(images_of(28, 28))
    assert_close(features(teacher, images_of(28, 28)), expected, rtol=1e-4, atol=1e-4)


def renamed(tensors: dict[str, Tensor], **names: str) -> dict[str, Tensor]:
    """Replace parts of names, in this order; a double underscore stands for a dot."""
    for old, new in names.items():
        old, new = old.replace("__", "."), new.replace("__", ".")
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def clip_of_its_authors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other names, tokens without a batch dimension, and a text tower."""
    tensors = tensors | {"cls_token": tensors["cls_token"][0, 0], "pos_embed": tensors["pos_embed"][0]}
    names = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed__proj": "conv1"}
    names |= {"blocks__": "transformer.resblocks.", "norm_pre": "ln_pre", "attn__qkv__": "attn.in_proj_"}
    names |= {"attn__proj": "attn.out_proj", "mlp__fc1": "mlp.c_fc", "mlp__fc2": "mlp.c_proj"}
    names |= {"norm1": "ln_1", "norm2": "ln_2", "norm__": "ln_post."}
    return {f"visual.{name}": each for name, each in renamed(tensors, **names).items() if each is not None}


def beit3_of_its_authors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other names, separate queries, keys and values, and a second branch for text."""
    tensors = tensors | {"pos_embed.weight": torch.cat([torch.zeros(2, 32), tensors["pos_embed"][0]])}
    del tensors["pos_embed"]
    for name in [name for name in tensors if ".qkv." in name]:
        for part, values in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("qkv", f"{part}_proj")] = values
    names = {"attn__norm": "self_attn.inner_attn_ln", "mlp__norm": "ffn.ffn_layernorm", "mlp": "ffn"}
    names |= {"norm1": "self_attn_layer_norm.A", "norm2": "final_layer_norm.A", "__attn": ".self_attn"}
    names |= {
        "self_attn__proj": "self_attn.out_proj",
        "blocks": "encoder.layers",
        "pos_embed": "encoder.embed_positions",
    }
    names |= {"cls_token": "vision_embed.cls_token", "patch_embed": "vision_embed"}
    return renamed({f"beit3.{name}": tensor for name, tensor in renamed(tensors, **names).items()}, beit3__norm="norm")


def dinov3_of_its_authors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other names, one bias whose part for keys is zero, and the rotary periods."""
    for block in range(2):
        queries, values = (tensors.pop(f"blocks.{block}.attn.{part}_bias") for part in "qv")
        tensors[f"blocks.{block}.attn.qkv.bias"] = torch.cat([queries, torch.zeros(32), values])
    return renamed(tensors, gamma_1="ls1.gamma", gamma_2="ls2.gamma", reg_token="storage_tokens")


def mobileclip_of_its_authors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other names, two more dimensions of the positions, and a text tower."""
    tensors = tensors | {"pos_embed": tensors["pos_embed"][None]}
    names = {"mlp__fc1": "pre_norm_ffn.1", "mlp__fc2": "pre_norm_ffn.4", "attn__qkv": "attn.qkv_proj"}
    names |= {"attn__proj": "attn.out_proj", "attn__": "pre_norm_mha.1.", "norm1": "pre_norm_mha.0"}
    names |= {"norm2": "pre_norm_ffn.0", "blocks__": "transformer.", "pos_embed": "pos_embed.pos_embed.pos_embed"}
    tensors = {
        name.replace("norm.", "post_transformer_norm.", name.startswith("norm.")): each
        for name, each in tensors.items()
    }
    stem = {"patch_embed__backbone__": "patch_emb.", "__conv__": ".block.conv.", "__bn__": ".block.norm."}
    return {f"image_encoder.model.{name}": each for name, each in renamed(tensors, **names, **stem).items()}


# A model → the file of its authors, and what it has besides.
AUTHORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, tuple[int, ...]]]] = {
    "small_clip": (
        clip_of_its_authors,
        {"visual.proj": (32, 16), "logit_scale": (), "transformer.resblocks.0.ln_1.weight": (16,)},
    ),
    "small_beit3": (
        beit3_of_its_authors,
        {"beit3.text_embed.weight": (9, 32), "beit3.encoder.layers.0.final_layer_norm.B.weight": (32,)},
    ),
    "small_mobileclip": (mobileclip_of_its_authors, {"text_encoder.weight": (9, 32)}),
    "small_dinov3": (dinov3_of_its_authors, {"mask_token": (1, 32), "rope_embed.periods": (8,)}),
}


@pytest.mark.parametrize("name", AUTHORS)
@pytest.mark.parametrize("image_size", [64, 32])
def test_of_an_authors_file_every_tensor_is_used_or_named(name: str, image_size: int, tmp_path: Path) -> None:
    """timm's filters rename and join tensors, and resample positions to another size: all of these are used."""
    model: Any = random_vit(name)
    rename, others = AUTHORS[name]
    theirs = rename(dict(model.state_dict())) | {each: torch.ones(shape) for each, shape in others.items()}
    torch.save(theirs, tmp_path / "weights.pth")
    teacher = load_teacher(tmp_path / "weights.pth", model=f"timm/{name}", image_size=image_size)
    model.set_input_size((image_size, image_size))
    images = images_of(image_size, image_size)
    with torch.no_grad():
        assert_close(features(teacher, images), model.forward_features(images), rtol=1e-4, atol=1e-4)


def test_a_bias_that_timms_filter_drops_is_refused_unless_it_is_zero(tmp_path: Path) -> None:
    """DINOv3's authors wrote zeros; others' files have learned ones, and would compute something else."""
    path, name = tmp_path / "weights.pth", "small_dinov3_without_bias"
    model = random_vit(name)
    theirs = renamed(model.state_dict(), gamma_1="ls1.gamma", gamma_2="ls2.gamma", reg_token="storage_tokens")
    for value in (0.0, 0.1):
        biases = {f"blocks.{block}.attn.qkv.bias": torch.full((96,), value) for block in range(2)}
        torch.save(theirs | biases, path)
        if value == 0:
            assert load_teacher(path, model=f"timm/{name}").config.depth == 2
    with pytest.raises(
        InputError, match=rf"not weights of timm/{name}, which has no blocks\.0\.attn\.qkv\.bias; .*_qkvb$"
    ):
        load_teacher(path, model=f"timm/{name}")


def test_provenance(file: Path) -> None:
    teacher = load_teacher(file, model=MODEL, first_blocks=2)
    sha256 = teacher.provenance.pop("sha256")
    assert len(sha256) == 64
    assert teacher.provenance == {
        "model": MODEL,
        "tag": None,
        "timm": timm.__version__,
        "source": "weights.safetensors",
        "licence": "of the file; timm states for its own weights of this model: apache-2.0",
    }
    sizes = teacher.config
    assert (sizes.embed_dim, sizes.num_heads, sizes.depth, sizes.num_extra_tokens, sizes.image_size) == (
        64,
        2,
        4,
        1,
        160,
    )


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def write_code(path: Path, *place: str, alone: bool = False) -> None:
    contents: Any = Code(path.with_name("canary"))
    for name in place:
        contents = {name: contents}
    torch.save(contents if alone else random_vit(NAME).state_dict() | contents, path)


def changed(path: Path, **tensors: Tensor | None) -> None:
    state = random_vit(NAME).state_dict() | tensors
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def write_other(path: Path, name: str = NAME, **options: Any) -> None:
    save(random_vit(name, **options), path)


Write = Callable[[Path], object]
# What a file is → how to write it, and the error.
REFUSED: dict[str, tuple[Write, str]] = {
    "wide": (
        lambda path: write_other(path, "deit_tiny_patch16_224", depth=6),
        "it has no patches of 16 x 16 pixels in its width",
    ),
    "deep": (lambda path: write_other(path, depth=7), "it has no tensor blocks.6.attn"),
    "shallow": (lambda path: write_other(path, depth=5), r"tensor blocks.5.\S+ is missing"),
    "patch": (lambda path: write_other(path, patch_size=8), "it has no patches of 16 x 16 pixels"),
    "CNN": (lambda path: write_other(path, "test_resnet"), "it has no patches of 16 x 16 pixels"),
    "registers": (lambda path: changed(path, reg_token=torch.zeros(1, 4, 64)), "it has no tensor reg_token"),
    "no positions": (lambda path: changed(path, pos_embed=None), "tensor pos_embed is missing"),
    "not finite": (lambda path: changed(path, cls_token=torch.full((1, 1, 64), np.nan)), "cls_token has values that"),
    "odd positions": (lambda path: changed(path, pos_embed=torch.zeros(7)), f"not weights of {MODEL}"),
    "learned rotary positions": (
        lambda path: changed(path, **{"rope.freqs": torch.ones(2, 6, 8)}),
        "no tensor rope.freqs",
    ),
    "quantized": (
        lambda path: changed(path, **{"blocks.0.attn.qkv.weight": torch.ones(192, 64, dtype=torch.int8)}),
        "tensor blocks.0.attn.qkv.weight is not a dense floating-point tensor",
    ),
    "patches of authors": (
        lambda path: torch.save({"visual.conv1.weight": torch.ones(64, 3, 8, 8)}, path),
        "it has no patches of 16 x 16 pixels",
    ),
    "two models": (
        lambda path: changed(path, **{"backbone.cls_token": torch.zeros(1, 1, 64)}),
        "holds cls_token twice, the second one as backbone.cls_token: keep one of both models",
    ),
    "no tensors": (lambda path: torch.save({"model": {"a": 1}}, path), "it has no dict of tensors"),
    "sparse": (
        lambda path: changed(path, cls_token=torch.zeros(1, 1, 64).to_sparse()),
        "tensor cls_token is not a dense floating-point tensor",
    ),
    "a list": (lambda path: torch.save([torch.zeros(3)], path), "it has no dict of tensors"),
    "text": (lambda path: path.write_text("weights"), "truncated, or not a PyTorch checkpoint"),
    "truncated": (lambda path: path.write_bytes(b"\0" * 100), "truncated, or not a PyTorch checkpoint"),
    "code": (lambda path: write_code(path, alone=True), "truncated, or not a PyTorch checkpoint"),
    "code in place of weights": (
        lambda path: write_code(path, "model", alone=True),
        "truncated, or not a PyTorch checkpoint",
    ),
    "code beside weights": (lambda path: write_code(path, "extra"), "truncated, or not a PyTorch checkpoint"),
    "code as a weight": (lambda path: write_code(path, "cls_token"), "truncated, or not a PyTorch checkpoint"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_files_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    write, message = REFUSED[what]
    write(tmp_path / "weights.pth")
    line = refused_by(lambda path: load_teacher(path, model=MODEL), tmp_path / "weights.pth")
    assert re.search(message, line), line
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "timm/resnet18"}, "timm/resnet18 is a ResNet; only"),
        ({"model": MODEL, "first_blocks": 6}, "first_blocks must be a whole number from 0 to 5, got 6"),
        ({"model": MODEL, "image_size": 100}, "image_size must be a multiple of the patch"),
        ({"model": MODEL, "weights": "ema"}, f"weights: {MODEL} has no ema weights"),
        ({"model": "dinov2"}, "model: must be data2vec2 or timm/NAME, got 'dinov2'"),
        ({"model": "data2vec2", "image_size": 112}, "image_size is fixed in the file of data2vec2"),
    ],
)
def test_options_that_do_not_fit_are_refused(file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_teacher(file, **options)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache of the hub, without network: its folder."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    configure_http_backend()
    yield tmp_path / "hub"
    configure_http_backend()  # those made meanwhile stay offline


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pretrained_weights_come_from_the_hubs_cache(offline: Path, file: Path, name: str) -> None:
    folder = offline / "models--timm--test_vit.r160_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / name).write_bytes(file.read_bytes())
    teacher = load_teacher(None, model=MODEL)
    assert torch.equal(
        features(teacher, images_of(160, 160)), features(load_teacher(file, model=MODEL), images_of(160, 160))
    )
    found = {name: teacher.provenance[name] for name in ("tag", "source", "licence")}
    assert found == {"tag": "r160_in1k", "source": "hub:timm/test_vit.r160_in1k", "licence": "apache-2.0"}
    _, same = load_any(MODEL)
    assert same is not None
    assert same.provenance == teacher.provenance


def test_an_exported_student_keeps_its_preprocessing(file: Path, tmp_path: Path) -> None:
    """Another tag of the same model may have another one."""
    teacher = load_teacher(file, model=MODEL)
    assert isinstance(teacher.encoder, TimmEncoder)
    config = replace(teacher.encoder.config, image_mean=(0.1, 0.2, 0.3), interpolation="bilinear")
    encoder = TimmEncoder(config)
    encoder.load_state_dict(teacher.encoder.state_dict())
    save_student(Student(encoder, teacher.build_student(depth=1).config), tmp_path / "student.safetensors")
    found = load_student(tmp_path / "student.safetensors").encoder
    assert isinstance(found, TimmEncoder)
    assert replace(found.config, outputs=()) == config
    assert found.image_mean.flatten().tolist() == pytest.approx(config.image_mean)


def test_an_unreachable_hub_is_asked_once(offline: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may have the second name."""
    calls: list[tuple[str, bool]] = []

    def download(repository: str, name: str, revision: str | None, local_files_only: bool) -> str:
        calls.append((name, local_files_only))
        if name == "model.safetensors":
            raise LocalEntryNotFoundError("no connection")
        return str(file)

    monkeypatch.setattr(timm_weights, "hf_hub_download", download)
    assert load_teacher(None, model=MODEL).provenance["source"] == "hub:timm/test_vit.r160_in1k"
    assert calls == [("model.safetensors", True), ("pytorch_model.bin", True)]


def test_without_network_and_cache_pretrained_weights_are_refused(offline: Path) -> None:
    with pytest.raises(InputError, match=f"^{MODEL}: no pretrained weights of timm/{NAME}") as caught:
        load_teacher(None, model=MODEL)
    assert "give checkpoint, a file" in str(caught.value)
    assert "\n" not in str(caught.value)


EMBED = """
import sys, numpy as np, torch
from d2v_composer import load_student
student = load_student(sys.argv[1])
images = torch.from_numpy(np.load(sys.argv[2]))
with torch.inference_mode():
    np.save(sys.argv[3], student.embed(images, "mean", "layer_mean").numpy())
"""


def test_another_teacher_than_the_students_is_refused(tmp_path: Path) -> None:
    """Its blocks would run on an encoder that is not theirs."""
    model = random_vit(NAME)
    path = save(model, tmp_path / "teacher.safetensors")
    save_student(load_teacher(path, model=MODEL).build_student(depth=1), tmp_path / "student.safetensors")
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(half, tmp_path / "half.pth")
    for same in (path, tmp_path / "half.pth"):
        _, teacher = load_any(tmp_path / "student.safetensors", teacher_path=str(same))
        assert teacher is not None
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(1.1)
    other = save(model, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors: is not the student's teacher: its encoder has another"):
        load_any(tmp_path / "student.safetensors", teacher_path=str(other))


def test_a_teacher_of_another_width_is_not_the_students(tmp_path: Path) -> None:
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=1), tmp_path / "student.safetensors")
    other = QUICKSTART / "teacher.safetensors"
    with pytest.raises(
        InputError, match=r"teacher\.safetensors: is not the student's teacher: its encoder has another"
    ):
        load_any(tmp_path / "student.safetensors", teacher_path=str(other))


@pytest.mark.parametrize("name", [NAME, "small_beit", "small_mixed_rope", "small_hybrid"])
def test_an_exported_student_needs_no_teacher(name: str, tmp_path: Path) -> None:
    path = save(random_vit(name), tmp_path / "weights.safetensors")
    teacher = load_teacher(path, model=f"timm/{name}", image_size=(64, 96))
    student = teacher.build_student(depth=2).eval()
    save_student(student, tmp_path / "student.safetensors")
    images = images_of(64, 96)
    with torch.inference_mode():
        expected = student.embed_all(images)
    path.unlink()
    again = load_student(tmp_path / "student.safetensors")
    config: Any = again.encoder.config
    assert replace(config, outputs=()) == student.encoder.config
    assert not any(parameter.requires_grad for parameter in again.encoder.parameters())
    with torch.inference_mode():
        for each, embedding in again.embed_all(images).items():
            assert torch.equal(embedding, expected[each])
    model = timm.create_model("d2v2_student", checkpoint_path=str(tmp_path / "student.safetensors")).eval()
    assert isinstance(model, TimmStudent)
    with torch.inference_mode():
        assert_close(model(images), expected["output_cls"])
    if name != NAME:  # another process does not know these models
        return
    np.save(tmp_path / "images.npy", images.numpy())
    arguments = [tmp_path / each for each in ("student.safetensors", "images.npy", "embeddings.npy")]
    # A new process, without the modules that programs of other tests start with.
    command = [sys.executable, "-c", EMBED, *map(str, arguments)]
    environment = command_environment() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_close(
        torch.from_numpy(np.load(tmp_path / "embeddings.npy")), expected["layer_mean_mean"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", [NAME, "small_beit", "small_mixed_rope"])
def test_another_version_of_timm_must_compute_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, path = save(random_vit(name), tmp_path / "weights.safetensors"), tmp_path / "student.safetensors"
    teacher = load_teacher(weights, model=f"timm/{name}", first_blocks=1)
    save_student(teacher.build_student(depth=1), path)
    before, create = timm.__version__, timm.create_model
    monkeypatch.setattr(timm, "__version__", "1.0.99")
    student = load_student(path)
    save_student(student, tmp_path / "again.safetensors")
    assert load_student(tmp_path / "again.safetensors").encoder.config == student.encoder.config
    config: Any = student.encoder.config
    assert (config.timm, len(config.outputs)) == (before, NUM_OUTPUTS)
    on_gpu_in_bf16 = {each: tensor.bfloat16() for each, tensor in student.encoder.state_dict().items()}
    with torch.device("meta"):  # as on another device, the outputs are a CPU's
        trained = add_outputs(replace(config, outputs=()), on_gpu_in_bf16)
    assert isinstance(trained, TimmEncoderConfig)
    assert trained.timm == "1.0.99"
    assert trained.outputs == pytest.approx(config.outputs, rel=0.1, abs=0.1)

    def create_other(name: str, **options: Any) -> Any:
        model: Any = create(name, **options)
        for block in getattr(model, "blocks", ()):
            block.mlp.act = nn.ReLU()
        return model

    monkeypatch.setattr(timm, "create_model", create_other)
    with monkeypatch.context() as patch:
        patch.setattr(TimmEncoder, "sample_outputs", lambda self: (math.nan,) * NUM_OUTPUTS)
        assert "timm 1.0.99 computes something else" in refused_by(load_student, path)
    problem = f"timm 1.0.99 computes something else for timm/{name} than timm {before}, with which it was exported"
    assert refused_by(load_student, path).endswith(f"{problem}: pip install timm=={before}")
    with pytest.raises(InputError, match=problem):
        create("d2v2_student", checkpoint_path=str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("model", value) for value in ("timm/resnet18", "timm/test_vit2", 3)],
        *[("first_blocks", value) for value in (2, "a")],
        *[("image_size", value) for value in (32, None)],
        ("grid_size", [1, 1]),
        ("image_std", [0, 0, 0]),
        *[("image_mean", value) for value in (None, [None], "abc", [0.5])],
        ("interpolation", "nearest"),
        ("has_cls_token", False),
        ("embed_dim", 32),
        *[("outputs", value) for value in ([0.5] * 31, [0.5] * 64, ["a"] * 32, 3)],
    ],
)
def test_an_exported_students_sizes_are_timms(name: str, value: Any, tmp_path: Path) -> None:
    teacher = load_teacher(save(random_vit(NAME), tmp_path / "weights.safetensors"), model=MODEL)
    path = tmp_path / "student.safetensors"
    save_student(teacher.build_student(depth=1), path)
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    sizes = json.loads(metadata["config"])
    sizes["encoder"][name] = value
    tensors = load_file(path)
    del tensors["config_json"]
    save_file(tensors, path, metadata | {"config": json.dumps(sizes)})
    refused_by(load_student, path)


def test_jax_weights_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", cls=np.zeros(3))
    with pytest.raises(InputError, match=r"weights\.npz: NumPy's files \(JAX weights\) are not supported; use timm's"):
        load_teacher(tmp_path / "weights.npz", model=MODEL)

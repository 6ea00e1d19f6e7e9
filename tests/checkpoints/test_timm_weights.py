"""Weights of timm's models: every tensor of a file is used or named, and what does not fit is refused in one line."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import configure_http_backend, constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import d2v_composer.timm_models  # noqa: F401  (registers the student)
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.config.reference import load_any
from d2v_composer.models.student import Student
from d2v_composer.models.timm_teacher import TimmEncoder
from d2v_composer.system.errors import InputError
from helpers import refused_by, write_files
from small_vits import RESAMPLED_BILINEARLY, random_vit
from steps import random_images

NAME = "test_vit"  # timm's own: 6 blocks of width 64, 160 px
MODEL = f"timm/{NAME}"


def save(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(random_vit(NAME), tmp_path / "weights.safetensors")


@torch.no_grad()
def features(teacher: Any, images: Tensor) -> Tensor:
    return teacher.forward_blocks(teacher.encode(images))[0]


def images_of(*shape: int) -> Tensor:
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))


def wrap(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# What training programs write.
FILES: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "nested": lambda tensors: {"state_dict": {"model": tensors}, "epoch": 3},
    "with arguments": lambda tensors: {"model": tensors, "args": argparse.Namespace(lr=0.1)},
    "wrapped": lambda tensors: wrap(tensors, "module._orig_mod."),
    "DINO's": lambda tensors: {"student": {}, "teacher": wrap(tensors, "backbone.")},
    "averaged": lambda tensors: {"state_dict": dict.fromkeys(tensors, torch.zeros(1)), "state_dict_ema": tensors},
    "half": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("what", FILES)
def test_pytorch_files_of_every_layout_give_timms_features(what: str, tmp_path: Path) -> None:
    model = random_vit(NAME)
    torch.save(FILES[what](model.state_dict()), tmp_path / "weights.pth")
    teacher = load_teacher(tmp_path / "weights.pth", model=MODEL)
    assert all(tensor.dtype == torch.float32 for tensor in teacher.state_dict().values())
    tolerance = 0.05 if what == "half" else 1e-5
    expected = model.forward_features(images_of(160, 160))
    assert_close(features(teacher, images_of(160, 160)), expected, rtol=tolerance, atol=tolerance)


# timm's resampling of relative positions, the second on torch 2.13.
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning", "ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize("name", [NAME, "small_beit", "small_mixed_rope", *RESAMPLED_BILINEARLY])
def test_positions_are_resampled_as_timms_factory_does(name: str, tmp_path: Path) -> None:
    """Some bilinearly, which the model's own method does not."""
    path, shape = save(random_vit(name), tmp_path / "weights.safetensors"), (48, 80)
    overlay = {"file": str(path), "num_classes": 0}
    options: dict[str, Any] = {"pretrained_cfg_overlay": overlay, "num_classes": 0, "img_size": shape}
    expected: Any = timm.create_model(name, pretrained=True, **options).eval()
    teacher = load_teacher(path, model=f"timm/{name}", image_size=shape)
    assert teacher.config.grid_size == (3, 5)
    images = images_of(*shape)
    assert_close(features(teacher, images), expected.forward_features(images), rtol=1e-5, atol=1e-5)
    same = load_teacher(path, model=f"timm/{name}", image_size="48x80")
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


def test_a_bias_that_timms_filter_drops_is_refused_unless_it_is_zero(tmp_path: Path) -> None:
    """DINOv3's authors wrote zeros; others' files have learned ones, and would compute something else."""
    path, name = tmp_path / "weights.pth", "small_dinov3_without_bias"
    model = random_vit(name)
    theirs = dict(model.state_dict())
    for old, new in (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens")):
        theirs = {key.replace(old, new): tensor for key, tensor in theirs.items()}
    biases = {f"blocks.{block}.attn.qkv.bias": torch.zeros(96) for block in range(2)}
    torch.save(theirs | biases, path)
    assert load_teacher(path, model=f"timm/{name}").config.depth == 2
    torch.save(theirs | {key: zeros + 0.1 for key, zeros in biases.items()}, path)
    problem = rf"timm/{name}: the file has blocks\.0\.attn\.qkv\.bias, but the model does not; .*_qkvb$"
    with pytest.raises(InputError, match=problem):
        load_teacher(path, model=f"timm/{name}")


def test_provenance_names_the_file_its_hash_and_its_license(file: Path) -> None:
    provenance = load_teacher(file, model=MODEL).provenance
    assert len(provenance.pop("sha256")) == 64
    assert provenance.pop("outputs")
    assert provenance == {
        "model": MODEL,
        "tag": None,
        "timm": timm.__version__,
        "source": "weights.safetensors",
        "license": "not stated in the file; the license of timm's own weights is apache-2.0",
    }


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
    cached = offline / "models--timm--test_vit.r160_in1k"
    write_files(cached, {f"snapshots/abc/{name}": file.read_bytes(), "refs/main": b"abc"})
    teacher, images = load_teacher(None, model=MODEL), images_of(160, 160)
    assert torch.equal(features(teacher, images), features(load_teacher(file, model=MODEL), images))
    provenance = {name: teacher.provenance[name] for name in ("tag", "source", "license")}
    assert provenance == {"tag": "r160_in1k", "source": "hub:timm/test_vit.r160_in1k", "license": "apache-2.0"}
    _, same = load_any(MODEL)
    assert same is not None
    assert same.provenance == teacher.provenance


def test_a_model_without_pretrained_weights_needs_a_file() -> None:
    with pytest.raises(InputError, match="timm has no pretrained weights for this model; set checkpoint to a file"):
        load_teacher(None, model="timm/vit_base_patch16_gap_224")


@pytest.mark.usefixtures("offline")
def test_without_network_and_cache_pretrained_weights_are_refused() -> None:
    problem = rf"\A{MODEL}: no pretrained weights: .* in timm/{NAME}.*set checkpoint to a file\Z"
    with pytest.raises(InputError, match=problem):
        load_teacher(None, model=MODEL)


QKV = "blocks.0.attn.qkv.weight"
# What is changed in a file's tensors → the error.
CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "deeper": ({"blocks.6.norm1.weight": torch.ones(64)}, "tensor blocks.6.norm1.weight is unknown"),
    "shallower": ({"blocks.5.norm1.weight": None}, "tensor blocks.5.norm1.weight is missing"),
    "shape": ({QKV: torch.ones(192, 32)}, f"size mismatch for {QKV}"),
    "no positions": ({"pos_embed": None}, "tensor pos_embed is missing"),
    "odd positions": ({"pos_embed": torch.zeros(7)}, f"not weights of {MODEL}"),
    "not finite": ({"cls_token": torch.full((1, 1, 64), np.nan)}, "cls_token has values that are not finite"),
    "quantized": ({QKV: torch.ones(192, 64, dtype=torch.int8)}, f"tensor {QKV} is not a dense floating-point tensor"),
    "two models": ({"backbone.cls_token": torch.zeros(1, 1, 64)}, "it holds two models"),
}


def refusal(content: Any, folder: Path) -> str:
    """Return the one line with which a file of weights is refused."""
    torch.save(content, folder / "weights.pth")
    return refused_by(lambda path: load_teacher(path, model=MODEL), folder / "weights.pth")


@pytest.mark.parametrize("what", CHANGED)
def test_tensors_that_do_not_fit_are_refused(what: str, tmp_path: Path) -> None:
    tensors, message = CHANGED[what]
    state = random_vit(NAME).state_dict() | tensors
    assert message in refusal({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path)


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    assert refusal({"model": {"a": 1}}, tmp_path).endswith("not a weight file: it has no dict of tensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": MODEL, "weights": "ema"}, f"weights: {MODEL} has no ema weights"),
        ({"model": "dinov2"}, "model: must be data2vec2, timm/NAME or ext/NAME, got 'dinov2'"),
        ({"model": "data2vec2", "image_size": 112}, "image_size: cannot be set for data2vec2, whose file fixes it"),
    ],
)
def test_options_that_do_not_fit_are_refused(file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_teacher(file, **options)


# Students.


@pytest.mark.parametrize("name", ["small_beit", "small_mixed_rope"])
def test_an_exported_student_needs_no_teacher(name: str, tmp_path: Path) -> None:
    """Its preprocessing is the file's own: another tag of the same model may have another one."""
    weights = save(random_vit(name), tmp_path / "weights.safetensors")
    teacher = load_teacher(weights, model=f"timm/{name}", image_size=(64, 96))
    config = teacher.encoder.config.changed(image_mean=(0.1, 0.2, 0.3), interpolation="bilinear")
    encoder = TimmEncoder(config).freeze()
    encoder.load_state_dict(teacher.encoder.state_dict())
    student = Student(encoder, teacher.build_student(depth=2).config).eval()
    save_student(student, tmp_path / "student.safetensors")
    weights.unlink()
    images, again = random_images(2, 70), load_student(tmp_path / "student.safetensors")
    expected = student.embed_all(images)
    for key, embedding in again.embed_all(images).items():
        assert torch.equal(embedding, expected[key])
    model: Any = timm.create_model("d2v2_student", checkpoint_path=str(tmp_path / "student.safetensors")).eval()
    assert_close(model(encoder.prepare(images)).detach(), expected["output_cls"])
    loaded_config: Any = again.encoder.config
    assert loaded_config.changed(outputs=()) == config
    assert not any(parameter.requires_grad for parameter in again.encoder.parameters())


def test_an_exported_students_sizes_are_timms(file: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "student.safetensors", timm.create_model("d2v2_student")
    save_student(load_teacher(file, model=MODEL).build_student(depth=1), path)
    tensors = load_file(path)
    sizes = json.loads(tensors["config_json"].numpy().tobytes())
    wrong = {"model": ("timm/test_vit2", 3), "first_blocks": (2,), "image_size": (None,), "image_mean": (None, [0.5])}
    wrong |= {"interpolation": ("nearest",), "embed_dim": (32,), "outputs": ([0.5] * 31, [0.5] * 32, ["a"] * 32, 3)}
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        text = json.dumps(sizes | {"encoder": sizes["encoder"] | {name: value}})
        tensors["config_json"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        with pytest.raises(InputError, match=r"\Aconfig_json .*\Z"):
            model.load_state_dict(tensors)

"""timm and a hub's folder embed as the student's file does; what cannot be exported is refused."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_data_config
from timm.models import save_for_hf
from torch import Tensor

import d2v_composer.timm_models  # noqa: F401  (registers the student)
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.checkpoints.timm_student import TimmWrapper
from d2v_composer.commands import export as export_student
from d2v_composer.models.alignment import side_by_side
from d2v_composer.models.configs import ImageEncoderConfig, height_and_width
from d2v_composer.models.images import ImageEncoder
from d2v_composer.models.names import EMBEDDING, Pooling
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.system.errors import InputError, RunError
from helpers import GOLDEN, slow, write_files
from hub_stub import serve

TOLERANCE = 1e-5


def export(*arguments: str | Path) -> None:
    export_student.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def narrow(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with random weights that is narrower than its encoder; the run's own is in tests/promises."""
    wide, path = load_student(exported), tmp_path_factory.mktemp("narrow") / "student.safetensors"
    student = Student(wide.encoder, wide.config.changed(embed_dim=20), wide.provenance)
    student.align(torch.randn(48, 80), torch.randn(48), "output_mean")
    save_student(student, path)
    return path


@pytest.fixture(scope="module")
def images(exported: Path) -> Tensor:
    """Five images, normalized."""
    config = load_student(exported).encoder.config
    shape = height_and_width(config.image_size)
    return torch.randn(5, 3, *shape, generator=torch.Generator().manual_seed(0))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def create(name: str, **options: Any) -> TimmWrapper:
    model = timm.create_model(name, **options)
    assert isinstance(model, TimmWrapper)
    return model.eval()


def test_timm_loads_an_exported_student(narrow: Path, images: Tensor) -> None:
    """With as many classes as the alignment has outputs, the model gives the embedding; with 0, its features."""
    model, student = create("d2v2_student", num_classes=48, checkpoint_path=str(narrow)), load_student(narrow)
    with torch.inference_mode():
        assert_close(model(images), student.embed(images))
        features, embeddings = model.forward_features(images), student.embed_all(images)
        pooled = side_by_side(embeddings, student.alignment_inputs)
        assert_close(model.forward_head(features, pre_logits=True), pooled)
        assert model.head_hidden_size == pooled.shape[1]
        assert_close(create("d2v2_student", checkpoint_path=str(narrow))(images), pooled)
        assert_close(create("d2v2_student", num_classes=3, checkpoint_path=str(narrow))(images), torch.zeros(5, 3))
        options = {"representation": "layer_mean", "global_pool": "avg", "checkpoint_path": str(narrow)}
        model = create("d2v2_student", **options)
        poolings: dict[str, Pooling] = {"avg": "mean_patches", "mean": "mean"}
        for pool, pooling in poolings.items():
            model.reset_classifier(0, pool)
            assert_close(model(images), student.embed(images, pooling, "layer_mean"))
        features = model.forward_features(images)
        options |= {"representation": "output"}
        output = create("d2v2_student", **options)
        assert_close(output.forward_features(images), student.forward_blocks(student.encode(images))[0])
        assert_close(output(images), student.embed(images, "mean_patches"))
    assert all(parameter.requires_grad for parameter in output.student.blocks.parameters())
    assert not any(parameter.requires_grad for parameter in model.student.block_list[-1].norm2.parameters())  # not used
    assert model.num_features == features.shape[2] == student.embed_dim
    data = resolve_data_config(model=model)
    assert (data["input_size"], data["mean"]) == (tuple(images.shape[1:]), student.encoder.config.image_mean)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 1.0)


@pytest.mark.parametrize("options", [{}, {"representation": "output"}])
def test_its_grid_is_timms_one_scale(options: dict[str, Any], narrow: Path, images: Tensor) -> None:
    """By the call that loads any exported student's features."""
    file: Any = {"pretrained_cfg_overlay": {"file": str(narrow)}}
    model: Any = timm.create_model("d2v2_student", features_only=True, pretrained=True, **file, **options).eval()
    student = create("d2v2_student", checkpoint_path=str(narrow), **options)
    with torch.inference_mode():
        [grid], features = model(images), student.forward_features(images)
        assert_close(grid.flatten(2).transpose(1, 2), features[:, student.student.num_extra_tokens :])
        assert_close(student.forward_intermediates(images, output_fmt="NLC")[1][0], features[:, 1:])
    assert (model.feature_info.channels(), model.feature_info.reduction()) == (
        [grid.shape[1]],
        [images.shape[3] // grid.shape[3]],
    )
    with pytest.raises(ValueError, match=r"^features_only: d2v2_student needs pretrained=True"):
        timm.create_model("d2v2_student", features_only=True)


def test_fine_tuning_and_a_hubs_folder(narrow: Path, images: Tensor, tmp_path: Path) -> None:
    """A classifier on the student, trained for a step, saved as timm saves for the hub, and loaded from there."""
    model = create("d2v2_student", checkpoint_path=str(narrow), num_classes=7).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = model.student.encode(images)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the head starts as zeros, and the blocks behind it without a gradient
        torch.nn.functional.cross_entropy(model(images), torch.arange(5)).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in trained)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.student.blocks.parameters())
    assert torch.equal(model.student.encode(images), frozen)

    save_for_hf(model, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "d2v2_student"
    again, features_only = (
        create(f"local-dir:{tmp_path}", pretrained=True, **size) for size in ({}, {"num_classes": 0})
    )
    assert again.num_classes == 7
    with torch.inference_mode():
        assert_close(again(images), model.eval()(images))
        assert_close(features_only(images), model.forward_head(model.forward_features(images), pre_logits=True))


def test_a_classifier_of_sound_takes_waveforms(tmp_path: Path) -> None:
    """Stored as a fine-tuned student is."""
    student = load_teacher(GOLDEN / "audio_base.pt", first_blocks=1).build_student(depth=2, normalization="layer")
    save_student(student, tmp_path / "student.safetensors")
    model = create("d2v2_student", checkpoint_path=str(tmp_path / "student.safetensors"), num_classes=3)
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    student.head = model.head
    save_student(student, tmp_path / "classifier.safetensors")
    again = create("d2v2_student", checkpoint_path=str(tmp_path / "classifier.safetensors"), num_classes=3)
    waveforms = 0.1 * torch.randn(2, 8000)
    assert torch.equal(again(waveforms), model(waveforms))
    embeddings = model.student.embed(waveforms)
    assert torch.equal(model.forward_head(model.forward_features(waveforms), True), embeddings)
    without_head = create("d2v2_student", checkpoint_path=str(tmp_path / "classifier.safetensors"), num_classes=0)
    assert torch.equal(without_head(waveforms), embeddings)


def test_timm_refuses_other_files(exported: Path, tmp_path: Path) -> None:
    tensors, old = load_file(exported), tmp_path / "old.safetensors"
    del tensors["config_json"]
    save_file(tensors, old)
    with pytest.raises(InputError, match="no tensor config_json: not a file written by d2v export"):
        timm.create_model("d2v2_student", checkpoint_path=str(old))
    for option, value, missing in (
        ("global_pool", "max", "output_max"),
        ("representation", "max", "max_cls"),
    ):
        with pytest.raises(InputError, match=f"this model has no {missing}; it has output_cls, "):
            create("d2v2_student", checkpoint_path=str(exported), **{option: value})


def test_a_student_comes_from_the_hub(
    exported: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its repository, or by a file of a revision."""
    expected = load_student(exported).embed(images)
    for place in ("main/student.safetensors", "v2/a/b.safetensors"):
        write_files(tmp_path / "hub" / "org" / "photos", {place: exported.read_bytes()})
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch):
        for address in ("hf://org/photos", "hf://org/photos@v2/a/b.safetensors"):
            assert_close(load_student(address).embed(images), expected)
        with pytest.raises(InputError, match=r"^no student\.safetensors in org/none"):
            load_student("hf://org/none")


def test_unsupported_files_and_options_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"student.txt must end in .safetensors, .onnx or .pt2"):
        export(exported, tmp_path / "student.txt")
    for options in (("--pooling", "mean"), ("--preprocessing", "in")):
        with pytest.raises(
            InputError, match=r"--pooling, --representation and --preprocessing are only for .onnx and .pt2"
        ):
            export(exported, tmp_path / "student.safetensors", *options)
    without_cls = tmp_path / "without_cls.safetensors"
    config = ImageEncoderConfig(embed_dim=16, num_heads=2, prenet_depth=1, image_size=32)
    save_student(Student(ImageEncoder(config).freeze(), StudentConfig(depth=1)), without_cls)
    with pytest.raises(
        InputError, match="representation and pooling: this model has no output_cls; it has output_mean, "
    ):
        export(without_cls, tmp_path / "student.onnx", "--pooling", "cls")
    student = load_student(without_cls)
    assert (student.choose_embedding(), student.embedding.of) == (EMBEDDING, "output_mean")
    assert create("d2v2_student", checkpoint_path=str(without_cls)).pooled == ["output_mean"]


@pytest.mark.parametrize("suffix", ["safetensors", slow("pt2")])
def test_the_file_is_whole_or_as_before(exported: Path, tmp_path: Path, suffix: str) -> None:
    """It replaces another only if asked, and a full disk leaves nothing."""
    out = tmp_path / f"student.{suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match=rf"^{out} cannot be written: .*File too large"):
            export(exported, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    out.write_text("mine")
    with pytest.raises(InputError, match=rf"student\.{suffix} already exists; choose another file, or append --overw"):
        export(exported, out)
    assert out.read_text() == "mine"
    export(exported, out, "--overwrite")
    assert out.stat().st_size > 10_000

"""timm, ONNX, torch.export and a hub's folder embed as the student's checkpoint does."""

import json
import resource
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_data_config
from timm.models import save_for_hf
from torch import Tensor

from d2v_composer import load_student
from d2v_composer.checkpoints.export import TimmStudent, TracedAlibi
from d2v_composer.checkpoints.load import save_student
from d2v_composer.checkpoints.student_file import choose_embedding
from d2v_composer.commands import embed as embed_command
from d2v_composer.commands import export as export_student
from d2v_composer.models.configs import ImageEncoderConfig, height_and_width
from d2v_composer.models.images import ImageEncoder
from d2v_composer.models.names import Embedding
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.system.errors import InputError, RunError

TOLERANCE = 1e-5


def export(*arguments: str | Path) -> None:
    export_student.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def exported(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of a small run, three blocks with ALiBi."""
    path = tmp_path_factory.mktemp("exported") / "student.safetensors"
    export(uninterrupted / "latest-rank0.pt", path)
    return path


@pytest.fixture(scope="module", params=[pytest.param(None, marks=pytest.mark.slow), 20], ids=["wide", "narrow"])
def wide_or_narrow(exported: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """That student, or one with random weights that is narrower than its encoder and has the same primary embedding."""
    if request.param is None:
        return exported
    wide = load_student(exported)
    narrow = Student(wide.encoder, wide.config.changed(embed_dim=request.param), wide.provenance)
    path = tmp_path_factory.mktemp("narrow") / "student.safetensors"
    save_student(narrow, path)
    return path


@pytest.fixture(scope="module")
def images(exported: Path) -> Tensor:
    """Five images, normalized."""
    config = load_student(exported).encoder.config
    shape = height_and_width(config.image_size)
    return torch.randn(5, 3, *shape, generator=torch.Generator().manual_seed(0))


def embed(student: Student, images: Tensor, **options: str) -> Tensor:
    with torch.inference_mode():
        return student.embed(images, **options)  # pyright: ignore[reportArgumentType]


def primary(student: Student, images: Tensor) -> Tensor:
    """The embedding of the run's primary embedding, see :func:`helpers.small_run`."""
    return embed(student, images, representation="layer_mean", pooling="cls")


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def create(name: str, **options: Any) -> TimmStudent:
    model = timm.create_model(name, **options)
    assert isinstance(model, TimmStudent)
    return model.eval()


def test_timm(wide_or_narrow: Path, images: Tensor) -> None:
    exported = wide_or_narrow
    model, student = create("d2v2_student", checkpoint_path=str(exported)), load_student(exported)
    with torch.inference_mode():
        assert_close(model(images), primary(student, images))
        features = model.forward_features(images)
        assert_close(model.forward_head(features, pre_logits=True), primary(student, images))
        for pool, pooling in (("avg", "mean_patches"), ("mean", "mean")):
            model.reset_classifier(0, pool)
            assert_close(model(images), embed(student, images, representation="layer_mean", pooling=pooling))
        output = create("d2v2_student", checkpoint_path=str(exported), representation="output", global_pool="avg")
        assert_close(output.forward_features(images), student.forward_blocks(student.encode(images))[0])
        assert_close(output(images), embed(student, images, pooling="mean_patches"))
    assert all(parameter.requires_grad for parameter in output.blocks.parameters())
    assert not any(parameter.requires_grad for parameter in model.block_list[-1].norm2.parameters())  # not used
    assert model.num_features == features.shape[2] == student.embed_dim
    data = resolve_data_config(model=model)
    assert data["input_size"] == tuple(images.shape[1:])
    assert data["mean"] == student.encoder.config.image_mean
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 1.0)


def test_fine_tuning_and_a_hubs_folder(wide_or_narrow: Path, images: Tensor, tmp_path: Path) -> None:
    """A classifier on the student, trained for a step, saved as timm saves for the hub, and loaded from there."""
    model = create("d2v2_student", checkpoint_path=str(wide_or_narrow), num_classes=7).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = model.encode(images)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the head starts as zeros, and the blocks behind it without a gradient
        torch.nn.functional.cross_entropy(model(images), torch.arange(5)).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in trained)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.blocks.parameters())
    assert torch.equal(model.encode(images), frozen)

    save_for_hf(model, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "d2v2_student"
    again = create(f"local-dir:{tmp_path}", pretrained=True)
    model.eval()
    with torch.inference_mode():
        assert again.num_classes == 7
        assert_close(again(images), model(images))
    features_only = create(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    with torch.inference_mode():
        assert_close(features_only(images), model.forward_head(model.forward_features(images), pre_logits=True))


def test_timm_refuses_other_files(exported: Path, tmp_path: Path) -> None:
    tensors, old = load_file(exported), tmp_path / "old.safetensors"
    del tensors["config_json"]
    save_file(tensors, old)
    with pytest.raises(InputError, match="no tensor config_json: not a file written by d2v export"):
        timm.create_model("d2v2_student", checkpoint_path=str(old))
    for option, value, missing in (
        ("representation", "projected", "projected_cls"),
        ("global_pool", "max", "layer_mean_max"),
        ("representation", "max", "max_cls"),
    ):
        with pytest.raises(InputError, match=f"this model has no {missing}; it has output_cls, "):
            create("d2v2_student", checkpoint_path=str(exported), **{option: value})


@pytest.mark.slow  # by default test_programs_of_the_student compares one, and int8 starts with another
def test_onnx(wide_or_narrow: Path, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    export(wide_or_narrow, path, "--pooling", "mean", "--representation", "output")
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in [*session.get_inputs(), *session.get_outputs()]] == ["images", "embedding"]
    for batch in (images, images[:1]):
        [embedding] = session.run(None, {"images": batch.numpy()})
        expected = embed(load_student(wide_or_narrow), batch, representation="output", pooling="mean")
        assert_close(torch.from_numpy(np.asarray(embedding)), expected)
    assert session.get_modelmeta().custom_metadata_map["embedding"] == "output_mean"


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_program_computes_the_same_or_is_not_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    right = TracedAlibi.unscaled
    monkeypatch.setattr(TracedAlibi, "unscaled", lambda *arguments: 0.5 * right(*arguments))
    path = tmp_path / f"student.{suffix}"
    with pytest.raises(InputError, match=f"{path}: the program would compute something else than the student"):
        export(exported, path)
    assert not list(tmp_path.iterdir())


def test_onnx_is_one_file(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would write the weights of a large student beside it."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    export(exported, tmp_path / "student.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]
    monkeypatch.setattr("d2v_composer.checkpoints.export.MAX_ONNX", 1000)
    with pytest.raises(InputError, match=r"large.onnx: an ONNX file holds at most 2 GB, and this student has 0.0"):
        export(exported, tmp_path / "large.onnx")
    assert not (tmp_path / "large.onnx").exists()


@pytest.mark.slow
def test_int8(exported: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "student.onnx"
    export(exported, path, "--int8", "--calibrate", small_data)
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert table["pytorch"][3:5] == ["1", "1"]  # the least and the mean cosine
    assert 0.98 < float(table["onnxruntime"][3]) < float(table["onnxruntime"][4]) < 1
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map["embedding"] == "layer_mean_cls"
    student, layers = load_student(exported), [node.op_type for node in onnx.load(path).graph.node]
    num_blocks = len(student.block_list) + len(student.encoder.block_list)
    assert layers.count("MatMul") == 6 * num_blocks + 1  # qkv, proj, fc1, fc2, attention's two products; patches
    assert layers.count("QuantizeLinear") == 4 * num_blocks + 1


def test_int8_needs_images(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs at least 20 images, got 0; use --images FOLDER, or for --int8 "):
        export(exported, tmp_path / "student.onnx", "--int8")
    for out, options in (("a.pt2", ["--int8"]), ("a.onnx", ["--calibrate", "photos"])):
        with pytest.raises(InputError, match=f"{out}: --int8 is only for .onnx, and --calibrate only for --int8"):
            export(exported, tmp_path / out, *options)
    assert not list(tmp_path.iterdir())


def test_a_student_comes_from_the_hub(
    exported: Path, small_data: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, name: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append((repository, name, revision))
        if local_files_only:
            raise OSError("not in the cache")
        return str(exported)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", Mock())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_close(primary(load_student("hf://org/photos"), images), primary(load_student(exported), images))
    embed_command.main(["hf://org/photos@v2/a/b.safetensors", str(small_data), str(tmp_path / "embeddings.npy")])
    assert np.load(tmp_path / "embeddings.npy").shape == (96, load_student(exported).embed_dim)
    found = ("org/photos", "student.safetensors", None), ("org/photos", "a/b.safetensors", "v2")
    assert tuple(dict.fromkeys(asked)) == found
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: Path(tmp_path, "none").read_bytes())
    with pytest.raises(InputError, match=r"^no student\.safetensors in org/photos on the Hugging Face hub"):
        load_student("hf://org/photos")


def test_torch_export(wide_or_narrow: Path, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "student.pt2"
    export(wide_or_narrow, path)
    extra = {"preprocessing.json": "", "embedding": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for batch in (images, images[:1]):
        assert_close(program(batch), primary(load_student(wide_or_narrow), batch))
    assert extra["embedding"] == "layer_mean_cls"
    assert json.loads(extra["preprocessing.json"])["image_size"] == images.shape[-1]


def test_unsupported_files_and_options_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"student.txt must end in .safetensors, .onnx or .pt2"):
        export(exported, tmp_path / "student.txt")
    for options in (("--pooling", "mean"), ("--preprocessing", "in")):
        with pytest.raises(InputError, match=r"a .safetensors file holds every embedding; --pooling, --representation"):
            export(exported, tmp_path / "student.safetensors", *options)
    without_cls = tmp_path / "without_cls.safetensors"
    config = ImageEncoderConfig(embed_dim=16, num_heads=2, prenet_depth=1, image_size=32)
    save_student(Student(ImageEncoder(config).freeze(), StudentConfig(depth=1)), without_cls)
    with pytest.raises(
        InputError, match="representation and pooling: this model has no output_cls; it has output_mean, "
    ):
        export(without_cls, tmp_path / "student.onnx", "--pooling", "cls")
    student = load_student(without_cls)
    assert choose_embedding(student, None, None) == Embedding("output", "mean_patches")
    assert create("d2v2_student", checkpoint_path=str(without_cls)).embedding.name == "output_mean_patches"


def test_a_program_takes_pixels(exported: Path, tmp_path: Path) -> None:
    """As any decoder gives them; the other program needs them normalized by hand."""
    path, config = tmp_path / "student.pt2", load_student(exported).encoder.config
    export(exported, path, "--preprocessing", "in")
    size = height_and_width(config.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    normalized = (pixels / 255 - config.image_mean) / config.image_std
    program = torch.export.load(path, extra_files=(extra := {"preprocessing.json": ""})).module()
    by_hand = torch.from_numpy(normalized.transpose(0, 3, 1, 2)).float()
    for count in (5, 1):
        assert_close(program(torch.from_numpy(pixels[:count])), primary(load_student(exported), by_hand[:count]))
    preprocessing = json.loads(extra["preprocessing.json"])
    assert preprocessing["inputs"] == "uint8, (B, H, W, channels)"
    assert "image_mean" not in preprocessing  # nobody shall subtract it again


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("pt2", marks=pytest.mark.slow)])
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

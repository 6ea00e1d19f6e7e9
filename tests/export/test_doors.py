"""One sample through every door of one student: the same embedding, unless another is named."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor

import d2v_composer.timm_models  # noqa: F401  (registers the student)
from d2v_composer import Embedder, FrozenModel, load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.checkpoints.timm_student import timm_call
from d2v_composer.commands import embed, export
from d2v_composer.data import modality_of
from helpers import GOLDEN, encoded_clip, encoded_image, write_files

TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
INT8_COSINE = 0.98


class Patches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 24, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).transpose(1, 2)


def own_module() -> FrozenModel:
    return FrozenModel(Patches(), image_size=32, grid_size=(4, 4), has_cls_token=False, source="random")


# Kind of student → its teacher, and its sizes.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "blocks": (lambda: load_teacher(GOLDEN / "tiny_base.pt"), {"depth": 2}),
    "narrow blocks": (lambda: load_teacher(GOLDEN / "tiny_base.pt"), {"depth": 1, "embed_dim": 24}),
    "MobileNet": (lambda: load_teacher(GOLDEN / "tiny_base.pt"), {"model": "timm/mobilenetv3_small_050"}),
    "audio": (lambda: load_teacher(GOLDEN / "audio_base.pt"), {"depth": 1, "normalization": "layer"}),
    "own module": (own_module, {"depth": 1}),
}


@pytest.fixture(scope="module", params=[(kind, has_map) for kind in KINDS for has_map in (True, False)], ids=str)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's file, random, with the map of a run or without one, beside a folder with one sample."""
    kind, has_map = request.param
    folder = tmp_path_factory.mktemp("doors")
    torch.manual_seed(0)
    build_teacher, sizes = KINDS[kind]
    teacher = build_teacher()
    student = teacher.build_student(**sizes).eval()
    if has_map:
        width = sum(map(student.width_of, student.alignment_inputs))
        weight = torch.randn(teacher.embedding.width, width) / width**0.5
        student.align(weight, torch.randn(len(weight)), teacher.embedding.of)
    save_student(student, folder / "student.safetensors")
    files = {"0.flac": encoded_clip(0, 4000, format="FLAC")} if kind == "audio" else {"0.jpg": encoded_image(0, 40)}
    write_files(folder / "samples", files)
    return folder / "student.safetensors"


@pytest.fixture
def sample(exported: Path) -> Tensor:
    [path] = (exported.parent / "samples").iterdir()
    return modality_of(load_student(exported).encoder.config).decode(path.read_bytes(), path.name)[None]


@pytest.fixture
def expected(exported: Path, sample: Tensor) -> Tensor:
    return load_student(exported).embed(sample)


def by_command(exported: Path, *options: str) -> np.ndarray:
    out = exported.with_name("out.npy")
    embed.main([str(exported), str(exported.parent / "samples"), str(out), "--workers", "0", "--overwrite", *options])
    return np.load(out)


def prepared(exported: Path, sample: Tensor) -> Tensor:
    """Return the sample as a program and timm take it."""
    encoder = load_student(exported).encoder
    return sample if sample.ndim == 2 else encoder.prepare(sample)


def test_python_the_command_and_engines(exported: Path, expected: Tensor) -> None:
    [path] = (exported.parent / "samples").iterdir()
    np.testing.assert_allclose(by_command(exported), expected, **TOLERANCE)
    of_engine = Embedder(str(exported), column="sample")({"sample": [path.read_bytes()]})
    np.testing.assert_allclose(of_engine["embedding"], expected, **TOLERANCE)


def test_timm_gives_the_embedding(exported: Path, sample: Tensor, expected: Tensor) -> None:
    """By the call of the model card, with as many classes as the embedding has channels."""
    student = load_student(exported)
    model = eval(timm_call(student, exported), {"timm": timm}).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(prepared(exported, sample)), expected, **TOLERANCE)
    assert model.num_classes == (0 if student.alignment is None else expected.shape[1])


@pytest.mark.slow
def test_onnx_and_torch_export_give_the_embedding(exported: Path, sample: Tensor, expected: Tensor) -> None:
    """And the page for a browser, which runs the ONNX file."""
    inputs = prepared(exported, sample)
    for suffix in ("onnx", "pt2"):
        export.main([str(exported), str(exported.with_suffix(f".{suffix}")), "--overwrite"])
    session = onnxruntime.InferenceSession(exported.with_suffix(".onnx"))
    [name] = [given.name for given in session.get_inputs()]
    [computed] = session.run(["embedding"], {name: inputs.numpy()})
    np.testing.assert_allclose(np.asarray(computed), expected, **TOLERANCE)
    program = torch.export.load(exported.with_suffix(".pt2")).module()
    torch.testing.assert_close(program(inputs), expected, **TOLERANCE)


@pytest.mark.slow
def test_int8_is_close_to_the_embedding(exported: Path, sample: Tensor, expected: Tensor) -> None:
    if sample.ndim == 2:
        pytest.skip("int8 is only for images")
    photos = write_files(exported.parent / "photos", {f"{i:03}.jpg": encoded_image(i) for i in range(64)})
    out = exported.with_name("int8.onnx")
    export.main([str(exported), str(out), "--int8", "--calibrate", str(photos), "--overwrite"])
    computed = onnxruntime.InferenceSession(out).run(None, {"images": prepared(exported, sample).numpy()})[0]
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(np.asarray(computed)), expected)
    assert cosine.item() > INT8_COSINE


def test_another_embedding_is_given_by_its_name(exported: Path, sample: Tensor) -> None:
    named = load_student(exported).embed(sample, pooling="mean")
    np.testing.assert_allclose(by_command(exported, "--pooling", "mean"), named, **TOLERANCE)


def test_a_student_and_its_teacher_compare_by_cosine(uninterrupted: Path, tmp_path: Path) -> None:
    """Both by ``d2v embed`` without a flag, whatever layers and poolings the student's own embeddings have."""
    photos = write_files(tmp_path / "photos", {f"{i:03}.jpg": encoded_image(1000 + i) for i in range(60)})
    rows = []
    for name, model in (("student", uninterrupted / "latest-rank0.pt"), ("teacher", GOLDEN / "tiny_base.pt")):
        embed.main([str(model), str(photos), str(tmp_path / f"{name}.npy"), "--workers", "0"])
        rows.append(torch.from_numpy(np.load(tmp_path / f"{name}.npy")))
    student, teacher = (torch.nn.functional.normalize(row - rows[1].mean(0), dim=1) for row in rows)
    nearest = (student @ teacher.T).argmax(dim=1)
    assert (nearest == torch.arange(60)).double().mean() > 0.5

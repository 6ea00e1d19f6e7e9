"""Programs of a student of sound take clips of any length, though they are traced with one second."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor

from d2v_composer.checkpoints.export import TimmStudent
from d2v_composer.checkpoints.load import load_student, load_teacher, save_student
from d2v_composer.commands import export as export_student
from d2v_composer.models.configs import SAMPLE_RATE
from d2v_composer.models.student import Student
from d2v_composer.system.errors import InputError
from helpers import GOLDEN

TOLERANCE = 1e-5
# The shortest clips, of two frames, and others; in samples.
LENGTHS = 720, 8000, 3 * SAMPLE_RATE + 123


def export(*arguments: str | Path) -> None:
    export_student.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=["audio_base", pytest.param("audio_options", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student on an encoder with a block whose ALiBi has a learned scale; or also extra tokens, and heads without."""
    torch.manual_seed(0)
    student = load_teacher(GOLDEN / f"{request.param}.pt", first_blocks=1).build_student(depth=2, normalization="layer")
    path = tmp_path_factory.mktemp("exported") / "student.safetensors"
    save_student(student, path)
    return path


def sound(num_clips: int, length: int) -> Tensor:
    return 0.1 * torch.randn(num_clips, length, generator=torch.Generator().manual_seed(length))


def expected(student: Student, waveforms: Tensor) -> Tensor:
    embeddings = student.embed(waveforms)
    assert embeddings.std() > 100 * TOLERANCE
    return embeddings


def test_torch_export(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "student.pt2"
    export(exported, path)
    extra = {"preprocessing.json": "", "embedding": ""}
    program = torch.export.load(path, extra_files=extra).module()
    student = load_student(exported)
    for num_clips, length in ((1, 720), *((3, each) for each in LENGTHS)):
        waveforms = sound(num_clips, length)
        torch.testing.assert_close(program(waveforms), expected(student, waveforms), rtol=0, atol=TOLERANCE)
    assert json.loads(extra["preprocessing.json"]) == {"sample_rate": 16_000}
    # Nothing in it is bound to the CPU.
    assert program.to("meta")(torch.empty(2, 8000, device="meta")).shape == (2, student.embed_dim)


@pytest.mark.slow
def test_onnx(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    export(exported, path)
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in [*session.get_inputs(), *session.get_outputs()]] == ["waveforms", "embedding"]
    student = load_student(exported)
    for num_clips, length in ((1, 720), *((3, each) for each in LENGTHS)):
        waveforms = sound(num_clips, length)
        [embedding] = session.run(None, {"waveforms": waveforms.numpy()})
        found = torch.from_numpy(np.asarray(embedding))
        torch.testing.assert_close(found, expected(student, waveforms), rtol=0, atol=TOLERANCE)


def test_a_classifier_in_timm(exported: Path, tmp_path: Path) -> None:
    """As a fine-tuned student is stored; timm then takes waveforms."""
    model = timm.create_model("d2v2_student", checkpoint_path=str(exported), num_classes=3)
    assert isinstance(model, TimmStudent)
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    save_student(model, tmp_path / "classifier.safetensors")
    again = timm.create_model("d2v2_student", checkpoint_path=str(tmp_path / "classifier.safetensors"), num_classes=3)
    waveforms = sound(2, 8000)
    assert torch.equal(again(waveforms), model(waveforms))
    assert torch.equal(model.forward_head(model.forward_features(waveforms), True), model.embed(waveforms))


def test_options_that_are_for_images(exported: Path, tmp_path: Path) -> None:
    """A program of waveforms normalizes them itself."""
    for options in (["--int8"], ["--preprocessing", "in"]):
        with pytest.raises(InputError, match=f"{' '.join(options)}: only for images; this model takes waveforms$"):
            export(exported, tmp_path / "student.onnx", *options)
    assert not list(tmp_path.iterdir())

"""Every command works with a teacher from timm, and refuses one that does not fit in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from d2v_composer.commands import embed, evaluate
from d2v_composer.commands import export as export_student
from d2v_composer.system.errors import InputError
from helpers import ROOT, losses_of, run_training, small_run
from recipes import train
from small_vits import random_vit


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's test_vit: 6 blocks of width 64, patches of 16 pixels."""
    path = tmp_path_factory.mktemp("timm") / "test_vit.safetensors"
    save_file(random_vit("test_vit", noise=0.05).state_dict(), path)
    return path


def timm_run(folder: Path, data: Path, teacher: Path, *overrides: str) -> list[str]:
    """Return the arguments of a tiny run: images of 48 x 64 pixels, 3 x 4 patches."""
    options = ["teacher.model=timm/test_vit", f"teacher.checkpoint={teacher}", "teacher.image_size=48x64"]
    return small_run(folder, data, *options, "max_duration=4ba", *overrides)


@pytest.fixture(scope="session")
def trained(teacher: Path, small_data: Path, labeled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with retrieval and health, in one process."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    datasets = f"retrieval.datasets={{four: {{format: mds, root: {labeled}}}}}"
    references = "retrieval.baselines=[pixels,encoder,teacher]"
    options = [datasets, references, "retrieval.interval=4ba", "callbacks={health: {interval: 2ba}}"]
    run_training(*timm_run(folder, small_data, teacher, *options))
    return folder


def test_export_evaluate_and_embed(
    trained: Path, labeled: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "student.safetensors"
    export_student.main([str(trained / "latest-rank0.pt"), str(student)])
    datasets = f"datasets={{four: {{format: mds, root: {labeled}}}}}"
    arguments = [str(ROOT / "yamls" / "evaluate.yaml"), f"model={student}", f"teacher={teacher}", datasets]
    evaluate.main([*arguments, "precision=fp32", f"out={tmp_path}"])
    names = [candidate["name"] for candidate in json.loads((tmp_path / "evaluation.json").read_text())["candidates"]]
    assert names == ["pixels", "encoder", "untrained student", "student", "teacher"]
    embed.main([str(student), str(labeled / "test"), str(tmp_path / "embeddings.npy")])
    assert np.load(tmp_path / "embeddings.npy").shape == (48, 64)
    options = ["--checkpoint", str(teacher), "--first-blocks", "2", "--image-size", "48x64"]
    embed.main(["timm/test_vit", str(labeled / "test"), str(tmp_path / "teachers.npy"), *options])
    assert np.load(tmp_path / "teachers.npy").shape == (48, 64)
    assert capsys.readouterr().out.count("48 embeddings of 64 dimensions") == 2


@pytest.mark.slow
def test_a_compiled_run_in_bfloat16_is_close(trained: Path, teacher: Path, small_data: Path, tmp_path: Path) -> None:
    train.main(timm_run(tmp_path, small_data, teacher, "compile=true", "precision=amp_bf16"))
    assert losses_of(tmp_path) == pytest.approx(losses_of(trained), rel=0.02)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.model=timm/resnet18", "is a ResNet; only timm's classes VisionTransformer, Eva, Beit can be teach"),
        ("teacher.model=timm/vit_small_patch16_224", "it has no 16 x 16 pixel patch embedding"),
        ("teacher.first_blocks=6", "^teacher.first_blocks must be a whole number from 0 to 5, got 6"),
        ("teacher.image_size=40", "image_size must be a multiple of the patch size, 16 x 16 pixels, got 40 x 40"),
        ("targets.average_top_k_layers=6", "average_top_k_layers must be a whole number from 1 to 5, got 6"),
        ("student.init=teacher_blocks", "init teacher_blocks needs data2vec 2.0's post-norm blocks"),
    ],
)
def test_what_does_not_fit_is_refused(
    override: str, message: str, small_data: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train.main(timm_run(tmp_path / "run", small_data, teacher, override))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()

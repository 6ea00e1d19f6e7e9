"""Everything that version 0.1.0 wrote still loads: config, checkpoint, log, teacher, student and data set."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import load_any
from d2v_composer.config.load import load_config
from d2v_composer.models.transformer import Transformer
from helpers import GOLDEN, losses_of, run_command, train_command

RELEASE = GOLDEN / "release-0.1.0"
CHECKPOINT = "ep0-ba4-rank0.pt"
TEACHER = GOLDEN / "tiny_base.pt"


@pytest.fixture
def config() -> dict[str, Any]:
    """The config of the run as its record keeps it."""
    return yaml.safe_load((RELEASE / "run.yaml").read_text())["config"]


@pytest.fixture
def arguments(config: dict[str, Any], tmp_path: Path) -> list[str]:
    """The run's config as a YAML, with the places of this machine."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    places = {"teacher.checkpoint": TEACHER, "train_loader.local": RELEASE / "images", "save_folder": tmp_path / "run"}
    return [str(path), *(f"{key}={place}" for key, place in places.items())]


def assert_same_embeddings(ours: Transformer, expected: Transformer) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embeddings, embeddings_expected = ours.eval().embed_all(images), expected.eval().embed_all(images)
    assert embeddings.keys() == embeddings_expected.keys()
    for name, embedding in embeddings.items():
        torch.testing.assert_close(embedding, embeddings_expected[name], rtol=0, atol=0)


def only_keys_of(old: Any, new: Any) -> Any:
    """Return the new values without keys that the old ones lack."""
    return {key: only_keys_of(old[key], new[key]) for key in old} if isinstance(old, dict) else new


def test_every_key_of_a_runs_config_is_still_read(config: dict[str, Any], arguments: list[str]) -> None:
    loaded = asdict(load_config(arguments))
    for section, key in (("teacher", "checkpoint"), ("train_loader", "local")):
        config[section][key] = loaded[section][key]
    assert only_keys_of(config, loaded) == config | {"save_folder": loaded["save_folder"]}


def test_a_checkpoint_resumes_to_the_same_losses(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(RELEASE / CHECKPOINT, tmp_path / "run")
    result = run_command(*train_command(arguments))
    assert result.returncode == 0, result.stderr
    expected = {step: loss for step, loss in losses_of(RELEASE).items() if step >= 4}
    assert sorted(expected) == list(range(4, 14))
    assert losses_of(tmp_path / "run") == pytest.approx(expected, rel=2e-6)


def test_a_converted_teacher_gives_the_embeddings_of_its_source() -> None:
    assert_same_embeddings(load_teacher(RELEASE / "teacher.safetensors"), load_teacher(TEACHER))


def test_an_exported_student_gives_the_embeddings_of_its_checkpoint() -> None:
    trained, _ = load_any(RELEASE / CHECKPOINT, teacher_path=str(TEACHER))
    assert trained is not None
    assert_same_embeddings(load_student(RELEASE / "student.safetensors"), trained)

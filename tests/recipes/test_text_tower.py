"""A student of a small CLIP-like pair, trained without labels, stays aligned with the pair's text tower."""

import sys
from pathlib import Path

import pytest

from helpers import ROOT, log_of, run_command, run_training


@pytest.mark.slow
def test_zero_shot_is_kept(tmp_path: Path) -> None:
    """Minutes on one core: chance is 0.1, and a student before training is near it."""
    made = run_command(sys.executable, ROOT / "tests" / "makers" / "clip_pair.py", tmp_path, timeout=900)
    assert made.returncode == 0, made.stderr
    run_training(
        str(ROOT / "yamls" / "quickstart.yaml"),
        "teacher.model=timm/test_vit",
        f"teacher.checkpoint={tmp_path / 'teacher.safetensors'}",
        "teacher.image_size=64",
        "student.depth=2",
        "objectives={tokens: {weight: 0}, embedding: {weight: 1}}",
        f"retrieval.datasets.cifar10.class_embeddings={tmp_path / 'classes.npy'}",
        "retrieval.probes=[zero_shot]",
        "retrieval.representation=projected",
        "retrieval.baselines=[teacher]",
        "max_duration=400ba",
        "retrieval.interval=400ba",
        "precision=fp32",
        "report=false",
        f"save_folder={tmp_path / 'run'}",
        timeout=900,
    )
    log = log_of(tmp_path / "run")
    student, teacher = (log[f"metrics/cifar10/{name}zero_shot/top1"] for name in ("", "teacher/"))
    untrained, trained, whole = student[0], student[400], teacher[max(teacher)]
    print(f"zero-shot top-1: teacher {whole:.3f}, student {trained:.3f}, untrained {untrained:.3f}")
    assert f"top-1 of the pair: {whole:.4f}" in made.stdout
    assert whole > 0.3
    assert trained > untrained + 0.6 * (whole - untrained)

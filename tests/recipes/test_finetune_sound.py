"""Fine-tune a classifier of clips of several lengths."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer.sources.labeled import LabeledSamples, eval_batches
from helpers import GOLDEN, ROOT, failure, run_command, write_words


def test_batches_have_lengths_only_if_clips_are_padded() -> None:
    clips = [torch.full((size,), float(size)) for size in (1000, 900, 800, 800)]
    batches: Any = eval_batches(LabeledSamples(clips, torch.arange(4)), 2)
    (inputs, labels, lengths), (equal, last_labels) = batches
    assert (inputs.shape, lengths.tolist(), labels.tolist()) == ((2, 1000), [1000, 900], [0, 1])
    assert torch.equal(inputs[1, :900], clips[1])
    assert not inputs[1, 900:].any()
    assert torch.equal(equal, torch.stack(clips[2:]))
    assert last_labels.tolist() == [2, 3]


@pytest.mark.parametrize("train_encoder", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_teacher_of_sound_learns_words(train_encoder: str, tmp_path: Path) -> None:
    write_words(tmp_path / "words", {"train": 16, "test": 8})
    for split in ("train", "test"):
        arguments = ("convert-audio", tmp_path / "words", tmp_path / "data" / split, "--split", split)
        assert run_command(sys.executable, "-m", "d2v_composer.commands", *arguments).returncode == 0
    arguments = [
        ROOT / "recipes" / "finetune.py",
        ROOT / "yamls" / "finetune.yaml",
        f"model={GOLDEN / 'audio_base.pt'}",
        f"dataset={{format: mds, root: {tmp_path / 'data'}}}",
        f"save_folder={tmp_path / 'run'}",
        "train_loader={num_workers: 1, crop_scale: [0.08, 1.0], crop_seconds: 0.2}",
        f"train_encoder={train_encoder}",
        "precision=fp32",
        "max_duration=6ep",
        "global_train_batch_size=16",
        "device_train_microbatch_size=8",
        "report=false",
    ]
    ended = run_command(sys.executable, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "clips     48 for training, 24 for testing, 3 classes\n" in ended.stdout + ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("finetune ")]
    assert float(line.split()[1]) > 80
    line = failure(run_command(sys.executable, *arguments, "algorithms.mixup={}"), 2)
    assert line == "error: algorithms.mixup: must be null, because the model takes clips"

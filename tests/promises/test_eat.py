"""Promise 1 for EAT, data2vec 2.0's image model on spectrograms: the reference's numbers, float32, from waveforms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from d2v_composer import DistillationModel, load_student, load_teacher
from helpers import GOLDEN, assert_same_numbers, d2v, encoded_clip, failure

CHECKPOINT = GOLDEN / "eat_base.pt"


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "eat_base.npz").items()}


@pytest.fixture(scope="module")
def clips(arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both clips in one batch with noise behind the shorter one's end, (2, L), and their lengths."""
    waveforms = [arrays["waveform_0"], arrays["waveform_1"]]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = torch.randn(2, int(lengths.max()), generator=torch.Generator().manual_seed(0))
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    return batch, lengths


def compute(teacher: Any, *waveforms: Tensor) -> dict[str, Tensor]:
    """Return our arrays under the reference's names."""
    x = teacher.encode(*waveforms)
    output, ffn_outputs = teacher.forward_blocks(x)
    ours = {"local_features": teacher.encoder.local_features(*waveforms), "encoder_out": x, "teacher_out": output}
    ours |= {f"teacher_ffn_{i}": ffn_output for i, ffn_output in enumerate(ffn_outputs)}
    ours |= {f"teacher_block_{i}": layer for i, (layer, _) in enumerate(teacher.iterate_blocks(x))}
    return ours | {"targets": teacher.targets(x), "targets_patch_only": teacher.targets(x, "drop")}


@pytest.mark.parametrize(("prefix", "weights"), [("", "model"), ("ema_", "ema")])
def test_teacher(arrays: dict[str, Tensor], clips: tuple[Tensor, Tensor], prefix: str, weights: Any) -> None:
    teacher = load_teacher(CHECKPOINT, weights=weights)
    assert teacher.padding_mask(clips[1]) is None
    ours = compute(teacher, *clips)
    for name in [name for name in ours if f"{prefix}{name}" in arrays]:
        assert_same_numbers(ours[name], arrays[f"{prefix}{name}"])
    assert_close(teacher.encode(arrays["waveform_0"][None]), ours["encoder_out"][:1])


def test_another_length(tmp_path: Path, arrays: dict[str, Tensor]) -> None:
    options = ["--target-length", "112"]
    d2v("convert-teacher", CHECKPOINT, tmp_path / "long.safetensors", *options)
    ours = compute(load_teacher(tmp_path / "long.safetensors"), arrays["waveform_0"][None])
    for name, array in ours.items():
        assert_same_numbers(array, arrays[f"other_{name}"])
    arguments = [*options, "--log-mel-mean", "-6.627", "--log-mel-std", "5.359"]
    d2v("convert-teacher", CHECKPOINT, tmp_path / "own.safetensors", *arguments)
    config = load_teacher(tmp_path / "own.safetensors").config
    assert (config.log_mel_mean, config.log_mel_std) == (-6.627, 5.359)
    wrong = d2v("convert-teacher", CHECKPOINT, tmp_path / "wrong.safetensors", "--target-length", "15")
    assert failure(wrong, 2) == f"error: {CHECKPOINT}: target_length must be a multiple of 16, got 15"


def test_student(arrays: dict[str, Tensor], clips: tuple[Tensor, Tensor]) -> None:
    """Its ALiBi is over the grid of time and mels."""
    teacher = load_teacher(CHECKPOINT)
    student = teacher.build_student(depth=2, mlp_ratio=3.0)
    weights = {name.removeprefix("student."): array for name, array in arrays.items() if name.startswith("student.")}
    assert not student.load_state_dict(weights, strict=False).unexpected_keys
    model = DistillationModel(teacher, student)
    batch = {"audio": clips[0], "lengths": clips[1]}
    regression = model(batch)
    assert_same_numbers(regression.prediction, arrays["student_prediction"])
    loss = model.loss(regression, batch)
    assert_same_numbers(loss, arrays["loss"].reshape(()))
    loss.backward()
    assert_same_numbers(student.get_parameter("blocks.0.attn.qkv.weight").grad, arrays["grad_first_qkv"])


def test_embeddings_of_a_long_clip_are_the_mean_of_its_windows() -> None:
    """Each counts as long as it lasts; a clip in a padded batch gives what it gives alone."""
    student: Any = load_teacher(CHECKPOINT).build_student(depth=2).eval()
    window, hop = 63 * 160 + 400, 64 * 160
    long, short = torch.randn(2, 2 * hop + 400 + 15 * 160, generator=torch.Generator().manual_seed(0))
    parts = [long[:window], long[hop : hop + window], long[2 * hop :]]
    embedded = torch.cat([student.embed(part[None]) for part in parts])
    expected = torch.tensor([[64.0, 64, 16]]) @ embedded / 144
    assert_close(student.embed(long[None]), expected)
    batch = student.embed(torch.stack([long, short]), lengths=torch.tensor([len(long), 9000]))
    assert_close(batch, torch.cat([expected, student.embed(short[None, :9000])]))
    assert student.embed(torch.stack([long, short]), lengths=torch.tensor([len(long), 300])).isfinite().all()


@pytest.mark.slow
def test_distill_takes_it(tmp_path: Path) -> None:
    """From a folder of sound to a student's file that embeds, also for another program."""
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for seed in range(200):
        (sounds / f"{seed}.wav").write_bytes(encoded_clip(seed, 8000 + 40 * seed, "WAV"))
    settings = ["max_duration=2ba", "global_train_batch_size=8", "student.depth=1", "precision=fp32"]
    d2v("distill", sounds, "--teacher", CHECKPOINT, "--out", tmp_path / "out", *settings)
    file = tmp_path / "out" / "student.safetensors"
    d2v("embed", file, sounds, tmp_path / "embeddings.npy")
    assert np.load(tmp_path / "embeddings.npy").shape == (200, 32)
    d2v("export", file, tmp_path / "student.onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    clips = 0.1 * torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    (embeddings,) = session.run(None, {"waveforms": clips.numpy()})
    student = load_student(file)
    assert_close(torch.from_numpy(embeddings), student.embed(clips, "cls", "layer_mean"), rtol=0, atol=1e-4)

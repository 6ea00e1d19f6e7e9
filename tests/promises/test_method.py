"""Promises 1 and 2: the reference's numbers, float32 (fairseq's data2vec 2.0, and EAT from waveforms); one encoding."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from d2v_composer import DistillationModel, load_student, load_teacher
from helpers import GOLDEN, assert_same_numbers, d2v, encoded_clip, failure, succeed

IMAGES, SOUND = ["tiny_base", "tiny_alibi", "tiny_topk_noprenet"], ["audio_base", "audio_prenet"]
SOUND_TEACHERS, EAT = [*SOUND, "audio_options"], GOLDEN / "eat_base.pt"
Arrays = dict[str, Tensor]


class Golden(NamedTuple):
    """The reference's arrays, and the file that they were computed with."""

    name: str
    arrays: Arrays

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Images, waveforms or, for EAT, two clips and their lengths, with noise behind the shorter one's end."""
        if "waveform_0" not in self.arrays:
            return (self.arrays["images" if "images" in self.arrays else "waveforms"],)
        clips = [self.arrays["waveform_0"], self.arrays["waveform_1"]]
        lengths = torch.tensor([len(clip) for clip in clips])
        batch = noise(2, int(lengths.max()))
        for row, clip in zip(batch, clips, strict=True):
            row[: len(clip)] = clip
        return batch, lengths

    def teacher(self, weights: Any = "model") -> Any:
        return load_teacher(GOLDEN / f"{self.name}.pt", weights=weights)

    def distillation(self, **options: Any) -> tuple[Any, Any]:
        """Return the distillation as the reference does it, of a student with its weights, and its batch."""
        teacher, prefix = self.teacher(), "student."
        weights = {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}
        depth = len({name.split(".")[1] for name in weights})
        mlp_ratio = len(weights["blocks.0.mlp.fc1.bias"]) / teacher.config.embed_dim
        student = teacher.build_student(depth=depth, mlp_ratio=mlp_ratio)
        assert not student.load_state_dict(weights, strict=False).unexpected_keys
        if self.name in SOUND:
            options["final_layer_norm"] = True
        model = DistillationModel(teacher, student, objectives={"tokens": options})
        sound = dict(zip(("audio", "lengths"), self.inputs, strict=False))
        return model, self.inputs[0] if self.name in IMAGES else sound


@pytest.fixture(scope="module", params=[*IMAGES, *SOUND, "eat_base"])
def golden(request: pytest.FixtureRequest) -> Golden:
    arrays = np.load(GOLDEN / f"{request.param}.npz")
    return Golden(request.param, {name: torch.from_numpy(array) for name, array in arrays.items()})


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def compute(teacher: Any, inputs: Tensor, lengths: Tensor | None = None) -> Arrays:
    """Return our arrays under the reference's names."""
    mask, x = teacher.padding_mask(lengths), teacher.encode(inputs, lengths)
    is_fairseqs_sound = hasattr(teacher.encoder.config, "extractor_mode")
    output, ffn_outputs = teacher.forward_blocks(x, padding_mask=mask)
    assert len(ffn_outputs) == teacher.config.depth
    arrays = {"encoder_out": x, "teacher_out": output}
    arrays |= {f"teacher_ffn_{i}": ffn_output for i, ffn_output in enumerate(ffn_outputs)}
    arrays |= {f"teacher_block_{i}": layer for i, (layer, _) in enumerate(teacher.iterate_blocks(x, padding_mask=mask))}
    as_fairseqs_sound = {"final_layer_norm": True} if is_fairseqs_sound else {}
    arrays["targets"] = teacher.targets(x, padding_mask=mask, **as_fairseqs_sound)
    arrays["targets_patch_only"] = arrays["targets_as_configured"] = teacher.targets(x, "drop", padding_mask=mask)
    if hasattr(teacher.encoder, "local_features"):
        arrays["local_features"] = teacher.encoder.local_features(inputs, lengths)
    return arrays | (compute_prenet(teacher, arrays["local_features"], inputs, lengths) if is_fairseqs_sound else {})


def compute_prenet(teacher: Any, local_features: Tensor, waveforms: Tensor, lengths: Tensor | None) -> Arrays:
    encoder, mask = teacher.encoder, teacher.padding_mask(lengths)
    padding_BN = None if mask is None else mask[:, teacher.num_extra_tokens :]
    inputs: Any = SimpleNamespace(values=waveforms, lengths=lengths)
    x = encoder.embed_tokens(inputs)
    arrays = {"positions": encoder.positions(local_features, padding_BN), "encoder_norm": x}
    for i, (block, bias) in enumerate(zip(encoder.block_list, encoder.block_contexts(x, mask), strict=True)):
        x, arrays[f"prenet_ffn_{i}"] = block(x, bias)
        arrays[f"prenet_block_{i}"] = x
    return arrays


def assert_same_arrays(ours: Arrays, golden: Golden, prefix: str = "") -> None:
    """Compare all that the reference has of a teacher under names with a prefix."""
    kinds = tuple(prefix + kind for kind in ("encoder_", "local_", "positions", "prenet_", "targets", "teacher_"))
    names = [name.removeprefix(prefix) for name in golden.arrays if name.startswith(kinds)]
    assert len(names) > len([name for name in ours if name.startswith("teacher_ffn_")])
    for name in names:
        assert_same_numbers(ours[name], golden.arrays[prefix + name])


@pytest.mark.parametrize("golden", [*IMAGES, *SOUND_TEACHERS, "eat_base"], indirect=True)
def test_a_teacher_computes_the_references_numbers(golden: Golden) -> None:
    """Promise 1: encoder, blocks and targets, with and without extra tokens, have the reference's numbers."""
    assert_same_arrays(compute(golden.teacher(), *golden.inputs), golden)


@pytest.mark.parametrize("golden", [*SOUND_TEACHERS, "eat_base"], indirect=True)
def test_averaged_weights_compute_the_references_numbers(golden: Golden) -> None:
    """Promise 1: with weights='ema', arrays are those of the reference's averaged weights."""
    averaged = golden.teacher("ema")
    assert averaged.config == golden.teacher().config
    assert_same_arrays(compute(averaged, *golden.inputs), golden, "ema_")


@pytest.mark.parametrize("golden", SOUND_TEACHERS, indirect=True)
def test_waveforms_and_alibi_are_the_references(golden: Golden) -> None:
    """Promise 1: normalized waveforms and ALiBi's biases have the reference's numbers."""
    teacher, arrays = golden.teacher(), golden.arrays
    assert_same_numbers(teacher.encoder.prepare(arrays["waveforms"]), arrays["inputs"])
    ours = compute(teacher, arrays["waveforms"])
    contexts = [*teacher.encoder.block_contexts(ours["encoder_norm"]), *teacher.block_contexts(ours["encoder_out"])]
    biases, reference = torch.cat(contexts), arrays["alibi"].expand(len(contexts), -1, -1, -1)
    assert_same_numbers(biases[:, : reference.shape[1]], reference)
    assert not biases[:, reference.shape[1] :].any()


@pytest.mark.parametrize("golden", SOUND_TEACHERS, indirect=True)
def test_a_clip_in_a_padded_batch_gives_what_it_gives_alone(golden: Golden) -> None:
    """Promise 1: mask and outputs are the reference's of each clip alone."""
    teacher, arrays, lengths = golden.teacher(), golden.arrays, golden.arrays["lengths"]
    ours = compute(teacher, padded_waveforms(arrays), lengths)
    assert torch.equal(teacher.padding_mask(lengths), arrays["padded_frame_mask"])
    for i in range(len(lengths)):
        prefix = f"alone_{i}_"
        alone = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        assert len(alone) > teacher.config.depth
        for name, reference in alone.items():
            assert_same_numbers(ours[name][i : i + 1, : reference.shape[1]], reference)


def padded_waveforms(arrays: Arrays) -> Tensor:
    """Return waveforms that normalization turns into the padded inputs, with noise behind their ends."""
    padding, clips = arrays["padding_mask"], arrays["padded_inputs"].double()
    variance_B1 = clips.square().sum(dim=1, keepdim=True) / (~padding).sum(dim=1, keepdim=True)
    waveforms = clips * (1e-5 / (1 - variance_B1)).sqrt()  # variance = v / (v + 1e-5), with v that of the waveform
    return torch.where(padding, noise(*padding.shape), waveforms.float())


@pytest.mark.parametrize("golden", ["audio_base"], indirect=True)
def test_short_clips_have_the_references_outputs(golden: Golden) -> None:
    """Promise 1: clips of a few frames have the reference's outputs."""
    names = [name for name in golden.arrays if name.startswith("short_") and name.endswith("_inputs")]
    assert names
    for name in names:
        output, _ = golden.teacher().forward_blocks(golden.teacher().encode(golden.arrays[name]))
        assert_same_numbers(output, golden.arrays[name.replace("_inputs", "_teacher_out")])


def test_a_student_computes_the_references_numbers(golden: Golden) -> None:
    """Promise 1: ALiBi, blocks and prediction have the reference's numbers."""
    arrays = golden.arrays
    model, batch = golden.distillation()
    x = model.teacher.encode(*golden.inputs)
    if "student_alibi" in arrays:
        assert_same_numbers(model.student.block_contexts(x)[0][0], arrays["student_alibi"])
    output, ffn_outputs = model.student.forward_blocks(x)
    assert_same_numbers(output, arrays["student_out"])
    for i, ffn_output in enumerate(ffn_outputs):
        assert_same_numbers(ffn_output, arrays[f"student_ffn_{i}"])
    assert_same_numbers(model(batch)["tokens"].prediction, arrays["student_prediction"])


def test_loss_and_gradients_are_the_references(golden: Golden) -> None:
    """Promise 1: the first block's and the last block's gradients have the reference's numbers, too."""
    model, batch = golden.distillation(prediction="layer_mean")
    loss = model.loss(model(batch), batch)
    assert_same_numbers(loss, golden.arrays["loss"].reshape(()))
    loss.backward()
    last = len(model.student.block_list) - 1
    for name, gradient in {"blocks.0.attn.qkv": "grad_first_qkv", f"blocks.{last}.mlp.fc2": "grad_last_fc2"}.items():
        assert_same_numbers(model.student.get_parameter(f"{name}.weight").grad, golden.arrays[gradient])


def test_the_loss_of_the_last_block_is_the_references(golden: Golden) -> None:
    """Promise 1: it is the reference's loss with prediction: last_block."""
    model, batch = golden.distillation(prediction="last_block")
    assert_same_numbers(model.loss(model(batch), batch), golden.arrays["loss_last_block"].reshape(()))


@pytest.mark.parametrize("golden", IMAGES, indirect=True)
def test_only_the_students_blocks_are_trained_and_images_are_encoded_once(golden: Golden) -> None:
    """Promise 2: tests/models shows that sizes and FLOPs are the paper's."""
    (model, images), calls = golden.distillation(), []
    model.teacher.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.loss(model(images), images)
    assert calls == [1]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = {f"student.{name}" for name, _ in model.student.named_parameters() if name.startswith("blocks.")}
    assert trained <= blocks
    assert {name.split(".")[-2] for name in blocks - trained} == {"norm2"}  # the last one: it is after the targets


@pytest.mark.parametrize("golden", ["eat_base"], indirect=True)
def test_eat_of_another_length_computes_the_references_numbers(golden: Golden, tmp_path: Path) -> None:
    """Promise 1: convert-teacher sets length, mean and deviation of the spectrograms, as the reference has them."""
    options, long, other = ["--target-length", "112"], tmp_path / "long.safetensors", tmp_path / "other.safetensors"
    succeed("convert-teacher", EAT, long, *options)
    assert_same_arrays(compute(load_teacher(long), golden.arrays["waveform_0"][None]), golden, "other_")
    succeed("convert-teacher", EAT, other, *options, "--log-mel-mean", "-6.627", "--log-mel-std", "5.359")
    config = load_teacher(other).config
    assert (config.log_mel_mean, config.log_mel_std) == (-6.627, 5.359)
    wrong = d2v("convert-teacher", EAT, tmp_path / "wrong.safetensors", "--target-length", "15")
    assert failure(wrong, 2) == f"error: {EAT}: target_length must be a multiple of 16, got 15"


HOP, FRAME = 160, 400  # of EAT's spectrograms, in samples of a waveform
LONG = [64, 64, 16]  # the frames in each window of a long clip


def num_samples(num_frames: int) -> int:
    return (num_frames - 1) * HOP + FRAME


@pytest.fixture(scope="module")
def eats_student() -> Any:
    return load_teacher(EAT).build_student(depth=2).eval()


def test_embeddings_of_a_long_clip_of_eat_are_the_mean_of_its_windows(eats_student: Any) -> None:
    """Promise 1: a window counts as long as it lasts."""
    clip = noise(1, num_samples(sum(LONG)))
    starts = [0, LONG[0] * HOP, (LONG[0] + LONG[1]) * HOP]
    windows = [clip[:, start:][:, : num_samples(frames)] for start, frames in zip(starts, LONG, strict=True)]
    embeddings = torch.cat([eats_student.embed(window) for window in windows])
    assert_close(eats_student.embed(clip), torch.tensor([LONG]) / sum(LONG) @ embeddings)


def test_a_long_and_a_short_clip_of_eat_give_together_what_they_give_alone(eats_student: Any) -> None:
    """Promise 1: in a padded batch, the noise behind the short clip's end does not count."""
    clips, end = noise(2, num_samples(sum(LONG))), 9000
    alone = torch.cat([eats_student.embed(clips[:1]), eats_student.embed(clips[1:, :end])])
    assert_close(eats_student.embed(clips, lengths=torch.tensor([clips.shape[1], end])), alone)


def test_a_clip_of_eat_without_a_whole_frame_has_an_embedding(eats_student: Any) -> None:
    """Promise 1: a long clip stands beside it in the batch."""
    clips = noise(2, num_samples(sum(LONG)))
    assert eats_student.embed(clips, lengths=torch.tensor([clips.shape[1], FRAME - 100])).isfinite().all()


@pytest.mark.slow
def test_distill_takes_eat(tmp_path: Path) -> None:
    """Promise 17: a folder of sound becomes a student's file that embeds, also in another program."""
    sounds, out = tmp_path / "sounds", tmp_path / "out"
    sounds.mkdir()
    for seed in range(200):
        (sounds / f"{seed}.wav").write_bytes(encoded_clip(seed, 8000 + 40 * seed, "WAV"))
    settings = ["max_duration=2ba", "global_train_batch_size=8", "student.depth=1", "precision=fp32"]
    succeed("distill", sounds, "--teacher", EAT, "--out", out, *settings)
    succeed("embed", out / "student.safetensors", sounds, tmp_path / "embeddings.npy")
    assert np.load(tmp_path / "embeddings.npy").shape == (200, 32)
    succeed("export", out / "student.safetensors", tmp_path / "student.onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    clips = 0.1 * noise(3, 8000)
    (embeddings,) = onnxruntime.InferenceSession(tmp_path / "student.onnx").run(None, {"waveforms": clips.numpy()})
    expected = load_student(out / "student.safetensors").embed(clips)
    assert_close(torch.from_numpy(embeddings), expected, rtol=0, atol=1e-4)

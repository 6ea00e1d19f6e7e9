"""Audio: padding changes nothing, odd encoders, cost, hostile sizes, files; the reference's numbers are a promise."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from d2v_composer.checkpoints.fairseq import convert_teacher
from d2v_composer.checkpoints.load import load_student, load_teacher, save_student
from d2v_composer.models.audio import LogMel
from d2v_composer.models.classification import Classifier
from d2v_composer.models.configs import RELEASED, AudioEncoderConfig, TeacherConfig, parse_convolutions
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.encoder import Inputs
from d2v_composer.objectives.compilation import compile_model
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, assert_same_numbers, refused_by, time_limit
from steps import flops_of_a_step

BASE = GOLDEN / "audio_base.pt"
LENGTHS = torch.tensor([9000, 6137, 12000])


@pytest.fixture
def teacher() -> Any:
    return load_teacher(BASE)


def sound(lengths: Tensor = LENGTHS, seed: int = 0) -> Tensor:
    """Noise of several loudnesses, also behind the clips' ends."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.tensor([0.3, 0.003, 0.05])[: len(lengths), None]
    return torch.randn(len(lengths), int(lengths.max()), generator=generator) * loudness + 0.01


def random_teacher(**sizes: Any) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {"embed_dim": 16, "num_heads": 4, "prenet_depth": 1}
    small |= {"feature_encoder_spec": "[(16, 10, 5)] + [(16, 3, 2)] * 2", "conv_pos_groups": 4, "num_alibi_heads": 4}
    encoder = AudioEncoderConfig(**(small | sizes))
    return Data2Vec2(TeacherConfig(encoder=encoder, depth=2, average_top_k_layers=2, final_layer_norm=False))


def test_the_loss_of_a_padded_batch_is_that_of_its_clips(teacher: Any) -> None:
    """Each clip counts alike, in the loss and its gradient: so it depends on neither ranks nor microbatches."""
    student = teacher.build_student(depth=2)
    waveforms = sound()
    choices: list[Any] = [{}, {"extra_tokens": "drop"}, {"prediction": "last_block"}, {"final_layer_norm": True}]
    for options in choices:
        model: Any = DistillationModel(teacher, student, **options)
        model.zero_grad()
        loss = model.loss(model({"audio": waveforms, "lengths": LENGTHS}), {})
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
        model.zero_grad()
        losses = [model.loss(model(waveforms[i : i + 1, :length]), {}) for i, length in enumerate(LENGTHS)]
        total = torch.stack(losses).mean()
        total.backward()
        assert_same_numbers(loss, total)
        again = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
        for ours, alone in zip(gradients, again, strict=True):
            assert (ours - alone).norm() <= 1e-4 * alone.norm() + 1e-6


@pytest.mark.parametrize("options", [{"extractor_mode": "default"}, {"num_extra_tokens": 2}, {"conv_pos_pre_ln": True}])
def test_embeddings_do_not_depend_on_padding(options: dict[str, Any]) -> None:
    teacher = random_teacher(**options)
    waveforms, student = sound(), teacher.build_student(depth=1, alibi=False, normalization="layer")
    embed = partial(teacher.embed_all, layer_mean=student.layer_mean)  # of "layer", whose means over frames are not 0
    for embed_all in (embed, student.embed_all):
        embeddings = embed_all(waveforms, LENGTHS)
        assert list(embeddings) == [
            f"{representation}_{pooling}"
            for representation, pooling in itertools.product(("output", "layer_mean"), ("mean", "mean_patches"))
        ]
        for i, length in enumerate(LENGTHS):
            for name, alone in embed_all(waveforms[i : i + 1, :length]).items():
                assert_same_numbers(embeddings[name][i : i + 1], alone)
    raw = teacher.encoder.raw(Inputs(waveforms, LENGTHS))
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(raw[i : i + 1], teacher.encoder.raw(Inputs(waveforms[i : i + 1, :length])))


def test_the_groups_of_the_default_extractor_are_torchs() -> None:
    encoder, waveforms = random_teacher(extractor_mode="default").encoder, sound()
    first, *rest = encoder.local_encoder["conv_layers"]
    torch.nn.init.uniform_(first["2"].bias)
    x = torch.nn.functional.gelu(first["2"](first["0"](encoder.prepare(waveforms)[:, None])))
    for layer in rest:
        x = torch.nn.functional.gelu(layer["0"](x))
    project = encoder.project_features
    expected = project["2"](project["1"](x.transpose(1, 2)))
    assert_same_numbers(encoder.local_features(waveforms), expected)


def test_one_alibi_serves_all_lengths(teacher: Any) -> None:
    student = teacher.build_student(depth=1)
    for length in (40, 30, 50):
        x = torch.zeros(1, length, 48)
        bias = student.block_contexts(x)[0]
        torch.testing.assert_close(bias, student.alibi.build(length))
    assert [alibi.shape[-1] for alibi in student.alibi.kept.values()] == [60]  # half as long again as the one before


@pytest.mark.parametrize("num_samples", [8000, 12345])
def test_the_cost_of_a_step(teacher: Any, num_samples: int) -> None:
    model = DistillationModel(teacher, teacher.build_student(depth=2))
    waveforms = sound(torch.tensor([num_samples] * 2))
    assert model.flops_per_batch(waveforms) == pytest.approx(flops_of_a_step(model, waveforms), rel=0.03)


def test_the_log_mel_spectrogram_is_kaldis() -> None:
    arrays = np.load(GOLDEN / "eat_base.npz")
    names = [name for name in arrays.files if name.startswith("waveform_")]
    assert names
    for name in names:
        waveform, expected = (torch.from_numpy(arrays[key]) for key in (name, name.replace("waveform", "fbank")))
        assert_same_numbers(LogMel()(waveform.reshape(1, -1))[0][0], expected)


def test_wrong_waveforms_and_lengths(teacher: Any) -> None:
    for waveforms in (torch.zeros(2, 399), torch.zeros(2, 1, 800), torch.zeros(2, 800, dtype=torch.int16)):
        with pytest.raises(ValueError, match=r"waveforms must be \(B, L\) float in \[-1, 1\] of at least 400 samples"):
            teacher.encode(waveforms)
    for lengths in ([399, 800], [800, 801]):
        with pytest.raises(ValueError, match="lengths must be from 400 to 800 samples, got"):
            teacher.encode(torch.zeros(2, 800), torch.tensor(lengths))
    images = load_teacher(GOLDEN / "tiny_base.pt")
    assert images.padding_mask(None) is None
    with pytest.raises(ValueError, match="lengths: image inputs have none"):
        images.padding_mask(torch.tensor([32]))
    assert not teacher.encode(torch.full((1, 800), 0.5)).isnan().any()  # a constant clip


def test_an_embedding_without_cls(teacher: Any) -> None:
    student = teacher.build_student(depth=1)
    embedding = student.embed(sound(), lengths=LENGTHS)
    assert torch.equal(embedding, student.embed(sound(), "mean_patches", lengths=LENGTHS))
    with pytest.raises(ValueError, match="no embedding 'output_cls'; this model has: output_mean, "):
        student.embed(sound(), pooling="cls")


@pytest.mark.parametrize("train_encoder", [False, True])
def test_a_classifier_of_padded_clips(teacher: Any, train_encoder: bool) -> None:
    """Its logits are those of each clip alone, and all that trains has a gradient."""
    model = Classifier(teacher.build_student(depth=1), 3, train_encoder=train_encoder)
    torch.nn.init.normal_(model.head.weight)
    batch = model.prepare((sound(), torch.tensor([0, 2, 1]), LENGTHS))
    assert torch.equal(batch[0], sound())  # the encoder normalizes
    logits = model(batch)
    for i, length in enumerate(LENGTHS):
        alone = model((sound()[i : i + 1, :length], torch.tensor([0])))
        assert_same_numbers(logits[i : i + 1], alone)
    model.loss(logits, batch).backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == trained
    assert any("local_encoder" in name for name in trained) == train_encoder


@pytest.mark.slow
def test_more_lengths_than_torch_compiles_by_default(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a graph of its own. Beyond the limit a run would fail, and not go on without compiling."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = DistillationModel(teacher, teacher.build_student(depth=1))
    torch._dynamo.reset()
    compile_model(model)
    counters.clear()
    (block,) = model.student.block_list
    for _ in range(2):
        for length in range(10, 20):
            block(torch.zeros(1, length, 48))
    assert counters["stats"]["unique_graphs"] == 10
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 10)
    with pytest.raises(FailOnRecompileLimitHit):
        block(torch.zeros(1, 20, 48))


@pytest.mark.slow
def test_compiled_steps_give_the_same_loss(teacher: Any) -> None:
    model = DistillationModel(teacher, teacher.build_student(depth=1))
    batch = {"audio": sound(), "lengths": LENGTHS}
    expected = model.loss(model(batch), batch)
    torch._dynamo.reset()
    compile_model(model, choice="default")
    assert_same_numbers(model.loss(model(batch), batch), expected)


def test_half_precision_is_close(teacher: Any) -> None:
    expected = teacher.targets(teacher.encode(sound(), LENGTHS), padding_mask=teacher.padding_mask(LENGTHS))
    teacher.cast_weights(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mask = teacher.padding_mask(LENGTHS)
        targets = teacher.targets(teacher.encode(sound(), LENGTHS), padding_mask=mask)
    assert targets.dtype == torch.float32
    assert torch.cosine_similarity(targets[~mask], expected[~mask], dim=-1).mean() > 0.99


# Files.


def test_a_converted_teacher_and_a_students_file_compute_the_same(teacher: Any, tmp_path: Path) -> None:
    converted, left = convert_teacher(BASE, tmp_path / "teacher.safetensors")
    assert all(".decoder." in name for name in left)
    assert "MIT" in converted.provenance["license"]
    again = load_teacher(tmp_path / "teacher.safetensors")
    assert again.config == teacher.config
    x = teacher.encode(sound(), LENGTHS)
    assert torch.equal(again.encode(sound(), LENGTHS), x)
    for final_layer_norm in (None, True):
        student = again.build_student(depth=1, final_layer_norm=final_layer_norm)
        save_student(student, tmp_path / "student.safetensors")
        loaded = load_student(tmp_path / "student.safetensors")
        assert loaded.config == student.config
        assert loaded.encoder.config == again.encoder.config
        for name, embedding in student.embed_all(sound(), LENGTHS).items():
            assert torch.equal(loaded.embed_all(sound(), LENGTHS)[name], embedding)


def test_an_older_layout_of_alibis_scale(teacher: Any, tmp_path: Path) -> None:
    checkpoint = torch.load(BASE, weights_only=True)
    name = "modality_encoders.AUDIO.alibi_scale"
    checkpoint["model"][name] = checkpoint["model"][name][0]
    torch.save(checkpoint, tmp_path / "teacher.pt")
    older: Any = load_teacher(tmp_path / "teacher.pt")
    assert torch.equal(older.encoder.alibi_scale, teacher.encoder.alibi_scale)


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ("base_audio", (93_163_532, 85_054_464, 8_109_068)),
        ("large_audio", (313_275_408, 201_539_584, 111_735_824)),
    ],
)
def test_released_sizes(size: str, counts: tuple[int, ...]) -> None:
    with torch.device("meta"):
        teacher = Data2Vec2(RELEASED[size])
    assert counts == tuple(
        sum(map(torch.numel, part.parameters())) for part in (teacher, teacher.blocks, teacher.encoder)
    )


SPECS = {
    "[(512, 10, 5)] + [(512, 3, 2)] * 2": [(512, 10, 5), (512, 3, 2), (512, 3, 2)],
    "[(4, 3, 2), (8, 3, 2)] * 2 + [(4,2,1)]": [(4, 3, 2), (8, 3, 2), (4, 3, 2), (8, 3, 2), (4, 2, 1)],
}
HOSTILE_SPECS = [
    "__import__('os').system('true')",
    "[(512, 10, 5)] * 1000000",
    "[(4, 2, 1)]" + " * 33" * 100,
    "[(4, 2, 1)]" + " + [(4, 2, 1)]" * 40,
    "(" * 400 + ")" * 400,
    "[(512, 10)]",
    "[(512, 10, 5.0)]",
    "[(512, -10, 5)]",
    "[(10 ** 9, 10, 5)]",
    "[(4, 2, 1)] * -1",
    "[" * 90 + "]" * 90,
    "[lambda: 1]",
    "\0",
    "",
    "[]",
    "5 * 5",
    "[(4, 2, 1)]" * 100_000,
    None,
    7,
]


def test_convolutions_are_parsed_and_never_evaluated(tmp_path: Path) -> None:
    for spec, expected in SPECS.items():
        assert parse_convolutions(spec) == expected
    assert AudioEncoderConfig().min_samples() == 400
    assert [AudioEncoderConfig().num_frames(size) for size in (400, 719, 720, 16_000, 160_000)] == [1, 1, 2, 49, 499]
    checkpoint = torch.load(BASE, weights_only=True)
    section = checkpoint["cfg"]["model"]["modalities"]["audio"]
    with time_limit(60):
        for spec in HOSTILE_SPECS:
            section["feature_encoder_spec"] = spec
            torch.save(checkpoint, tmp_path / "teacher.pt")
            if spec is not None:  # a field without a value takes the default
                refused = refused_by(load_teacher, tmp_path / "teacher.pt")
                assert "feature_encoder_spec" in refused or "number of convolutions" in refused
                assert len(refused) < 400


WRONG: dict[str, Any] = {
    "conv_pos_depth": 10**6,
    "conv_pos_width": 10**9,
    "conv_pos_groups": 7,
    "extractor_mode": "other",
    "prenet_depth": 10**9,
    "num_alibi_heads": 13,
    "learned_alibi": True,
    "conv_pos_pre_ln": "yes",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sizes_are_refused(name: str, tmp_path: Path) -> None:
    checkpoint = torch.load(BASE, weights_only=True)
    checkpoint["cfg"]["model"]["modalities"]["audio"][name] = WRONG[name]
    torch.save(checkpoint, tmp_path / "teacher.pt")
    refused = refused_by(load_teacher, tmp_path / "teacher.pt")
    assert name in refused or "not learned" in refused


def test_long_clips_of_eat_embed_in_a_batch_as_alone() -> None:
    eat: Any = load_teacher(GOLDEN / "eat_base.pt")
    clips = sound(torch.tensor([2, 2]) * eat.encoder.window)
    alone = torch.cat([eat.embed(clip[None]) for clip in clips])
    assert_same_numbers(eat.embed(clips), alone)


def test_a_mean_that_is_zero_is_no_embedding(teacher: Any) -> None:
    waveforms = torch.randn(2, 8000)
    assert list(teacher.embed_all(waveforms)) == teacher.embedding_names == ["output_mean", "output_mean_patches"]
    layers = teacher.build_student(depth=1, normalization="layer")
    assert layers.embedding_names[2:] == ["layer_mean_mean", "layer_mean_mean_patches"]
    assert layers.embed(waveforms, "mean", "layer_mean").abs().mean() > 0.1
    with pytest.raises(InputError, match="no layer_mean_mean; it has output_mean, output_mean_patches"):
        teacher.choose_embedding("mean", "layer_mean")

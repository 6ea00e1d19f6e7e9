"""Audio: padding changes nothing, odd encoders, cost, hostile sizes; the reference's numbers are a promise."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.models.configs import RELEASED, AudioEncoderConfig, TeacherConfig, parse_convolutions
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.encoder import Inputs, count_flop
from d2v_composer.objectives.compilation import compile_model
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, assert_same_numbers, refused_by
from steps import flops_of_a_step, total_loss

BASE = GOLDEN / "audio_base.pt"
LENGTHS = torch.tensor([9000, 6137, 12000])


@pytest.fixture
def teacher() -> Any:
    return load_teacher(BASE)


def sound(lengths: Tensor = LENGTHS) -> Tensor:
    """Noise of several loudnesses, also behind the clips' ends."""
    noise = torch.randn(len(lengths), int(lengths.max()), generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([0.3, 0.003, 0.05])[: len(lengths), None] + 0.01


def clips_of(waveforms: Tensor) -> list[Tensor]:
    """Return each clip as a batch of its own, without padding."""
    return [waveforms[i : i + 1, :length] for i, length in enumerate(LENGTHS)]


@pytest.fixture
def group_normalized() -> Any:
    """A teacher with the extractor that no golden file has, and with extra tokens."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "num_heads": 4, "num_alibi_heads": 4, "conv_pos_groups": 4}
    sizes |= {"feature_encoder_spec": "[(16, 10, 5)] + [(16, 3, 2)] * 2", "extractor_mode": "default"}
    encoder = AudioEncoderConfig(prenet_depth=1, num_extra_tokens=2, **sizes)
    return Data2Vec2(TeacherConfig(encoder=encoder, depth=2, average_top_k_layers=2, final_layer_norm=False))


def gradients_of(student: Any, loss: Tensor) -> list[Tensor]:
    student.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in student.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "options", [{}, {"extra_tokens": "drop"}, {"prediction": "last_block"}, {"final_layer_norm": True}]
)
def test_the_loss_of_a_padded_batch_is_that_of_its_clips(teacher: Any, options: Any) -> None:
    """Each clip counts alike, in the loss and its gradient: so it depends on neither ranks nor microbatches."""
    student = teacher.build_student(depth=2)
    model = DistillationModel(teacher, student, objectives={"tokens": options})
    loss = total_loss(model, {"audio": sound(), "lengths": LENGTHS})
    gradients = gradients_of(student, loss)
    alone = torch.stack([total_loss(model, clip) for clip in clips_of(sound())]).mean()
    assert_same_numbers(loss, alone)
    for ours, expected in zip(gradients, gradients_of(student, alone), strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def test_embeddings_do_not_depend_on_padding(group_normalized: Any) -> None:
    """Layer means are of normalization "layer", whose means over frames are not 0."""
    student = group_normalized.build_student(depth=1, alibi=False, normalization="layer")
    for embed_all in (partial(group_normalized.embed_all, layer_mean=student.layer_mean), student.embed_all):
        embeddings = embed_all(sound(), LENGTHS)
        names = ["output_mean", "output_mean_patches", "layer_mean_mean", "layer_mean_mean_patches", "embedding"]
        assert list(embeddings) == names
        alone = [embed_all(clip) for clip in clips_of(sound())]
        for name, embedding in embeddings.items():
            for i in range(len(LENGTHS)):
                assert_same_numbers(embedding[i : i + 1], alone[i][name])
    raw = group_normalized.encoder.baseline_of
    alone = torch.cat([raw(Inputs(clip)) for clip in clips_of(sound())])
    torch.testing.assert_close(raw(Inputs(sound(), LENGTHS)), alone)


def test_the_groups_of_the_default_extractor_are_torchs(group_normalized: Any) -> None:
    encoder, waveforms = group_normalized.encoder, sound()
    first, *rest = encoder.local_encoder["conv_layers"]
    torch.nn.init.uniform_(first["2"].bias)
    x = torch.nn.functional.gelu(first["2"](first["0"](encoder.prepare(waveforms)[:, None])))
    for layer in rest:
        x = torch.nn.functional.gelu(layer["0"](x))
    project = encoder.project_features
    expected = project["2"](project["1"](x.transpose(1, 2)))
    assert_same_numbers(encoder.local_features(waveforms), expected)


@pytest.mark.parametrize("num_samples", [8000, 12345])
def test_the_cost_of_a_step(teacher: Any, num_samples: int) -> None:
    model = DistillationModel(teacher, teacher.build_student(depth=2))
    waveforms = sound(torch.tensor([num_samples] * 2))
    assert model.flops_per_batch(waveforms) == pytest.approx(flops_of_a_step(model, waveforms), rel=0.03)


@pytest.mark.parametrize("name", [BASE.name, "eat_base.pt"])
def test_operations_are_counted_for_a_clip_of_five_seconds(name: str) -> None:
    teacher, state = load_teacher(GOLDEN / name), torch.get_rng_state()
    expected = count_flop(teacher, partial(teacher.embed_all, torch.zeros(1, 5 * 16_000)))
    assert teacher.flop() == sum(expected.values())
    assert torch.equal(torch.get_rng_state(), state), "a run's random numbers depend on its count of operations"


def test_wrong_waveforms_and_lengths(teacher: Any) -> None:
    for waveforms in (torch.zeros(2, 399), torch.zeros(2, 1, 800), torch.zeros(2, 800, dtype=torch.int16)):
        with pytest.raises(ValueError, match=r"must be \(B, L\) float, with L at least 400 and values in \[-1, 1\]"):
            teacher.encode(waveforms)
    for lengths in ([399, 800], [800, 801]):
        with pytest.raises(ValueError, match="lengths must be from 400 to 800 samples, got"):
            teacher.encode(torch.zeros(2, 800), torch.tensor(lengths))
    images = load_teacher(GOLDEN / "tiny_base.pt")
    assert images.padding_mask(None) is None
    with pytest.raises(ValueError, match="lengths: expected None for image inputs"):
        images.padding_mask(torch.tensor([32]))
    assert not teacher.encode(torch.full((1, 800), 0.5)).isnan().any()  # a constant clip


def test_without_cls_and_a_final_norm_there_are_fewer_embeddings(teacher: Any) -> None:
    assert list(teacher.embed_all(sound())) == ["output_mean", "output_mean_patches", "embedding"]
    student = teacher.build_student(depth=1, normalization="layer")
    assert student.raw_names[2:] == ["layer_mean_mean", "layer_mean_mean_patches"]
    assert student.embed(sound(), "mean", "layer_mean").abs().mean() > 0.1
    assert torch.equal(student.embed(sound()), student.embed(sound(), "mean"))
    with pytest.raises(ValueError, match="this model has no output_cls; it has output_mean, "):
        student.embed(sound(), pooling="cls")
    with pytest.raises(InputError, match="no layer_mean_mean; it has output_mean, output_mean_patches"):
        teacher.choose_embedding("mean", "layer_mean")


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


def test_half_precision_is_close(teacher: Any) -> None:
    mask = teacher.padding_mask(LENGTHS)
    expected = teacher.targets(teacher.encode(sound(), LENGTHS), padding_mask=mask)
    teacher.cast_weights(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        targets = teacher.targets(teacher.encode(sound(), LENGTHS), padding_mask=mask)
    assert targets.dtype == torch.float32
    assert torch.cosine_similarity(targets[~mask], expected[~mask], dim=-1).mean() > 0.99


# Sizes.


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


def with_sizes(folder: Path, **sizes: Any) -> Path:
    """Write a teacher with other sizes of its encoder."""
    checkpoint = torch.load(BASE, weights_only=True)
    checkpoint["cfg"]["model"]["modalities"]["audio"] |= sizes
    torch.save(checkpoint, folder / "teacher.pt")
    return folder / "teacher.pt"


def test_convolutions_are_parsed() -> None:
    assert parse_convolutions("[(512, 10, 5)] + [(512, 3, 2)] * 2") == [(512, 10, 5), (512, 3, 2), (512, 3, 2)]
    nested = parse_convolutions("[(4, 3, 2), (8, 3, 2)] * 2 + [(4,2,1)]")
    assert nested == [(4, 3, 2), (8, 3, 2), (4, 3, 2), (8, 3, 2), (4, 2, 1)]
    assert AudioEncoderConfig().min_samples() == 400
    assert [AudioEncoderConfig().num_frames(size) for size in (400, 719, 720, 16_000, 160_000)] == [1, 1, 2, 49, 499]


HOSTILE_SPECS: dict[str, Any] = {
    "code": "__import__('os').system('true')",
    "a lambda": "[lambda: 1]",
    "a million": "[(512, 10, 5)] * 1000000",
    "products": "[(4, 2, 1)]" + " * 33" * 100,
    "sums": "[(4, 2, 1)]" + " + [(4, 2, 1)]" * 40,
    "parentheses": "(" * 400 + ")" * 400,
    "nested lists": "[" * 90 + "]" * 90,
    "a long text": "[(4, 2, 1)]" * 100_000,
    "two numbers": "[(512, 10)]",
    "a fraction": "[(512, 10, 5.0)]",
    "a negative number": "[(512, -10, 5)]",
    "a power": "[(10 ** 9, 10, 5)]",
    "a negative count": "[(4, 2, 1)] * -1",
    "no list": "5 * 5",
    "an empty list": "[]",
    "nothing": "",
    "a zero byte": "\0",
    "a number": 7,
}


@pytest.mark.parametrize("what", HOSTILE_SPECS)
def test_convolutions_are_never_evaluated(what: str, tmp_path: Path) -> None:
    refused = refused_by(load_teacher, with_sizes(tmp_path, feature_encoder_spec=HOSTILE_SPECS[what]))
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
    refused = refused_by(load_teacher, with_sizes(tmp_path, **{name: WRONG[name]}))
    assert name in refused or "not learned" in refused

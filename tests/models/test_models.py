"""Sizes, cost, freezing, options and checkpoints of the models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from d2v_composer.checkpoints.fairseq import load_data2vec2
from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.models.configs import ImageEncoderConfig, TeacherConfig
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.images import resize, resize_in_float
from d2v_composer.models.targets import norm_mean
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.objectives.tokens import regression_loss
from d2v_composer.system.errors import InputError
from helpers import GOLDEN
from steps import flops_of_a_step, random_images, total_loss, train

# The paper's cost of one image, in operations (2 per multiply-accumulate).
PAPER_FLOPS = 71.1e9
IMAGES = random_images()


@pytest.fixture(scope="module")
def paper_model() -> DistillationModel:
    """The paper's sizes with random weights."""
    torch.manual_seed(0)
    encoder = ImageEncoderConfig(prenet_depth=2, num_extra_tokens=1)
    config = TeacherConfig(encoder=encoder, depth=10, average_top_k_layers=10)
    teacher = Data2Vec2(config)
    return DistillationModel(teacher, teacher.build_student())


@pytest.fixture
def teacher() -> Data2Vec2:
    return load_data2vec2(GOLDEN / "tiny_base.pt", "model")


def test_sizes_are_the_papers(paper_model: DistillationModel) -> None:
    groups = (
        paper_model.student.blocks.parameters(),
        paper_model.teacher.parameters(),
        paper_model.state_dict().values(),
    )
    student_size, teacher_size, saved_size = (sum(map(torch.numel, tensors)) for tensors in groups)
    assert student_size == saved_size == 29_537_280
    assert round(teacher_size / 1e6, 1) == 85.8
    assert not any(parameter.requires_grad for parameter in paper_model.teacher.parameters())


def test_flops_are_the_papers(paper_model: DistillationModel) -> None:
    images = torch.randn(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        total_loss(paper_model, images).backward()
    paper_model.zero_grad()
    # A second pass of the encoder would be 1.085 of it; the counter misses the CPU's fused attention, 2 %.
    assert 0.95 * PAPER_FLOPS < counter.get_total_flops() < 1.02 * PAPER_FLOPS
    assert paper_model.flops_per_batch(images) == pytest.approx(PAPER_FLOPS, rel=0.002)


@pytest.mark.parametrize("width", [None, 20])
@pytest.mark.parametrize("tokens", [{}, {"prediction": "last_block", "extra_tokens": "drop"}])
def test_every_trainable_parameter_gets_a_gradient(
    teacher: Data2Vec2, tokens: dict[str, str], width: int | None
) -> None:
    student = teacher.build_student(depth=2, embed_dim=width)
    train(DistillationModel(teacher, student, objectives={"tokens": tokens}), IMAGES, steps=1)
    assert not any(module.training for module in teacher.modules())


def test_dropped_extra_tokens_mirror_the_target(teacher: Data2Vec2) -> None:
    student = teacher.build_student(depth=2)
    model = DistillationModel(teacher, student, objectives={"tokens": {"extra_tokens": "drop"}})
    regression = model(IMAGES)["tokens"]
    x = teacher.encode(IMAGES)
    patches_only = norm_mean(layer[:, 1:] for layer in student.forward_blocks(x)[1])
    torch.testing.assert_close(regression.prediction, patches_only)
    torch.testing.assert_close(regression.target, teacher.targets(x, "drop"))
    assert regression.cls_prediction is not None
    cls_loss = (regression.cls_prediction - regression.target.mean(1)).square().mean()
    patch_loss = (regression.prediction - regression.target).square().mean()
    torch.testing.assert_close(regression_loss(regression), patch_loss + 0.01 * cls_loss)


@pytest.mark.parametrize("name", ["tiny_base", "tiny_alibi", "audio_prenet"])
def test_blocks_move_between_encoder_and_teacher(name: str) -> None:
    """They compute the same wherever they are, on padded clips too."""
    whole: Any = load_data2vec2(GOLDEN / f"{name}.pt", "model")
    inputs, lengths = whole.encoder.noise(3), None
    if name == "audio_prenet":
        inputs, lengths = inputs[:, :12_000], torch.tensor([9000, 6137, 12_000])
    mask, num_blocks = whole.padding_mask(lengths), whole.config.prenet_depth + whole.config.depth
    x = whole.encode(inputs, lengths)
    output, ffn_outputs = whole.forward_blocks(x, mask)
    for first_blocks in range(num_blocks):
        teacher: Any = load_teacher(GOLDEN / f"{name}.pt", first_blocks=first_blocks)
        moved_x = teacher.encode(inputs, lengths)
        moved_output, moved_ffn_outputs = teacher.forward_blocks(moved_x, mask)
        assert torch.equal(moved_output, output)
        assert len(moved_ffn_outputs) == teacher.config.depth == num_blocks - first_blocks
        for ours, theirs in zip(moved_ffn_outputs[::-1], ffn_outputs[::-1], strict=False):
            assert torch.equal(ours, theirs)
        if teacher.config.depth >= whole.config.average_top_k_layers:
            targets = teacher.targets(moved_x, padding_mask=mask)
            assert torch.equal(targets, whole.targets(x, padding_mask=mask))
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not any(module.training for module in teacher.modules())
        total_loss(DistillationModel(teacher, teacher.build_student(depth=1)), inputs).backward()
        assert teacher.flop() == whole.flop()


@pytest.mark.parametrize(
    ("num_extra_tokens", "final_layer_norm", "is_padded"),
    [(0, True, False), (2, True, False), (0, True, True), (2, False, True)],
)
def test_norm_means_gradient(
    num_extra_tokens: int, final_layer_norm: bool, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # finite differences in float32 are too coarse
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 6, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]
    padding_mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if is_padded else None
    without_padding: Any = num_extra_tokens, "instance", final_layer_norm
    options: Any = *without_padding, padding_mask
    assert torch.autograd.gradcheck(lambda *layers: norm_mean(layers, *options), layers)
    with torch.no_grad():
        expected = norm_mean(layers, *options)
        alone = norm_mean([layer[1:, :4] for layer in layers], *without_padding)
    assert torch.equal(norm_mean(layers, *options), expected)
    assert not is_padded or torch.allclose(expected[1:, :4], alone)
    halves = [layer.detach().half().requires_grad_() for layer in layers]
    norm_mean(halves, *options).square().mul(expected).sum().backward()
    assert all(layer.grad is not None and layer.grad.dtype == torch.float16 for layer in halves)


@pytest.mark.usefixtures("process_group")
def test_ddp_broadcasts_no_constant(teacher: Data2Vec2) -> None:
    wrapped: Any = DistributedDataParallel(DistillationModel(teacher, teacher.build_student(depth=1)))
    assert list(wrapped.module.buffers())
    assert not wrapped.modules_buffers


def test_a_student_starts_from_the_teachers_blocks(teacher: Data2Vec2) -> None:
    whole = teacher.build_student(depth=2, mlp_ratio=4.0, alibi=False, init="teacher_blocks")
    x = teacher.encode(IMAGES)
    for ours, theirs in zip(whole.forward_blocks(x)[1], teacher.forward_blocks(x)[1], strict=False):
        torch.testing.assert_close(ours, theirs)
    attention = teacher.build_student(depth=2, init="teacher_attention")
    torch.testing.assert_close(attention.block_list[1].attn.qkv.weight, teacher.block_list[1].attn.qkv.weight)
    assert attention.block_list[1].attn.qkv.weight.requires_grad
    with pytest.raises(ValueError, match="at most 3, the number of the teacher's blocks after the shared encoder"):
        teacher.build_student(depth=4, init="teacher_attention")


def test_copied_attention_that_is_frozen_stays_the_teachers(teacher: Data2Vec2) -> None:
    model = DistillationModel(teacher, teacher.build_student(depth=2, init="teacher_attention", freeze_copied=True))
    before = {name: weight.clone() for name, weight in model.student.state_dict().items()}
    assert model.flops_per_batch(IMAGES) == flops_of_a_step(model, IMAGES)
    train(model, IMAGES, steps=2)
    for ours, theirs in zip(model.student.block_list, teacher.block_list, strict=False):
        assert all(torch.equal(*pair) for pair in zip(ours.attn.parameters(), theirs.attn.parameters(), strict=True))
    changed = {name for name, weight in model.student.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[2] for name in changed} == {"mlp", "norm1", "norm2"}
    for init in ("random", "teacher_blocks"):
        with pytest.raises(ValueError, match="freeze_copied: must be false unless init is teacher_attention"):
            teacher.build_student(init=init, freeze_copied=True)


@pytest.mark.parametrize("prediction", ["layer_mean", "last_block"])
@pytest.mark.parametrize("width", [None, 20])
def test_the_cost_of_a_step(teacher: Data2Vec2, width: int | None, prediction: Any) -> None:
    student = teacher.build_student(depth=2, embed_dim=width)
    model = DistillationModel(teacher, student, objectives={"tokens": {"prediction": prediction}})
    assert model.flops_per_batch(IMAGES) == flops_of_a_step(model, IMAGES)


def test_a_narrow_student(teacher: Data2Vec2) -> None:
    """Its prediction has the teacher's width, its embeddings its own."""
    student = teacher.build_student(depth=2, embed_dim=20)
    model = DistillationModel(teacher, student)
    layers = student.forward_blocks(teacher.encode(IMAGES))[1]
    widths = {tensor.shape[-1] for tensor in (*layers, *model.embed_all(IMAGES).values())}
    assert widths == {20}
    torch.testing.assert_close(student.embed(IMAGES, "mean", "layer_mean"), norm_mean(layers).mean(1))
    head = model.objectives["tokens"].head
    torch.testing.assert_close(model(IMAGES)["tokens"].prediction, norm_mean(head(layer) for layer in layers))


def test_widths_of_a_student(teacher: Data2Vec2) -> None:
    """A head keeps the teacher's 8 channels at least; the teacher's width is that of a student without a width."""
    heads = {width: teacher.build_student(embed_dim=width).block_list[0].attn.num_heads for width in range(1, 49)}
    assert [heads[width] for width in (1, 8, 12, 20, 24, 25, 36, 47, 48)] == [1, 1, 1, 2, 3, 1, 4, 1, 6]
    plain, whole = (teacher.build_student(embed_dim=width).state_dict() for width in (None, 48))
    assert plain.keys() == whole.keys()
    allowed = {0: "greater than or equal to 1", 49: "a whole number from 1 to 48", 2.0: "a whole number"}
    for width, rule in allowed.items():
        with pytest.raises(ValueError, match=f"embed_dim must be {rule}, got {width}"):
            teacher.build_student(embed_dim=width)  # pyright: ignore[reportArgumentType]
    for init in ("teacher_attention", "teacher_blocks"):
        with pytest.raises(ValueError, match=f"^init {init} needs a student with the teacher's sizes: size mismatch"):
            teacher.build_student(depth=1, embed_dim=24, init=init)


@pytest.mark.parametrize("size", [20, 100])
@pytest.mark.parametrize("resize_images", [resize, resize_in_float])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_of_another_size_are_resized_as_pillow_does(
    interpolation: str, resize_images: Callable[[Tensor, tuple[int, int], str], Tensor], size: int
) -> None:
    images = random_images(3, size)
    resized = resize_images(images, (48, 48), interpolation)
    assert resized.shape == (3, 3, 48, 48)
    for ours, image in zip(resized, images, strict=True):
        whole = Image.fromarray(image.permute(1, 2, 0).numpy())
        pillow = whole.resize((48, 48), Image.Resampling[interpolation.upper()])
        difference = (ours.float() - torch.from_numpy(np.array(pillow)).permute(2, 0, 1)).abs()
        assert difference.max() <= 2
        # Bilinear weights of these sizes often give a half, which floats round otherwise than Pillow.
        assert difference.mean() < (0.025 if interpolation == "bicubic" else 0.3)


def test_uint8_images_are_normalized_as_float_ones(teacher: Data2Vec2) -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    normalized = (IMAGES / 255 - mean) / std
    torch.testing.assert_close(teacher.encode(IMAGES), teacher.encode(normalized))
    with pytest.raises(ValueError, match=r"float and normalized; got \(4, 3, 16, 16\) float32"):
        teacher.encode(normalized[..., :16, :16])


def test_pixels_from_0_to_1_are_named_once(teacher: Data2Vec2, caplog: pytest.LogCaptureFixture) -> None:
    """Only the first images are looked at: on a GPU, each look would wait for it."""
    for _ in range(2):
        teacher.encode(IMAGES / 255)
    assert caplog.messages == ["expected float images that are normalized, or uint8 images, got floats from 0 to 1"]
    caplog.clear()
    other = load_data2vec2(GOLDEN / "tiny_base.pt", "model")
    for images in (IMAGES, teacher.encoder.example(2), IMAGES / 255 - 0.5, IMAGES / 255):
        other.encode(images)
    assert not caplog.messages


def test_embeddings_are_poolings_of_output_and_layer_mean(teacher: Data2Vec2) -> None:
    student, x = teacher.build_student(depth=2), teacher.encode(IMAGES)
    output, ffn_outputs = student.forward_blocks(x)
    torch.testing.assert_close(student.embed(IMAGES), output[:, 0])
    torch.testing.assert_close(student.embed(IMAGES, pooling="mean"), output.mean(1))
    patches = norm_mean(ffn_outputs)[:, 1:]
    torch.testing.assert_close(student.embed(IMAGES, "mean_patches", "layer_mean"), patches.mean(1))
    of_teacher = DistillationModel(teacher, student).retrieval_baselines()["teacher"](IMAGES)
    torch.testing.assert_close(of_teacher["layer_mean_mean"], teacher.targets(x).mean(1))
    assert len(of_teacher) == 7
    with pytest.raises(ValueError, match="this model has no output_max; it has output_cls"):
        student.embed(IMAGES, pooling="max")  # pyright: ignore[reportArgumentType]


def test_embeddings_take_no_gradient_and_training_beside_them_keeps_its_own(teacher: Data2Vec2) -> None:
    student = teacher.build_student(depth=2)
    assert not student.embed(IMAGES).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        student.embed(IMAGES)  # autocast could keep the weights that it casts here, without gradient
        student.forward_blocks(student.encode(IMAGES))[0].float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.blocks.parameters())


# What is changed in a checkpoint → the error.
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"student.blocks.1.mlp.fc2.weight": None}, r"blocks\.1\.mlp\.fc2\.weight' is missing in the checkpoint"),
    (
        {"student.blocks.1.mlp.fc2.weight": torch.zeros(1, 144)},
        r"shape \(1, 144\) in the checkpoint, and has the shape \(48, 144\) in the model",
    ),
    ({"student.blocks.9.norm1.bias": torch.zeros(48)}, r"student\.blocks\.9.* is missing in the model"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_a_checkpoint_of_other_tensors_is_refused(teacher: Data2Vec2, changes: dict[str, Any], message: str) -> None:
    model = DistillationModel(teacher, teacher.build_student(depth=2))
    checkpoint = model.state_dict()
    assert set(checkpoint) == {f"student.blocks.{name}" for name in model.student.blocks.state_dict()}
    model.load_state_dict(checkpoint)
    broken = {name: tensor for name, tensor in (checkpoint | changes).items() if tensor is not None}
    with pytest.raises(InputError, match=message):
        model.load_state_dict(broken, strict=False)

"""Teachers from timm compute what timm computes: features, FFN outputs, positions at other sizes."""

from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from d2v_composer.models.configs import TeacherConfig, height_and_width
from d2v_composer.models.encoder import Tokens
from d2v_composer.models.timm_network import projection_width
from d2v_composer.models.timm_teacher import TimmTeacher, build_timm_model, teacher_config
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.system.errors import InputError
from steps import train

SMALL = {"embed_dim": 48, "num_heads": 4, "depth": 4, "img_size": 64}
SMALL_14 = SMALL | {"img_size": 56}
WIDE = SMALL | {"img_size": (32, 64)}

# Name → options and blocks of the encoder. Together they have every kind of block, token and position.
MODELS: dict[str, tuple[dict[str, Any], int | None]] = {
    "test_vit": ({}, None),
    "vit_small_patch14_dinov2": (SMALL_14, None),
    "vit_small_patch14_reg4_dinov2": (SMALL_14 | {"img_size": (28, 56)}, 2),  # registers, dynamic size
    "vit_giant_patch14_dinov2": (SMALL_14, 1),  # SwiGLU
    "vit_base_patch16_clip_224": (WIDE, 1),  # norm_pre
    "vit_base_patch16_siglip_224": (WIDE, 0),  # no CLS, attention pooling
    "vit_base_patch16_siglip_gap_224": (SMALL, 1),
    "vit_base_patch16_rpn_224": (SMALL, 1),  # post-norm branches
    "vit_dlittle_patch16_reg1_gap_256": (SMALL, 1),  # differential attention, q/k norm
    "aimv2_large_patch14_224": (SMALL_14, 1),  # RMS norms
    "deit3_small_patch16_224": (SMALL, 3),
    "deit_tiny_distilled_patch16_224": (SMALL, 1),  # two tokens
    "eva02_tiny_patch14_224": (SMALL_14, 1),
    "eva02_base_patch16_clip_224": (WIDE, 0),
    "eva02_enormous_patch14_clip_224": (SMALL_14, 1),  # post-norm branches
    "vit_small_patch16_dinov3": (WIDE, 2),
    "vit_small_plus_patch16_dinov3_qkvb": (SMALL, None),
    "vit_small_patch16_rope_224": (SMALL, 0),
    "vit_small_patch16_rope_mixed_ape_224": (WIDE, 2),  # rotary positions of each block
    "vit_pe_core_tiny_patch16_384": (SMALL, 1),
    "beit_base_patch16_224": (WIDE, 1),  # relative bias of each block
    "beitv2_base_patch16_224": (SMALL | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, 2),
}


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Set every parameter, LayerScale and positions too, to values that keep the scale of the activations."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.ndim >= 2 and parameter.shape[0] > 1 and not name.endswith("table")
        scale, shift = (parameter[0].numel() ** -0.5, 0) if is_matrix else (0.5, 0.5 * ("norm" in name))
        parameter.copy_(scale * noise + shift)
    return model.eval()


def build(name: str) -> tuple[nn.Module, TeacherConfig]:
    options, first_blocks = MODELS[name]
    model = randomise(timm.create_model(name, num_classes=0, **options))
    return model, teacher_config(f"timm/{name}", model, first_blocks)


def images_for(config: TeacherConfig, count: int = 2) -> Tensor:
    size = height_and_width(config.image_size)
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features_and_ffn_outputs(model: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run timm's own forward pass; what passes drop_path2 is added to the residual stream."""
    added: list[Tensor] = []
    hooks = [block.drop_path2.register_forward_hook(lambda *args: added.append(args[2])) for block in model.blocks]
    features = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return features, added


def assert_equal_to_1e_5(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 1e-3
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_teacher_computes_what_timm_does(name: str) -> None:
    model, config = build(name)
    images = images_for(config)
    features, added = features_and_ffn_outputs(model, images)
    teacher = TimmTeacher(model, config)
    with torch.no_grad():
        x = teacher.encode(images)
        output, ffn_outputs = teacher.forward_blocks(x)
        *_, last = teacher.features(Tokens(x)).layers("block")
        assert torch.equal(teacher.norm(last), output)
    assert_equal_to_1e_5(output, features)
    assert len(ffn_outputs) == config.depth == len(added) - config.first_blocks
    for ours, theirs in zip(ffn_outputs, added[config.first_blocks :], strict=True):
        assert_equal_to_1e_5(ours, theirs)


# Name → the layers that a student regresses.
SOME = {
    "vit_small_patch14_reg4_dinov2": "ffn",
    "vit_base_patch16_siglip_224": "block",
    "vit_small_patch16_dinov3": "ffn",
    "beit_base_patch16_224": "block",
}


def build_teacher(name: str) -> TimmTeacher:
    return TimmTeacher(*build(name))


@pytest.mark.parametrize("name", SOME)
def test_its_parts_compile_without_a_break(name: str) -> None:
    teacher = build_teacher(name)
    images = images_for(teacher.config)
    with torch.no_grad():
        expected = teacher.forward_blocks(teacher.encode(images))[0]
        torch._dynamo.reset()  # each model counts as a recompilation
        encoder = teacher.encoder
        encoder.embed_tokens = torch.compile(encoder.embed_tokens, fullgraph=True, backend="eager")
        for block in [*encoder.block_list, *teacher.block_list]:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
        assert_close(teacher.forward_blocks(teacher.encode(images))[0], expected)


@pytest.mark.parametrize(("name", "source"), SOME.items())
def test_a_student_learns_on_its_encoder(name: str, source: Any) -> None:
    torch.manual_seed(0)
    teacher = build_teacher(name)
    student = teacher.build_student(depth=2)
    model = DistillationModel(teacher, student, objectives={"tokens": {"source": source}})
    assert student.get_parameter("blocks.0.norm0.weight").requires_grad
    assert set(model.state_dict()) == {f"student.blocks.{name}" for name in student.blocks.state_dict()}
    losses = train(model, images_for(teacher.config, 4), steps=5)
    assert losses[-1] < 0.9 * losses[0]


def test_registers_are_not_cls() -> None:
    teacher = build_teacher("vit_dlittle_patch16_reg1_gap_256")
    assert (teacher.num_extra_tokens, teacher.has_cls_token) == (1, False)
    student = teacher.build_student(depth=1)
    images = images_for(teacher.config)
    names = {f"{name}_{pooling}" for name in ("output", "layer_mean") for pooling in ("mean", "mean_patches")}
    assert set(student.embed_all(images)) == {*names, "embedding"}
    assert student.embedding[:2] == teacher.embedding._replace(made_by="raw")[:2] == ("output_mean_patches", "raw")
    with pytest.raises(InputError, match=r"this model has no .*_cls; it has output_mean"):
        student.choose_embedding("cls")
    model = DistillationModel(teacher, student, objectives={"tokens": {"extra_tokens": "drop"}})
    regression = model(images)["tokens"]
    assert regression.cls_prediction is None
    assert regression.prediction.shape == regression.target.shape == (2, 16, 48)


def test_a_student_starts_from_an_attention_of_its_kind() -> None:
    teacher = build_teacher("vit_small_patch14_dinov2")
    student = teacher.build_student(depth=2, init="teacher_attention")
    assert_close(student.block_list[1].attn.qkv.weight, teacher.block_list[1].block.attn.qkv.weight)
    with pytest.raises(ValueError, match="position bias, but timm/vit_small_patch16_dinov3 uses one of them"):
        build_teacher("vit_small_patch16_dinov3").build_student(init="teacher_attention")


PATCHES_14 = "timm/vit_small_patch14_dinov2"


@pytest.mark.parametrize(
    ("model", "image_size", "message"),
    [
        ("vit_small_patch14_dinov2", None, "no model 'vit_small_patch14_dinov2'; expected timm/NAME"),
        ("timm/vit_smal", None, "no model 'timm/vit_smal'"),
        (f"{PATCHES_14}.mine", None, r"Invalid pretrained tag \(mine\)"),
        ("timm/vit_base_patch16_xp_224", None, "class ParallelScalingBlock are not supported; expected one of Block"),
        (PATCHES_14, 14 * 1000, "patches must be a whole number from 1 to 16384, got 1000000"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused(model: str, image_size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"\A.*{message}.*\Z"):
        build_timm_model(model, image_size)


def test_a_sixth_of_the_blocks_is_the_encoders() -> None:
    built = build_timm_model(PATCHES_14, "112x168")
    config = teacher_config(PATCHES_14, built)
    assert (config.first_blocks, config.depth, config.average_top_k_layers) == (2, 10, 10)
    assert (config.image_size, config.grid_size, config.num_tokens) == ((112, 168), (8, 12), 97)
    assert config.prenet_depth == 2


# Name → outputs of the projection. CLS; attention pooling; the mean, with CLS before it; CLS without a projection.
HEADS = {
    "vit_base_patch16_clip_224": 64,
    "vit_base_patch16_siglip_224": 0,
    "vit_pe_core_tiny_patch16_384": 64,
    "vit_base_patch16_siglip_gap_224": 0,
    "vit_small_patch14_dinov2": 0,
}


@pytest.mark.parametrize(("name", "outputs"), HEADS.items())
def test_its_image_embedding_is_timms(name: str, outputs: int) -> None:
    """Where it is a text tower's, it is the teacher's embedding; elsewhere, the teacher has a raw one like it."""
    options, first_blocks = MODELS[name]
    model: Any = randomise(timm.create_model(name, num_classes=outputs, **options))
    config = teacher_config(f"timm/{name}", model, first_blocks)
    images = images_for(config)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images))
        is_joint = bool(outputs) or model.attn_pool is not None
        if not is_joint:
            expected = model.forward_features(images)
            expected = (
                expected[:, 0] if model.global_pool == "token" else expected[:, model.num_prefix_tokens :].mean(1)
            )
    teacher = TimmTeacher(model, config, has_head=is_joint)
    assert_equal_to_1e_5(teacher.embed(images), expected)
    assert teacher.embedding.width == expected.shape[1]
    assert (teacher.embedding.of == "joint") == is_joint
    torch.manual_seed(0)
    student = teacher.build_student(depth=1)
    distillation = DistillationModel(teacher, student, objectives={"tokens": {}, "embedding": {"weight": 1.0}})
    assert_equal_to_1e_5(distillation(images)["embedding"].target, normalize(expected))
    assert student.embed(images).shape == expected.shape
    train(distillation, images, steps=1)
    assert {name.split(".")[1] for name in distillation.state_dict()} == {"blocks", "alignment"}


def test_which_of_timms_models_have_a_projection() -> None:
    """All whose names say that they have a text tower, and no classifier."""
    names = [
        name
        for module in ("vision_transformer", "eva", "beit")
        for name in timm.list_models(module=module, pretrained=True)
    ]
    outputs = {name: projection_width(cast("Any", timm.get_pretrained_cfg(name)).num_classes) for name in names}
    with_projection = {name for name, count in outputs.items() if count}
    assert len(with_projection) > 50
    has_text = {name for name in names if ("_clip_" in name or "_pe_core_" in name) and "ft_in" not in name}
    assert with_projection == has_text

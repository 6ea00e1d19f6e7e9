"""A student of any architecture: a timm model whose features have a grid."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn.functional import layer_norm

from d2v_composer import DistillationModel, load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.checkpoints.timm_student import timm_call
from d2v_composer.models.configs import ImageEncoderConfig, TeacherConfig, TimmNetworkConfig
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.timm_network import TimmStudent
from d2v_composer.models.timm_teacher import TimmTeacher, teacher_config
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, slow
from small_vits import random_vit
from steps import flops_of_a_step, random_images, train

# Features as (B, C, height, width), with a wider pooled feature, as (B, height, width, C), as tokens with CLS.
MODELS = {
    "test_resnet": (1, 1),
    "mobilenetv3_small_050": (1, 1),
    "test_mambaout": (1, 1),
    "test_vit": (2, 2),
}
IMAGES = random_images()


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_teacher(GOLDEN / "tiny_base.pt")


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_whole(teacher: Any, name: str) -> None:
    """All that a loss reads, and nothing else: DDP accepts no trained parameter without gradient."""
    torch.manual_seed(0)
    student = teacher.build_student(model=f"timm/{name}")
    model = DistillationModel(teacher, student)
    assert student.encoder.grid_size == MODELS[name]
    frozen = [key for key, parameter in student.named_parameters() if not parameter.requires_grad]
    assert all("head.fc" in key or "classifier" in key or ".fc." in key or ".head." in key for key in frozen)
    losses = train(model, IMAGES, steps=4, lr=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert {key.split(".")[0] for key in model.state_dict()} == {"student", "objectives"}
    embeddings = student.eval().embed_all(IMAGES)
    assert list(embeddings) == [*student.raw_names, "embedding"]


def test_what_one_gets_is_timms(teacher: Any) -> None:
    student = teacher.build_student(model="timm/mobilenetv3_small_050").eval()
    theirs: Any = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    theirs.load_state_dict(student.encoder.model.state_dict())
    with torch.no_grad():
        features = theirs.forward_features(student.encoder.prepare(IMAGES))
        pooled = theirs.forward_head(features, pre_logits=True)
        assert torch.equal(theirs(student.encoder.prepare(IMAGES)), pooled)
    torch.testing.assert_close(student.embed(IMAGES, "cls"), pooled)
    torch.testing.assert_close(student.embed(IMAGES, "mean"), features.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("name", "size", "problem"),
    [
        ("deit_tiny_distilled_patch16_224", 32, ""),  # two classifiers
        slow("eva02_tiny_patch14_224", 28, ""),  # none, unless one asks for it
        ("test_vit_relpos", 32, ""),  # another size, which no weight shows
        slow("efficientformer_l1", 224, ""),  # whole numbers among the weights
        slow("levit_128s", 32, ""),  # two, each after a BatchNorm, which is new and changes nothing
        slow("repvit_m0_9", 32, ""),
        slow("caformer_s18", 32, "is invalid for input of size"),
    ],
)
def test_a_file_computes_the_same_in_timm_or_is_not_written(tmp_path: Path, name: str, size: int, problem: str) -> None:
    """The features of a student, and the logits of a fine-tuned one."""
    torch.manual_seed(0)
    data = {"timm": timm.__version__, "image_size": size, "interpolation": "bicubic"}
    student = TimmStudent(TimmNetworkConfig(model=f"timm/{name}", **data)).eval()
    for key, buffer in student.named_buffers():
        if "running_" in key:  # as after training
            buffer.add_(torch.rand_like(buffer))
    path, pictures = tmp_path / "student.safetensors", student.encoder.prepare(random_images(2, size))
    save_student(student, path)
    expected = student.embed(pictures)
    model = eval(timm_call(student, path)).eval()
    torch.testing.assert_close(model(pictures), expected)
    student.head = torch.nn.Linear(expected.shape[1], 3)
    if problem:
        with pytest.raises(InputError, match=f"timm would not compute what the student computes .*{problem}"):
            save_student(student, tmp_path / "classifier.safetensors")
        assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]
        return
    save_student(student, path)
    logits = eval(timm_call(student, path)).eval()(pictures)
    torch.testing.assert_close(logits, student.head(expected), rtol=1e-5, atol=1e-5)
    student.head = None
    student.align(torch.randn(5, expected.shape[1]), torch.randn(5), "output_mean")
    save_student(student, path)
    aligned = student.embed(pictures)
    torch.testing.assert_close(eval(timm_call(student, path)).eval()(pictures), aligned, rtol=1e-5, atol=1e-5)
    again = load_student(path)
    assert again.embedding == student.embedding
    assert torch.equal(again.embed(pictures), aligned)


def test_registers_are_left_out() -> None:
    """CLS, four registers, 4 × 4 patches."""
    built, pictures = random_vit("vit_small_patch14_reg4_dinov2", img_size=56), random_images(2, 56)
    teacher = TimmTeacher(built, teacher_config("timm/vit_small_patch14_reg4_dinov2", built))
    student = teacher.build_student(model="timm/resnet10t")
    model = DistillationModel(teacher, student, objectives={"tokens": {"source": "block"}})
    _, targets = model.frozen_pass(model.inputs_of(pictures))
    layers = [block for block, _ in teacher.iterate_blocks(teacher.encode(pictures))]
    kept = [torch.cat([layer[:, :1], layer[:, 5:]], dim=1) for layer in layers]
    expected = layer_norm(torch.stack([layer_norm(layer, (384,)) for layer in kept]).mean(dim=0), (384,))
    torch.testing.assert_close(targets["tokens"], expected)
    assert model(pictures)["tokens"].prediction.shape == expected.shape


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_cost_of_a_step(teacher: Any, name: str) -> None:
    model = DistillationModel(teacher, teacher.build_student(model=f"timm/{name}")).eval()
    assert model.flops_per_batch(IMAGES) == pytest.approx(flops_of_a_step(model, IMAGES), rel=0.02)


def test_what_only_the_pooled_feature_needs_does_not_train_without_cls() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoderConfig(embed_dim=32, num_heads=2, image_size=32, patch_size=8, prenet_depth=1)
    teacher = Data2Vec2(TeacherConfig(encoder=encoder, depth=2, average_top_k_layers=2), {})
    assert not teacher.has_cls_token
    student = teacher.build_student(model="timm/mobilenetv3_small_050")
    train(DistillationModel(teacher, student), IMAGES, steps=1)
    assert not student.get_parameter("encoder.model.conv_head.weight").requires_grad


@pytest.mark.parametrize("name", ["coat_tiny", "qwen3_vit_88m_enc"])
def test_a_model_without_a_grid_is_no_student(teacher: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"timm/{name} gives no grid of features for"):
        teacher.build_student(model=f"timm/{name}")


def test_a_teacher_of_sound_has_no_such_student() -> None:
    with pytest.raises(ValueError, match="takes images, but this teacher takes audio"):
        load_teacher(GOLDEN / "audio_base.pt").build_student(model="timm/resnet10t")

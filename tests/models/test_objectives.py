"""Students with an encoder of their own, and several objectives."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, normalize

from d2v_composer import load_teacher
from d2v_composer.models.configs import StudentConfig
from d2v_composer.models.images import ImageEncoder
from d2v_composer.models.student import Student
from d2v_composer.objectives.compilation import compile_model
from d2v_composer.objectives.distillation import DistillationModel
from helpers import GOLDEN
from steps import flops_of_a_step, random_images, total_loss, train

IMAGES, OTHER_IMAGES = random_images(), random_images(seed=2)


@pytest.fixture
def teacher() -> Any:
    return load_teacher(GOLDEN / "tiny_base.pt")


def with_own_encoder(teacher: Any) -> Student:
    torch.manual_seed(0)
    return Student(ImageEncoder(teacher.encoder.config), StudentConfig(depth=2, mlp_ratio=2.0))


def model_with(teacher: Any, student: Any, embedding: float = 0.0, **tokens: Any) -> DistillationModel:
    return DistillationModel(teacher, student, objectives={"tokens": tokens, "embedding": {"weight": embedding}})


def count_calls(*modules: nn.Module) -> Counter[nn.Module]:
    calls: Counter[nn.Module] = Counter()
    for module in modules:
        module.register_forward_hook(lambda module, *_: calls.update([module]))
    return calls


def test_a_student_trains_its_own_encoder(teacher: Any) -> None:
    student = with_own_encoder(teacher)
    model = DistillationModel(teacher, student)
    calls = count_calls(student.encoder, teacher.encoder)
    before = {name: weight.clone() for name, weight in student.encoder.named_parameters() if weight.requires_grad}
    losses = train(model, IMAGES)
    assert calls == {student.encoder: len(losses), teacher.encoder: len(losses)}
    assert losses[-1] < 0.9 * losses[0]
    assert not any(torch.equal(student.encoder.get_parameter(name), weight) for name, weight in before.items())
    assert not teacher.encoder.training
    assert set(model.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    again = DistillationModel(teacher, with_own_encoder(teacher))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval().embed_all(IMAGES), model.eval().embed_all(IMAGES))


def test_a_frozen_encoder_of_its_own_is_no_part_of_a_checkpoint(teacher: Any) -> None:
    student = with_own_encoder(teacher)
    student.encoder.freeze()
    model = DistillationModel(teacher, student)
    train(model, IMAGES, steps=1)
    assert set(model.state_dict()) == {f"student.blocks.{name}" for name in student.blocks.state_dict()}


def test_the_cost_of_a_step_with_an_encoder_of_its_own(teacher: Any) -> None:
    model = DistillationModel(teacher, with_own_encoder(teacher))
    assert model.flops_per_batch(IMAGES) == flops_of_a_step(model, IMAGES)


def with_two_objectives() -> DistillationModel:
    both = load_teacher(GOLDEN / "tiny_base.pt")
    objectives = {"tokens": {}, "embedding": {"weight": 0.5}}
    return DistillationModel(both, both.build_student(depth=2), objectives=objectives)


def test_the_share_of_cls(teacher: Any) -> None:
    """1 / T is as of any token; half of the loss is that of all patches."""
    torch.manual_seed(0)
    student = teacher.build_student(depth=2)
    usual, same, half = (model_with(teacher, student, cls_weight=share) for share in (None, 1 / 17, 0.5))
    outputs = usual(IMAGES)
    regression = outputs["tokens"]
    errors_BT = (regression.prediction - regression.target).square().mean(dim=-1)
    assert errors_BT.shape[1] == 17
    torch.testing.assert_close(same.loss(outputs, IMAGES), usual.loss(outputs, IMAGES))
    expected = (errors_BT[:, 0].mean() + errors_BT[:, 1:].mean()) / 2
    torch.testing.assert_close(half.loss(outputs, IMAGES), expected)
    with pytest.raises(ValueError, match="cls_weight: allowed only with extra_tokens 'regress' and a teacher"):
        model_with(teacher, student, extra_tokens="drop", cls_weight=0.5)


def test_the_embedding_of_data2vec() -> None:
    """CLS of the output, by its cosine, beside the tokens; encoder and teacher run once for both."""
    teacher = load_teacher(GOLDEN / "tiny_base.pt")
    torch.manual_seed(0)
    student = teacher.build_student(depth=2)
    model = model_with(teacher, student, embedding=2.0, weight=0.5)
    parts = {teacher.encoder, *teacher.block_list, *student.block_list}
    calls = count_calls(*parts)
    results = model(IMAGES)
    assert calls == dict.fromkeys(parts, 1)
    theirs, _ = teacher.forward_blocks(teacher.encode(IMAGES))
    torch.testing.assert_close(results["embedding"].target, normalize(theirs[:, 0]))
    tokens = DistillationModel(teacher, teacher.build_student(depth=2))
    tokens.student.load_state_dict(student.state_dict(), strict=False)
    cosines = (normalize(student.embed(IMAGES)) * normalize(teacher.embed(IMAGES))).sum(dim=1)
    expected = {"tokens": tokens.loss(tokens(IMAGES), IMAGES), "embedding": 1 - cosines.mean()}
    weighted = 0.5 * expected["tokens"] + 2 * expected["embedding"]
    torch.testing.assert_close(dict(model.loss(results, IMAGES)), expected | {"total": weighted})


def test_a_narrower_student_learns_the_embedding_alone() -> None:
    """Without the tokens, by all that its alignment reads."""
    teacher = load_teacher(GOLDEN / "tiny_base.pt")
    torch.manual_seed(0)
    student = teacher.build_student(depth=2, embed_dim=24)
    model = model_with(teacher, student, embedding=1.0, weight=0.0)
    embeddings = student.embed_all(IMAGES)
    names = [f"{kind}_{pooling}" for kind in ("output", "layer_mean") for pooling in ("cls", "mean")]
    joined = torch.cat([embeddings[name] for name in names], dim=1)
    assert student.alignment is not None
    expected = torch.nn.functional.linear(joined, student.alignment.weight, student.alignment.bias)
    torch.testing.assert_close(embeddings["embedding"], expected)
    prediction, target, *_ = model(IMAGES)["embedding"]
    torch.testing.assert_close(normalize(prediction), normalize(expected))
    losses = train(model, IMAGES)
    prediction, target, *_ = model(IMAGES)["embedding"]
    for length in (0.9, 1.1):  # the loss leaves it free, but Health compares with the target
        assert mse_loss(prediction, target) < mse_loss(length * prediction, target)
    assert losses[-1] < 0.5 * losses[0]
    assert any(name.startswith("student.alignment.") for name in model.state_dict())
    assert student.embedding[:3] == ("output_cls", "training", teacher.embed_dim)


def test_the_embedding_of_sound_leaves_out_padding() -> None:
    teacher = load_teacher(GOLDEN / "audio_base.pt")
    model = model_with(teacher, teacher.build_student(depth=1), embedding=1.0)
    clips, lengths = torch.rand(2, 4000, generator=torch.Generator().manual_seed(1)) - 0.5, torch.tensor([4000, 2500])
    target = model({"audio": clips, "lengths": lengths})["embedding"].target
    torch.testing.assert_close(target, normalize(teacher.embed(clips, "mean", lengths=lengths)))
    alone = normalize(teacher.embed(clips[1:, :2500], "mean"))
    torch.testing.assert_close(target[1:], alone, rtol=1e-3, atol=1e-4)


# torch.compile.


def compile_to_whole_graphs(model: DistillationModel, on_gpu: bool) -> None:
    """Compile a model as for a GPU or a CPU, but without its kernels; a graph that breaks is an error later."""
    torch._dynamo.reset()
    whole: Any = partial(torch.compile, fullgraph=True, backend="eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: whole(function))
        patch.setattr(torch.cuda, "is_available", lambda: on_gpu)
        compile_model(model)


@pytest.mark.slow
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("kind", ["two objectives", "own encoder"])
def test_a_step_compiles_to_whole_graphs(kind: str, on_gpu: bool, teacher: Any) -> None:
    model = with_two_objectives() if kind == "two objectives" else DistillationModel(teacher, with_own_encoder(teacher))
    expected = total_loss(model, IMAGES)
    compile_to_whole_graphs(model, on_gpu)
    torch.testing.assert_close(total_loss(model, IMAGES), expected)

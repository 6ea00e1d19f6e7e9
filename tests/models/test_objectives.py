"""Students with an encoder of their own, and several objectives: each encoder and teacher runs once a step."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss, normalize

from d2v_composer import load_teacher
from d2v_composer.models.configs import StudentConfig
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.features import Features
from d2v_composer.models.images import PixelEncoder
from d2v_composer.models.student import Student
from d2v_composer.objectives import OBJECTIVES
from d2v_composer.objectives.compilation import compile_model
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.objectives.objective import Objective, Regression, Term
from helpers import GOLDEN
from steps import flops_of_a_step, random_images, total_loss, train

IMAGES = random_images()
STUDENT = StudentConfig(depth=2, mlp_ratio=2.0)


class TinyConvolution(PixelEncoder):
    """One convolution with BatchNorm, and a CLS token; as many tokens as a teacher's encoder gives."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.convolution = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        self.norm = nn.BatchNorm2d(config.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))

    @property
    def block_list(self) -> list[Any]:
        return []

    def embed_tokens(self, inputs: Inputs, padding_mask: Tensor | None = None) -> Tensor:
        x_BND = self.norm(self.convolution(self.prepare(inputs.values))).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], dim=1)

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        return []


POOLED = {"pooled": {"weight": 0.5}}


class PooledCosine(Objective):
    """Regress the mean of a teacher's output over patches, by its cosine."""

    def __init__(self, options: Term, teacher: Any, student: Any, layer_mean: Any) -> None:
        super().__init__(options, teacher, student, layer_mean)
        self.head = nn.Linear(student.embed_dim, teacher.embed_dim)

    def target(self, features: Features) -> Tensor:
        return features.poolings(features.output)["mean_patches"]

    def regression(self, features: Features, target: Tensor) -> Regression:
        return Regression(self.head(features.poolings(features.output)["mean_patches"]), target)

    def loss(self, regression: Regression) -> Tensor:
        return 1 - cosine_similarity(regression.prediction, regression.target).mean()


@pytest.fixture
def teacher() -> Any:
    return load_teacher(GOLDEN / "tiny_base.pt")


def model_with(teacher: Any, student: Any, embedding: float = 0.0, **tokens: Any) -> DistillationModel:
    return DistillationModel(teacher, student, objectives={"tokens": tokens, "embedding": {"weight": embedding}})


def count_calls(*modules: nn.Module) -> Counter[nn.Module]:
    calls: Counter[nn.Module] = Counter()
    for module in modules:
        module.register_forward_hook(lambda module, *_: calls.update([module]))
    return calls


def test_a_student_trains_its_own_encoder(teacher: Any) -> None:
    torch.manual_seed(0)
    student = Student(TinyConvolution(teacher.encoder.config), STUDENT)
    model = DistillationModel(teacher, student)
    calls = count_calls(student.encoder, teacher.encoder)
    before = {name: tensor.clone() for name, tensor in student.encoder.state_dict().items()}
    losses = train(model, IMAGES)
    assert calls == {student.encoder: len(losses), teacher.encoder: len(losses)}
    assert losses[-1] < 0.9 * losses[0]
    after = student.encoder.state_dict()
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())  # running statistics too
    assert not teacher.encoder.training
    checkpoint = model.state_dict()
    assert set(checkpoint) == {f"student.{name}" for name in student.state_dict()}
    again = DistillationModel(teacher, Student(TinyConvolution(teacher.encoder.config), STUDENT))
    again.load_state_dict(checkpoint)
    for name, embedding in again.eval().embed_all(IMAGES).items():
        torch.testing.assert_close(embedding, model.eval().embed_all(IMAGES)[name])


def test_a_frozen_encoder_of_its_own_is_no_part_of_a_checkpoint(teacher: Any) -> None:
    student = Student(TinyConvolution(teacher.encoder.config).freeze(), STUDENT)
    model = DistillationModel(teacher, student)
    train(model, IMAGES, steps=1)
    assert set(model.state_dict()) == {f"student.blocks.{name}" for name in student.blocks.state_dict()}


def test_the_cost_of_a_step_with_an_encoder_of_its_own(teacher: Any) -> None:
    model = DistillationModel(teacher, Student(TinyConvolution(teacher.encoder.config), STUDENT))
    assert model.flops_per_batch(IMAGES) == flops_of_a_step(model, IMAGES)


def two_objectives(teacher: Any) -> DistillationModel:
    """Tokens, and the pooled output."""
    torch.manual_seed(0)
    with patch.dict(OBJECTIVES, pooled=PooledCosine):
        return DistillationModel(teacher, teacher.build_student(depth=2), objectives={"tokens": {}, **POOLED})


def test_objectives_add_up_and_encoder_and_teacher_run_once(teacher: Any) -> None:
    model = two_objectives(teacher)
    parts = {*teacher.block_list, *model.student.block_list, teacher.encoder}
    calls = count_calls(*parts)
    results = model(IMAGES)
    assert calls == dict.fromkeys(parts, 1)
    (pooled,) = results.others
    losses = [
        objective.loss(result) for objective, result in zip(model.objectives.values(), (results, pooled), strict=True)
    ]
    sums = {"tokens": losses[0], "pooled": losses[1], "total": losses[0] + 0.5 * losses[1]}
    torch.testing.assert_close(model.loss(results, IMAGES), sums)
    alone = DistillationModel(teacher, model.student)(IMAGES)
    torch.testing.assert_close((results.prediction, results.target), (alone.prediction, alone.target))
    output, _ = teacher.forward_blocks(teacher.encode(IMAGES))
    torch.testing.assert_close(pooled.target, output[:, 1:].mean(dim=1))
    model.student.block_list[-1].norm2.requires_grad_()
    losses = train(model, IMAGES)
    assert losses[-1] < losses[0]
    heads = {f"objectives.pooled.head.{name}" for name in ("weight", "bias")}
    assert set(model.state_dict()) == heads | {f"student.blocks.{name}" for name in model.student.blocks.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize("on_gpu", [False, True])
def test_all_of_it_compiles_to_whole_graphs(teacher: Any, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    second, third = (load_teacher(GOLDEN / "tiny_base.pt") for _ in range(2))  # each is compiled once
    student = Student(TinyConvolution(teacher.encoder.config), STUDENT)
    of_dataset = DistillationModel(third, third.build_student(normalization="dataset"), dataset_norm=True)
    of_dataset.measure_targets([IMAGES])
    models = two_objectives(teacher), DistillationModel(second, student), of_dataset
    expected = [total_loss(model, IMAGES) for model in models]
    options: Any = {"fullgraph": True, "backend": "eager"}
    monkeypatch.setattr(torch, "compile", lambda function, compiled=torch.compile, **_: compiled(function, **options))
    for model, loss in zip(models, expected, strict=True):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: on_gpu)
            compile_model(model)
        torch.testing.assert_close(total_loss(model, IMAGES), loss)
    of_dataset.measure_targets([IMAGES])
    torch.testing.assert_close(total_loss(of_dataset, IMAGES), expected[-1])


def test_the_share_of_cls(teacher: Any) -> None:
    """1 / T is as of any token; half of the loss is that of all patches."""
    torch.manual_seed(0)
    student = teacher.build_student(depth=2)
    usual, same, half = (model_with(teacher, student, cls_weight=share) for share in (None, 1 / 17, 0.5))
    regression = usual(IMAGES)
    errors_BT = (regression.prediction - regression.target).square().mean(dim=-1)
    assert errors_BT.shape[1] == 17
    torch.testing.assert_close(same.loss(regression, IMAGES), usual.loss(regression, IMAGES))
    expected = (errors_BT[:, 0].mean() + errors_BT[:, 1:].mean()) / 2
    torch.testing.assert_close(half.loss(regression, IMAGES), expected)
    with pytest.raises(ValueError, match="cls_weight: allowed only with extra_tokens 'regress' and a teacher"):
        DistillationModel(teacher, student, extra_tokens="drop", objectives={"tokens": {"cls_weight": 0.5}})


def test_cosine_and_smooth_l1(teacher: Any) -> None:
    model = model_with(teacher, teacher.build_student(depth=2), loss="cosine_smooth_l1")
    regression = model(IMAGES)
    ours, theirs = regression.prediction, regression.target
    difference = (ours - theirs).abs()
    smooth_l1 = torch.where(difference < 1, difference.square() / 2, difference - 0.5).mean()
    cosine = (ours * theirs).sum(dim=-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    torch.testing.assert_close(model.loss(regression, IMAGES), 0.9 * (1 - cosine).mean() + 0.1 * smooth_l1)
    assert train(model, IMAGES)[-1] < 0.9 * model.loss(regression, IMAGES)


def test_the_image_embedding_of_data2vec() -> None:
    """CLS of the output, by its cosine; alone or beside the tokens, and of a narrower student through a layer."""
    teacher = load_teacher(GOLDEN / "tiny_base.pt", projected=True)
    torch.manual_seed(0)
    student = teacher.build_student(depth=2, projected=True)
    model = model_with(teacher, student, embedding=2.0, weight=0.5)
    results = model(IMAGES)
    theirs, _ = teacher.forward_blocks(teacher.encode(IMAGES))
    ours, _ = student.forward_blocks(student.encode(IMAGES))
    torch.testing.assert_close(results.others[0].target, normalize(theirs[:, 0]))
    torch.testing.assert_close(student.embed(IMAGES, representation="projected"), ours[:, 0])
    products = (ours[:, 0] * theirs[:, 0]).sum(dim=1) / (ours[:, 0].norm(dim=1) * theirs[:, 0].norm(dim=1))
    tokens = DistillationModel(teacher, student)
    expected = {"tokens": tokens.loss(tokens(IMAGES), IMAGES), "embedding": 1 - products.mean()}
    weighted = 0.5 * expected["tokens"] + 2 * expected["embedding"]
    torch.testing.assert_close(dict(model.loss(results, IMAGES)), expected | {"total": weighted})
    narrow = teacher.build_student(depth=2, embed_dim=24, projected=True)
    alone = model_with(teacher, narrow, embedding=1.0, weight=0.0)
    output, _ = narrow.forward_blocks(narrow.encode(IMAGES))
    projected, target, *_ = alone(IMAGES)
    expected = normalize(narrow.projection.linear(output[:, 0]))
    torch.testing.assert_close(normalize(projected), expected)
    torch.testing.assert_close(target, normalize(theirs[:, 0]))
    for length in (0.9, 1.1):  # the loss leaves it free, but Health compares with the target
        assert mse_loss(projected, target) < mse_loss(length * projected, target)
    losses = train(alone, IMAGES)  # each trained parameter has a gradient
    assert losses[-1] < 0.5 * losses[0]
    assert any(name.startswith("student.projection.") for name in alone.state_dict())


def test_the_image_embedding_of_sound_leaves_out_padding() -> None:
    teacher = load_teacher(GOLDEN / "audio_base.pt", projected=True)
    model = model_with(teacher, teacher.build_student(depth=1, projected=True), embedding=1.0)
    clips, lengths = torch.rand(2, 4000, generator=torch.Generator().manual_seed(1)) - 0.5, torch.tensor([4000, 2500])
    target = model({"audio": clips, "lengths": lengths}).others[0].target
    torch.testing.assert_close(target, normalize(teacher.embed(clips, "mean_patches", lengths=lengths)))
    alone = normalize(teacher.embed(clips[1:, :2500], "mean_patches"))
    torch.testing.assert_close(target[1:], alone, rtol=1e-3, atol=1e-4)

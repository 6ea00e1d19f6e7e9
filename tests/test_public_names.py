# pyright: strict
"""A program that uses each public name; pyright checks in its strict mode that they have types."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.core import Callback
from torch import Tensor, nn

import d2v_composer
import d2v_composer.callbacks
from d2v_composer import (
    DistillationModel,
    Embedder,
    FrozenModel,
    ZeroShotRetrieval,
    knn_accuracy,
    linear_probe_accuracy,
    load_config,
    load_labeled_set,
    load_student,
    load_teacher,
    neighbor_agreement,
    retrieval_accuracy,
    train_student,
)
from d2v_composer.callbacks import (
    AlignStudent,
    GradientNorm,
    Health,
    JSONLLogger,
    NanGuard,
    ProgressLogger,
    Throughput,
)
from d2v_composer.checkpoints.load import save_student
from helpers import GOLDEN, small_run

IMAGES = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
EMBEDDINGS, LABELS = torch.eye(40).repeat(2, 1), torch.arange(80) % 2


class Patches(nn.Conv2d):
    """Patches without CLS, as anyone's module might give them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(2).transpose(1, 2)


def test_teacher_student_and_their_embeddings(tmp_path: Path) -> None:
    teacher = load_teacher(GOLDEN / "tiny_base.pt", weights="model")
    x = teacher.encode(IMAGES)
    output, ffn_outputs = teacher.forward_blocks(x)
    target: Tensor = teacher.targets(x)
    assert output.shape == target.shape == ffn_outputs[0].shape
    assert len(ffn_outputs) == len(teacher.blocks) == teacher.config.depth
    student = teacher.build_student(depth=1, mlp_ratio=3.0, alibi=True, init="random").eval()
    student.blocks.load_state_dict(student.blocks.state_dict())
    assert student.encoder is teacher.encoder
    save_student(student, tmp_path / "student.safetensors")
    loaded = load_student(tmp_path / "student.safetensors")
    embedding: Tensor = loaded.embed(IMAGES)
    raw = loaded.embed_all(IMAGES)["output_mean"]
    torch.testing.assert_close(raw, student.embed(IMAGES, pooling="mean", representation="output"))
    assert embedding.shape == teacher.embed(IMAGES).shape
    assert loaded.provenance["teacher"]["sha256"] == teacher.provenance["sha256"]


def test_waveforms() -> None:
    teacher = load_teacher(GOLDEN / "audio_base.pt")
    waveforms, lengths = torch.zeros(2, 16_000), torch.tensor([16_000, 8_000])
    mask = teacher.padding_mask(lengths)
    assert mask is not None
    output, _ = teacher.forward_blocks(teacher.encode(waveforms, lengths), padding_mask=mask)
    assert output.shape[:2] == mask.shape
    assert len(teacher.embed(waveforms, lengths=lengths, pooling="mean")) == 2


def test_the_model_that_trains() -> None:
    teacher = FrozenModel(Patches(3, 48, 8, 8), image_size=32, grid_size=(4, 4), has_cls_token=False, source="random")
    student = teacher.build_student(depth=1)
    model = DistillationModel(teacher, student)
    outputs = model.forward(IMAGES)
    loss: Tensor = model.losses(outputs)["total"]
    assert loss.ndim == 0
    callbacks: list[Callback] = [NanGuard(), Health(), Throughput(), AlignStudent(model, list(IMAGES))]
    assert [*callbacks, GradientNorm(), JSONLLogger("log.jsonl"), ProgressLogger(bar=False)]


def test_a_run_of_a_config(tmp_path: Path, small_data: Path) -> None:
    config = load_config(small_run(tmp_path / "run", small_data, "max_duration=1ba", "scheduler.t_warmup=0ba"))
    assert config.student.depth > 0
    trainer: Trainer = train_student(config, teacher=load_teacher(GOLDEN / "tiny_base.pt"))
    assert trainer.state.timestamp.batch == 1


def test_embeddings_of_a_table_and_accuracies(small_data: Path, labeled: Path) -> None:
    embed = Embedder(str(GOLDEN / "tiny_base.pt"), column="image", batch_size=2)
    assert embed.column == "image"
    cifar = load_labeled_set("mds", labeled, image_size=32, interpolation="bicubic", max_images=9)
    assert ZeroShotRetrieval({"small": cifar}, interval="5000ba", ks=(1, 3)).settings.ks == (1, 3)
    accuracies: dict[int, float] = retrieval_accuracy(EMBEDDINGS, LABELS, EMBEDDINGS, LABELS, ks=(1,))
    assert accuracies == {1: 1.0}
    assert knn_accuracy(EMBEDDINGS, LABELS, EMBEDDINGS, LABELS, k=1) == 1.0
    assert linear_probe_accuracy(EMBEDDINGS, LABELS, EMBEDDINGS, LABELS) > 0.5
    assert neighbor_agreement(EMBEDDINGS, EMBEDDINGS, k=1) == 1.0


def names_used() -> Iterator[str]:
    for node in ast.walk(ast.parse(Path(__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


@pytest.mark.parametrize("name", [*d2v_composer.__all__, *d2v_composer.callbacks.MODULES])
def test_each_public_name_is_used_here(name: str) -> None:
    assert name in set(names_used())

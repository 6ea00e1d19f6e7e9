"""The classifier: what trains, how deep it is, and the same network with random weights."""

import torch

from d2v_composer import load_teacher
from d2v_composer.config.schema import LayerwiseOptimizerConfig
from d2v_composer.runs.classifier import Classifier
from d2v_composer.runs.trainer import build_optimizer
from helpers import GOLDEN


def build_classifier(embedding: str = "output_cls", *, train_encoder: bool) -> Classifier:
    """Return one of a student that is narrower than its encoder."""
    student = load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=2, embed_dim=24)
    student.raw_embedding = embedding
    return Classifier(student, 3, train_encoder=train_encoder)


def names_of_trained(model: Classifier) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_every_trained_parameter_has_a_gradient() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for embedding in ("output_cls", "output_mean", "layer_mean_cls"):
        for train_encoder in (False, True):
            model = build_classifier(embedding, train_encoder=train_encoder)
            batch = model.prepare((images, torch.tensor([0, 2])))
            torch.nn.init.normal_(model.head.weight)
            model.loss(model(batch), batch).backward()
            trained = names_of_trained(model)
            assert {name for name, weight in model.named_parameters() if weight.grad is not None} == trained
            assert any("encoder" in name for name in trained) == train_encoder
            assert not any("positions" in name for name in trained)


def test_the_learning_rate_decays_from_the_head_to_the_patches() -> None:
    model = build_classifier(train_encoder=True)
    config = LayerwiseOptimizerConfig(lr=1.0, layer_decay=0.5)
    groups = build_optimizer(config, model, model.depth_of_trained, config.layer_decay).param_groups
    of_weight = {id(weight): group for group in groups for weight in group["params"]}
    group_of = {name: of_weight[id(weight)] for name, weight in model.named_parameters() if weight.requires_grad}
    assert groups[0]["lr"] == group_of["head.weight"]["lr"] == 1
    assert group_of["backbone.blocks.1.mlp.fc1.weight"]["lr"] == 1 / 2
    assert group_of["backbone.blocks.0.mlp.fc1.weight"]["lr"] == 1 / 4
    assert group_of["backbone.input_proj.weight"]["lr"] == 1 / 4
    first = len(model.backbone.encoder.block_list)
    assert group_of["backbone.encoder.context_encoder.blocks.0.attn.qkv.weight"]["lr"] == 0.5 ** (2 + first)
    assert group_of["backbone.encoder.local_encoder.proj.weight"]["lr"] == 0.5 ** (3 + first)

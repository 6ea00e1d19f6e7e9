"""bfloat16 and torch.compile give nearly the same numbers, with few graphs."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.utils import clip_grad_norm_

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.models.encoder import Inputs, Tokens
from d2v_composer.objectives.compilation import captured, compile_model
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.sources.labeled import load_labeled_set
from helpers import QUICKSTART

NUM_STEPS = 20
BATCH_SIZE = 16


@pytest.fixture(scope="module")
def batches() -> Tensor:
    """Real images, one batch for each step: (20, 16, 3, 32, 32) uint8."""
    images = load_labeled_set("mds", QUICKSTART / "cifar10", image_size=32, interpolation="bicubic").train.samples
    return images[: NUM_STEPS * BATCH_SIZE].unflatten(0, (NUM_STEPS, BATCH_SIZE))


@pytest.fixture(scope="module")
def model() -> DistillationModel:
    """The quickstart's teacher and student; tests must not train it."""
    torch.manual_seed(0)
    teacher = load_teacher(QUICKSTART / "teacher.safetensors")
    return DistillationModel(teacher, teacher.build_student(depth=3))


def train(model: DistillationModel, batches: Tensor) -> Iterator[float]:
    """Train one step on each batch, as Composer does; yield the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)
    for images in batches:
        loss = model.loss(model(images), images)
        loss.backward()
        clip_grad_norm_(trained, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def evaluate(model: DistillationModel, images: Tensor) -> dict[str, Tensor]:
    """Embed with student and teacher in three batches, the last one smaller, as the callback does."""
    embeds = {"student": model.embed_all, **model.retrieval_baselines()}
    with torch.inference_mode():
        parts = [
            {f"{who}_{name}": embedding for who, embed in embeds.items() for name, embedding in embed(part).items()}
            for part in images.split(6)
        ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_losses_in_bfloat16_are_close(model: DistillationModel, batches: Tensor) -> None:
    few = batches[:8, :4]  # a CPU without the instructions takes a second for each
    expected = list(train(copy.deepcopy(model), few))
    in_bf16 = copy.deepcopy(model)
    in_bf16.teacher.cast_weights(torch.bfloat16)
    in_bf16.cpu_bf16 = True
    np.testing.assert_allclose(list(train(in_bf16, few)), expected, rtol=0.01)


def test_a_half_residual_stream_ends_before_the_student(model: DistillationModel, batches: Tensor) -> None:
    halved = copy.deepcopy(model)
    halved.teacher.encoder.half_residual = True
    images = batches[0, :2]
    assert halved.teacher.encode(images).dtype == torch.float32  # outside autocast
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, expected = model.frozen_pass(Inputs(images))
        tokens, targets = halved.frozen_pass(Inputs(images))
        assert tokens is not None
        x, target = tokens.x, targets["tokens"]
        assert all(output.dtype == torch.bfloat16 for output, _ in halved.teacher.iterate_blocks(x))
        assert all(output.dtype == torch.float32 for output, _ in halved.student.iterate_blocks(x))
    assert (target.dtype, x.dtype) == (torch.float32, torch.bfloat16)
    assert torch.cosine_similarity(target, expected["tokens"], dim=-1).mean() > 0.999


@pytest.mark.parametrize(("choice", "is_captured"), [(True, True), ("default", False)])
def test_a_gpu_starts_the_frozen_pass_as_one_graph(
    choice: bool | str, is_captured: bool, model: DistillationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are copies: the next replay overwrites the graph's own."""
    asked: list[dict[str, Any]] = []
    x_BTD, target = torch.zeros(1), torch.ones(1)
    results = Tokens(x_BTD), {"tokens": target}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda _, **given: asked.append(given) or (lambda *_: results))
    compiled = copy.deepcopy(model)
    compile_model(compiled, choice)
    graphs = [given for given in asked if given.get("options") == {"triton.cudagraphs": True}]
    assert len(graphs) == is_captured
    if is_captured:
        tokens, targets = compiled.frozen_pass(Inputs(torch.empty(0)))
        assert tokens is not None
        for result, buffer in ((tokens.x, x_BTD), (targets["tokens"], target)):
            assert torch.equal(result, buffer)
            assert result.data_ptr() != buffer.data_ptr()


@pytest.mark.slow
def test_a_pass_that_cannot_be_a_cuda_graph_computes_the_same(model: DistillationModel, batches: Tensor) -> None:
    run = captured(model.frozen_pass)
    with torch.no_grad():
        for images in (batches[0], batches[1], batches[0, :5]):
            (tokens, targets), (expected, wanted) = run(Inputs(images)), model.frozen_pass(Inputs(images))
            assert tokens is not None
            assert expected is not None
            torch.testing.assert_close(tokens.x, expected.x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(targets, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_losses_and_embeddings_in_bfloat16_are_close(model: DistillationModel, batches: Tensor) -> None:
    """With few graphs, and packed weights, as on a CPU; tests/promises/test_run_ranks.py compiles in float32."""
    expected = list(train(copy.deepcopy(model), batches))
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    for variant in (eager, compiled):
        variant.teacher.cast_weights(torch.bfloat16)
        variant.cpu_bf16 = True
    torch._dynamo.reset()
    counters.clear()
    compile_model(compiled)
    training = train(compiled, batches)
    losses = [next(training), next(training)]
    embeddings = evaluate(compiled, batches[0])
    num_graphs = counters["stats"]["unique_graphs"]
    assert 10 < num_graphs < 40

    eager.load_state_dict(compiled.state_dict())
    for name, embedding in evaluate(eager, batches[0]).items():
        assert torch.cosine_similarity(embeddings[name], embedding).min() > 0.999, name

    losses += training
    evaluate(compiled, batches[1])
    np.testing.assert_allclose(losses, expected, rtol=0.01)
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]

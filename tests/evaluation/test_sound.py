"""Clips of sound: padded batches, in any order of lengths, give each clip its own embedding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_composer import load_teacher
from d2v_composer.data.labeled import LabeledSamples, LabeledSet
from d2v_composer.evaluation.evaluate import build_embeds
from d2v_composer.evaluation.labeled_retrieval import VIEWS, embed_set
from d2v_composer.evaluation.nearest_neighbors import Ranks
from helpers import GOLDEN

BASE = GOLDEN / "audio_base.pt"
LENGTHS = (4000, 1440, 16000, 9001, 4000, 2500, 12345)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_teacher(BASE)


def clips(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Return noise of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def without_labels(samples: list[Tensor]) -> LabeledSet:
    return LabeledSet.without_labels(LabeledSamples(samples, torch.zeros(len(samples), dtype=torch.int64)))


def half(sample: Tensor, number: int, view: int) -> Tensor:
    return sample[: len(sample) // 2] if view else sample[len(sample) // 2 :]


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_clip_is_embedded_as_if_alone(teacher: Any, world_size: int) -> None:
    models = {"student": teacher.build_student(depth=1).eval(), "teacher": teacher}
    embeds, samples = build_embeds(teacher.encoder, models), clips()
    assert list(embeds) == ["log_mel", "encoder", "student", "teacher"]
    shapes = set()

    def watched(inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        shapes.add((tuple(inputs.shape), None if lengths is None else tuple(lengths.tolist())))
        return inputs[:, :1]

    with torch.inference_mode():
        for rank in range(world_size):
            share = Ranks(rank, world_size)
            options: Any = {"batch_size": 3, "to_device": lambda each: each, "ranks": share, "augment": half}
            embedded = embed_set({**embeds, "watched": watched}, without_labels(samples), **options)
            for name, embed in embeds.items():
                for part in ("test", *VIEWS):
                    for place, i in enumerate(share.share(len(samples)).tolist()):
                        clip = samples[i] if part == "test" else half(samples[i], i, VIEWS.index(part))
                        alone = embed(clip[None])
                        alone = alone if isinstance(alone, dict) else {"": alone}
                        assert embedded[name][part].keys() == alone.keys()
                        for key, expected in alone.items():
                            found = embedded[name][part][key][place]
                            torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=2e-5)
    if world_size == 1:
        assert ((3, 16000), (16000, 12345, 9001)) in shapes
        assert ((1, 1440), None) in shapes

"""Clips of sound: padded batches, in any order of lengths, give each clip its own embedding."""

import json
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from d2v_composer import load_teacher
from d2v_composer.commands import evaluate as evaluate_command
from d2v_composer.evaluation.embedded_set import embed_set
from d2v_composer.evaluation.evaluate import share_encoders
from d2v_composer.evaluation.metrics.metric import VIEWS
from d2v_composer.evaluation.nearest_neighbors import Ranks
from d2v_composer.evaluation.settings import Settings
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples
from helpers import GOLDEN, write_words

BASE = GOLDEN / "audio_base.pt"
LENGTHS = (2000, 1440, 8000, 4501, 2000, 1600, 6172)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_teacher(BASE)


def clips(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Return noise of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def without_labels(samples: list[Tensor]) -> EvaluationSet:
    return EvaluationSet.without_labels(LabeledSamples(samples, torch.zeros(len(samples), dtype=torch.int64)))


def half(sample: Tensor, number: int, view: int) -> Tensor:
    return sample[: len(sample) // 2] if view else sample[len(sample) // 2 :]


@pytest.mark.parametrize("world_size", [1, 2])
@torch.inference_mode()
def test_each_clip_is_embedded_as_if_alone(teacher: Any, world_size: int) -> None:
    models = {"student": teacher.build_student(depth=1).eval(), "teacher": teacher}
    embeds, samples, augment = share_encoders(teacher, models, teacher.layer_mean), clips(), cast(Any, half)
    assert list(embeds) == ["log_mel", "encoder", "student", "teacher"]
    for rank in range(world_size):
        ranks = Ranks(rank, world_size)
        settings = Settings("", (1,), (), augment, 3, needs_all=True, ranks=ranks)
        embedded = embed_set(embeds, "clips", without_labels(samples), settings)
        for (model, embed), part in product(embeds.items(), ("test", *VIEWS)):
            for place, i in enumerate(ranks.indices_of_rank(len(samples)).tolist()):
                clip = samples[i] if part == "test" else half(samples[i], i, VIEWS.index(part))
                alone = embed(clip[None])
                expected = alone if isinstance(alone, dict) else {"": alone}
                ours = {name: rows[place, None] for name, rows in embedded[model][part].items()}
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_clips_of_similar_length_are_padded_together() -> None:
    shapes = set()

    def watch(inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        shapes.add((tuple(inputs.shape), None if lengths is None else tuple(lengths.tolist())))
        return inputs[:, :1]

    embed_set({"watches": watch}, "clips", without_labels(clips()), Settings("", (1,), (), None, 3))
    assert {((3, 8000), (8000, 6172, 4501)), ((1, 1440), None)} <= shapes


def test_words_are_compared_by_every_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_words(tmp_path / "words", {"train": 8, "test": 5})
    sets = f"datasets={{words: {{format: folder, root: {tmp_path / 'words'}}}}}"
    arguments = [f"model={BASE}", sets, "device_eval_batch_size=8", f"out={tmp_path / 'out'}"]
    evaluate_command.main([*arguments, "probes=[knn,linear,agreement,instance]"])
    printed = capsys.readouterr()
    assert "\nZero-shot retrieval on words, embedding: the teacher's output_mean\nin % [95 % interval] " in printed.out
    assert "GFLOP/5-s clip\n" in printed.out
    assert printed.out.endswith(f"embed {BASE} CLIPS embeddings.npy\n")
    assert "embedding 39 samples of words with each of: log_mel, untrained student, teacher" in printed.err
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["class_names"] == {"words": ["no", "stop", "yes"]}
    assert {row["measure"] for row in report["results"]} == {
        *("retrieval", "knn", "knn_majority", "linear", "agreement", "instance")
    }
    hits = {
        row["candidate"]: row["value"]
        for row in report["results"]
        if (row["measure"], row["k"], row["embedding"]) in (("instance", 1, ""), ("instance", 1, "embedding"))
    }
    assert hits.keys() == {"log_mel", "untrained student", "teacher"}
    assert all(0 < value < 1 for value in hits.values())  # the two views differ

"""The quickstart with sound: what ships reaches what its README says, and the command runs."""

import json
import re
from pathlib import Path

import pytest
import torch

from d2v_composer import load_teacher, retrieval_accuracy
from d2v_composer.data.audio import Audio
from d2v_composer.data.modality import collate
from d2v_composer.sources.labeled import LabeledSamples, load_labeled_set
from helpers import ROOT, d2v

FOLDER = ROOT / "yamls" / "quickstart_audio"


def test_the_teacher_knows_words_across_speakers() -> None:
    """The table in yamls/quickstart_audio/README.md, to one query."""
    words, teacher = load_labeled_set("mds", FOLDER / "words", Audio()), load_teacher(FOLDER / "teacher.safetensors")
    assert words.num_samples == (74, 82)

    def embed(split: LabeledSamples) -> torch.Tensor:
        inputs, lengths = collate(split.samples)
        return teacher.embed(inputs, "mean", lengths=lengths)

    train, test = ((embed(split), split.labels) for split in (words.train, words.test))
    (row,) = re.findall(r"\| teacher, `output` \| (.*) \| (.*) \|", (FOLDER / "README.md").read_text())
    for said, (bank, queries) in zip(row, ((train, test), (test, train)), strict=True):
        accuracy = retrieval_accuracy(*bank, *queries, ks=(1,))[1]
        assert abs(accuracy - float(said) / 100) <= 1.01 / len(queries[0])


@pytest.mark.slow
def test_the_command_runs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    d2v("train", ROOT / "yamls" / "quickstart_audio.yaml", f"save_folder={out}", "max_duration=3ba", cwd=tmp_path)
    page = (out / "report.html").read_text()
    assert page.count("<audio") >= 12
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    keys = {key for line in log for key in line}
    assert {"metrics/words/bank_train/top1", "metrics/words/log_mel/bank_test/top3"} <= keys

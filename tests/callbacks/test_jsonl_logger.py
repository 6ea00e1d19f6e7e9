"""Reading a log with corrupt lines."""

from pathlib import Path

import pytest

from d2v_composer.evaluation.metrics import read_jsonl

CORRUPT = [
    b"\xff\xfe{",
    b"null",
    b"[1, 2]",
    b'{"loss/train/total": 1.0}',
    b'{"step": null, "loss/train/total": 1.0}',
    b'{"step": 3, "loss/train/total": [1.0]}',
    b'{"step": 3, "loss/train/tot',
    b"[" * 100_000,
]


def test_skips_the_corrupt_lines_of_a_log_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    whole = [f'{{"step": {step}, "loss/train/total": {step / 2}, "nan": NaN}}'.encode() for step in range(3)]
    path.write_bytes(b"\n".join([whole[0], *CORRUPT, *whole[1:]]))
    series = read_jsonl(path)
    assert series["loss/train/total"] == {0: 0.0, 1: 0.5, 2: 1.0}
    assert list(series) == ["loss/train/total", "nan"]
    assert caplog.messages == [f"{path}: skipped 8 of 11 lines: corrupt"]

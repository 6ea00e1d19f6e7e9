"""A pipe gets a line now and then, and nothing of short work."""

import re
import sys

import pytest

from d2v_composer.system import progress


def test_a_pipe_gets_lines_instead_of_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress.progress_bar(range(3), desc="photos", unit="images")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # it is short
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.progress_bar(total=4, desc="photos", unit="images", initial=1) as bar:
        bar.update()
        bar.write("told", file=sys.stderr)  # it is not repeated after another line
        bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    photos = r"photos: \d+% \d/4 \[[\d:]+<[\d:?]+, *(\?|\d+\.\d\d) images/s\]"
    assert [line.split()[2] for line in lines if re.fullmatch(photos, line)] == ["1/4", "2/4", "4/4"]

"""A pipe gets a line now and then, and nothing of short work."""

import re

import pytest

from d2v_composer.system import command_line


def test_a_pipe_gets_lines_instead_of_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "LINE_SECONDS", 0.0)
    with command_line.progress_bar(total=4, desc="photos", unit="images", initial=1, miniters=1) as bar:
        bar.update()
        bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"photos: {count} of 4 images" for count in (1, 2, 4)]
    assert all(re.fullmatch(r"photos: \d of 4 images, (\?|\d+\.\d\d) images/s, left [\d:?]+", line) for line in lines)


def test_a_line_without_a_total_has_no_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command_line, "LINE_SECONDS", 0.0)
    with command_line.progress_bar(desc="a file", unit="B", miniters=1, unit_scale=True) as bar:
        bar.update(5_000_000)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"a file: 5\.00M B, [\d.]+\w? B/s", last)


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(command_line.progress_bar(range(3), desc="photos", unit="images")) == [0, 1, 2]
    assert capsys.readouterr().err == ""

"""A command's model is its command line: words, help, errors in one line, and the call in Python."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from d2v_composer.commands.__main__ import COMMANDS
from d2v_composer.commands.__main__ import main as d2v
from d2v_composer.commands.command import Command, PartOfWork, PlaceHere, Positional
from d2v_composer.system.errors import InputError
from d2v_composer.system.processes import Part


class Paint(Command):
    picture: Positional[str]
    """What to paint on."""
    settings: Positional[tuple[str, ...]] = ()
    """Settings."""
    color: Literal["red", "blue"] = "red"
    """The color."""
    width: int = 3
    """Pixels."""
    shift: float | None = None
    """Pixels to the right; default: centered."""
    layers: tuple[str, ...] = ()
    """A layer to paint."""
    out: PlaceHere = Field(description="The file to write.")
    skip_hidden: bool = False
    """Skip hidden layers."""
    part: PartOfWork = None


OUT = "--out", "out.png"


def test_words_and_fields_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["a.png", "x=[1,2]", "--shift", "-6.5", "--layers", "sky", "--color=blue", "b.y={c: 1}", "--skip", *OUT]
    words += ["--layers", "sea", "--part", "1/3", "--", "--z=0"]
    assert Paint.parse(words) == Paint(
        picture="a.png",
        settings=("x=[1,2]", "b.y={c: 1}", "--z=0"),
        color="blue",
        shift=-6.5,
        layers=("sky", "sea"),
        out=tmp_path / "out.png",
        skip_hidden=True,
        part=Part(1, 3),
    )
    assert Paint.parse(["a.png", *OUT]) == Paint(picture="a.png", out=Path("out.png"))


def test_help_shows_docstrings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Paint.parse(["--help"], "d2v paint")
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: d2v paint [-h] [--color {red,blue}] [--width WIDTH]")
    assert str(__doc__) in shown
    for line in (
        "SETTINGS Settings",
        "--color {red,blue} The color; default: red",
        "--skip-hidden Skip hidden layers --",
    ):
        assert line in shown
    assert "the right; default: centered --" in shown


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (OUT, ["the following arguments are required: PICTURE"]),
        (("a.png",), ["the following arguments are required: --out"]),
        (("a.png", *OUT, "--width"), ["argument --width: expected one argument"]),
        (
            ("a.png", *OUT, "--widht", "3"),
            ["--widht: no such option; did you mean --width? (allowed: --color, --width, "],
        ),
        (
            ("--colour=red", "--lyers", "x"),
            ["--colour: no such option; did you mean --color?", "--lyers: no such option"],
        ),
        (
            ("a.png", *OUT, "--width", "wide", "--color", "green"),
            ["argument --color: must be 'red' or 'blue', got 'green'", "argument --width: must be a valid integer, "],
        ),
        (
            ("a.png", "--out", "/"),
            ["argument --out: expected a path or address to write to, not the root of a disk or bucket, got '/'"],
        ),
        (("a.png", *OUT, "--part", "3/3"), ["argument --part: must be I/N with 0 <= I < N <= 100,000, got '3/3'"]),
    ],
)
def test_each_slip_is_a_line(words: tuple[str, ...], lines: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Paint.parse(words)
    said = [str(line) for line in caught.value.args]
    assert len(said) == len(lines)
    assert all(line.startswith(expected) for line, expected in zip(said, lines, strict=True)), said


@pytest.mark.parametrize(
    ("words", "empty"),
    [
        (["distill", "", "--teacher", "timm/x", "--out", "out"], "SOURCE"),
        (["distill", "photos", "--teacher", "", "--out", "out"], "--teacher"),
        (["convert-images", "", "out"], "SOURCE"),
        (["embed", "student.safetensors", "", "out.npy"], "SOURCE"),
        (["align", "student.safetensors", "", "out.safetensors", "--to", "timm/x"], "SOURCE"),
    ],
)
def test_an_unset_variable_is_not_the_current_folder(words: list[str], empty: str) -> None:
    with pytest.raises(InputError, match=f"^argument {empty}: must not be empty$"):
        d2v(words)


def test_a_name_of_a_table_is_suggested() -> None:
    with pytest.raises(
        InputError, match=r"^argument NAME: no such name 'quikstart'; did you mean quickstart\? \(allowed"
    ):
        d2v(["init", "quikstart"])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_slip_in_any_command_says_what_is_allowed(name: str) -> None:
    with pytest.raises(
        InputError, match=r"^[^\n]*--widht[^\n]*(no such [^\n]*\(allowed: |a setting is key=value)[^\n]*$"
    ):
        d2v([*name.split(), "--widht", "3"])
    with pytest.raises(InputError, match=r"^d2v embde: no such command; did you mean embed\?"):
        d2v(["embde"])


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_without_a_command_each_is_listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        d2v(words)
    listed = capsys.readouterr().out.splitlines()
    assert [name for line in listed if line.startswith("  ") for name in line.split()[:1]] == [*COMMANDS]

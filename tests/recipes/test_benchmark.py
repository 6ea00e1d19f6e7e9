"""recipes/benchmark.py: each program has a speed. The script itself checks that its programs do the same work."""

import re
from pathlib import Path

from helpers import QUICKSTART, ROOT, start_python

STEP = ("--teacher", str(QUICKSTART / "teacher.safetensors"), "--batch-size", "2", "--no-compile")
# Part → its options, the table's head, and the names of the rows.
PARTS = {
    "step": (
        (*STEP, "--precision", "fp32"),
        ["images/s, fp32", "speed ÷ naive", "speed ÷ matrix product alone"],
        ["naive", "ours", "matrix product alone"],
    ),
    "data": (
        ("--num-images", "64", "--remote", "REMOTE"),
        ["images/s", "speed ÷ ImageFolder and PIL", "speed ÷ ours"],
        ["ImageFolder and PIL", "StreamingDataset", "ours", "ours, shards of 256 px", "ours, S3 warm"],
    ),
    "retrieval": (
        ("--bank", "500"),
        ["queries/s", "time ÷ matrix product alone"],
        ["matrix product alone", "ours", "faiss"],
    ),
}


def test_each_program_has_a_speed(tmp_path: Path) -> None:
    """The first column has the medians, and each other column their ratios to one row; a folder stands for a store."""
    programs = {}
    for part, (options, *_) in PARTS.items():
        words = [str(tmp_path / "remote") if word == "REMOTE" else word for word in options]
        programs[part] = start_python(ROOT / "recipes" / "benchmark.py", part, "--repeats", "1", *words)
    for part, (_, heads, names) in PARTS.items():
        assert programs[part].wait(100) == 0, programs[part].stderr
        lines = [line.strip("| ").split(" | ") for line in programs[part].stdout.splitlines() if "|" in line]
        head, _, *rows = lines
        assert head == ["program", *heads]
        assert [name for name, *_ in rows] == names
        numbers = {name: [float(re.sub("[,×]", "", cell)) for cell in cells] for name, *cells in rows}
        assert all(number > 0 for cells in numbers.values() for number in cells)
        for column, head in enumerate(heads[1:], 1):
            assert numbers[head.split(" ÷ ")[1]][column] == 1

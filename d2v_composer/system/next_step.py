"""Name what comes next at the end of a command, ready to be copied."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from d2v_composer.system.launched_rank import global_rank

__all__ = ["EMBEDDINGS", "d2v", "print_next"]

# The file of embeddings that a step proposes.
EMBEDDINGS = "embeddings.npy"


def print_next(*steps: str) -> None:
    """Print the steps on rank 0, one a line."""
    if global_rank() == 0:
        print("\n".join(f"next: {step}" for step in steps), flush=True)


def d2v(*arguments: str | Path) -> str:
    """Return a command line of d2v that this shell can run, even if the environment is not activated."""
    script = Path(sys.executable).with_name("d2v")
    if shutil.which("d2v") == str(script):
        program = ["d2v"]
    elif script.is_file():
        program = [os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)]
    else:
        program = [sys.executable, "-m", "d2v_composer.commands"]
    return shlex.join([*program, *map(str, arguments)])

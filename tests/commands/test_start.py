"""The help of commands starts without heavy modules; what they import at work, tests/core/test_systems.py shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

from d2v_composer.commands.__main__ import COMMANDS
from helpers import ROOT

HEAVY = (
    "composer",
    "matplotlib",
    "streaming",
    "sympy",
    "timm",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torchvision",
)

# Runs each command line of a JSON list, as its script would, and prints the status and the heavy modules after it.
RUN = """
import json, runpy, sys
HEAVY, commands = map(json.loads, sys.argv[1:])
for program, *arguments in commands:
    sys.argv = [program, *arguments]
    try:
        if program == "d2v":
            runpy.run_module("d2v_composer.commands", run_name="__main__")
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        print(json.dumps([ended.code, [name for name in HEAVY if name in sys.modules]]))
"""


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """In one fresh interpreter."""
    recipes = [str(path) for path in sorted((ROOT / "recipes").glob("*.py"))]
    commands = [["d2v", "--help"], *([program, "--help"] for program in recipes)]
    commands += [["d2v", name, "--help"] for name in COMMANDS]
    command = [sys.executable, "-c", RUN, json.dumps(HEAVY), json.dumps(commands)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    answers = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    assert answers == [[0, []]] * len(commands), ended.stderr

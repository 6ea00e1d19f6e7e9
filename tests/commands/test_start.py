"""Commands start without the heavy modules that they do not use; each test runs in interpreters of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from d2v_composer.commands.__main__ import COMMANDS
from helpers import GOLDEN, ROOT, encoded_image
from small_students import random_student

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

# Runs each command line of a JSON list, as its script would, and prints the heavy modules that are imported after it.
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


def imported_after(commands: list[list[str]], cwd: Path) -> list[set[str]]:
    """Run commands in one fresh interpreter; each must succeed. Return what is imported after each."""
    arguments = [json.dumps(HEAVY), json.dumps(commands)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    answers = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    assert [status for status, _ in answers] == [0] * len(commands), ended.stderr
    return [set(modules) for _, modules in answers]


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    recipes = [str(path) for path in sorted((ROOT / "recipes").glob("*.py"))]
    commands = [["d2v", "--help"], *([program, "--help"] for program in recipes)]
    commands += [["d2v", name, "--help"] for name in COMMANDS]
    modules = imported_after(commands, tmp_path)
    assert len(modules) == 1 + len(recipes) + len(COMMANDS)
    assert not set().union(*modules)


# timm knows the student without a name of ours, whichever of the two a user imports first.
WITH_TIMM = """
import sys, d2v_composer, timm
assert timm.is_model("d2v2_student")
timm.models._registry._model_entrypoints.clear()
del sys.modules["d2v_composer"]
import d2v_composer
sys.exit(0 if timm.is_model("d2v2_student") else "timm was imported first")
"""


def test_commands_import_what_they_use_and_timm_knows_the_student(uninterrupted: Path, tmp_path: Path) -> None:
    """In another directory than the repository's, with a path relative to it."""
    student = random_student(tmp_path / "student.safetensors")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(encoded_image(0))
    embed = ["d2v", "embed", str(GOLDEN / "tiny_base.pt"), "photos", "photos.npy", "--workers", "0"]
    evaluate = ["d2v", "evaluate", str(ROOT / "yamls" / "evaluate.yaml"), f"model={student}", "max_images=20"]
    verify = ["d2v", "verify", str(student), "--kit", "kit"]
    for name in ("log.jsonl", "run.yaml"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    (tmp_path / "with_timm.py").write_text(WITH_TIMM)
    *imports, _ = imported_after([embed, evaluate, verify, ["d2v", "report", "."], ["with_timm.py"]], tmp_path)
    assert imports == [*[{"torch"}] * 3, {"torch", "matplotlib"}]
    assert (tmp_path / "report.html").is_file()

"""Run every measurement that needs a GPU, unattended, the most informative first.

Each step is a command with a time limit, so a step that fails or hangs does not stop the others. With several GPUs,
runs use all of them and benchmarks the first. On a CPU the same steps run at small sizes, except those that need a GPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
import yaml
from composer.devices import DeviceGPU

from d2v_composer.system.errors import RunError
from d2v_composer.system.files import write_atomically
from d2v_composer.system.machine import describe_machine, package_versions
from d2v_composer.system.processes import start_program

TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
YAMLS = Path(__file__).parents[1] / "yamls"
MINUTES = 10
"""Time limit of a step, in minutes."""
# Lines of a step's output that are printed and kept as results.
FOUND = re.compile(
    "^(naive|eager|ours|trainer|matrix|faiss|attention|gpu_|peak_gb|torch|resumed|frozen|student|loss|backward|step)"
    "|÷|batch [0-9]+/|top-1|rror|skipping cudagraph"
)
MOST_LINES = 20


def benchmark(out: Path) -> dict[str, Any]:
    """Run all steps; OUT receives their output, their files, and first_hour.json.

    Raises:
        OSError: OUT exists.
        RunError: A step failed.
    """
    out.mkdir(parents=True)
    on_gpu = torch.cuda.is_available()
    result = {"machine": describe_machine(), "versions": package_versions(), "steps": (rows := [])}
    for step in TABLE["steps"]:
        name, start = fill(step["name"], on_gpu), time.monotonic()
        file = name.replace(" ", "_")
        command = fill(step["command"], on_gpu, file)
        verdict, lines = "skipped: needs a GPU", []
        if on_gpu or not step.get("needs_gpu"):
            verdict, lines = run_step(command, out, file)
        seconds = round(time.monotonic() - start)
        rows.append({"name": name, "verdict": verdict, "seconds": seconds, "found": lines, "command": command})
        print(f"{name:28} {seconds:4} s  {verdict}", *lines, sep="\n    ", flush=True)
        write_atomically(out / "first_hour.json", json.dumps(result, indent=1) + "\n")
    if failed := [row["name"] for row in rows if not row["verdict"].startswith(("ok", "skipped"))]:
        raise RunError(f"{len(failed)} of {len(rows)} steps failed: {', '.join(failed)}; see {out}")
    return result


def fill(text: str, on_gpu: bool, file: str = "") -> str:
    """Replace each <name> in a step's text by its value in the table, for a GPU or for a CPU."""
    sizes = {name: str(choices[on_gpu]) for name, choices in TABLE["sizes"].items()}
    values = {**sizes, **TABLE["commands"], "file": file, "yamls": str(YAMLS)}
    return re.sub(r"<(\w+)>", lambda match: fill(values[match[1]], on_gpu, file), text)


def format_result(result: Mapping[str, Any]) -> str:
    """Return a single line, because the steps have already printed the table."""
    return f"all {len(result['steps'])} steps succeeded or were skipped"


def run_step(command: str, out: Path, file: str) -> tuple[str, list[str]]:
    """Run a command, within its time limit; return the verdict and the notable lines of the output."""
    output = out / f"{file}.txt"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TORCH_LOGS": "recompiles,perf_hints",
    }
    # At the end of its time, timeout kills itself and all that the command has started.
    limited = ["timeout", "--signal=KILL", str(60 * MINUTES), "sh", "-c", command]
    with output.open("wb") as stream:
        process = start_program(limited, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=out)
    status = process.wait()
    verdict = f"failed with status {status}" if status else "ok"
    if status == -signal.SIGKILL:
        verdict = f"stopped after {MINUTES} minutes"
    said = output.read_text(errors="replace")
    lines = [line for line in said.splitlines() if FOUND.search(line)][-MOST_LINES:]
    lines.append(f"{said.count('Recompiling function')} recompilations")
    return verdict, lines


def share_gpu() -> None:
    """Let all ranks of this machine share its first GPU, through gloo because NCCL does not allow it."""
    DeviceGPU.dist_backend = "gloo"
    DeviceGPU.__init__ = partialmethod(DeviceGPU.__init__, 0)  # pyright: ignore[reportAttributeAccessIssue]

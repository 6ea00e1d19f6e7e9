"""The first hour on a GPU: run every measurement that needs a GPU, unattended, the most informative first.

Each step is a separate command with a time limit: one that fails or hangs stops no other. With several GPUs, runs use
all of them and benchmarks the first. On a CPU the same steps run at small sizes, except those that need a GPU.
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
from typing import Any, NamedTuple

import torch
from composer.devices import DeviceGPU

from d2v_composer.system.errors import RunError
from d2v_composer.system.files import write_atomically
from d2v_composer.system.machine import describe_machine, package_versions
from d2v_composer.system.processes import start_program


class Step(NamedTuple):
    """A command to run and how to describe it; placeholders in the strings are filled in."""

    name: str
    command: str
    """Shell command, run in OUT."""
    needs_gpu: bool = False


VERSIONS = (
    'nvidia-smi; python -c \'import torch; print("torch", torch.__version__, "with CUDA", torch.version.cuda, '
    '"cuDNN", torch.backends.cudnn.version(), "SDPA", torch._C._get_sdp_priority_order())\''
)
STEP = "d2v benchmark step --size {size} {compiled} --json {file}.json "
QUICKSTART = (
    "train {yamls}/quickstart.yaml save_folder={file} compile={compile} max_duration={short}ba "
    "retrieval.max_images={labeled} precision="
)
DISTILL = (
    "d2v train {yamls}/distill.yaml save_folder=distill train_loader.local=images teacher.checkpoint={teacher} "
    "precision={fp16} compile={compile} global_train_batch_size={large} max_duration={long}ba "
    "scheduler.t_warmup=0.1dur retrieval.interval=150ba retrieval.max_images={labeled} "
    "'retrieval.datasets={{cifar10: {{format: mds, root: {yamls}/quickstart/cifar10}}}}'"
)
# At batch 100, SIGTERM; the run must save and exit with its status.
STOPPED = (
    " & while kill -0 $! && ! grep -qs '.step.: 100,' distill/log.jsonl; do sleep 1; done; "
    "kill $!; wait $!; [ $? = 143 ]"
)
PHOTOS = (
    "python -c 'from pathlib import Path; from d2v_composer.benchmarks.data import make_photos; "
    'make_photos(Path("photos"), {photos})\''
)
SHARE = (
    "python -c 'from d2v_composer.benchmarks.first_hour import share_gpu; share_gpu(); "
    "from d2v_composer.commands.__main__ import run; run()' "
)
STEPS = [
    Step("versions and SDPA order", VERSIONS),
    Step("quickstart in fp16", "d2v " + QUICKSTART + "amp_fp16", True),
    Step("quickstart in bf16", "d2v " + QUICKSTART + "{bf16}"),
    Step("step of {large} in fp16", STEP + "--batch-size {large} --precision amp_fp16", True),
    Step("step of {small} in fp16", STEP + "--batch-size {small} --precision amp_fp16", True),
    Step("step of {large} in bf16", STEP + "--batch-size {large} --precision {bf16}"),
    Step("step of {small} in bf16", STEP + "--batch-size {small} --precision {bf16}"),
    Step("Trainer at {large}", STEP + "--batch-size {large} --only ours --loop trainer"),
    Step("Trainer at {small}", STEP + "--batch-size {small} --only ours --loop trainer"),
    Step("plan", "d2v benchmark plan --json {file}.json"),
    Step("profile", STEP + "--batch-size {large} --only ours --trace {file}.trace.json"),
    Step("retrieval", "d2v benchmark retrieval --bank {bank} --json {file}.json"),
    Step("random teacher", "d2v random-teacher base teacher.safetensors"),
    Step("photographs", PHOTOS),
    Step("shards", "d2v convert-images photos images --labels none --resize 256"),
    Step("distill.yaml until SIGTERM", DISTILL + STOPPED),
    Step("distill.yaml resumed", DISTILL),
    Step("two ranks on one device", "composer -n 2 -c " + SHARE + QUICKSTART + "fp32"),
    Step("no CUDA graph at {small}", STEP + "--batch-size {small} --only ours compile=default", True),
    Step("half residual stream", STEP + "--only ours half_residual=true", True),
    Step("max-autotune", STEP + "--only ours compile=max-autotune-no-cudagraphs", True),
    Step("SDPA by cuDNN", STEP + "--only ours --sdp cudnn_attention", True),
    Step("SDPA by CUTLASS", STEP + "--only ours --sdp efficient_attention", True),
]
YAMLS = Path(__file__).parents[1] / "yamls"
# Name → what it is on a CPU and on a GPU.
SIZES = {
    "yamls": (YAMLS, YAMLS),
    "size": ("quickstart", "base"),
    "large": (8, 256),
    "small": (4, 32),
    "fp16": ("auto", "amp_fp16"),
    "bf16": ("auto", "amp_bf16"),
    "compile": ("false", "true"),  # takes minutes on a CPU
    "compiled": ("--no-compile", ""),
    "short": (10, 120),
    "long": (120, 300),
    "bank": (10_000, 50_000),
    "photos": (200, 5120),
    "labeled": (200, 5000),
    "teacher": (YAMLS / "quickstart" / "teacher.safetensors", "teacher.safetensors"),
}
MINUTES = 10
"""Time limit of a step, in minutes."""
# Lines of an output for the report.
FOUND = re.compile(
    "^(naive|eager|ours|trainer|matrix|faiss|attention|gpu_|peak_gb|torch|resumed|frozen|student|loss|backward|step)"
    "|÷|batch [0-9]+/|top-1|rror|skipping cudagraph"
)
MOST_LINES = 20


def benchmark(out: Path) -> dict[str, Any]:
    """Run all steps; OUT receives their output and files, first_hour.json and first_hour.txt.

    Raises:
        OSError: OUT exists.
        RunError: A step failed.
    """
    out.mkdir(parents=True)
    on_gpu = torch.cuda.is_available()
    sizes = {name: choices[on_gpu] for name, choices in SIZES.items()}
    result = {"machine": describe_machine(), "versions": package_versions(), "steps": (rows := [])}
    report = ""
    for step in STEPS:
        name, start = step.name.format(**sizes), time.monotonic()
        file = name.replace(" ", "_")
        command = step.command.format(file=file, **sizes)
        verdict, found = "skipped: needs a GPU", []
        if on_gpu or not step.needs_gpu:
            verdict, found = run_step(command, out, file)
        seconds = round(time.monotonic() - start)
        rows.append({"name": name, "verdict": verdict, "seconds": seconds, "found": found, "command": command})
        row = "\n    ".join([f"{name:28} {seconds:4} s  {verdict}", *found])
        print(row, flush=True)
        report += f"{row}\n"
        write_atomically(out / "first_hour.txt", report)
        write_atomically(out / "first_hour.json", json.dumps(result, indent=1) + "\n")
    if failed := [row["name"] for row in rows if not row["verdict"].startswith(("ok", "skipped"))]:
        raise RunError(f"{len(failed)} of {len(rows)} steps failed: {', '.join(failed)}; see {out}")
    return result


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
    with output.open("wb") as stream:
        options = {"stdout": stream, "stderr": subprocess.STDOUT, "env": environment, "cwd": out}
        process = start_program(["sh", "-c", command], **options)
    try:
        status = process.wait(60 * MINUTES)
        verdict = f"failed with status {status}" if status else "ok"
    except subprocess.TimeoutExpired:
        verdict = f"stopped after {MINUTES} minutes"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = output.read_text(errors="replace")
    found = [line for line in said.splitlines() if FOUND.search(line)][-MOST_LINES:]
    found.append(f"{said.count('Recompiling function')} recompilations")
    return verdict, found


def share_gpu() -> None:
    """Let all ranks of this machine share its first GPU, through gloo because NCCL does not allow it."""
    DeviceGPU.dist_backend = "gloo"
    DeviceGPU.__init__ = partialmethod(DeviceGPU.__init__, 0)  # pyright: ignore[reportAttributeAccessIssue]

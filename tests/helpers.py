"""Helpers of several tests: small data sets, small runs, commands and their outcome.

Nothing here imports a module of the package, because tests/promises uses it; tests/test_levels.py checks it.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from programs.preloaded import PreloadedPython, Program

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
QUICKSTART = ROOT / "yamls" / "quickstart"
TRACED = ROOT / "tests" / "programs" / "traced.py"

# Six batches of 16 an epoch.
NUM_IMAGES = 96
D2V = ("-m", "d2v_composer.commands")


def write_mds(folder: Path, images: list[bytes], labels: list[int] | None = None, shard_bytes: int = 1 << 15) -> Path:
    """Write encoded images as an MDS folder of several shards."""
    from streaming import MDSWriter  # the core's tests run without it

    columns = {"image": "bytes"} | ({} if labels is None else {"label": "int"})
    with MDSWriter(out=str(folder), columns=columns, size_limit=shard_bytes) as writer:
        for i, image in enumerate(images):
            writer.write({"image": image} | ({} if labels is None else {"label": labels[i]}))
    return folder


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below a folder, with the folders that they need."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_images(root: Path, names: Iterable[str]) -> Path:
    """Write the first image under the first name, the second under the second, and so on."""
    return write_files(root, {name: encoded_image(number) for number, name in enumerate(names)})


def encoded_image(seed: int, size: int = 32) -> bytes:
    """Return a JPEG of smooth random colors."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return saved(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), quality=95)


def saved(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """Return an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def encoded_clip(
    seed: int, length: int, format: str = "FLAC", rate: int = 16_000, channels: int = 1, volume: float = 0.1
) -> bytes:
    """Return a file of noise."""
    noise = np.random.default_rng(seed).standard_normal((length, channels)).clip(-3, 3) * volume
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format=format)
    return buffer.getvalue()


def write_words(root: Path, splits: Mapping[str, int]) -> None:
    """Write spoken 'words': noise in bands, of several lengths."""
    for (split, count), (label, word) in product(splits.items(), enumerate(("no", "stop", "yes"))):
        (root / split / word).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([label, i, len(split)])
            times = np.arange(rng.integers(2000, 6000)) / 16_000
            sound = 0.2 * np.sin(2 * np.pi * 400 * (label + 1) * times) + 0.05 * rng.normal(size=len(times))
            soundfile.write(root / split / word / f"{i}.flac", sound, 16_000)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def wait_until(holds: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for a condition, and fail if it takes longer."""
    with time_limit(seconds):
        while not holds():
            time.sleep(0.005)


def slow(*values: Any) -> Any:
    """Mark one case of a parametrized test as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def small_run(folder: Path, data: Path, *overrides: str) -> list[str]:
    """Return the arguments of a tiny run: tests/golden's teacher, 14 batches, 7 checkpoints, no retrieval."""
    return [
        str(ROOT / "yamls" / "quickstart.yaml"),
        f"teacher.checkpoint={GOLDEN / 'tiny_base.pt'}",
        f"train_loader.local={data}",
        f"save_folder={folder}",
        "retrieval.datasets={}",
        "precision=fp32",
        "max_duration=14ba",
        "global_train_batch_size=16",
        "scheduler.t_warmup=4ba",
        "save_interval=2ba",
        "student.depth=2",
        "train_loader.num_workers=0",
        "report=false",  # seconds
        *overrides,
    ]


def datasets_of(root: Path, name: str = "small") -> str:
    """Return the override that evaluates on an MDS data set with labels; a run's needs ``retrieval.`` before it."""
    return f"datasets={{{name}: {{format: mds, root: {root}}}}}"


def peak_allocated(function: Callable[[], object]) -> int:
    """Return the peak of what torch allocates on the CPU while a function runs, beyond what is held, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    before = changes[0]["args"]["Total Allocated"] - changes[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in changes) - before


def contents_of(folder: Path) -> dict[str, bytes | None]:
    """Return each file and folder below a folder with its content, except locks, which name their last user."""
    paths = (path for path in folder.rglob("*") if path.name != ".in_use")
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def checkpoints_of(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("ep*.pt")}


def shared_memory_of(pid: int) -> set[tuple[str, int]]:
    """Return path and inode of the shared memory of a process and its children; a path alone may be reused."""
    mapped = {region.path for process in family_of(pid) for region in process.memory_maps()}
    return {(path, inode_of(path)) for path in mapped if path.startswith("/dev/shm/") and inode_of(path)}


def inode_of(path: str) -> int:
    """Return a file's inode; 0 if there is none."""
    with suppress(FileNotFoundError):
        return os.stat(path).st_ino
    return 0


def run_command(
    *command: str | Path, timeout: float = 300, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and collect its output."""
    arguments = [str(part) for part in command]
    if arguments[0] != sys.executable:
        variables = command_environment() | (environment or {})
        return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=variables)
    program = start_python(*arguments[1:], cwd=cwd, environment=environment)
    try:
        program.wait(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(arguments, program.wait(timeout), program.stdout, program.stderr)


def d2v(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``d2v NAME …``."""
    return run_command(sys.executable, *D2V, *arguments, **options)


def succeed(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``d2v NAME …``, which must succeed."""
    ended = d2v(*arguments, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def run_training(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python recipes/train.py …``, which must succeed."""
    ended = run_command(*train_command(list(arguments)), **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def refused_run(arguments: list[str], status: int = 2, **options: Any) -> str:
    """Run ``python recipes/train.py …``, which must fail, and return its last line."""
    return failure(run_command(*train_command(arguments), **options), status)


def failure(ended: "subprocess.CompletedProcess[str] | Program", status: int) -> str:
    """Check that a command failed with a status and without a traceback, and return its last line."""
    exit_status = ended.poll() if isinstance(ended, Program) else ended.returncode
    assert exit_status == status, f"status {exit_status}: {ended.stdout}{ended.stderr}"
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr.strip().splitlines()[-1]


def start_python(*arguments: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> Program:
    """Start a Python program from a process that has imported what it needs."""
    variables = command_environment() | (environment or {})
    return preloaded_python().start([str(part) for part in arguments], cwd, variables)


def has_trained(folder: Path) -> bool:
    """Return True if a run has finished a batch: it has logged the loss of the next one."""
    log = folder / "log.jsonl"
    return log.exists() and log.read_text().count("loss/train/total") > 1


def run_ranks(*arguments: str | Path, ranks: int = 2, **options: Any) -> None:
    """Run a Python program on each rank. All must succeed."""
    with started_ranks(*arguments, ranks=ranks, **options) as programs:
        for program in programs:
            assert program.wait(300) == 0, program.stderr


@contextmanager
def started_ranks(
    *arguments: str | Path,
    ranks: int,
    num_nodes: int = 1,
    environment: dict[str, str] | None = None,
    folders: Sequence[Path] = (ROOT,) * 4,
) -> Iterator[list[Program]]:
    """Start a Python program on each rank, with the variables that Composer's launcher sets, and kill it afterwards.

    Args:
        folders: The working folder of each rank.
    """
    shared = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks // num_nodes,
        "MASTER_PORT": free_port(),
        "MASTER_ADDR": "127.0.0.1",
    }
    programs = []
    try:
        for rank in range(ranks):
            node_rank, local_rank = divmod(rank, ranks // num_nodes)
            variables = shared | {"RANK": rank, "LOCAL_RANK": local_rank, "NODE_RANK": node_rank} if ranks > 1 else {}
            variables = {name: str(value) for name, value in variables.items()} | (environment or {})
            programs.append(start_python(*arguments, cwd=folders[rank], environment=variables))
        yield programs
    finally:
        for program in programs:
            program.kill()


@cache
def preloaded_python() -> PreloadedPython:
    """Return the server of this test process."""
    return PreloadedPython()


def command_environment() -> dict[str, str]:
    """Return an environment with one thread a process: results do not depend on the cores, and two ranks fit on two."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def train_command(arguments: list[str], ranks: int = 1) -> list[str]:
    """Return ``python recipes/train.py …``, or Composer's launcher for several ranks."""
    script = str(ROOT / "recipes" / "train.py")
    if ranks == 1:
        return [sys.executable, script, *arguments]
    launcher = str(Path(sys.executable).parent / "composer")
    return [launcher, "-n", str(ranks), script, *arguments]


def train_until_killed(arguments: list[str], moment: str, recipe: str = "train") -> None:
    """Run a training recipe in one process that is killed at an event of a batch, such as ``batch_start 3``."""
    killed = run_command(sys.executable, *traced(arguments, recipe), environment={"AT": f"{moment} kill"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def traced(arguments: list[str], recipe: str = "train") -> list[str]:
    """Return the arguments of Python for a recipe with the tests' callback, which AT and SAMPLES command."""
    return [str(TRACED), str(ROOT / "recipes" / f"{recipe}.py"), *arguments]


def load_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False)


def student_of(folder: Path) -> dict[str, Tensor]:
    """Return the student's tensors in a run's newest checkpoint."""
    return load_checkpoint(folder / "latest-rank0.pt")["state"]["model"]


def map_of(folder: Path) -> dict[str, Any]:
    """Return the map to the teacher's space in a run's newest checkpoint; empty if there is none."""
    return load_checkpoint(folder / "latest-rank0.pt")["state"]["callbacks"].get("AlignStudent", {})


def assert_same_student(folder: Path, expected: Path) -> None:
    """Compare the students of two runs, and their maps to the teacher's space, bit by bit."""
    for ours, theirs in ((read(folder), read(expected)) for read in (student_of, map_of)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if isinstance(theirs[name], Tensor))


def family_of(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def assert_gone(processes: list[psutil.Process], seconds: float = 10) -> None:
    assert psutil.wait_procs(processes, timeout=seconds)[1] == []


def losses_of(folder: Path) -> dict[int, float]:
    return log_of(folder).get("loss/train/total", {})


def log_of(folder: Path) -> dict[str, dict[int, float]]:
    """Return a run's log as key → step → value; of a step that a restart logged again, the later value."""
    series: dict[str, dict[int, float]] = {}
    path = folder / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):  # a kill truncated it
            entry = json.loads(line)
            step = entry.pop("step")
            for key, value in entry.items():
                series.setdefault(key, {})[step] = value
    return series


def assert_same_numbers(ours: Tensor | None, expected: Tensor) -> None:
    """Compare as promise 1 says: up to 3e-5 of the array's largest value, on any processor."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def assert_same_losses(ours: dict[int, float], expected: dict[int, float], num_steps: int) -> None:
    """Compare the losses of each step, up to the order of sums. The tolerance is tight: Adam hides wrong scales."""
    assert sorted(ours) == sorted(expected) == list(range(num_steps))
    np.testing.assert_allclose([ours[step] for step in expected], list(expected.values()), rtol=2e-6)


def refused_by(load: Callable[[Path], Any], path: Path) -> str:
    """Return the line of the error with which a file is refused, within seconds."""
    with pytest.raises(ValueError, match=r".") as caught, time_limit(20):
        load(path)
    assert caught.type.__name__ == "InputError"
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail instead of hanging if the block takes too long."""

    def stop(*_: Any) -> None:
        pytest.fail(f"takes longer than {seconds} s")

    if not hasattr(signal, "SIGALRM"):  # Windows
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


Record = dict[int, dict[int, str]]
"""Batch → sample id → the sample's checksum."""


@contextmanager
def recorded(
    folder: Path, arguments: list[str], environment: dict[str, str] | None = None, ranks: int = 1, num_nodes: int = 1
) -> Iterator[list[Program]]:
    """Start a run that records its samples in ``folder``/samples."""
    variables = {"SAMPLES": str(folder / "samples"), **(environment or {})}
    with started_ranks(*traced(arguments), ranks=ranks, num_nodes=num_nodes, environment=variables) as programs:
        yield programs


def read_record(folder: Path) -> Record:
    """Read the samples that were trained on; a batch that a resume repeated must be the same."""
    record: Record = {}
    for file in sorted((folder / "samples").iterdir()):
        for line in file.read_text().splitlines():
            batch, sample_id, checksum = line.split(" ")
            assert record.setdefault(int(batch), {}).setdefault(int(sample_id), checksum) == checksum
    return record


def assert_succeed(programs: list[Program]) -> None:
    for program in programs:
        assert program.wait(120) == 0, program.stderr

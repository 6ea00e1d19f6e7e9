"""Promise 26: a command is repeated after a loss of power at any moment; tests/README.md has the model."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import (
    D2V,
    GOLDEN,
    ROOT,
    command_environment,
    d2v,
    encoded_image,
    log_of,
    run_command,
    small_run,
    student_of,
    write_mds,
)
from power.recorder import IS_AVAILABLE, Operation, record
from power.replayer import Link, State, Tree, crash_states, read_tree, replay, write_tree

TEACHER = GOLDEN / "tiny_base.pt"
TRAIN, FINETUNE = ROOT / "recipes" / "train.py", ROOT / "recipes" / "finetune.py"
CONVERT = ("--shard-size", "3kb", "--workers", "2")
EMBED = ("--workers", "0", "--batch-size", "16")
SHORT = ("global_train_batch_size=16", "precision=fp32", "train_loader.num_workers=0", "callbacks={}", "report=false")
STUDY = (*SHORT, "max_duration=4ba", "save_interval=2ba", "student.depth=1", "retrieval.interval=4ba")
# Suffixes of files that a reader takes for whole; those of a run that saves are followed from its pointer.
RESULTS = (".safetensors", ".onnx", ".pt2", ".npy", ".parquet", ".yaml", ".md", ".mds", "conversion.json", "index.json")
# Files of an unfinished command, in a folder or by name.
UNFINISHED = (".partial", ".converting", ".tmp")
STATES = float(os.environ.get("POWER_STATES", 1))


class Case(NamedTuple):
    """A command whose power fails."""

    command: Callable[[Path, Path], Sequence[str | Path]]
    """Folder of inputs, folder of outputs → arguments of Python."""
    result: Callable[[Path], Any]
    """Folder of outputs → what the command made, to be compared."""
    limit: int
    """States that are tried, about."""
    before: Callable[[Path, Path], object] = lambda inputs, out: None
    """Makes what is there before the command."""
    done: str = "no such line"
    """What the command says, with status 2, if all has been done before."""


def contents_of(folder: Path) -> dict[str, Any]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): content_of(path) for path in paths}


def content_of(path: Path) -> Any:
    """Return a file's content; the order of a safetensors file's metadata is random."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def run_at(folder: Path) -> Any:
    log = {key: steps for key, steps in log_of(folder).items() if not key.startswith(("throughput/", "time/"))}
    return {
        "log": log,
        "student": {name: each.numpy().tobytes() for name, each in student_of(folder).items()},
        "checkpoints": sorted(path.name for path in folder.glob("*.pt")),
        "newest": (folder / "latest-rank0.pt").readlink().name,
        "record": (folder / "run.yaml").read_bytes(),
    }


def distilled_at(out: Path) -> Any:
    files = [path for path in out.glob("run/*") if path.suffix in (".yaml", ".safetensors", ".md")]
    return run_at(out / "run") | contents_of(out / "run" / "images") | {path.name: content_of(path) for path in files}


def make_parts(*command: str | Path) -> None:
    for number in range(2):
        assert d2v(*command, "--part", f"{number}/2").returncode == 0


def make_run(inputs: Path, out: Path) -> None:
    assert run_command(sys.executable, TRAIN, *training(inputs, out / "run")).returncode == 0


def training(inputs: Path, folder: Path) -> list[str]:
    changes = ("max_duration=6ba", "scheduler.t_warmup=2ba", "save_num_checkpoints_to_keep=2", "student.depth=1")
    return small_run(folder, inputs / "data" / "train", *SHORT, *changes)


def finetuning(inputs: Path, folder: Path) -> list[str]:
    return [
        str(ROOT / "yamls" / "finetune.yaml"),
        f"model={inputs / 'student.safetensors'}",
        f"dataset={{format: mds, root: {inputs / 'data'}}}",
        f"save_folder={folder}",
        *(change for change in SHORT if not change.startswith("callbacks")),
        "max_duration=6ba",
        "scheduler.t_warmup=2ba",
        "save_interval=2ba",
    ]


def embedding(name: str) -> Callable[[Path, Path], Sequence[str | Path]]:
    return lambda inputs, out: [*D2V, "embed", TEACHER, inputs / "many", out / name, *EMBED]


def exporting(name: str) -> Callable[[Path, Path], Sequence[str | Path]]:
    return lambda inputs, out: [*D2V, "export", inputs / "student.safetensors", out / name]


CASES = {
    "convert-images": Case(
        lambda inputs, out: [*D2V, "convert-images", inputs / "images", out / "set", *CONVERT],
        contents_of,
        1000,
        done="holds a finished data set",
    ),
    "merge a data set": Case(
        lambda inputs, out: [*D2V, "merge", out / "set"],
        contents_of,
        1000,
        lambda inputs, out: make_parts("convert-images", inputs / "images", out / "set", *CONVERT),
    ),
    "embed npy": Case(embedding("out.npy"), contents_of, 1000, done="already exists"),
    "embed parquet": Case(embedding("out.parquet"), contents_of, 1000, done="already exists"),
    "merge npy": Case(
        lambda inputs, out: [*D2V, "merge", out / "out.npy"],
        contents_of,
        1000,
        lambda inputs, out: make_parts("embed", TEACHER, inputs / "images", out / "out.npy", *EMBED),
        "already exists",
    ),
    "train": Case(lambda inputs, out: [TRAIN, *training(inputs, out / "run")], lambda out: run_at(out / "run"), 400),
    "distill": Case(
        lambda inputs, out: [
            *(*D2V, "distill", inputs / "images", "--teacher", TEACHER, "--out", out / "run"),
            *(*SHORT, "max_duration=4ba", "save_interval=1ba", "student.depth=1"),
        ],
        distilled_at,
        200,
    ),
    "export safetensors": Case(exporting("out.safetensors"), contents_of, 200, done="already exists"),
    "export onnx": Case(exporting("out.onnx"), contents_of, 100, done="already exists"),
    "finetune": Case(
        lambda inputs, out: [FINETUNE, *finetuning(inputs, out / "run")], lambda out: run_at(out / "run"), 200
    ),
    "ablations": Case(
        lambda inputs, out: [
            *(ROOT / "recipes" / "ablations.py", inputs / "study", *STUDY, f"teacher.checkpoint={TEACHER}"),
            *("--images", inputs / "cifar", "--out", out),
        ],
        lambda out: [run_at(out / name) for name in ("base", "other")],
        20,
    ),
}
RESUMED = ("convert-images", "embed npy", "embed parquet", "train", "distill", "finetune")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read, which is safe."""
    folder = tmp_path_factory.mktemp("inputs")
    images = [encoded_image(i) for i in range(200)]
    for i, image in enumerate(images):
        path = folder / "images" / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    labels = [i % 4 for i in range(len(images))]
    for name in ("data", "cifar/cifar10_sample"):
        for split, part in {"train": slice(0, 96), "test": slice(96, 144)}.items():
            write_mds(folder / name / split, images[part], labels[part])
    write_mds(folder / "many", images * 6)
    run = folder / "run"
    assert run_command(sys.executable, TRAIN, *training(folder, run)).returncode == 0
    assert d2v("export", run / "latest-rank0.pt", folder / "student.safetensors").returncode == 0
    (folder / "study").mkdir()
    base = (ROOT / "yamls" / "quickstart.yaml").read_text()
    (folder / "study" / "base.yaml").write_text(re.sub(r"\$\{here:(.*?)\}", rf"{ROOT}/yamls/\1", base))
    (folder / "study" / "rows.yaml").write_text(json.dumps({"base": {}, "other": {"seed": 18}}))
    return folder


class Recording(NamedTuple):
    """What a command did, and what is expected of it."""

    command: Sequence[str | Path]
    out: Path
    before: Tree
    operations: list[Operation]
    expected: Any


def record_case(case: Case, inputs: Path, folder: Path, resumes: bool) -> Recording:
    """Record a command, from the start or after a kill at half of its operations, beside a foreign file."""
    out = folder / "out"
    write_tree({"notes.txt": b"mine"}, out)
    case.before(inputs, out)
    command = case.command(inputs, out)
    while True:
        before = read_tree(out)
        operations = record([sys.executable, *command], out, folder / "log", cwd=ROOT, env=command_environment())
        (_, half), (_, whole) = [
            (i, disk.as_seen()) for i, disk in replay(before, operations, [len(operations) // 2, len(operations)])
        ]
        assert whole == read_tree(out), "the recording is not what happened"
        if not resumes:
            return Recording(command, out, before, operations, case.result(out))
        resumes = False
        write_tree(half, out)


def find_torn(state: State) -> Iterator[str]:
    """Yield the results that a reader finds and that are not what the program wrote."""
    for path, content in state.tree.items():
        if any(mark in path for mark in UNFINISHED):
            continue
        if path.endswith("latest-rank0.pt"):
            assert isinstance(content, Link)
            path = str(Path(path).with_name(content.target))
        elif not path.endswith(RESULTS) or (path.endswith(".mds") and not is_indexed(path, state.tree)):
            continue
        if path not in state.tree:
            yield f"{path} is missing"
        elif state.tree[path] != state.written[path]:
            yield f"{path} is torn"


def is_indexed(path: str, tree: Tree) -> bool:
    return any(str(folder / "index.json") in tree for folder in Path(path).parents)


def judge(case: Case, recording: Recording, state: State) -> str | None:
    """Return what is wrong with a state, or with what the same command makes of it."""
    if torn := [*find_torn(state)]:
        return f"a reader finds: {', '.join(torn)}"
    out, expected = recording.out, recording.expected
    write_tree(state.tree, out)
    if state.number == len(recording.operations) and (problem := compare(case, out, expected)):
        return f"it said to be done, but {problem}"
    ended = run_command(sys.executable, *recording.command, timeout=120)
    if ended.returncode and not (ended.returncode == 2 and case.done in ended.stderr):
        return f"status {ended.returncode}: {ended.stderr.strip().splitlines()[-1]}"
    return compare(case, out, expected)


def compare(case: Case, out: Path, expected: Any) -> str | None:
    """Return how the result differs from the undisturbed one; files of an unfinished command may be left."""
    try:
        found = case.result(out)
    except Exception as error:  # noqa: BLE001  (a reader's)
        return f"the result cannot be read: {error!r}"
    pairs = zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
    names = [key for ours, theirs in pairs for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    names = [name for name in names if not any(mark in name for mark in (*UNFINISHED, ".in_use"))]
    return f"another result: {', '.join(names[:4])}" if names else None


@pytest.mark.campaign
@pytest.mark.skipif(not IS_AVAILABLE, reason="strace cannot trace here")
@pytest.mark.parametrize(("name", "resumes"), [*((name, False) for name in CASES), *((name, True) for name in RESUMED)])
def test_a_command_survives_a_loss_of_power(name: str, resumes: bool, inputs: Path, tmp_path: Path) -> None:
    case, start = CASES[name], time.monotonic()
    recording = record_case(case, inputs, tmp_path, resumes)
    failures, count = [], 0
    for state in crash_states(recording.before, recording.operations, int(case.limit * STATES)):
        count += 1
        if (problem := judge(case, recording, state)) is not None:
            failures.append((state, problem))
    about = f"{name}{', resumed' * resumes}: {len(recording.operations)} operations, {count} states"
    print(f"{about}, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    assert not failures, story(recording, *min(failures, key=lambda each: (len(each[0].losses), each[0].number)))


def story(recording: Recording, state: State, problem: str) -> str:
    """Tell a failure in three lines."""
    last = recording.operations[state.number - 1]
    lost = "; ".join(state.losses[:5]) + f" and {len(state.losses) - 5} more" * (len(state.losses) > 5)
    return f"the power fails after operation {state.number}: {last}\non the disk: {lost}\nthen: {problem}"

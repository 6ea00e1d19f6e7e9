"""Commands whose power fails: what each needs and makes, and what must hold in every state that a crash may leave."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from helpers import (
    D2V,
    GOLDEN,
    ROOT,
    command_environment,
    encoded_image,
    log_of,
    run_command,
    run_training,
    small_run,
    student_of,
    succeed,
    write_images,
    write_mds,
)
from power.recorder import Operation, record
from power.replayer import Link, State, Tree, crash_states, read_tree, replay, write_tree

TEACHER = GOLDEN / "tiny_base.pt"
CONVERT = ("--shard-size", "3kb", "--workers", "2")
EMBED = ("--workers", "0", "--batch-size", "16")
FOREIGN = "notes.txt"
NUM_KEPT = 2
SHORT = (
    "global_train_batch_size=16",
    "precision=fp32",
    "student.depth=1",
    "train_loader.num_workers=0",
    f"save_num_checkpoints_to_keep={NUM_KEPT}",
    "callbacks={}",
    "report=false",
)
# Files that a reader takes for whole.
RESULTS = (".safetensors", ".onnx", ".npy", ".parquet", ".yaml", ".md", ".mds", "conversion.json", "index.json")
# Marks of files of an unfinished command, and of a lock; of a run's log, the times and the baselines, which a resumed
# run measures once more.
UNFINISHED = (".partial", ".converting", ".tmp", "/tmp", ".in_use")
NOT_COMPARED = re.compile(r"throughput/|time/|.*/(pixels|encoder|teacher)/")


class Inputs:
    """Files that the commands read, each made at its first use; no crash touches them.

    Args:
        folder: A new folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def images(self, count: int) -> Path:
        """Return a folder of images in three classes."""
        folder = self.folder / f"{count} images"
        return folder if folder.exists() else write_images(folder, [f"{'abc'[i % 3]}/{i}.jpg" for i in range(count)])

    def data(self, name: str = "data") -> Path:
        """Return a labeled data set in two splits."""
        folder = self.folder / name
        for split, numbers in {"train": range(96), "test": range(96, 144)}.items():
            if not (folder / split).exists():
                write_mds(folder / split, list(map(encoded_image, numbers)), [i % 4 for i in numbers])
        return folder

    @cached_property
    def many(self) -> Path:
        """1,200 images: an embedding of them has two chunks."""
        return write_mds(self.folder / "many", [encoded_image(i % 100) for i in range(1200)])

    @cached_property
    def student(self) -> Path:
        """An exported student of two batches."""
        run, file = self.folder / "run", self.folder / "student.safetensors"
        run_training(*training(self, run, "max_duration=2ba"))
        succeed("export", run / "latest-rank0.pt", file)
        return file

    @cached_property
    def study(self) -> Path:
        """A study of two rows."""
        (folder := self.folder / "study").mkdir()
        base = (ROOT / "yamls" / "quickstart.yaml").read_text()
        (folder / "base.yaml").write_text(re.sub(r"\$\{here:(.*?)\}", rf"{ROOT}/yamls/\1", base))
        (folder / "rows.yaml").write_text(json.dumps({"base": {}, "other": {"seed": 18}}))
        return folder


class Case(NamedTuple):
    """A command whose power fails."""

    command: Callable[[Inputs, Path], Sequence[str | Path]]
    """Inputs, folder of outputs → arguments of Python."""
    result: Callable[[Path], Mapping[str, Any]]
    """Folder of outputs → what the command made, to be compared."""
    done: str = "no such line"
    """What the command says, with status 2, if it had ended before."""
    before: Callable[[Inputs, Path], object] = lambda inputs, out: None
    """Makes what is in the folder of outputs before the command."""


def training(inputs: Inputs, folder: Path, *changes: str) -> list[str]:
    duration = ("max_duration=6ba", "scheduler.t_warmup=1ba")
    return small_run(folder, inputs.data() / "train", *SHORT, *duration, *changes)


def finetuning(inputs: Inputs, folder: Path) -> list[str]:
    return [
        str(ROOT / "yamls" / "finetune.yaml"),
        f"model={inputs.student}",
        f"dataset={{format: mds, root: {inputs.data()}}}",
        f"save_folder={folder}",
        *(change for change in SHORT if not change.startswith(("callbacks", "student"))),
        "max_duration=6ba",
        "scheduler.t_warmup=2ba",
        "save_interval=2ba",
    ]


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


def run_at(folder: Path) -> dict[str, Any]:
    """Return a run's result. One that lost its power after its last save may keep one checkpoint more."""
    return {
        "log": {key: steps for key, steps in log_of(folder).items() if not NOT_COMPARED.match(key)},
        "student": {name: tensor.numpy().tobytes() for name, tensor in student_of(folder).items()},
        "checkpoints": sorted(path.name for path in folder.glob("ep*.pt"))[-NUM_KEPT:],
        "newest": (folder / "latest-rank0.pt").readlink().name,
        "run.yaml": (folder / "run.yaml").read_bytes(),
    }


def distilled_at(out: Path) -> dict[str, Any]:
    files = [path for path in out.glob("run/*") if path.suffix in (".yaml", ".safetensors", ".md")]
    return run_at(out / "run") | contents_of(out / "run" / "images") | {path.name: content_of(path) for path in files}


def make_parts(*command: str | Path) -> None:
    for number in range(2):
        succeed(*command, "--part", f"{number}/2")


def converting(count: int) -> Case:
    return Case(
        lambda inputs, out: [*D2V, "convert-images", inputs.images(count), out / "set", *CONVERT],
        contents_of,
        "holds a finished data set",
    )


def embedding(name: str) -> Case:
    return Case(
        lambda inputs, out: [*D2V, "embed", TEACHER, inputs.many, out / name, *EMBED], contents_of, "already exists"
    )


def exporting(name: str) -> Case:
    return Case(lambda inputs, out: [*D2V, "export", inputs.student, out / name], contents_of, "already exists")


CASES = {
    "convert-images": converting(120),  # 40 shards
    "merge a data set": Case(
        lambda inputs, out: [*D2V, "merge", out / "set"],
        contents_of,
        before=lambda inputs, out: make_parts("convert-images", inputs.images(36), out / "set", *CONVERT),
    ),
    "embed npy": embedding("out.npy"),
    "embed Parquet": embedding("out.parquet"),
    "merge npy": Case(
        lambda inputs, out: [*D2V, "merge", out / "out.npy"],
        contents_of,
        "already exists",
        lambda inputs, out: make_parts("embed", TEACHER, inputs.images(36), out / "out.npy", *EMBED),
    ),
    "train": Case(
        lambda inputs, out: [ROOT / "recipes" / "train.py", *training(inputs, out / "run")],
        lambda out: run_at(out / "run"),
    ),
    "distill": Case(
        lambda inputs, out: [
            *(*D2V, "distill", inputs.images(200), "--teacher", TEACHER, "--out", out / "run"),
            *(*SHORT, "max_duration=4ba", "save_interval=1ba"),
        ],
        distilled_at,
    ),
    "export safetensors": exporting("out.safetensors"),
    "export ONNX": exporting("out.onnx"),
    "finetune": Case(
        lambda inputs, out: [ROOT / "recipes" / "finetune.py", *finetuning(inputs, out / "run")],
        lambda out: run_at(out / "run"),
    ),
    "ablations": Case(
        lambda inputs, out: [
            *(ROOT / "recipes" / "ablations.py", inputs.study, f"teacher.checkpoint={TEACHER}", *SHORT),
            *("max_duration=4ba", "save_interval=2ba", "retrieval.interval=4ba"),
            *("--images", inputs.data("cifar/cifar10_sample").parent, "--out", out),
        ],
        lambda out: {f"{row} {key}": value for row in ("base", "other") for key, value in run_at(out / row).items()},
    ),
}


class Trial(NamedTuple):
    """A recorded command, and what is expected of it."""

    case: Case
    command: Sequence[str | Path]
    out: Path
    before: Tree
    operations: list[Operation]
    expected: Mapping[str, Any]

    def judge(self, state: State, *, repeats: bool = True) -> str | None:
        """Return what is wrong with a state, or with what the same command makes of it; None if all is well."""
        if torn := [*find_torn(state)]:
            return f"a reader finds: {', '.join(torn[:3])}"
        write_tree(state.tree, self.out)
        if state.number == len(self.operations) and (problem := self.compare()):
            return f"it said to be done, but {problem}"
        if not repeats:
            return None
        ended = run_command(sys.executable, *self.command, timeout=120)
        if ended.returncode and not (ended.returncode == 2 and self.case.done in ended.stderr):
            return f"status {ended.returncode}: {ended.stderr.strip().splitlines()[-1]}"
        return self.compare()

    def compare(self) -> str | None:
        """Return how the result differs from the undisturbed one; files of an unfinished command may be left."""
        try:
            result = self.case.result(self.out)
        except Exception as error:  # noqa: BLE001  (a reader's)
            return f"the result cannot be read: {error!r}"
        if not (notes := self.out / FOREIGN).exists() or notes.read_bytes() != self.before[FOREIGN]:
            return f"{FOREIGN}, which is not ours, was touched"
        names = [name for name in {**result, **self.expected} if result.get(name) != self.expected.get(name)]
        names = [name for name in names if not any(mark in name for mark in UNFINISHED)]
        return f"another result: {', '.join(names[:4])}" if names else None

    def states(self, limit: int) -> Iterator[State]:
        return crash_states(self.before, self.operations, limit)

    def tell(self, state: State, problem: str) -> str:
        """Tell a failure in three lines."""
        last, lost = self.operations[state.number - 1], state.losses
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        return f"the power fails after: {last}\non the disk: {'; '.join(lost[:5])}{more}\nthen: {problem}"


def record_trial(case: Case, inputs: Inputs, folder: Path, *, resumes: bool = False) -> Trial:
    """Record a command, beside a foreign file; if it resumes, after a kill at half of its operations."""
    out = folder / "out"
    write_tree({FOREIGN: b"mine"}, out)
    case.before(inputs, out)
    command = case.command(inputs, out)
    while True:
        before = read_tree(out)
        operations = record([sys.executable, *command], out, folder / "log", cwd=ROOT, env=command_environment())
        half, whole = (
            disk.as_seen() for _, disk in replay(before, operations, [len(operations) // 2, len(operations)])
        )
        assert whole == read_tree(out), "the recording is not what happened"
        if not resumes:
            return Trial(case, command, out, before, operations, case.result(out))
        resumes = False
        write_tree(half, out)


def find_torn(state: State) -> Iterator[str]:
    """Yield the results that a reader finds and that are not what the program wrote."""
    for path, content in state.tree.items():
        if any(mark in path for mark in UNFINISHED):
            continue
        if isinstance(content, Link):  # latest-rank0.pt
            path = str(Path(path).with_name(content.target))
        elif not path.endswith(RESULTS) or (path.endswith(".mds") and not is_indexed(path, state.tree)):
            continue
        if path not in state.tree:
            yield f"{path} is missing"
        elif state.tree[path] != state.written[path]:
            yield f"{path} is torn"


def is_indexed(shard: str, tree: Tree) -> bool:
    return any(str(folder / "index.json") in tree for folder in Path(shard).parents)

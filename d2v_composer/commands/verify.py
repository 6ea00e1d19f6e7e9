"""Check what an exported file computes in each runtime of this machine, against PyTorch.

    d2v verify student.onnx
    d2v verify student.onnx --runtime onnxruntime --runtime openvino --images photos
    d2v verify student-int8.onnx --student student.safetensors
    d2v verify student.onnx --kit kit

EXPORTED is an .onnx or .pt2 file of `d2v export`, and STUDENT the .safetensors file of the same student. For each
runtime, the table has the seconds to load the file and the peak memory of its process; the least and the mean cosine to
PyTorch's embeddings, the largest difference of a number, as a share of the largest number, and the neighbor agreement
with PyTorch; and the samples/s in batches of 1 and of 16. The exit status is 1 if a runtime misses a limit, gives
numbers that are not finite, the same embedding for every sample, or another one in another batch. EXPORTED.json gets
the numbers. --kit writes a folder to take to a machine whose runtime is not here: its script prints the same numbers,
and needs only numpy and that runtime.
"""

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_composer.checkpoints import check_program
from d2v_composer.checkpoints.check_program import RUNTIMES, Kit, read_kit
from d2v_composer.system.command_line import make_parser
from d2v_composer.system.errors import InputError, RunError, reason, writing
from d2v_composer.system.files import check_out_file, write_atomically
from d2v_composer.system.processes import die_with_parent

if TYPE_CHECKING:
    from d2v_composer.checkpoints.export import Embedder
    from d2v_composer.checkpoints.student_file import PrimaryEmbedding

BATCHES = (1, 7, 64)
ROUNDS = 3
COSINE, COSINE_INT8, DIFFERENCE = 0.999, 0.98, 1e-4
# Modality → samples that ship.
SHIPPED = {"image": "quickstart/cifar10/test", "audio": "quickstart_audio/words/test"}
PYTORCH = {"PyTorch": False, "PyTorch, compiled": True}

_loaded: check_program.Embed
"""In a worker process, the program that it has loaded."""


def main(argv: Sequence[str]) -> None:
    """Check a file, and print the table."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("exported", metavar="EXPORTED", type=Path, help="a file of d2v export: .onnx or .pt2")
    add("--student", type=Path, help="the same student's .safetensors file; default: EXPORTED with that suffix")
    add("--runtime", action="append", choices=RUNTIMES, help="may be repeated; default: all that are installed")
    add("--images", metavar="FOLDER", help="images, sound or MDS shards to embed; default: CIFAR-10's, or 51 words")
    about = f"least cosine to PyTorch's embeddings; default: {COSINE}, of an int8 file {COSINE_INT8}"
    add("--cosine", type=float, help=about)
    about = f"in float32, largest difference of a number, as a share of the largest one; default: {DIFFERENCE}"
    add("--difference", type=float, default=DIFFERENCE, help=about)
    add("--kit", type=Path, metavar="FOLDER", help="write this new folder instead of checking here")
    verify(**vars(parser.parse_args(argv)))


def verify(
    exported: Path,
    *,
    student: Path | None = None,
    runtime: Sequence[str] | None = None,
    images: str | None = None,
    cosine: float | None = None,
    difference: float = DIFFERENCE,
    kit: Path | None = None,
) -> None:
    """Check an exported file; the arguments are the command's.

    Raises:
        InputError: A file cannot be used, or a chosen runtime is not installed or takes other files.
        RunError: A runtime misses a limit.
    """
    chosen, own = choose_runtimes(exported, runtime), student or exported.with_suffix(".safetensors")
    report = exported.with_name(f"{exported.name}.json")
    check_out_file(report if kit is None else kit, overwrite=kit is None)
    if not own.exists():
        raise InputError(f"{own}: no such file; name the student that {exported} was exported from: --student FILE")

    from d2v_composer.checkpoints.export import Embedder, read_description
    from d2v_composer.checkpoints.load import load_student
    from d2v_composer.system.machine import describe_machine, package_versions

    embedding, is_int8 = read_description(exported)
    limits = cosine or (COSINE_INT8 if is_int8 else COSINE), None if is_int8 else difference
    task = Kit(str(exported), make_batches(Embedder(load_student(own), embedding), images), *limits)
    if kit is not None:
        with writing(kit):
            kit.mkdir(parents=True)
            script = Path(shutil.copy(check_program.__file__, kit)).name
            shutil.copy(exported, kit)
            task.write(kit)
        print(f"wrote {kit}: copy it to the other machine, and run `python {script}` in it")
        return
    loads = {name: partial(RUNTIMES[name].load, str(exported)) for name in chosen}
    loads |= {name: partial(load_pytorch, own, embedding, compiles) for name, compiles in PYTORCH.items()}
    found = measure(task, loads)
    print(f"{exported}: {exported.stat().st_size / 1e6:.1f} MB, {embedding.name}", check_program.HEAD, sep="\n")
    print(*(check_program.line(name, each, each["rates"]) for name, each in found.items()), sep="\n")
    about = {"machine": describe_machine(), "versions": package_versions(*(each.package for each in RUNTIMES.values()))}
    write_atomically(report, json.dumps({"embedding": embedding.name, **about, "runtimes": found}, indent=1) + "\n")
    if faults := [f"{exported}: {name}: {'; '.join(each['faults'])}" for name, each in found.items() if each["faults"]]:
        raise RunError(*faults)


def choose_runtimes(exported: Path, names: Sequence[str] | None) -> list[str]:
    """Return the runtimes of a file that are installed, and name the others.

    Raises:
        InputError: There is none, or one of ``names`` is not installed or takes other files.
    """
    known = {name: each.package for name, each in RUNTIMES.items() if each.suffix == exported.suffix}
    if not known:
        raise InputError(f"{exported}: must end in .onnx or .pt2")
    found = [name for name, package in known.items() if find_spec(package)]
    if refused := [name for name in names or () if name not in found]:
        raise InputError(f"--runtime: {refused[0]} is not installed, or takes no {exported.suffix} file")
    for name in known.keys() - found:
        print(f"{name}: not checked; pip install {known[name]}")
    return found if names is None else [*names]


def make_batches(embedder: "Embedder", source: str | None) -> list[tuple[Any, Any]]:
    """Return inputs and PyTorch's embeddings of batches of several sizes and, of sound, several lengths.

    The inputs of a batch are the first ones of a larger one.

    Raises:
        InputError: The samples cannot be read.
    """
    import torch

    from d2v_composer.data.containers import open_source
    from d2v_composer.data.labeled import evenly_spaced
    from d2v_composer.data.modalities import modality_of

    encoder = embedder.student.encoder
    modality = modality_of(encoder.config)
    place = source or str(Path(__file__).parents[1] / "yamls" / SHIPPED[modality.name])
    found = open_source(place, modality)
    samples = [found.decode(i) for i in evenly_spaced(len(found), max(BATCHES))]
    if len(samples) < 2:
        raise InputError(f"{place}: expected at least 2 {modality.unit}, got {len(samples)}")
    shortest = min(each.shape[-1] for each in samples)
    batch = encoder.prepare(torch.stack([each[..., :shortest] for each in samples]))
    batches = [batch[:size] for size in BATCHES]
    if len(encoder.free_axes) > 1:
        batches += [batch[:7, : shortest * 3 // 4], batch[:7].repeat(1, 2)]
    with torch.inference_mode():
        return [(each.numpy(), embedder(each).numpy()) for each in batches]


def load_pytorch(student: Path, embedding: "PrimaryEmbedding", compiles: bool) -> check_program.Embed:
    """Load a student in PyTorch."""
    import torch

    from d2v_composer.checkpoints.export import Embedder
    from d2v_composer.checkpoints.load import load_student

    warnings.filterwarnings("ignore", "Dynamo does not know how to trace", UserWarning)
    model = Embedder(load_student(student), embedding)
    embed = torch.compile(model) if compiles else model
    return lambda inputs: embed(torch.from_numpy(inputs)).numpy()


def measure(kit: Kit, loads: Mapping[str, Callable[[], check_program.Embed]]) -> dict[str, dict[str, Any]]:
    """Check each program in a process of its own, then measure their speeds in turns: the median over rounds.

    Returns:
        Name → what :func:`check_program.check` returns, ``seconds``, ``megabytes`` and ``rates``. Of one that cannot be
        loaded or run, only ``faults``.
    """
    found: dict[str, dict[str, Any]] = {}
    context = get_context("spawn")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        kit.write(Path(folder))
        workers = {}
        for name, load in loads.items():
            worker = stack.enter_context(ProcessPoolExecutor(1, context, die_with_parent))
            is_float32 = name not in RUNTIMES or RUNTIMES[name].is_float32
            try:
                found[name] = worker.submit(check_in_worker, load, Path(folder), is_float32).result()
                workers[name] = worker
            except Exception as error:  # noqa: BLE001  (the runtime's, or it died)
                found[name] = {"faults": [f"{type(error).__name__}: {reason(error)}"]}
        for _ in range(ROUNDS):
            for name, worker in workers.items():
                rates = worker.submit(rate_in_worker, Path(folder)).result()
                found[name].setdefault("rates", []).append(rates)
    for each in found.values():
        each["rates"] = [sorted(rates)[ROUNDS // 2] for rates in zip(*each.get("rates", ()), strict=True)]
    return found


def check_in_worker(load: Callable[[], check_program.Embed], folder: Path, is_float32: bool) -> dict[str, Any]:
    """Load a program, and check it."""
    global _loaded
    start = time.perf_counter()
    _loaded = load()
    seconds = time.perf_counter() - start
    found = check_program.check(_loaded, read_kit(folder), is_float32)
    with suppress(OSError):  # Linux alone has it; what getrusage says begins with this process's parent
        status = Path("/proc/self/status").read_text()
        found["megabytes"] = int(status.partition("VmHWM:")[2].split()[0]) / 1e3
    return found | {"seconds": seconds}


def rate_in_worker(folder: Path) -> list[float]:
    """Measure the loaded program's samples/s for each batch size."""
    return check_program.rates(_loaded, read_kit(folder))

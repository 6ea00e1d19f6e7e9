"""Compare an exported file, in each runtime that is installed, with PyTorch."""

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen

import numpy as np
import torch
from torch import Tensor

from d2v_composer.checkpoints.load import save_student
from d2v_composer.data import modality_of
from d2v_composer.export import check_program
from d2v_composer.export.check_program import RUNTIMES
from d2v_composer.export.model_card import add_section
from d2v_composer.export.programs import read_metadata
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import height_and_width
from d2v_composer.models.images import resize
from d2v_composer.models.provenance import value_at
from d2v_composer.report.tables import format_table
from d2v_composer.sources.labeled import ONLY_SAMPLES, evenly_spaced, open_labeled_sets
from d2v_composer.sources.open import open_source
from d2v_composer.system.errors import InputError, RunError
from d2v_composer.system.fetch import names_in
from d2v_composer.system.files import check_out_file, check_owned, sha256, write_atomically
from d2v_composer.system.machine import describe_machine, package_versions
from d2v_composer.system.processes import if_interrupted
from d2v_composer.system.progress import progress_bar

# A program's input → samples that ship.
YAMLS = f"{Path(__file__).parents[1]}/yamls"
SHIPPED = {"images": f"{YAMLS}/quickstart/cifar10/test", "waveforms": f"{YAMLS}/quickstart_audio/words/test"}
MAX_SAMPLES, MIN_SAMPLES, ROUNDS = 64, 20, 3


def verify(
    exported: Path,
    student: Backbone,
    *,
    images: str | None,
    runtime: Sequence[str] | None = None,
    cosine: float | None = None,
    difference: float | None = None,
    kit: Path | None = None,
) -> None:
    """Measure a student's exported file in each runtime, print a table, and write the numbers beside the file.

    The keyword arguments are the options of ``d2v verify``. With ``kit``, only this folder is written, and nothing is
    measured.

    Raises:
        InputError: A file cannot be used, or a chosen runtime is not installed or takes other files.
        RunError: A runtime fails, or misses a limit.
    """
    embedding, is_int8, takes_pixels = read_metadata(exported, student)
    suited = [name for name, entry in RUNTIMES.items() if entry.suffix == exported.suffix and find_spec(entry.package)]
    if refused := [name for name in runtime or () if name not in suited]:
        raise InputError(f"--runtime: {explain_refusal(refused[0], exported)}")
    report, script = exported.with_name(f"{exported.name}.verify.json"), Path(check_program.__file__)
    check_out_file(report)
    if kit is not None:
        check_owned(kit, names_in(kit), "kit.json", "--kit")
    if cosine is None:
        cosine = 0.98 if is_int8 else 0.999
    if difference is None:
        difference = 9 if is_int8 else 1e-4
    batch = read_samples(student, images, MAX_SAMPLES, takes_pixels)
    inputs = [batch, batch[:7, : batch.shape[1] // 2]] if len(student.encoder.free_axes) > 1 else [batch]
    samples = [x.movedim(-1, 1) if takes_pixels else x for x in inputs]
    with tempfile.TemporaryDirectory() as temporary:
        folder = kit or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        archive = io.BytesIO()  # on a full disk, numpy's writer hides the error behind another
        np.savez(archive, *inputs, np.concatenate([student.embed_all(x)[embedding] for x in samples]))
        write_atomically(folder / "kit.npz", archive.getvalue())
        limits = {"embedding": embedding, "cosine": cosine, "difference": difference}
        write_atomically(folder / "kit.json", json.dumps(limits, indent=1))
        shutil.copy(script, folder)
        if kit is not None:
            with suppress(shutil.SameFileError):  # the file is in the folder already
                shutil.copy(exported, kit)
            print(f"wrote {kit}; in this folder, run: python {script.name} RUNTIME {exported.name}")
            return
        save_student(student, folder / "pytorch.safetensors")
        files = {"pytorch": folder / "pytorch.safetensors"} | dict.fromkeys(runtime or suited, exported)
        medians, faults = measure_runtimes(folder / script.name, files)
    rows = [[name, *map("{:.5g}".format, numbers.values())] for name, numbers in medians.items()]
    table = format_table(["", *max(medians.values(), key=len)], rows)
    digest = sha256(exported)
    table += (
        f"\n{exported.name}: {exported.stat().st_size / 1e6:.1f} MB, {student.describe(embedding)}, sha256 {digest}"
    )
    table += f"\n{name_fastest({name: medians[name] for name in medians if name not in faults})}"
    print(table)
    report_entries = {"embedding": embedding, "machine": describe_machine(), "faults": faults, "runtimes": medians}
    report_entries |= {"sha256": digest, "versions": package_versions("onnxruntime", "openvino")}
    write_atomically(report, json.dumps(report_entries, indent=1) + "\n")
    add_section(exported.with_name("README.md"), f"{exported.name} in each runtime", f"```\n{table}\n```\n")
    if faults:
        raise RunError(*(f"{exported}: {name}: {fault}" for name, fault in faults.items()))


def explain_refusal(runtime: str, exported: Path) -> str:
    """Return why a runtime cannot measure an exported file, and what to do."""
    if (suffix := RUNTIMES[runtime].suffix) != exported.suffix:
        return f"{runtime} takes {suffix} files, got {exported.name}; to measure a converted file, use --kit FOLDER"
    return (
        f"{runtime} is not installed; install it, or use --kit FOLDER, and run the script in FOLDER in the runtime's "
        "own environment"
    )


def name_fastest(medians: Mapping[str, Mapping[str, float]]) -> str:
    """Return a line that compares the fastest runtime at each batch size with the second fastest and the slowest."""
    comparisons = []
    for size in (1, 16) if len(medians) > 1 else ():
        key = f"/s at {size}"
        fastest, *slower = sorted(medians, key=lambda name: medians[name][key], reverse=True)
        compared = dict.fromkeys((slower[0], slower[-1]))
        factors = (f"{medians[fastest][key] / medians[name][key]:.2f} times as fast as {name}" for name in compared)
        comparisons.append(f"in batches of {size}, {fastest} is {' and '.join(factors)}")
    return f"fastest runtime that met all limits: {'; '.join(comparisons) or 'nothing to compare'}"


def read_samples(student: Backbone, source: str | None, maximum: int, takes_pixels: bool = False) -> Tensor:
    """Return at most ``maximum`` samples in the form that an exported file takes as input.

    Audio clips are cut to the length of the shortest, (N, L). Images are normalized, (N, 3, height, width); with
    ``takes_pixels``, they are (N, height, width, 3) uint8.

    Args:
        student: The student that was exported.
        source: SOURCE of ``d2v embed``; ``None``: the first retrieval data set of the run that trained the student.
        maximum: Maximum number of samples.
        takes_pixels: True if the exported file normalizes images itself.

    Raises:
        InputError: There are too few samples, or a sample cannot be read.
    """
    modality, samples = modality_of(student.encoder.config), []
    if source is not None:
        opened = open_source(source, modality)
        samples = [opened.decode(i) for i in evenly_spaced(len(opened), maximum)]
    elif section := value_at(student.provenance, "config.retrieval"):
        for load in [*open_labeled_sets(section, modality, **ONLY_SAMPLES, max_images=maximum).values()][:1]:
            samples = load().test.samples
    if len(samples) < MIN_SAMPLES:
        raise InputError(
            f"expected at least {MIN_SAMPLES} {modality.unit}, got {len(samples)}; choose a larger source with "
            "--images (d2v verify) or --calibrate (d2v export --int8)"
        )
    length = min(sample.shape[-1] for sample in samples)
    batch = torch.stack([sample[..., :length] for sample in samples])
    if takes_pixels:
        config = student.encoder.config
        return resize(batch, height_and_width(config.image_size), config.interpolation).movedim(1, -1)
    return student.encoder.normalized(batch)


def measure_runtimes(script: Path, files: Mapping[str, Path]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Run the script ``ROUNDS`` times for each runtime, each time in a new process.

    Returns:
        Runtime → name of a measured number → its median over rounds; and runtime → message, for each runtime that
        failed or missed a limit.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    medians, faults, path = {}, {}, os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for name in progress_bar(ROUNDS * list(files), desc="measuring", unit="runs"):
        command = [sys.executable, str(script), name, str(files[name])]
        with Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=path) as process, if_interrupted(process.kill):
            output, errors = process.communicate()
        rounds[name].append(json.loads("{" + (output.partition("{")[2] or "}")))
        if process.returncode:
            faults[name] = (errors.splitlines() or [f"exit status {process.returncode}"])[-1]
    for name, runs in rounds.items():
        medians[name] = {key: median(run[key] for run in runs) for key in min(runs, key=len)}
    return medians, faults

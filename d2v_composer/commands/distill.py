"""Distill a student from images or audio alone: no labels, no YAML, no clone.

    d2v distill photos --teacher timm/vit_small_patch14_dinov2.lvd142m --out runs/photos
    d2v distill recordings --teacher base_libri.pt --out runs/recordings
    d2v distill photos --teacher teacher.safetensors --out runs/photos max_duration=20ep student.depth=3
    d2v distill s3://bucket/photos/train --teacher teacher.safetensors --out runs/photos
    d2v distill 'hf://datasets/ORG/NAME/data/train-*' --teacher teacher.safetensors --out runs/photos

SOURCE is a folder of images, or of audio for an audio teacher; or MDS, Parquet files or WebDataset tars, local or in
a store; or a data set on the Hugging Face hub. A tenth of its samples, at most 5,000, and all exact copies of these
measure the student and are never trained on. Sizes and duration follow from the number of samples, the teacher and the
device. DIR, which must be new or empty, receives distill.yaml (every setting, to read and for d2v train), images/ or
clips/, the run with its report.html, and student.safetensors. key=value changes a setting; `d2v fields training` lists
them.
Run the same command again to resume after any interruption.
"""

import json
import os
import shlex
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from d2v_composer.commands.export import export
from d2v_composer.commands.train import relaunch_on_gpus
from d2v_composer.models.configs import (
    EatEncoderConfig,
    TeacherConfig,
    TimmEncoderConfig,
    height_and_width,
    parse_image_size,
)
from d2v_composer.models.names import DATA2VEC2, PREFIX
from d2v_composer.system.addresses import MARK, STUDENT_FILE, RunFolder, hide_secrets
from d2v_composer.system.command_line import COLUMN, SOURCES, make_parser
from d2v_composer.system.errors import InputError, errors_of, reading
from d2v_composer.system.files import check_out_file, check_owned, write_atomically
from d2v_composer.system.processes import global_rank, is_launched

if TYPE_CHECKING:
    from composer import Trainer

    from d2v_composer.config.schema import TrainConfig
    from d2v_composer.data.modality import Modality
    from d2v_composer.data.source import Source
    from d2v_composer.models.teacher import Teacher

# A tenth of them are twenty: each needs ten neighbors among the others, and some may be unreadable.
MIN_SAMPLES = 200
# The chapter's, on ImageNet: 30,000 batches of 256.
EPOCHS, MAX_BATCHES = 6, 30_000
# Chosen for any teacher and number of samples.
ALWAYS = {"precision": "auto", "scheduler.t_warmup": "0.1dur"}
SETTINGS, HELD_OUT = "distill.yaml", "held_out"
# What a run's results depend on, besides what its checkpoint fixes.
DECIDES = (
    *(f"config.{name}" for name in ("max_duration", "precision", "scheduler", "algorithms", "retrieval")),
    *(f"config.train_loader.{name}" for name in ("crop_scale", "crop_ratio", "flip")),
)
# In the folder of samples: the shards of a data set in a store, until they are converted.
FETCHED = ".fetched"


class Plan(NamedTuple):
    """The config, teacher and samples of a call, checked before anything is written."""

    config: "TrainConfig"
    teacher: "Teacher"
    source: "Source"


def main(argv: Sequence[str]) -> None:
    """Choose settings, convert samples, train, report and export."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("source", type=absolute, metavar="SOURCE", help=f"a folder of images or audio files, or {SOURCES}")
    add("changes", metavar="key=value", nargs="*", help="settings to change")
    add("--teacher", type=absolute, required=True, help="a data2vec 2.0 teacher's file or address, or timm/NAME")
    add("--out", type=absolute, required=True, metavar="DIR", help="the folder for samples, run and student")
    add("--column", metavar="NAME", help=COLUMN)
    arguments = parser.parse_intermixed_args(argv)
    arguments.out = Path(arguments.out)
    if any(change.startswith(("run_name=", "save_folder=")) for change in arguments.changes):
        raise InputError("run_name and save_folder: use --out instead")
    try:
        distill(arguments, argv)
    except InputError as error:  # settings that follow from --out
        raise InputError(*(str(line).replace("save_folder", "--out") for line in error.args)) from error


def distill(arguments: Namespace, argv: Sequence[str]) -> None:
    """Plan and prepare a run, or go on with one, on every GPU; then export its student."""
    plan = None
    if not (is_launched() or has_begun(arguments)):
        prepare(arguments, plan := make_plan(arguments))
    relaunch_on_gpus("distill", *argv)

    from d2v_composer.builders.run import build_teacher, train_student
    from d2v_composer.checkpoints.checkpoint import LATEST

    config = read_settings(arguments) if plan is None else plan.config
    # Before the seed is set, in every call: a student's random weights come after it.
    teacher = plan.teacher if plan is not None else None if is_launched() else build_teacher(config)
    train_student(config, teacher=teacher, when_built=partial(settle, arguments, config))
    if global_rank() == 0:
        export(str(arguments.out / LATEST), arguments.out / STUDENT_FILE)


def command_of(arguments: Namespace) -> str:
    """Return the command, without OUT and changes, for the first line of the settings file."""
    column = ["--column", arguments.column] if arguments.column else []
    return hide_secrets(shlex.join(["d2v", "distill", arguments.source, "--teacher", arguments.teacher, *column]))


def has_begun(arguments: Namespace) -> bool:
    """Return True if OUT holds this command's run and its training has begun, so that its settings are fixed.

    Raises:
        InputError: OUT is the user's or another command's, or cannot be written.
    """
    from d2v_composer.system.fetch import is_remote, names_in

    source, out, path = arguments.source, arguments.out, arguments.out / SETTINGS
    if not is_remote(source) and out.resolve().is_relative_to(Path(source).resolve(strict="*" not in source)):
        raise InputError(f"{out} is inside the folder of samples, {source}; choose another --out")
    check_out_file(path)
    with errors_of("--out", ValueError):
        RunFolder.parse(str(out))
    check_owned(out, names := names_in(out), MARK, "--out")
    with reading(out):
        if not path.exists():
            if any(not name.startswith((MARK, SETTINGS)) for name in names):
                raise InputError(f"{out} holds a run of another command; choose another --out")
            return False
        if (found := path.read_text().partition("\n")[0][2:]) != command_of(arguments):
            raise InputError(f"{out} was made by {found!r}; choose another --out")
        return (out / "run.yaml").exists()


def make_plan(arguments: Namespace) -> Plan:
    """List the samples, load the teacher and choose the settings.

    Raises:
        InputError: The samples, the teacher or a change cannot be used.
    """
    from d2v_composer.builders.models import build_augmentation
    from d2v_composer.builders.run import build_callbacks, build_teacher, choose_embeds, join_student
    from d2v_composer.data.modalities import modality_of

    # The changes are checked before the teacher is fetched.
    unsized = configure(arguments, arguments.out, ALWAYS)
    teacher = build_teacher(unsized)
    modality = modality_of(teacher.config)
    samples = arguments.out / modality.unit
    with TemporaryDirectory() as folder:
        source = list_source(arguments, modality, Path(folder))
    if (number := len(source)) < MIN_SAMPLES:
        raise InputError(f"{arguments.source}: expected at least {MIN_SAMPLES} {modality.unit}, got {number}")
    chosen = choose(number, teacher.config, unsized.student.model)
    config = configure(arguments, samples, chosen)
    if config.teacher != unsized.teacher:  # a timm model for smaller images
        teacher = build_teacher(config)
    choose_embeds(config, join_student(config, teacher))
    build_augmentation(config.train_loader, modality, config.seed)
    build_callbacks(config)
    print(f"settings for {number} {modality.unit}: {', '.join(f'{key}={value}' for key, value in chosen.items())}")
    return Plan(config, teacher, source)


def list_source(arguments: Namespace, modality: "Modality", fetched: Path) -> "Source":
    """List the samples of SOURCE; ``fetched`` is a folder for files that must be downloaded.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    from d2v_composer.data.containers import find_files, open_source
    from d2v_composer.system.fetch import is_remote

    remote, column = is_remote(arguments.source), arguments.column
    if remote and (files := find_files(arguments.source, modality, column)):
        return files.open()
    return open_source(arguments.source, modality, column=column, cache=fetched if remote else None)


def prepare(arguments: Namespace, plan: Plan) -> None:
    """Write the settings and convert the samples, except for what an interrupted call already did.

    Raises:
        InputError: Another call or run uses OUT, or too few samples are left to train on.
    """
    from d2v_composer.callbacks.checkpointing import FolderLock
    from d2v_composer.data.convert import convert, foresee, hold_out
    from d2v_composer.data.mds import INDEX, SUMMARY
    from d2v_composer.data.source import name_counts
    from d2v_composer.system.fetch import is_remote

    config, source, modality = plan.config, plan.source, plan.source.modality
    samples = arguments.out / modality.unit
    lock, fetched, workers = FolderLock(RunFolder(arguments.out)), samples / FETCHED, os.cpu_count() or 1
    if has_begun(arguments):  # meanwhile
        raise InputError(f"{arguments.out}: another process has begun to train there; run the command again")
    splits = []
    for split in ("test", "train"):
        summary, kept = samples / split / SUMMARY, encoding(modality, config, split == "test")
        if not (samples / split / INDEX).exists():
            splits.append(split)
            continue
        with reading(summary):
            found = json.loads(summary.read_bytes())
        if found | kept != found:
            raise InputError(f"{samples / split} was not converted with {kept}; choose another --out")
    write_settings(arguments, config)
    print(f"all settings, including yours, are in {arguments.out / SETTINGS}")
    if splits:
        if is_remote(arguments.source):
            source = list_source(arguments, modality, fetched)
        print(f"other files: {name_counts(source.left_out)}")
        parts, num_copies = hold_out(source, samples / f"{HELD_OUT}.json", workers)
        print(f"copies of held-out {modality.unit}, also held out: {num_copies}")
        if (left := len(parts["train"])) < (batch := config.global_train_batch_size):
            left_to_train = f"the number of {modality.unit} left to train on"
            raise InputError(f"global_train_batch_size: must be at most {left}, {left_to_train}; got {batch}")
        size, seconds = foresee(parts["train"], workers, **encoding(modality, config, False))
        print(f"converting {left:,} {modality.unit}: about {size / 1e6:,.0f} MB, {seconds / 60:,.0f} min")
        for split in splits:
            options = {"workers": workers, **encoding(modality, config, split == "test")}
            done = convert(parts[split], samples / split, **options, skip_unreadable=True)
            found = f"{done.samples} {modality.unit}, {len(done.skipped)} unreadable"
            print(f"{samples / split}: {found}; see its {SUMMARY}")
    if is_remote(arguments.source):
        shutil.rmtree(fetched, ignore_errors=True)
    lock.release()


def configure(
    arguments: Namespace, samples: Path, chosen: Mapping[str, Any], path: str | Path = os.devnull
) -> "TrainConfig":
    """Return the run's config, from a YAML, the chosen settings, the command's own settings and the changes.

    Raises:
        InputError: A change of a setting is wrong.
    """
    from d2v_composer.config.load import load_config

    is_timm = arguments.teacher.startswith(PREFIX)
    own = {
        "run_name": arguments.out.name,
        "save_folder": str(arguments.out.with_name("{run_name}")),  # a copy of the settings may name another run
        "teacher.model": arguments.teacher if is_timm else DATA2VEC2,
        "teacher.checkpoint": None if is_timm else arguments.teacher,
        "train_loader.local": str(samples / "train"),
        "retrieval.datasets": {HELD_OUT: {"format": "mds", "root": str(samples), "label_column": None}},
    }
    return load_config([str(path), *arguments.changes], {**chosen, **own})


def read_settings(arguments: Namespace) -> "TrainConfig":
    """Return the config in the ``distill.yaml`` that an earlier call wrote.

    Raises:
        InputError: A change of a setting is wrong.
    """
    import yaml

    path = arguments.out / SETTINGS
    with reading(path):  # the folder's name follows from the teacher
        samples = Path(yaml.safe_load(path.read_text())["train_loader"]["local"]).parent
    return configure(arguments, arguments.out / samples.name, {}, path)


def settle(arguments: Namespace, config: "TrainConfig", trainer: "Trainer") -> None:
    """Write the settings with which the run goes on; a finished run's settings stay.

    Raises:
        InputError: The run has finished, and its results would depend on a change.
    """
    from d2v_composer.callbacks.run_record import RunRecord

    if trainer.state.timestamp < config.max_duration:
        write_settings(arguments, config)
        return
    before = read_settings(Namespace(**vars(arguments) | {"changes": []}))
    if changes := RunRecord({"config": shown(config)}, None, DECIDES).changes({"config": shown(before)}):
        raise InputError(f"{arguments.out} holds a finished run: {changes}; choose another --out")


def write_settings(arguments: Namespace, config: "TrainConfig") -> None:
    """Write all settings of the run, on rank 0."""
    import yaml

    if global_rank() == 0:
        settings = yaml.safe_dump(shown(config), sort_keys=False, allow_unicode=True)
        write_atomically(arguments.out / SETTINGS, f"# {command_of(arguments)}\n{settings}")


def shown(config: "TrainConfig") -> Any:
    """Return all settings as plain values, without secrets."""
    return hide_secrets(config.model_dump(mode="json"))


def absolute(place: str) -> str:
    """Return an address or timm/NAME unchanged, and a local path as an absolute path."""
    return place if "://" in place or place.startswith(PREFIX) else os.path.abspath(place)


def choose(num_samples: int, teacher: "TeacherConfig", student: str | None) -> dict[str, Any]:
    """Choose sizes and duration: the quickstart's on a CPU, the chapter's on GPUs.

    Args:
        num_samples: Images or clips of the source.
        teacher: The teacher's sizes.
        student: The timm model that is the student, if it is one.

    Returns:
        Dotted key → value; all else has its default.
    """
    import torch

    from d2v_composer.data.modalities import modality_of

    num_gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    min_batches, side, lr = (3000, 224, 0.384) if num_gpus else (600, 112, 0.768)
    own = choose_for(modality_of(teacher.encoder).name, num_gpus > 0)
    batch = own["global_train_batch_size"]
    while batch > max(num_samples // 8, num_gpus):
        batch //= 2
    batch = max(batch - batch % max(num_gpus, 1), num_gpus)
    num_batches = min(max(EPOCHS * num_samples * 9 // 10 // batch, min_batches), MAX_BATCHES)
    chosen = {
        **own,
        **ALWAYS,
        "max_duration": f"{num_batches}ba",
        "global_train_batch_size": batch,
        "train_loader.num_workers": max(1, min(8, cores // max(num_gpus, 2))),
        "optimizer.lr": round(lr / teacher.embed_dim, 6),
        "retrieval.interval": f"{num_batches // 2}ba",
        "retrieval.at_start": True,
        # Without a LayerNorm at the target's end, the mean of a layer over tokens is 0.
        "retrieval.representation": "layer_mean" if teacher.final_layer_norm and student is None else "output",
        "retrieval.pooling": "cls" if teacher.has_cls_token else "mean",
        "callbacks": {"health": {"interval": "100ba"}, "lr_monitor": {}},
        "loggers": {"jsonl": {}},
        "save_interval": f"{min(num_batches // 6, 1000)}ba",
        "save_num_checkpoints_to_keep": 2,
    }
    if isinstance(teacher.encoder, TimmEncoderConfig):
        height, width = height_and_width(teacher.image_size)
        patch = height // teacher.grid_size[0]
        if height == width:  # else the model's own
            chosen["teacher.image_size"] = min(height, side // patch * patch)
        chosen["train_loader.crop_scale"] = [0.7, 1.0]  # not worse than 0.35 in yamls/ablations/timm
    if isinstance(teacher.encoder, EatEncoderConfig):  # it would cut off the rest
        chosen["train_loader.crop_seconds"] = min(own["train_loader.crop_seconds"], teacher.target_length / 100)
    return chosen


def choose_for(modality: str, on_gpu: bool) -> dict[str, Any]:
    """Return the settings that depend on the modality of the samples."""
    if modality == "audio":
        return {
            "global_train_batch_size": 64 if on_gpu else 32,
            "device_eval_batch_size": 64 if on_gpu else 32,
            "train_loader.crop_seconds": 15.6 if on_gpu else 2.0,
            "train_loader.shuffle_block_size": 8192,
            "retrieval.baselines": ["log_mel", "encoder", "teacher"],
        }
    return {
        "global_train_batch_size": 256 if on_gpu else 32,
        "device_eval_batch_size": 256 if on_gpu else 64,
        "train_loader.crop_scale": [0.35, 1.0],
        "retrieval.baselines": ["pixels", "encoder", "teacher"],
    }


def encoding(modality: "Modality", config: "TrainConfig", held_out: bool) -> dict[str, Any]:
    """Return the options with which a conversion keeps the size or length that the run needs."""
    from d2v_composer.data.audio import MAX_SECONDS_WHOLE
    from d2v_composer.data.images import Images

    if isinstance(modality, Images):
        image_size = parse_image_size(config.teacher.image_size or modality.image_size)
        return {"resize": max(height_and_width(image_size)) * 8 // 7}  # 256 for 224
    return {"most_seconds": min(config.train_loader.crop_seconds, MAX_SECONDS_WHOLE)} if held_out else {}

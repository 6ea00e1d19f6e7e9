"""Prepare a run of ``d2v distill``: choose the settings, and convert the samples."""

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from composer import Trainer

from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.callbacks.trainer_state import find_callback
from d2v_composer.config.load import load_config
from d2v_composer.config.resume import NEW_RESULT, keys_marked
from d2v_composer.config.schema import TrainConfig
from d2v_composer.conversion.convert import convert, hold_out
from d2v_composer.data import MODALITIES, build_augmentation, modality_of
from d2v_composer.data.audio import MAX_SECONDS_WHOLE
from d2v_composer.data.images import Images
from d2v_composer.data.modality import Modality
from d2v_composer.models.configs import (
    EatEncoderConfig,
    TeacherConfig,
    TimmEncoderConfig,
    height_and_width,
    parse_image_size,
)
from d2v_composer.models.names import DATA2VEC2, TIMM_PREFIX
from d2v_composer.models.provenance import Json, Record, value_at
from d2v_composer.models.teacher import Teacher
from d2v_composer.runs.distill import build_model, build_teacher, choose_embeds
from d2v_composer.runs.trainer import build_callbacks
from d2v_composer.sources.mds import INDEX
from d2v_composer.sources.open import find_files, open_source
from d2v_composer.sources.source import Source, name_counts
from d2v_composer.system.addresses import MARK, RunFolder, hide_secrets
from d2v_composer.system.command_line import print_skipped
from d2v_composer.system.errors import InputError, errors_of, reading
from d2v_composer.system.fetch import is_remote, names_in
from d2v_composer.system.files import check_out_file, check_owned, read_json, write_atomically
from d2v_composer.system.folder_lock import FolderLock
from d2v_composer.system.processes import global_rank

# A tenth, twenty, is held out: each held-out sample needs ten neighbors among the others, and some may be unreadable.
MIN_SAMPLES = 200
# The thesis trains for 30,000 batches of 256 on ImageNet: 6 epochs.
EPOCHS, MAX_BATCHES = 6, 30_000
PRESETS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
REQUEST, SETTINGS, HELD_OUT = "distill.json", "distill.yaml", "held_out"
LISTING = "list of files"  # the hash of the source's list, in the request
# In OUT: the shards of a data set in a store, until they are converted.
FETCHED = f"{MARK}.fetched"


class Request(NamedTuple):
    """Arguments of ``d2v distill``."""

    source: str
    """Absolute path, glob or address of the samples."""
    teacher: str
    """Absolute path or address of the teacher's file, or timm/NAME."""
    out: Path
    """Path of the run's folder."""
    column: str | None = None
    """Name of the column that holds the samples; ``None``: the only column that can hold samples."""
    changes: tuple[str, ...] = ()
    """Settings that the user changed, each as dotted.key=value."""

    @property
    def settings(self) -> Path:
        """Path of the YAML with all settings of the run."""
        return self.out / SETTINGS

    def check(self, **more: Json) -> Record:
        """Check that an earlier call with this ``out``, if any, had the same source, teacher and column.

        Returns:
            The source, teacher and column, and ``more``, without secrets.
        """
        about = hide_secrets({"source": self.source, "teacher": self.teacher, "column": self.column, **more})
        path = self.out / REQUEST
        before = read_json(path, Record) if path.exists() else about
        for name, value in about.items():
            if (begun := before.get(name)) != value:
                raise InputError(
                    f"the run in {self.out} was begun with other input ({name}: {begun!r} then, {value!r} now); "
                    "choose another --out"
                )
        return about


class Plan(NamedTuple):
    """The config, teacher and samples of a run."""

    config: TrainConfig
    teacher: Teacher
    source: Source


def prepare(request: Request) -> Plan | None:
    """Prepare a run: choose and write the settings, and convert the samples.

    Returns:
        The plan; ``None`` if the run's training has begun.
    """
    if has_begun(request):
        warn_of_changes(request)
        return None
    lock, fetched = FolderLock(RunFolder(request.out)), request.out / FETCHED
    try:
        if has_begun(request):  # meanwhile, by the same command
            return None
        try:
            plan = make_plan(request, fetched)
        except BaseException:
            shutil.rmtree(fetched, ignore_errors=True)
            raise
        convert_samples(request, plan)
        shutil.rmtree(fetched, ignore_errors=True)
        return plan
    finally:
        lock.release()


def has_begun(request: Request) -> bool:
    """Return whether the training of this request's run has begun in the folder ``out``."""
    source, out, path = request.source, request.out, request.settings
    if not is_remote(source) and out.resolve().is_relative_to(Path(source).resolve(strict="*" not in source)):
        raise InputError(f"{out} is inside the folder of samples, {source}; choose another --out")
    check_out_file(path)
    with errors_of("--out", ValueError):
        RunFolder.parse(str(out))
    check_owned(out, names := names_in(out), MARK, "--out")
    with reading(out):
        if not (out / REQUEST).exists() and any(not name.startswith((MARK, REQUEST)) for name in names):
            raise InputError(f"{out} holds a run of another command; choose another --out")
        request.check()
        return (out / "run.yaml").exists()


def warn_of_changes(request: Request) -> None:
    """Print a warning if the source is on this machine and has changed since its samples were converted."""
    if is_remote(request.source):
        return
    for modality in (kind() for kind in MODALITIES.values()):
        if (samples := request.out / modality.unit).is_dir():
            try:
                source = open_source(request.source, modality, column=request.column)
                request.check(**{LISTING: source.content})
            except InputError:
                print(
                    f"warning: {request.source} has changed since the run in {request.out} was begun; the run trains "
                    f"on the samples in {samples}; to train on the changed source, choose another --out",
                    file=sys.stderr,
                )


def make_plan(request: Request, fetched: Path) -> Plan:
    """List the samples, load the teacher and choose the settings."""
    # The changes are checked before the teacher is fetched.
    unsized = configure(request, request.out, PRESETS["any"])
    teacher = build_teacher(unsized)
    modality, cache = modality_of(teacher.config), fetched if is_remote(request.source) else None
    files = find_files(request.source, modality, request.column) if cache else None
    source = files.open() if files else open_source(request.source, modality, column=request.column, cache=cache)
    if (number := len(source)) < MIN_SAMPLES:
        raise InputError(f"{request.source}: expected at least {MIN_SAMPLES} {modality.unit}, got {number}")
    chosen = choose_settings(number, teacher.config)
    samples = request.out / modality.unit
    held_out = {HELD_OUT: {"format": "mds", "root": str(samples), "label_column": None}}
    config = configure(request, samples, {**chosen, "retrieval.datasets": held_out})
    if config.teacher != unsized.teacher:  # a timm model for smaller images
        teacher = build_teacher(config)
    model = build_model(config, teacher)
    choose_embeds(config, model)
    build_augmentation(config.train_loader, modality, config.seed)
    build_callbacks(config)
    settings = hide_secrets(config.model_dump(mode="json"))
    shown = [f"{key}={as_yaml(value_at(settings, key))}" for key in chosen]
    print(f"settings for {number} {modality.unit}: {', '.join(shown)}")
    return Plan(config, teacher, source)


def convert_samples(request: Request, plan: Plan) -> None:
    """Write the request and the settings, and convert the splits that are not converted yet."""
    config, source, modality = plan.config, plan.source, plan.source.modality
    samples = request.out / modality.unit
    splits = {split: conversion_options(modality, config, split == "test") for split in ("test", "train")}
    made_from = {modality.unit: len(source), LISTING: source.content, "conversion": splits}
    about = request.check(**made_from)
    write_atomically(request.out / REQUEST, json.dumps(about))
    write_settings(request, config)
    print(f"all settings are in {request.settings}")
    splits = {split: options for split, options in splits.items() if not (samples / split / INDEX).exists()}
    if not splits:
        return
    print(f"other files: {name_counts(source.left_out)}")
    parts, num_copies = hold_out(source, samples / f"{HELD_OUT}.json")
    print(f"copies of held-out {modality.unit}, also held out: {num_copies}")
    if (left := len(parts["train"])) < (batch := config.global_train_batch_size):
        left_to_train = f"the number of {modality.unit} left to train on"
        raise InputError(f"global_train_batch_size: must be at most {left}, {left_to_train}; got {batch}")
    for split, options in splits.items():
        done = convert(parts[split], samples / split, workers=os.cpu_count() or 1, **options, skip_unreadable=True)
        print(f"{samples / split}: {done.samples} {modality.unit}")
        print_skipped(done.skipped)


def configure(
    request: Request, samples: Path, chosen: Mapping[str, Json], path: str | Path = os.devnull
) -> TrainConfig:
    """Return the run's config: the YAML ``path``, changed by the settings in ``chosen``, then by the request."""
    is_timm = request.teacher.startswith(TIMM_PREFIX)
    settings = {
        "run_name": request.out.name,
        "save_folder": str(request.out.with_name("{run_name}")),  # a copy of the settings may name another run
        "teacher.model": request.teacher if is_timm else DATA2VEC2,
        "teacher.checkpoint": None if is_timm else request.teacher,
        "train_loader.local": str(samples / "train"),
    }
    return load_config([str(path), *request.changes], {**chosen, **settings})


def read_settings(request: Request) -> TrainConfig:
    """Return the config in the ``distill.yaml`` that an earlier call wrote, with this request's changes."""
    with reading(request.settings):
        written = yaml.safe_load(request.settings.read_text())
        samples = request.out / Path(written["train_loader"]["local"]).parent.name  # it follows from the teacher
        has_held_out = HELD_OUT in written["retrieval"]["datasets"]
    moved = {f"retrieval.datasets.{HELD_OUT}.root": str(samples)} if has_held_out else {}
    return configure(request, samples, moved, request.settings)


def update_settings(request: Request, config: TrainConfig, trainer: Trainer) -> None:
    """Write the settings of a run that is about to train."""
    before = read_settings(request._replace(changes=()))  # not run.yaml: if OUT was moved, it has the old place
    record = find_callback(trainer.state, RunRecord)
    assert record is not None
    keys = [f"config.{key}" for key in keys_marked(config, NEW_RESULT)]
    if changes := record.changes({"config": before.model_dump(mode="json")}, keys):
        raise InputError(f"{request.out} holds a run with other settings: {changes}; choose another --out")
    write_settings(request, config)


def write_settings(request: Request, config: TrainConfig) -> None:
    """Write all settings of the run, without secrets, on rank 0."""
    if global_rank() == 0:
        settings = hide_secrets(config.model_dump(mode="json"))
        write_atomically(request.settings, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def as_yaml(value: Json) -> str:
    """Return a value as YAML on one line, as in an override ``key=value``."""
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]


def choose_settings(num_samples: int, teacher: TeacherConfig) -> Record:
    """Choose the settings of a run for this machine.

    Returns:
        Dotted key → value; other settings keep their defaults.
    """
    num_gpus, cores, modality = torch.cuda.device_count(), os.cpu_count() or 1, modality_of(teacher.encoder).name
    min_batches, side, lr = (3000, 224, 0.384) if num_gpus else (600, 112, 0.768)
    chosen = {**PRESETS["any"], **PRESETS[modality], **PRESETS[f"{modality} on a {'GPU' if num_gpus else 'CPU'}"]}
    batch = chosen["global_train_batch_size"]
    while batch > max(num_samples // 8, num_gpus):
        batch //= 2
    batch = max(batch - batch % max(num_gpus, 1), num_gpus)
    num_batches = min(max(EPOCHS * num_samples * 9 // 10 // batch, min_batches), MAX_BATCHES)
    chosen |= {
        "max_duration": f"{num_batches}ba",
        "global_train_batch_size": batch,
        "train_loader.num_workers": max(1, min(8, cores // max(num_gpus, 2))),
        "optimizer.lr": round(lr / teacher.embed_dim, 6),
        "retrieval.interval": f"{num_batches // 2}ba",
        "save_interval": f"{min(num_batches // 6, 1000)}ba",
    }
    if isinstance(teacher.encoder, TimmEncoderConfig):
        height, width = height_and_width(teacher.image_size)
        patch = height // teacher.grid_size[0]
        if height == width:  # other models keep their own size
            chosen["teacher.image_size"] = min(height, side // patch * patch)
        chosen["train_loader.crop_scale"] = [0.7, 1.0]  # not worse than 0.35 in yamls/ablations/timm
    if isinstance(teacher.encoder, EatEncoderConfig):  # EAT cuts a clip to target_length
        chosen["train_loader.crop_seconds"] = min(chosen["train_loader.crop_seconds"], teacher.target_length / 100)
    return chosen


def conversion_options(modality: Modality, config: TrainConfig, held_out: bool) -> Record:
    """Return options of :func:`convert`: for images, their size; for held-out clips, their maximum length."""
    if isinstance(modality, Images):
        image_size = parse_image_size(config.teacher.image_size or modality.image_size)
        return {"resize": max(height_and_width(image_size)) * 8 // 7}  # 256 for 224
    return {"most_seconds": min(config.train_loader.crop_seconds, MAX_SECONDS_WHOLE)} if held_out else {}

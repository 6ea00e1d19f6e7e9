"""Distill a student from images or sound alone: no labels, no YAML, no clone.

    d2v distill photos --teacher timm/vit_small_patch14_dinov2.lvd142m --out runs/photos
    d2v distill recordings --teacher base_libri.pt --out runs/recordings
    d2v distill photos --teacher teacher.safetensors --out runs/photos max_duration=20ep student.depth=3
    d2v distill s3://bucket/photos/train --teacher teacher.safetensors --out runs/photos

SOURCE is a folder of images, or of sound for a teacher of sound, or an MDS data set, local or in a store. A tenth of
its samples, at most 5,000, measure the student and are never trained on. Sizes and duration follow from the number of
samples, the teacher and the device. OUT receives distill.yaml (every setting, to read and for d2v train), images/ or
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_composer.commands import export
from d2v_composer.commands.train import fit, relaunch_on_gpus
from d2v_composer.models.names import DATA2VEC2, PREFIX
from d2v_composer.models.sizes import Data2Vec2Config, TeacherConfig, TimmTeacherConfig, height_and_width
from d2v_composer.system.addresses import STUDENT_FILE, hide_secrets
from d2v_composer.system.command_line import make_parser
from d2v_composer.system.errors import InputError, reading, writing
from d2v_composer.system.files import check_out_file, write_atomically
from d2v_composer.system.processes import global_rank, is_launched

if TYPE_CHECKING:
    from d2v_composer.config.schema import TrainConfig

# A tenth of them are twenty: each needs ten neighbors among the others, and some may be unreadable.
FEWEST = 200
# The chapter's, on ImageNet: 30,000 batches of 256.
EPOCHS, MOST_BATCHES = 6, 30_000
SETTINGS, HELD_OUT = "distill.yaml", "held_out"


def main(argv: Sequence[str]) -> None:
    """Choose settings, convert samples, train, report and export."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    sources = "a folder of images, sound or MDS shards, or the shards' address: s3://, …"
    add("source", type=absolute, metavar="SOURCE", help=sources)
    add("changes", metavar="key=value", nargs="*", help="settings to change")
    add("--teacher", type=absolute, required=True, help="a data2vec 2.0 teacher's file or address, or timm/NAME")
    add("--out", type=absolute, required=True, metavar="DIR", help="the folder for samples, run and student")
    add("--column", metavar="NAME", help="the MDS column of images or sound; default: image or audio")
    arguments = parser.parse_intermixed_args(argv)
    out = arguments.out = Path(arguments.out)
    if not is_launched():
        prepare(arguments)
        relaunch_on_gpus("distill", *argv)

    from d2v_composer.checkpoints.safe_load import LATEST

    fit(read_settings(arguments, out / SETTINGS))
    if global_rank() == 0:
        export.main([str(out / LATEST), str(out / STUDENT_FILE), "--overwrite"])


def read_settings(arguments: Namespace, path: str | Path, chosen: Mapping[str, Any] | None = None) -> "TrainConfig":
    """Return the run's config, from a YAML, the chosen settings and the command's own settings.

    Raises:
        InputError: A change of a setting is wrong.
    """
    if any(change.startswith("save_folder=") for change in arguments.changes):
        raise InputError("save_folder: use --out instead")
    from d2v_composer.config.load import load_config

    out, is_timm, samples = arguments.out, arguments.teacher.startswith(PREFIX), samples_of(arguments.out)
    own = {
        "run_name": out.name,
        "teacher.model": arguments.teacher if is_timm else DATA2VEC2,
        "teacher.checkpoint": None if is_timm else arguments.teacher,
        "train_loader.local": str(samples / "train"),
        "retrieval.datasets": {HELD_OUT: {"format": "mds", "root": str(samples), "label_column": None}},
    }
    values = {**(chosen or {}), **own, "save_folder": str(out)}
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return load_config([str(path), *overrides, *arguments.changes])


def samples_of(out: Path) -> Path:
    """Return the folder of a run's samples: that of images before one of sound is made."""
    from d2v_composer.data.modalities import MODALITIES

    first, *others = (out / each.unit for each in MODALITIES.values())
    return next((folder for folder in others if folder.is_dir()), first)


def prepare(arguments: Namespace) -> None:
    """Choose the settings and convert the samples, except for what an interrupted call already did.

    Raises:
        InputError: The samples, the teacher or a change cannot be used, or OUT is another source's or teacher's.
    """
    from d2v_composer.builders.distillation import build_teacher
    from d2v_composer.data.convert import SampleSource, convert, hold_out, list_samples
    from d2v_composer.data.index import INDEX, SUMMARY
    from d2v_composer.data.modalities import modality_of
    from d2v_composer.data.modality import list_files
    from d2v_composer.system.fetch import is_remote

    source, path, samples = arguments.source, arguments.out / SETTINGS, samples_of(arguments.out)
    is_mds, is_new = is_remote(source) or Path(source, INDEX).is_file(), not path.exists()
    if not is_mds and samples.resolve().is_relative_to(Path(source).resolve(strict=True)):
        raise InputError(f"{arguments.out}: is inside the folder of samples, {source}")
    check_out_file(path)
    if is_new and (arguments.out / STUDENT_FILE).exists():
        raise InputError(f"{arguments.out}: has a {STUDENT_FILE} from another run; choose another --out")
    options = ["--teacher", arguments.teacher, *(["--column", arguments.column] if arguments.column else [])]
    command = shlex.join(hide_secrets(["d2v", "distill", source, *options]))
    with reading(path):
        if not is_new and (found := path.read_text().partition("\n")[0][2:]) != command:
            raise InputError(f"{arguments.out}: was made by {found!r}; choose another --out")
    if (samples / "train" / INDEX).exists():  # written last
        write_settings(path, command, read_settings(arguments, path))
        shutil.rmtree(samples / "source", ignore_errors=True)
        return
    given, chosen = ("/dev/null", choose(FEWEST, Data2Vec2Config())) if is_new else (path, {})
    config = read_settings(arguments, given, chosen)  # checks the changes, before the teacher is fetched
    teacher = build_teacher(config.teacher).config
    modality = modality_of(teacher)
    samples = arguments.out / modality.unit
    if is_mds:
        every = list_samples(source, arguments.column or modality.name, samples / "source", type(modality))
    else:
        files = list_files(Path(source), modality)[0]
        every = SampleSource(Path(source), files, None, {}, modality=type(modality))
    if (number := len(every.files)) < FEWEST:
        raise InputError(f"{source}: expected at least {FEWEST} {modality.unit}, got {number}")
    with writing(samples):
        samples.mkdir(parents=True, exist_ok=True)
    if is_new:
        chosen = choose(number, teacher)
        print(f"chosen for {number} {modality.unit}: {', '.join(f'{key}={value}' for key, value in chosen.items())}")
        print(f"all settings, including yours, are in {path}")
        config = read_settings(arguments, given, chosen)
    write_settings(path, command, config)
    for split, part in hold_out(every, samples / f"{HELD_OUT}.json").items():
        if not (samples / split / INDEX).exists():
            options = {"workers": os.cpu_count() or 1, **modality.kept(config, split == "test")}
            done = convert(part, samples / split, **options, skip_unreadable=True)
            found = f"{done.samples} {modality.unit}, {len(done.skipped)} unreadable"
            print(f"{samples / split}: {found}; see its {SUMMARY}")
    shutil.rmtree(samples / "source", ignore_errors=True)


def write_settings(path: Path, command: str, config: "TrainConfig") -> None:
    """Write all settings of the run."""
    import yaml

    settings = yaml.safe_dump(hide_secrets(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
    write_atomically(path, f"# {command}\n{settings}")


def absolute(place: str) -> str:
    """Return an address or timm/NAME unchanged, and a local path as an absolute path."""
    return place if "://" in place or place.startswith(PREFIX) else os.path.abspath(place)


def choose(num_samples: int, teacher: "TeacherConfig") -> dict[str, Any]:
    """Choose sizes and duration: the quickstart's on a CPU, the chapter's on GPUs.

    Args:
        num_samples: Images or clips of the source.
        teacher: The teacher's sizes.

    Returns:
        Dotted key → value; all else has its default.
    """
    import torch

    from d2v_composer.data.modalities import modality_of

    num_gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    fewest, side, lr = (3000, 224, 0.384) if num_gpus else (600, 112, 0.768)
    own = modality_of(teacher).choices(num_gpus > 0)
    batch = own["global_train_batch_size"]
    while batch > max(num_samples // 8, num_gpus):
        batch //= 2
    batch = max(batch - batch % max(num_gpus, 1), num_gpus)
    num_batches = min(max(EPOCHS * num_samples * 9 // 10 // batch, fewest), MOST_BATCHES)
    chosen = {
        **own,
        "precision": "auto",
        "max_duration": f"{num_batches}ba",
        "global_train_batch_size": batch,
        "train_loader.num_workers": max(1, min(8, cores // max(num_gpus, 2))),
        "optimizer.lr": round(lr / teacher.embed_dim, 6),
        "scheduler.t_warmup": "0.1dur",
        "retrieval.interval": f"{num_batches // 2}ba",
        "retrieval.at_start": True,
        # Without a LayerNorm at the target's end, the mean of a layer over tokens is 0.
        "retrieval.representation": "layer_mean" if teacher.final_layer_norm else "output",
        "retrieval.pooling": "cls" if teacher.has_cls_token else "mean",
        "callbacks": {"health": {"interval": "100ba"}, "lr_monitor": {}},
        "loggers": {"jsonl": {}},
        "save_interval": f"{min(num_batches // 6, 1000)}ba",
        "save_num_checkpoints_to_keep": 2,
    }
    if isinstance(teacher, TimmTeacherConfig):
        height, width = height_and_width(teacher.image_size)
        patch = height // teacher.grid_size[0]
        if height == width:  # else the model's own
            chosen["teacher.image_size"] = min(height, side // patch * patch)
        chosen["train_loader.crop_scale"] = [0.7, 1.0]  # better than 0.35 in yamls/ablations/timm
    return chosen

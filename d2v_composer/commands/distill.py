"""Distill a student from images or audio clips, with one command.

    d2v distill photos --teacher timm/vit_small_patch14_dinov2.lvd142m --out runs/photos
    d2v distill recordings --teacher base_libri.pt --out runs/recordings
    d2v distill photos --teacher teacher.safetensors --out runs/photos max_duration=20ep student.depth=3
    d2v distill s3://bucket/photos/train --teacher teacher.safetensors --out runs/photos
    d2v distill 'hf://datasets/ORG/NAME/data/train-*' --teacher teacher.safetensors --out runs/photos

SOURCE has images or, for an audio teacher, clips; labels are not used. A tenth of the samples, at most 5,000, tests the
student; the run trains neither on these samples nor on their exact copies. Batch size, duration and other settings
follow from the number of samples, the teacher and the machine; key=value changes a setting, and `d2v fields training`
lists all settings. OUT, a new or empty folder, receives distill.yaml with all settings, the samples in images/ or
clips/, the checkpoints, report.html and student.safetensors. Run the same command again to resume an interrupted run.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from d2v_composer.commands.command import (
    IS_ABSOLUTE,
    IS_GIVEN,
    Column,
    Command,
    PlaceHere,
    Positional,
    Samples,
)
from d2v_composer.system.addresses import STUDENT_FILE
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.errors import InputError
from d2v_composer.system.processes import global_rank, is_launched, relaunch_on_gpus


class Distill(Command):
    source: Annotated[Samples, IS_ABSOLUTE]
    changes: Positional[tuple[str, ...]] = ()
    """Settings to change, each as key=value."""
    teacher: Annotated[str, IS_GIVEN, IS_ABSOLUTE]
    """Path or address of a data2vec 2.0 or EAT model's file, or timm/NAME."""
    out: PlaceHere
    """Folder for the samples, the run and the student."""
    column: Column = None

    def run(self, argv: Sequence[str] | None = None) -> None:
        """Prepare a run and train, or resume an interrupted run; then export the student."""
        if any(change.startswith(("run_name=", "save_folder=")) for change in self.changes):
            raise InputError("run_name and save_folder: use --out instead")

        from d2v_composer.checkpoints.checkpoint import LATEST
        from d2v_composer.config.reference import load_any
        from d2v_composer.export.model_card import save_with_card
        from d2v_composer.runs.auto_config import Request, prepare, read_settings, update_settings
        from d2v_composer.runs.distill import build_teacher, train_student

        request = Request(**self.model_dump())
        try:
            plan = None if is_launched() else prepare(request)
            if argv is not None:
                relaunch_on_gpus("distill", *argv)
            if plan is None:
                config = read_settings(request)
                # Before the seed is set, in every call: a student's random weights come after it.
                teacher = None if is_launched() else build_teacher(config)
            else:
                config, teacher, _ = plan
            train_student(config, teacher=teacher, when_built=partial(update_settings, request, config))
            if global_rank() == 0:
                latest, exported = str(request.out / LATEST), request.out / STUDENT_FILE
                student, _ = load_any(latest)
                save_with_card(student, latest, exported)
                print_next(d2v("embed", exported, "SOURCE", "embeddings.npy"))
        except InputError as error:  # settings that follow from --out
            raise InputError(*(str(line).replace("save_folder", "--out") for line in error.args)) from error


def main(argv: Sequence[str]) -> None:
    """Parse a command line, and distill a student."""
    Distill.parse(argv).run(argv)

"""Train, and export the student, under a scheduler that may stop and restart the program.

usage: python recipes/launch/run.py FILE.yaml save_folder=s3://… [dotted.key=value …]

    IMAGENET=s3://BUCKET/imagenet/train python recipes/launch/run.py yamls/distill.yaml save_folder=s3://BUCKET/runs/distill

The program runs recipes/train.py on all GPUs of this machine. Then the program exports the student to save_folder.
After SIGTERM, the training saves a checkpoint, and the exit status is 143; run the same command again to resume.
slurm.sh and kubernetes.yaml start this program.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from d2v_composer.system import command_line

if __name__ == "__main__":
    command_line.begin(__doc__)

import psutil

from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.config.load import load_config
from d2v_composer.config.reference import load_any
from d2v_composer.export.model_card import save_with_card
from d2v_composer.system.addresses import STUDENT_FILE
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import put
from d2v_composer.system.processes import defer_signals, if_interrupted, obey_signals, received, start_program

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
POLL_SECONDS = 0.5


def main(argv: Sequence[str]) -> None:
    """Train, and export the student."""
    folder = load_config(argv).run_folder
    if folder is None:
        raise InputError("save_folder: must be set, because a restarted run resumes from this folder")
    train_on_all_gpus(argv)

    latest, student_file = folder.local / LATEST, folder.local / STUDENT_FILE
    student, _ = load_any(latest)
    save_with_card(student, str(latest), student_file)
    if folder.address is not None:
        for path in (student_file, student_file.with_name("README.md")):
            put(path, f"{folder.address}/{path.name}")
    command_line.print_next(command_line.d2v("embed", f"{folder}/{STUDENT_FILE}", "SOURCE", "embeddings.npy"))


def train_on_all_gpus(argv: Sequence[str]) -> None:
    """Train with Composer's launcher, and exit with the launcher's status if the training fails."""
    command = [sys.executable, "-m", "composer.cli", str(TRAIN), *argv]
    with if_interrupted(lambda: "the same command resumes"):
        defer_signals()
        launcher = start_program(command)
        while launcher.poll() is None:
            if received() is not None:
                stop(launcher)
            time.sleep(POLL_SECONDS)
        obey_signals()
    if launcher.returncode != 0:
        sys.exit(launcher.returncode if launcher.returncode > 0 else 128 - launcher.returncode)


def stop(launcher: "subprocess.Popen[bytes]") -> None:
    # Composer's launcher would pass SIGTERM on to the ranks, and kill the ranks 30 seconds later.
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher.pid)
        for rank in process.children() or [process]:
            rank.terminate()


if __name__ == "__main__":
    command_line.run(main)

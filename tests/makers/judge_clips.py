"""Judge students of sound on clips of several lengths: how much of the target they miss, and whom they resemble.

    python tests/makers/judge_clips.py speech/long runs/ablations/audio/*/latest-rank0.pt

SPEECH/1s, 2s, 5s and 10s hold the first seconds of the same clips. Prints CSV: for each run and length, with the 95 %
interval over the clips, in %,

missed      the share of the target's variance over all frames and clips that the prediction misses, mean over clips
agreement   the share of a clip's ten nearest others that student and teacher have in common (mean of the layers' means)
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2v_composer.config.reference import load_any
from d2v_composer.data.audio import Audio
from d2v_composer.evaluation.nearest_neighbors import common_fractions, nearest_others
from d2v_composer.evaluation.results import accuracy_interval
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher

BATCH_SIZE = 16


def judge(student: Student, teacher: Teacher, clips: Tensor) -> dict[str, np.ndarray]:
    """Return the measures of each clip, from clips of one length, (B, L)."""
    predicted, wanted = [], []
    with torch.inference_mode():
        for batch in clips.split(BATCH_SIZE):
            tokens = student.encoder(Inputs(batch))
            for model, averages in ((student, predicted), (teacher, wanted)):
                features = model.features(tokens)
                averages.append(student.layer_mean(features.layers(), features))
    prediction_BTD, target_BTD = torch.cat(predicted), torch.cat(wanted)
    variance = (target_BTD - target_BTD.mean(dim=(0, 1))).square().mean()
    nearest = [nearest_others(x_BTD.mean(dim=1)) for x_BTD in (prediction_BTD, target_BTD)]
    return {
        "missed": ((prediction_BTD - target_BTD).square().mean(dim=(1, 2)) / variance).numpy(),
        "agreement": common_fractions(*nearest).numpy(),
    }


def main(speech: str, *checkpoints: str) -> None:
    print("run,seconds,measure,value,low,high")
    for checkpoint in checkpoints:
        student, teacher = load_any(checkpoint)
        for seconds in (1, 2, 5, 10):
            files = sorted(Path(speech, f"{seconds}s").glob("*.flac"))
            clips = torch.stack([Audio().decode(path.read_bytes(), str(path)) for path in files])
            for measure, values in judge(student, teacher, clips).items():
                interval = ",".join(f"{100 * number:.2f}" for number in accuracy_interval(values))
                print(f"{Path(checkpoint).parent.name},{seconds},{measure},{interval}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

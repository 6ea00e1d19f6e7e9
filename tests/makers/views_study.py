"""Train the quickstart's student on fixed views of 913 images, and measure it on others: yamls/ablations/views.csv.

python tests/makers/views_study.py OUT.csv VIEWS SEED BATCHES
python tests/makers/views_study.py TEACHER [NAME=VALUE...]

VIEWS is train_loader.views, or null. A row has the loss of 1,000 test images, not augmented, and the student's top-1
in % with the train and with the test images as the bank.

With a teacher and load_teacher's arguments, print the CPU time of a step without kept targets over that of a step with
them: batches of 32, steps of both kinds in turn, one thread.
"""

import csv
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from d2v_composer import load_teacher
from d2v_composer.config.load import load_config
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.runs.distill import train_student
from d2v_composer.sources.labeled import load_labeled_set

ROOT = Path(__file__).parents[2] / "yamls"
CIFAR = ROOT / "quickstart" / "cifar10"
FIELDS = ("views", "seed", "batches", "loss", "bank_train", "bank_test", "seconds")
IMAGES, BATCH = 1000, 100
PAIRS = 20


def write_first_shard(folder: Path) -> None:
    """Write a data set of the quickstart's first shard."""
    index = json.loads((CIFAR / "train" / "index.json").read_text())
    index["shards"] = index["shards"][:1]
    shutil.copy(CIFAR / "train" / index["shards"][0]["raw_data"]["basename"], folder)
    (folder / "index.json").write_text(json.dumps(index))


def main(out: str, views: str, seed: str, batches: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_first_shard(folder)
        changes = {
            "train_loader.local": folder,
            "train_loader.views": views,
            "train_loader.num_workers": 0,
            "seed": seed,
            "max_duration": f"{batches}ba",
            "save_folder": folder / "run",
            "save_interval": f"{batches}ba",
            "retrieval.interval": f"{batches}ba",
            "retrieval.at_start": "false",
            "retrieval.baselines": "[]",
            "alignment.max_samples": 0,
            "callbacks": "{}",
            "report": "false",
        }
        config = load_config([str(ROOT / "quickstart.yaml"), *(f"{key}={value}" for key, value in changes.items())])
        begin = time.perf_counter()
        trainer = train_student(config)
        seconds = time.perf_counter() - begin
        log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        top1 = {
            f"bank_{bank}": 100 * row[key]
            for bank in ("train", "test")
            for row in log
            if (key := f"metrics/cifar10/bank_{bank}/top1") in row
        }
    model = trainer.state.model.eval()
    images = read_test_images()
    with torch.no_grad():
        losses = [float(model.loss(model(batch), batch)) for batch in images.split(BATCH)]
    row = {"views": views, "seed": seed, "batches": batches, "loss": sum(losses) / len(losses), **top1}
    is_new = not Path(out).exists()
    with open(out, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerow(row | {"seconds": round(seconds)})


def read_test_images() -> torch.Tensor:
    """Return the first test images, (IMAGES, 3, 32, 32) uint8."""
    return load_labeled_set("mds", str(CIFAR), image_size=32, interpolation="bicubic").test[0][:IMAGES]


def print_ratio(path: str, *options: str) -> None:
    torch.set_num_threads(1)
    teacher = load_teacher(path, **dict(option.split("=") for option in options))
    model = DistillationModel(teacher, teacher.build_student(depth=5), keeps_targets=True)
    images = teacher.encoder.example(32)
    targets = model(images).kept_targets
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for step in range(2 * PAIRS):
        batch = {"image": images} | ({"targets": targets} if step % 2 else {})
        begin = time.process_time()
        model.loss(model(batch), batch).backward()
        seconds[bool(step % 2)].append(time.process_time() - begin)
    ratios = [computed / kept for computed, kept in zip(seconds[False], seconds[True], strict=True)]
    print(f"{path}: {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    (main if sys.argv[1].endswith(".csv") else print_ratio)(*sys.argv[1:])

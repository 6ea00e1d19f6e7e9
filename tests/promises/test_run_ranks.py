"""Promises 3, 8 and 10: several ranks train like one process: compiled, in microbatches, on several nodes."""

import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from gated_store import GatedStore
from helpers import (
    QUICKSTART,
    assert_same_losses,
    datasets_of,
    log_of,
    losses_of,
    run_command,
    run_ranks,
    run_training,
    small_run,
    traced,
    train_command,
)

LAUNCHER = Path(sys.executable).parent / "composer"

# Evaluations of twice 499 images, which two ranks share unevenly: before the first batch, after each fifth, at the end.
WITH_RETRIEVAL = (
    f"retrieval.{datasets_of(QUICKSTART / 'cifar10')}",
    "retrieval.interval=5ba",
    "retrieval.at_start=true",
    "retrieval.max_images=499",
    "retrieval.probes=[knn,linear,agreement,instance]",
    "retrieval.baselines=[encoder,teacher]",
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """Return the folder of a run in one process that measures retrieval."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    run_training(*small_run(folder, small_data, *WITH_RETRIEVAL))
    return folder


def assert_same_run(folder: Path, expected: Path) -> None:
    """Compare losses, and the accuracies up to two of 499 queries with equally near neighbors."""
    assert_same_losses(losses_of(folder), losses_of(expected), num_steps=14)
    ours, theirs = (log_of(run) for run in (folder, expected))
    metrics = [name for name in theirs if name.startswith("metrics/")]
    assert len(metrics) >= 4 * (7 + 4 + 7)  # of student, encoder and teacher: the primary and every embedding
    for name in metrics:
        at_the_same_steps = {step: ours[name][step] for step in theirs[name]}  # a resume measures the references anew
        assert at_the_same_steps == pytest.approx(theirs[name], abs=4.5e-3), name


def test_microbatches_give_the_same_losses(uninterrupted: Path, small_data: Path, tmp_path: Path) -> None:
    """Sixteen images in parts of 6, 6 and 4."""
    options = ("device_train_microbatch_size=6", "activation_checkpointing=true")
    run_training(*small_run(tmp_path, small_data, *options))
    assert_same_losses(losses_of(tmp_path), losses_of(uninterrupted), num_steps=14)


@pytest.mark.slow
def test_a_fresh_run_trains_with_static_graphs(small_data: Path, tmp_path: Path) -> None:
    """24: the evaluation before the first step ends with a batch of 51 images instead of 64."""
    few = ("compile=true", "max_duration=2ba", "scheduler.t_warmup=1ba", "retrieval.probes=[]")
    arguments = small_run(tmp_path / "run", small_data, *WITH_RETRIEVAL, *few)
    variables = {"BACKEND": "static", "GRAPHS": str(tmp_path / "counts")}
    result = run_command(sys.executable, *traced(arguments), environment=variables)
    assert result.returncode == 0, result.stderr
    (counts,) = (tmp_path / "counts").iterdir()
    assert len(counts.read_text().splitlines()) == 2


# Both backends compile the same graphs; inductor takes a minute more to make kernels of them.
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_ranks_train_as_one_process(evaluated: Path, small_data: Path, tmp_path: Path, backend: str) -> None:
    arguments = small_run(tmp_path / "run", small_data, "compile=true", *WITH_RETRIEVAL)
    variables = {"BACKEND": backend, "GRAPHS": str(tmp_path / "counts")}
    result = run_command(LAUNCHER, "-n", "2", *traced(arguments), timeout=400, environment=variables)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", evaluated)
    first, second = (tmp_path / "counts").iterdir()
    for rank in (first, second):
        counts = [line.split() for line in rank.read_text().splitlines()]
        graphs, breaks = ([int(count) for count in column] for column in zip(*counts, strict=True))
        assert len(graphs) == 14
        assert 10 < graphs[0] < 40
        assert graphs[-1] == graphs[1]  # the three evaluations that follow included
        assert breaks[-1] == 0


@pytest.mark.slow
def test_two_nodes_train_as_one_process(evaluated: Path, small_data: Path, tmp_path: Path) -> None:
    """They share data set and folder, as on machines with a common file system."""
    options = ["train_loader.num_workers=1", "device_train_microbatch_size=3", "activation_checkpointing=true"]
    arguments = small_run(tmp_path / "run", small_data, *options, *WITH_RETRIEVAL)
    run_ranks(*train_command(arguments)[1:], num_nodes=2)
    assert_same_run(tmp_path / "run", evaluated)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [None, b"of another machine, which was node 0 meanwhile"], ids=["none", "another"])
def test_a_checkpoint_that_was_not_uploaded_reaches_the_other_node(
    object_store: GatedStore, evaluated: Path, small_data: Path, tmp_path: Path, stored: bytes | None
) -> None:
    """Node 0 saved it and was killed; each node has a disk of its own."""
    bucket = f"two-nodes-{'none' if stored is None else 'another'}"
    object_store.create_bucket_of_images(bucket, small_data)
    put = partial(object_store.client().put_object, Bucket=bucket)
    if stored is not None:
        put(Key="runs/killed/ep1-ba12-rank0.pt", Body=stored)
        put(Key="runs/killed/latest-rank0.pt.symlink", Body=b"runs/killed/ep1-ba12-rank0.pt")
    folders = tmp_path / "node0", tmp_path / "node1"
    run = folders[0] / "runs" / "killed"
    shutil.copytree(evaluated, run, symlinks=True)
    (run / "latest-rank0.pt").unlink()
    (run / "latest-rank0.pt").symlink_to("ep1-ba12-rank0.pt")
    folders[1].mkdir()
    save = f"save_folder=s3://{bucket}/runs/killed"
    command = train_command(small_run(run, small_data, save, *WITH_RETRIEVAL))[1:]
    run_ranks(*command, num_nodes=2, folders=folders, environment=object_store.environment)
    assert_same_run(run, evaluated)
    assert (folders[1] / "runs" / "killed" / "ep1-ba12-rank0.pt").is_file()

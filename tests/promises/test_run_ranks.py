"""Promises 3, 8 and 10: ranks train like one process: in microbatches, compiled, on nodes, with any student, target."""

import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import Run

from d2v_composer import load_student
from gated_store import GatedStore
from helpers import (
    QUICKSTART,
    ROOT,
    assert_same_losses,
    datasets_of,
    load_checkpoint,
    log_of,
    losses_of,
    run_command,
    student_of,
    succeed,
    traced,
)

LAUNCHER = Path(sys.executable).parent / "composer"
ONE_WORKER = "train_loader.num_workers=1"

# Evaluations of twice 499 images, which two ranks share unevenly: before the first batch, after each fifth, at the end.
WITH_RETRIEVAL = ("retrieval.at_start=true", "retrieval.interval=5ba", "retrieval.max_images=499")
WITH_RETRIEVAL += ("retrieval.probes=[knn,linear,agreement,instance]", "retrieval.baselines=[encoder,teacher]")
WITH_RETRIEVAL += ("retrieval.embeddings=all",)
WITH_RETRIEVAL += (f"retrieval.{datasets_of(QUICKSTART / 'cifar10')}",)


def trained(folder: Path, data: Path, *overrides: str, **variables: str) -> Run:
    """Return a run that has been trained in one process."""
    run = Run(folder / "run", data, *overrides)
    program = run.start(**variables)
    assert program.wait(300) == 0, program.stderr
    return run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """Return the folder of a run in one process that measures retrieval."""
    return trained(tmp_path_factory.mktemp("evaluated"), small_data, *WITH_RETRIEVAL).folder


def assert_same_run(folder: Path, expected: Path) -> None:
    """Compare losses, and the accuracies up to two of 499 queries with equally near neighbors."""
    assert_same_losses(losses_of(folder), losses_of(expected), num_steps=14)
    ours, theirs = (log_of(run) for run in (folder, expected))
    metrics = [name for name in theirs if name.startswith("metrics/")]
    assert len(metrics) >= 4 * (7 + 4 + 7)  # of student, encoder and teacher: the headline and every embedding
    for name in metrics:
        at_the_same_steps = {step: ours[name][step] for step in theirs[name]}  # a resume measures the references anew
        assert at_the_same_steps == pytest.approx(theirs[name], abs=4.5e-3), name


def test_microbatches_give_the_same_losses(uninterrupted: Path, run: Run) -> None:
    """Sixteen images are trained on in parts of 6, 6 and 4."""
    run.train("device_train_microbatch_size=6", "activation_checkpointing=true")
    assert_same_losses(run.losses, losses_of(uninterrupted), num_steps=14)


@pytest.mark.slow
def test_a_fresh_run_trains_with_static_graphs(run: Run, tmp_path: Path) -> None:
    """Promise 24: the evaluation before the first step ends with a batch of 51 images instead of 64."""
    few = "compile=true", "max_duration=2ba", "scheduler.t_warmup=1ba", "retrieval.probes=[]"
    program = run.start(*WITH_RETRIEVAL, *few, BACKEND="static", GRAPHS=str(tmp_path / "counts"))
    assert program.wait(300) == 0, program.stderr
    (counts,) = (tmp_path / "counts").iterdir()
    assert len(counts.read_text().splitlines()) == 2


# Both backends compile the same graphs; inductor takes a minute more to make kernels of them.
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_ranks_train_as_one_process(evaluated: Path, run: Run, tmp_path: Path, backend: str) -> None:
    arguments = traced([*run.arguments, "compile=true", *WITH_RETRIEVAL])
    variables = {"BACKEND": backend, "GRAPHS": str(tmp_path / "counts")}
    result = run_command(LAUNCHER, "-n", "2", *arguments, timeout=400, environment=variables)
    assert result.returncode == 0, result.stderr
    assert_same_run(run.folder, evaluated)
    first, second = (tmp_path / "counts").iterdir()
    for rank in (first, second):
        counts = [line.split() for line in rank.read_text().splitlines()]
        graphs, breaks = ([int(count) for count in column] for column in zip(*counts, strict=True))
        assert len(graphs) == 14
        assert 10 < graphs[0] < 40
        assert graphs[-1] == graphs[1]  # the three evaluations that follow included
        assert breaks[-1] == 0


@pytest.mark.slow
def test_two_nodes_train_as_one_process(evaluated: Path, run: Run) -> None:
    """They share data set and folder, as on machines with a common file system."""
    options = ONE_WORKER, "device_train_microbatch_size=3", "activation_checkpointing=true"
    run.train_on_ranks(*options, *WITH_RETRIEVAL, num_nodes=2)
    assert_same_run(run.folder, evaluated)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [None, b"of another machine, which was node 0 meanwhile"], ids=["none", "another"])
def test_a_checkpoint_that_was_not_uploaded_reaches_the_other_node(
    object_store: GatedStore, evaluated: Path, small_data: Path, tmp_path: Path, stored: bytes | None
) -> None:
    """Node 0 saved it and was killed; each node has a disk of its own."""
    bucket, newest = f"two-nodes-{'none' if stored is None else 'another'}", "ep1-ba12-rank0.pt"
    object_store.create_bucket_of_images(bucket, small_data)
    put = partial(object_store.client().put_object, Bucket=bucket)
    if stored is not None:
        put(Key=f"runs/killed/{newest}", Body=stored)
        put(Key="runs/killed/latest-rank0.pt.symlink", Body=f"runs/killed/{newest}".encode())
    folders = tmp_path / "node0", tmp_path / "node1"
    run = Run(folders[0] / "runs" / "killed", small_data, f"save_folder=s3://{bucket}/runs/killed", *WITH_RETRIEVAL)
    shutil.copytree(evaluated, run.folder, symlinks=True)
    run.newest.unlink()
    run.newest.symlink_to(newest)
    folders[1].mkdir()
    run.train_on_ranks(num_nodes=2, folders=folders, environment=object_store.environment)
    assert_same_run(run.folder, evaluated)
    assert (folders[1] / "runs" / "killed" / newest).is_file()


NARROW = ("student.embed_dim=20", "max_duration=6ba")  # of the teacher's 48


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Run:
    """A run, in one process, of a student narrower than its encoder."""
    return trained(tmp_path_factory.mktemp("narrow"), small_data, *NARROW)


def test_a_narrow_students_checkpoint_holds_all_that_trains_and_ranks_train_as_one(narrow: Run, run: Run) -> None:
    """Promises 3, 8 and 10: these are the input projection, the blocks and the objective's head."""
    shapes = {name: tensor.shape for name, tensor in student_of(narrow.folder).items() if ".blocks." not in name}
    assert shapes == {
        "student.input_proj.weight": (20, 48),
        "student.input_proj.bias": (20,),
        "objectives.tokens.head.weight": (48, 20),
        "objectives.tokens.head.bias": (48,),
    }
    run.train_on_ranks(*NARROW)
    assert_same_losses(run.losses, narrow.losses, num_steps=6)


def test_evaluate_embed_and_export_read_the_narrow_embedding(narrow: Run, labeled: Path, tmp_path: Path) -> None:
    """Promises 17 and 21: they read the checkpoint, and its exported file."""
    exported = tmp_path / "student.safetensors"
    succeed("export", narrow.newest, exported)
    for options, width in (((), 48), (("--pooling", "cls"), 20)):  # the teacher's embedding, and the student's own
        for model in (narrow.newest, exported):
            succeed("embed", model, labeled / "test", tmp_path / f"{model.name}.npy", "--overwrite", *options)
        ours, expected = (np.load(tmp_path / f"{model.name}.npy") for model in (exported, narrow.newest))
        assert ours.shape == (48, width)
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    datasets = datasets_of(labeled, "cifar10")
    succeed("evaluate", ROOT / "yamls" / "evaluate.yaml", f"model={narrow.newest}", datasets)
    student, trained = load_student(exported), load_checkpoint(narrow.newest)["state"]["model"]
    assert torch.equal(student.state_dict()["input_proj.weight"], trained["student.input_proj.weight"])
    assert not any("head" in name for name in student.state_dict())

"""recipes/launch/: what a scheduler starts, stops and starts again; without SLURM, Kubernetes or a container engine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from d2v_composer import load_student
from d2v_composer.config.load import load_config
from gated_store import GatedStore
from helpers import (
    GOLDEN,
    ROOT,
    assert_gone,
    command_environment,
    family_of,
    has_trained,
    losses_of,
    start_python,
    time_limit,
    wait_until,
)

LAUNCH = ROOT / "recipes" / "launch"
BUCKET = "launch"
NUM_BATCHES = 300
# Takes the place of run.py: it saves on SIGTERM, or ends at once with a status.
STANDS_IN = """#!/usr/bin/env bash
echo "$@" > arguments
trap 'sleep 0.3; touch saved; exit 143' TERM
[ -e status ] && exit "$(cat status)"
touch started
while true; do sleep 0.05; done
"""
# A recipe whose ranks save on SIGTERM, for as many seconds as its second argument says.
SAVES = """
import os, signal, sys, time
from pathlib import Path

folder, seconds = sys.argv[1:]

def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(float(seconds))
    Path(folder, f"saved {os.environ['RANK']}").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
Path(folder, f"started {os.environ['RANK']}").touch()
signal.pause()
"""
RUN_TRAIN = """
import sys
from pathlib import Path
from d2v_composer.system import command_line
from recipes.launch import run

run.TRAIN = Path(sys.argv[1], "train.py")
command_line.run(run.train_on_all_gpus)
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> requeued\n'

Started = subprocess.Popen[str]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[[], Started]]:
    """Return what starts slurm.sh as SLURM does, from a copy, with another program in place of the run."""
    for name, content in {".venv/bin/python": STANDS_IN, "bin/scontrol": SCONTROL}.items():
        write_program(tmp_path / name, content)
    started = []

    def start() -> Started:
        started.append(start_job(tmp_path, "save_folder=s3://bucket/run"))
        return started[-1]

    yield start
    for process in started:
        kill_group(process)


def write_program(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)


def start_job(folder: Path, *arguments: str, **variables: str) -> Started:
    """Start a copy of slurm.sh, as SLURM does, with a folder's ``bin`` before the PATH."""
    shutil.copy(LAUNCH / "slurm.sh", folder / "slurm_script")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return start("bash", folder / "slurm_script", *arguments, folder=folder, PATH=path, SLURM_JOB_ID="7", **variables)


def start(*command: str | Path, folder: Path, **variables: str) -> Started:
    """Start a command in a group of its own; its output goes to ``output.txt``."""
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=command_environment() | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def kill_group(process: Started) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("sent", "is_queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["time is up", "canceled"]
)
def test_a_job_saves_and_is_queued_again_when_its_time_is_up(
    job: Callable[[], Started], tmp_path: Path, sent: signal.Signals, is_queued: bool
) -> None:
    process = job()
    wait_until((tmp_path / "started").exists)
    process.send_signal(sent)
    assert process.wait(20) == 143
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").exists() == is_queued
    if is_queued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    run, run_yaml, argument = (tmp_path / "arguments").read_text().split()
    assert (ROOT / run).is_file()
    assert (ROOT / run_yaml).is_file()
    assert argument == "save_folder=s3://bucket/run"


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_has_ended_is_not_queued_again(job: Callable[[], Started], tmp_path: Path, status: int) -> None:
    (tmp_path / "status").write_text(str(status))
    assert job().wait(20) == status
    assert not (tmp_path / "requeued").exists()


def test_the_shell_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install -e .[dev]")
    subprocess.run([shellcheck, LAUNCH / "slurm.sh", ROOT / ".ci" / "run"], check=True)


def job_manifest() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def job_command() -> tuple[list[str], dict[str, str]]:
    """Return the arguments of Python and the variables of the manifest's container, with this repository's paths."""
    (container,) = job_manifest()["spec"]["template"]["spec"]["containers"]
    python, *arguments = [*container["command"], *container["args"]]
    assert python == "python"
    image = str(image_folder()) + "/"
    return [each.replace(image, f"{ROOT}/") for each in arguments], {
        each["name"]: each["value"] for each in container["env"]
    }


def image_folder() -> Path:
    """Return the folder of the image that holds the repository."""
    return Path(re.findall("^WORKDIR (.*)$", (LAUNCH / "Containerfile").read_text(), re.MULTILINE)[0])


def test_the_manifest_is_kubernetes() -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate: .ci/run installs it")
    kubernetes.validate(job_manifest(), kubernetes.latest_version(), strict=True)


def test_the_manifests_command_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    (run, *arguments), variables = job_command()
    assert Path(run).is_file()
    monkeypatch.setenv("IMAGENET", variables["IMAGENET"])
    config = load_config([*arguments, "precision=fp32"])  # the YAML's needs a GPU
    assert (config.train_loader.remote, str(config.run_folder)) == (
        "s3://BUCKET/imagenet/train",
        "s3://BUCKET/runs/distill",
    )


def test_the_image_has_what_the_package_pins() -> None:
    parser = pytest.importorskip("dockerfile_parse", reason="no dockerfile-parse: .ci/run installs it")
    with (LAUNCH / "Containerfile").open("rb") as file:
        image = parser.DockerfileParser(fileobj=file)
        base, instructions = image.baseimage, [(each["instruction"], each["value"]) for each in image.structure]
    project = (ROOT / "pyproject.toml").read_text()
    (torch,) = re.findall('"torch==(.+)"', project)
    assert base.startswith(f"docker.io/pytorch/pytorch:{torch}-cuda")
    sources = {name for kind, value in instructions if kind == "COPY" for name in value.split()[:-1]}
    assert {name for name in sources if not (ROOT / name).exists()} == set()
    read_by_pip = re.findall('^(?:readme = |license-files = \\[)"(.+?)"', project, re.MULTILINE)
    assert sources == {"pyproject.toml", *read_by_pip, "d2v_composer", "yamls", "recipes"}
    assert ("RUN", "pip install --no-cache-dir '.[train]'") in instructions


@pytest.mark.slow
@pytest.mark.parametrize(("to_all", "seconds"), [(False, 32), (True, 2)], ids=["run.py", "every process"])
def test_sigterm_leaves_all_ranks_the_time_to_save(to_all: bool, seconds: int, tmp_path: Path) -> None:
    """Composer's launcher, if it gets SIGTERM itself, kills the ranks after 30 seconds; a scheduler may wait longer."""
    (tmp_path / "train.py").write_text(SAVES)
    program = start_python("-c", RUN_TRAIN, tmp_path, str(seconds), environment={"LOCAL_WORLD_SIZE": "2"})
    wait_until(lambda: len([*tmp_path.glob("started*")]) == 2 or program.poll() is not None, 60)
    family = family_of(program.pid)
    for process in family if to_all else family[:1]:
        process.send_signal(signal.SIGTERM)
    assert program.wait(60) == 143, program.stderr
    assert "SIGTERM: the same command resumes" in program.stderr
    assert len([*tmp_path.glob("saved*")]) == 2
    assert_gone(family[1:])


@pytest.fixture(scope="module")
def store(object_store: GatedStore, small_data: Path) -> GatedStore:
    """The store with the small data set and a teacher."""
    object_store.create_bucket_of_images(BUCKET, small_data)
    object_store.client().upload_file(str(GOLDEN / "tiny_base.pt"), BUCKET, "tiny_base.pt")
    return object_store


@pytest.mark.slow
def test_a_run_begun_by_slurm_is_finished_by_kubernetes(store: GatedStore, labeled: Path, tmp_path: Path) -> None:
    """A job's time is up; on another machine, the same run resumes from the bucket."""
    here, there = tmp_path / "here", tmp_path / "there"
    write_program(here / "bin" / "scontrol", SCONTROL)
    for name, place in {".venv": sys.prefix, "recipes": ROOT / "recipes", "yamls": ROOT / "yamls"}.items():
        (here / name).symlink_to(place)
    there.mkdir()
    save_folder = f"save_folder=s3://{BUCKET}/runs/distill"
    settings = [
        f"teacher.checkpoint=s3://{BUCKET}/tiny_base.pt",
        f"retrieval.datasets={{small: {{format: mds, root: {labeled}}}}}",
        f"retrieval.interval={NUM_BATCHES}ba",
        "precision=fp32",
        "compile=false",
        f"max_duration={NUM_BATCHES}ba",
        "global_train_batch_size=16",
        "scheduler.t_warmup=4ba",
        "save_interval=50ba",
        "student.depth=2",
        "train_loader.num_workers=1",
    ]
    variables = store.environment | {"IMAGENET": f"s3://{BUCKET}/images"}

    first = start_job(here, save_folder, *settings, **variables, TORCH_HOME=str(here / "torch"))
    try:
        wait_until(lambda: first.poll() is not None or has_trained(here / "runs" / "distill"), 900)
        first.send_signal(signal.SIGUSR1)
        assert first.wait(120) == 143, (here / "output.txt").read_text()
    finally:
        kill_group(first)
    assert (here / "requeued").read_text() == "requeue 7\n"
    before = losses_of(here / "runs" / "distill")
    assert 1 < len(before) < NUM_BATCHES

    arguments, _ = job_command()
    arguments = [save_folder if each.startswith("save_folder=") else each for each in arguments]
    torch_home = str(there / "torch")
    second = start(sys.executable, *arguments, *settings, folder=there, **variables, TORCH_HOME=torch_home)
    try:
        with time_limit(900):
            assert second.wait() == 0, (there / "output.txt").read_text()
    finally:
        kill_group(second)
    assert f" at batch {len(before)}\n" in (there / "output.txt").read_text()
    assert sorted(losses_of(there / "runs" / "distill")) == list(range(NUM_BATCHES))

    stored = store.objects(BUCKET, "runs/distill/")
    assert {"report.html", "log.jsonl", "README.md", "student.safetensors"} <= stored.keys()
    (tmp_path / "student.safetensors").write_bytes(stored["student.safetensors"])
    assert load_student(tmp_path / "student.safetensors").config.depth == 2

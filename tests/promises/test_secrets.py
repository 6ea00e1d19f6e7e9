"""Promise 25: a password or token given to a command stands in none of its files, nor in what it prints."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from small_runs import Run

from helpers import GOLDEN, ROOT, d2v, datasets_of, failure

LOGIN = "someone:hunter\"7qXw'k9Ztrap%5C5"
PARTS = ("hunter", "7qXw", "k9Ztrap", "topsecret")


class Web(NamedTuple):
    """A web server that needs a login and a token, and the folder that it serves."""

    folder: Path
    root: str

    def address(self, name: str) -> str:
        return f"{self.root}/{name}?token=topsecret"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if "Authorization" in self.headers:
            super().do_GET()
        else:
            self.send_error(401)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("web")
    shutil.copy(GOLDEN / "tiny_base.pt", folder)
    shutil.copytree(small_data, folder / "data" / "train")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Web(folder, f"http://{LOGIN}@127.0.0.1:{server.server_port}")
        server.shutdown()


def assert_no_secrets(folder: Path, *ended: subprocess.CompletedProcess[str]) -> None:
    """Check that commands succeeded, and all that they wrote and printed."""
    for process in ended:
        assert process.returncode == 0, process.stderr
        assert not [part for part in PARTS if part in process.stdout + process.stderr], process.stdout + process.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = str(path).encode() + path.read_bytes()
        assert not [part for part in PARTS if part.encode() in content], path


def run_from(web: Web, folder: Path, *overrides: str, **variables: str) -> Run:
    """Return a run whose teacher and shards need a login."""
    teacher, remote = f"teacher.checkpoint={web.address('tiny_base.pt')}", f"train_loader.remote={web.root}/data/train"
    settings = teacher, remote, "max_duration=2ba", "scheduler.t_warmup=1ba", *overrides
    environment = {"TORCH_HOME": str(folder / "torch"), **variables}
    return Run(folder / "run", folder / "cache", *settings, environment=environment)


def test_a_run_and_what_is_made_of_it(web: Web, labeled: Path, tmp_path: Path) -> None:
    """Promise 25: the same command resumes, and no command writes or prints a secret."""
    sets, moved = datasets_of(labeled), web.address("tiny_base.pt")
    run = run_from(web, tmp_path, f"retrieval.{sets}", "retrieval.baselines=[]")
    first, again = run.train(), run.train("max_duration=4ba")
    assert "at batch 2" in again.stdout, again.stderr
    assert sorted(run.losses) == [0, 1, 2, 3]
    options = f"teacher={moved}", f"rivals={json.dumps([moved])}", sets, f"out={run.folder}"
    evaluated = d2v("evaluate", f"model={run.newest}", *options)
    exported = d2v("export", run.newest, tmp_path / "student.safetensors", "--teacher", moved)
    assert_no_secrets(tmp_path, first, again, evaluated, exported, d2v("report", run.folder))
    card = (tmp_path / "README.md").read_text()
    assert "http://127.0.0.1" in card  # the command, without its login
    assert "Zero-shot retrieval on small" in card


@pytest.mark.slow
def test_loggers_and_a_checkpoint_of_another_run(web: Web, tmp_path: Path) -> None:
    """Promise 25: W&B and MLflow keep no secret either."""
    run = run_from(web, tmp_path / "first", WANDB_MODE="offline")
    first = run.train()
    shutil.copy(run.newest, web.folder / "checkpoint.pt")
    loggers = "loggers.mlflow={}", "loggers.wandb.init_kwargs.settings.api_key=topsecret"
    options = f"load_path={web.address('checkpoint.pt')}", "max_duration=4ba", "report=true", *loggers
    second = run_from(web, tmp_path / "second", *options, WANDB_MODE="offline").train()
    assert "at batch 2" in second.stdout, second.stderr
    assert_no_secrets(tmp_path, first, second)
    assert list(tmp_path.glob("second/run/wandb/offline-run-*/*.wandb"))
    assert list(tmp_path.glob("second/run/mlruns/**/tags"))


def test_a_student_and_other_commands(web: Web, uninterrupted: Path, tmp_path: Path) -> None:
    """Promise 25: commands read a student that needs a login, and what they make has no secret."""
    student, environment = web.address("student.safetensors"), {"TORCH_HOME": str(tmp_path / "torch")}
    ended = d2v("export", uninterrupted / "latest-rank0.pt", web.folder / "student.safetensors")
    assert ended.returncode == 0, ended.stderr
    source, out, cache = f"{web.root}/data/train", tmp_path / "photos.npy", tmp_path / "cache"
    assert_no_secrets(
        tmp_path,
        d2v("embed", student, source, out, "--local", cache, environment=environment),
        d2v("convert-teacher", web.address("tiny_base.pt"), tmp_path / "teacher.safetensors", environment=environment),
        d2v("export", student, tmp_path / "new" / "student.safetensors", environment=environment),
    )
    assert len(np.load(out)) == 96


def test_what_is_refused(web: Web, tmp_path: Path) -> None:
    """Promise 25: a file is not there, a password has any characters, or a slip stands beside it."""
    gone, odd = web.address("gone.pt"), f"https://someone:hunter{chr(92)}7qXw@127.0.0.1:9/a/k9Ztrap?key=topsecret"
    for arguments in (
        ["embed", gone, tmp_path, tmp_path / "a.npy"],
        ["embed", odd.replace("k9Ztrap", ""), tmp_path, tmp_path / "a.npy"],
        ["evaluate", f"model={gone}", "datasets.a.format=folder", f"datasets.a.root={tmp_path}"],
        ["evaluate", "modle=a", f"teacher={gone}", f"datasets={{a: {gone}}}"],
        ["export", gone, tmp_path / "a.safetensors"],
        ["train", ROOT / "yamls" / "quickstart.yaml", f"teacher.model={gone}", f"save_folder={gone}"],
        ["distill", f"{web.root}/gone", "--teacher", gone, "--out", tmp_path / "out"],
    ):
        ended = d2v(*arguments, environment={"TORCH_HOME": str(tmp_path / "torch")})
        failure(ended, 2)
        assert not [part for part in PARTS if part in ended.stdout + ended.stderr], ended.stderr

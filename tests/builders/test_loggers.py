"""Metrics and pictures arrive at W&B, TensorBoard and MLflow, and a server that refuses a run stops it at its start."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from d2v_composer.builders.loggers import check_logging_servers
from d2v_composer.config.load import load_config
from d2v_composer.evaluation.metrics import read_jsonl
from d2v_composer.system.errors import InputError
from helpers import free_port, serving, small_run, started_ranks, train_command

ALL = ("loggers.tensorboard={}", "loggers.mlflow={experiment_name: mine}", "loggers.wandb={project: mine}")
KEY = "k" * 40
# The retrievals of the run; the pixels of the gallery of four queries.
RETRIEVALS = (0, 14)
GALLERY_SIZE = (640, 688)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path, labeled: Path) -> Path:
    """Return the folder of a run with every logger, started in an empty folder; it says little."""
    started_in = tmp_path_factory.mktemp("loggers")
    folder = started_in / "runs" / "mine"
    sets = f"retrieval.datasets={{squares: {{format: mds, root: {labeled}}}}}"
    arguments = small_run(folder, small_data, sets, "retrieval.interval=14ba", "report=true", "run_name=mine", *ALL)
    # A process of its own: W&B keeps its pictures in a folder that the first forked process to end removes.
    variables = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = train_command(arguments)
    result = subprocess.run(command, cwd=started_in, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in started_in.iterdir()] == ["runs"]
    own = re.compile(r"wandb: |.* INFO mlflow\.|batch \d+/14 |retrieval at batch \d+: |$")
    assert [line for line in result.stderr.splitlines() if own.match(line) is None] == []
    return folder


def expected_losses(folder: Path) -> list[float]:
    losses = read_jsonl(folder / "log.jsonl")["loss/train/total"]
    assert sorted(losses) == list(range(14))
    return [losses[step] for step in sorted(losses)]


def test_tensorboard_has_metrics_and_pictures(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tensorboard_logs" / "mine"), size_guidance={"images": 0})
    events.Reload()
    losses = [event.value for event in events.Scalars("loss/train/total")]
    np.testing.assert_allclose(losses, expected_losses(folder), rtol=1e-6)
    galleries = events.Images("retrieval/squares")
    assert [(each.step, (each.width, each.height)) for each in galleries] == [(i, GALLERY_SIZE) for i in RETRIEVALS]
    assert {"report/loss", "report/gallery_squares_1"} <= set(events.Tags()["images"])


def test_mlflow_has_metrics_and_pictures(folder: Path) -> None:
    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.info.run_name, logged.info.status) == ("mine", "FINISHED")
    history = {each.step: each.value for each in client.get_metric_history(logged.info.run_id, "loss/train/total")}
    np.testing.assert_allclose([history[step] for step in sorted(history)], expected_losses(folder), rtol=1e-6)
    ours = {re.sub(r"(/top\d+)/", r"\1.", key) for key in read_jsonl(folder / "log.jsonl")}
    assert ours <= logged.data.metrics.keys()
    pictures = [Path(each.path) for each in client.list_artifacts(logged.info.run_id, "images")]
    galleries = [each for each in pictures if each.match("retrieval.squares_0%step%*.png")]
    assert {int(each.name.split("%")[2]) for each in galleries} == set(RETRIEVALS)
    assert any(each.match("report.retrieval_squares_bank_train_0%step%14%*.png") for each in pictures)


def test_wandb_has_metrics_and_pictures(folder: Path) -> None:
    (offline,) = (folder / "wandb").glob("offline-run-*")
    (file,) = offline.glob("*.wandb")
    rows = list(read_wandb(file))
    losses = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
    np.testing.assert_allclose(losses, expected_losses(folder), rtol=1e-6)
    name = "retrieval/squares"
    shown = {row["_step"]: (row[f"{name}.width"], row[f"{name}.height"]) for row in rows if f"{name}.width" in row}
    assert shown == dict.fromkeys(RETRIEVALS, GALLERY_SIZE)
    assert any("report/retrieval_squares_bank_train.filenames" in row for row in rows)


def read_wandb(file: Path) -> Iterator[dict]:
    """Yield the rows of the history that W&B keeps offline."""
    with closing(DataStore()) as store:
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record: Any = Record()
            record.ParseFromString(bytes(data))
            if record.HasField("history"):
                yield {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with 401."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No login, no settings of an earlier W&B run of this process, and no server but those on this machine."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("without_login")
def test_wandb_refuses_a_key(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(small_run(Path("unused"), small_data, "loggers.wandb={project: mine}"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Refusing)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(
            InputError, match=r"^loggers\.wandb: .*`wandb login --relogin`.* WANDB_MODE=offline"
        ) as caught:
            check_logging_servers(config)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_login")
def test_mlflow_does_not_answer(small_data: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    config = load_config(small_run(Path("unused"), small_data, f"loggers.mlflow={{tracking_uri: '{address}'}}"))
    with pytest.raises(InputError, match=r"^loggers\.mlflow: .*127\.0\.0\.1.*refused") as caught:
        check_logging_servers(config)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_login")
def test_two_ranks_without_a_login_end_before_work_starts(small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = small_run(folder, small_data, "loggers.wandb={project: mine}")
    with started_ranks(*train_command(arguments)[1:], ranks=2) as programs:
        for program in programs:
            assert program.wait(60) == 2, program.stderr
            message = "error: loggers.wandb: no login: run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline logs"
            assert program.stderr.startswith(message)
            assert len(program.stderr.splitlines()) == 1
    assert not folder.exists()

"""Metrics arrive at W&B, TensorBoard and MLflow, which take seconds to import."""

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v_composer.evaluation.run_log import read_jsonl
from helpers import datasets_of, run_command, small_run, train_command

ALL = ("loggers.tensorboard={}", "loggers.mlflow={experiment_name: mine}", "loggers.wandb={project: mine}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path, labeled: Path) -> Path:
    """Return the folder of a run with every logger, started in an empty folder; it says little."""
    started_in = tmp_path_factory.mktemp("loggers")
    folder = started_in / "runs" / "mine"
    sets = f"retrieval.{datasets_of(labeled, 'squares')}", "retrieval.interval=4ba", "retrieval.probes=[agreement]"
    arguments = small_run(folder, small_data, *sets, "run_name=mine", "max_duration=4ba", *ALL)
    result = run_command(*train_command(arguments), cwd=started_in, environment={"WANDB_MODE": "offline"})
    assert result.returncode == 0, result.stderr
    assert [path.name for path in started_in.iterdir()] == ["runs"]
    pattern = re.compile(
        r"wandb: |warning: squares: 48 of 48 test images |.* INFO mlflow\.|batch \d+/4 |batch \d+: metrics/|$"
    )
    assert [line for line in result.stderr.splitlines() if pattern.match(line) is None] == []
    (folder / "stderr").write_text(result.stderr)
    return folder


def test_the_console_names_accuracies_as_the_log_does(folder: Path) -> None:
    log, shown = read_jsonl(folder / "log.jsonl"), dict[str, str]()
    for line in (folder / "stderr").read_text().splitlines():
        if match := re.fullmatch(r"batch (\d+): (\S+) ([\d.]+%)", line):
            assert match[3] == f"{log[match[2]][int(match[1])]:.1%}"
            shown[match[2]] = match[1]
    rows, names = ("", "in_index/", "teacher/", "pixels/"), ("bank_train/top1", "bank_train/top3", "agreement@10")
    assert shown.keys() == {f"metrics/squares/{row}{name}" for row in rows for name in names}


def expected_losses(folder: Path) -> list[float]:
    losses = read_jsonl(folder / "log.jsonl")["loss/train/total"]
    assert sorted(losses) == list(range(4))
    return [losses[step] for step in sorted(losses)]


@pytest.mark.slow
def test_tensorboard_has_the_metrics(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard_logs" / "mine"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss/train/total")]
    assert read_jsonl(folder / "log.jsonl").keys() <= {*events.Tags()["scalars"]}
    np.testing.assert_allclose(losses, expected_losses(folder), rtol=1e-6)


def test_mlflow_has_the_metrics(folder: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.info.run_name, logged.info.status) == ("mine", "FINISHED")
    history = {point.step: point.value for point in client.get_metric_history(logged.info.run_id, "loss/train/total")}
    np.testing.assert_allclose([history[step] for step in sorted(history)], expected_losses(folder), rtol=1e-6)
    ours = {re.sub(r"(/top\d+|@10)/", r"\1.", key).replace("@", "_") for key in read_jsonl(folder / "log.jsonl")}
    assert ours <= logged.data.metrics.keys()


def test_wandb_has_the_metrics(folder: Path) -> None:
    (offline,) = (folder / "wandb").glob("offline-run-*")
    (file,) = offline.glob("*.wandb")
    rows = [*read_wandb(file)]
    assert read_jsonl(folder / "log.jsonl").keys() <= {key for row in rows for key in row}
    losses = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
    np.testing.assert_allclose(losses, expected_losses(folder), rtol=1e-6)


def read_wandb(file: Path) -> Iterator[dict]:
    """Yield the rows of the history that W&B keeps offline."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    with closing(DataStore()) as store:
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record: Any = Record()
            record.ParseFromString(bytes(data))
            if record.HasField("history"):
                yield {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}

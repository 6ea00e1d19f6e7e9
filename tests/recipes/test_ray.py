"""Embed and convert on a real Ray cluster of this machine, while processes and a node die.

Ray, datasets and pyspark are in no extra but their own: without them these tests skip. ``.ci/run`` installs them.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from containers import write_parquet, write_tar
from d2v_composer import Embedder
from d2v_composer.commands import convert_images
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, ROOT, command_environment, encoded_image, free_port, succeed, wait_until, write_files

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own

MODEL = str(GOLDEN / "tiny_base.pt")
NUM_IMAGES, BAD = 600, 123
IMAGES = [encoded_image(seed) for seed in range(NUM_IMAGES)]
IMAGES[BAD] = b"not an image"
# Workers find the package and the recipes as this process does.
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
NAMES = [f"{number:04}" for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files, as rows of Parquet and in tars, and as ``d2v embed`` embeds them; read-only."""
    root = tmp_path_factory.mktemp("sources")
    files = {f"{name}.jpg": image for name, image in zip(NAMES, IMAGES, strict=True)}
    write_files(root / "files", files)
    for first in range(0, NUM_IMAGES, 100):
        structs = [{"bytes": image, "path": None} for image in IMAGES[first : first + 100]]
        write_parquet(root / "rows" / f"{first}.parquet", {"image": structs, "id": NAMES[first : first + 100]})
        write_tar(root / "tars" / f"{first}.tar", [*files.items()][first : first + 100])
    succeed("embed", MODEL, root / "files", root / "expected.npy", "--skip-unreadable", "--workers", "0")
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this process's: two cores for actors, one for those who read.

    Ray's own niceness is 15: beside the other tests' processes, its workers would get hardly any time.
    """
    variables = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    # Without the address, Ray may bind one that a sandbox does not route, and wait.
    options = {"include_dashboard": False, "log_to_driver": False, "runtime_env": {"env_vars": variables}}
    ray.init("local", num_cpus=3, _node_ip_address="127.0.0.1", _system_config={"worker_niceness": 0}, **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def check(out: Path, expected: Path) -> None:
    """Compare a folder of Parquet files with the embeddings of ``d2v embed``."""
    import pyarrow.dataset

    table = pyarrow.dataset.dataset(out, format="parquet").to_table()
    rows = dict(zip(names_of(table), table.select(["embedding", "error"]).to_pylist(), strict=True))
    assert table.num_rows == NUM_IMAGES
    assert sorted(rows) == NAMES
    bad = rows.pop(NAMES[BAD])
    assert bad["embedding"] is None
    assert bad["error"].endswith(": cannot decode as an image (12 bytes)")
    assert {row["error"] for row in rows.values()} == {None}
    embeddings = [rows[name]["embedding"] for name in sorted(rows)]
    np.testing.assert_allclose(embeddings, np.load(expected), rtol=0, atol=2e-5)  # another order of sums


def names_of(table: Any) -> list[str]:
    column = next(name for name in ("id", "path", "__key__") if name in table.column_names)
    return [Path(name).stem for name in table[column].to_pylist()]


@pytest.mark.parametrize(("kind", "column"), [("files", ""), ("rows", "image"), ("tars", ".jpg")])
@pytest.mark.usefixtures("cluster")
def test_ray_embeds_every_kind_of_source_as_the_command(
    sources: Path, tmp_path: Path, kind: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes import ray_embed

    out = tmp_path / "out"
    ray_embed.main(MODEL, str(sources / kind), str(out), column)
    check(out, sources / "expected.npy")
    assert "unreadable samples: 1 (the column 'error' has the reasons)\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="already exists"):  # nothing is mixed
        ray_embed.main(MODEL, str(sources / kind), str(out), column)


def test_ray_leaves_out_no_sample_of_a_damaged_tar(sources: Path, tmp_path: Path) -> None:
    from recipes import ray_embed

    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join((sources / "tars" / f"{first}.tar").read_bytes() for first in (0, 100)))
    with pytest.raises(
        InputError, match=rf"^{joined} cannot be read: expected a member, or only the end mark, from byte \d+ on"
    ):
        list(ray_embed.read_samples({"address": str(joined), "version": ""}))


@pytest.mark.usefixtures("cluster")
def test_ray_loses_nothing_if_workers_are_killed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes import ray_embed

    killed = tmp_path / "killed"
    killed.mkdir()

    class Dying(Embedder):
        def __call__(self, batch: Any) -> Any:
            embedded = super().__call__(batch)
            for name in ("0150", "0310", "0590"):
                if name in batch["id"].to_pylist() and not (killed / name).exists():
                    (killed / name).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return embedded

    monkeypatch.setattr(ray_embed, "Embedder", Dying)
    ray_embed.main(MODEL, str(sources / "rows"), str(tmp_path / "out"), "image")
    assert len(list(killed.iterdir())) == 3
    check(tmp_path / "out", sources / "expected.npy")


@pytest.mark.usefixtures("cluster")
def test_ray_converts_as_the_command_while_tasks_are_killed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes import ray_convert

    whole, out, killed, skip = tmp_path / "whole", tmp_path / "out", tmp_path / "killed", "--skip-unreadable"
    killed.mkdir()

    def convert(argv: list[str]) -> None:
        mark = killed / argv[-1].replace("/", "of")
        if argv[-1] in ("1/5", "3/5") and not mark.exists():
            mark.touch()
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        convert_images.main(argv)

    monkeypatch.setattr(ray_convert, "convert", convert)
    monkeypatch.setattr(ray_convert, "PARTS", 5)
    succeed("convert-images", sources / "rows", whole, "--workers", "1", skip)
    ray_convert.main(str(sources / "rows"), str(out), skip)
    assert len(list(killed.iterdir())) == 2
    assert samples_of(out) == samples_of(whole)
    assert len(samples_of(out)) == NUM_IMAGES - 1
    with pytest.raises(InputError, match="differs from this command in source"):
        ray_convert.main(str(sources / "files"), str(out), skip)


def samples_of(folder: Path) -> list[bytes]:
    from streaming import StreamingDataset

    return sorted(sample["image"] for sample in StreamingDataset(local=str(folder), batch_size=1))


class Node(NamedTuple):
    """A node of a cluster, in processes of its own."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, log: Path, environment: dict[str, str], *options: str) -> "Node":
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
        with log.open("wb") as file:
            return cls(subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True))

    def kill(self) -> None:
        """Kill all its processes at once, as a power cut does."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def test_ray_loses_nothing_if_a_node_is_killed(sources: Path, tmp_path: Path) -> None:
    address, seen, out = f"127.0.0.1:{free_port()}", tmp_path / "seen", tmp_path / "out"
    seen.mkdir()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    environment = command_environment() | token | {"PYTHONPATH": PATHS, "RAY_worker_niceness": "0"}  # as in cluster()
    nodes = dict[str, Node]()

    def start(ip: str, *options: str) -> None:
        nodes[ip] = Node.start(tmp_path / ip, environment, "--node-ip-address", ip, *options)
        wait_until(lambda: "will now block" in (tmp_path / ip).read_text(), 200)

    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # a socket's path has at most 107 characters
        port, driver = f"--port={address.partition(':')[2]}", ROOT / "tests" / "programs" / "slow_ray_embed.py"
        command = [sys.executable, str(driver), str(seen), MODEL, str(sources / "rows"), str(out), "image"]
        try:
            start("127.0.0.1", "--head", port, "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={short}")
            # Ray may embed all on one of them, so the one that dies is one that has begun.
            for ip in ("127.0.0.2", "127.0.0.3"):
                start(ip, f"--address={address}", "--num-cpus=2")
            with (tmp_path / "driver.txt").open("wb") as log:
                running = subprocess.Popen(command, env=environment | {"RAY_ADDRESS": address}, stdout=log, stderr=log)
            try:
                wait_until(lambda: any(seen.iterdir()) or running.poll() is not None, 400)
                assert running.poll() is None, (tmp_path / "driver.txt").read_text()
                nodes.pop(next(seen.iterdir()).name).kill()
                assert running.wait(400) == 0, (tmp_path / "driver.txt").read_text()
            finally:
                running.kill()
                running.wait()
        finally:
            for node in reversed(nodes.values()):
                node.kill()
    check(out, sources / "expected.npy")


def test_datasets_map_embeds_as_the_command(sources: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("parquet", data_dir=str(sources / "rows"), cache_dir=str(tmp_path), split="train")
    embed = Embedder(MODEL)
    mapped = rows.with_format("arrow").map(embed, batched=True, batch_size=64, num_proc=2, remove_columns="image")
    mapped.to_parquet(tmp_path / "out" / "rows.parquet")
    check(tmp_path / "out", sources / "expected.npy")
    assert mapped.features["embedding"].feature.dtype == "float32"
    # Of rows that are not Arrow's, the types are those of the first batch.
    plain = rows.map(embed, batched=True, batch_size=NUM_IMAGES)
    assert plain[BAD]["embedding"] is None
    assert plain[0]["embedding"] == mapped.with_format(None)[0]["embedding"]


def test_spark_embeds_as_the_command(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sql = pytest.importorskip("pyspark.sql")
    if shutil.which("java") is None:
        pytest.skip("pyspark needs Java")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    local = {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1", "spark.ui.enabled": "false"}
    spark = sql.SparkSession.builder.master("local[2]").config(map=local).getOrCreate()
    try:
        rows, embed = spark.read.parquet(str(sources / "rows")), Embedder(MODEL)
        schema = "image struct<bytes: binary, path: string>, id string, embedding array<float>, error string"
        embedded = rows.mapInArrow(lambda batches: map(embed, batches), schema)
        embedded.drop("image").write.parquet(str(tmp_path / "out"))
    finally:
        spark.stop()
    check(tmp_path / "out", sources / "expected.npy")

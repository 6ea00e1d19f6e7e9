"""Embed and convert on a real Ray cluster of this machine, while processes and a node die.

Ray, datasets and pyspark are in no extra but their own: without them these tests skip. ``.ci/run`` installs them.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from containers import write_parquet, write_tar
from d2v_composer import Embedder
from helpers import GOLDEN, ROOT, d2v, encoded_image

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own

MODEL = str(GOLDEN / "tiny_base.pt")
NUM_IMAGES, BAD = 600, 123
IMAGES = [encoded_image(seed) for seed in range(NUM_IMAGES)]
IMAGES[BAD] = b"not an image"
# Another order of sums.
TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files, as rows of Parquet and in tars, and as ``d2v embed`` embeds them; read-only."""
    root = tmp_path_factory.mktemp("sources")
    (root / "files").mkdir()
    names = [f"{number:04}" for number in range(NUM_IMAGES)]
    for name, image in zip(names, IMAGES, strict=True):
        (root / "files" / f"{name}.jpg").write_bytes(image)
    for first in range(0, NUM_IMAGES, 100):
        images, ids = IMAGES[first : first + 100], names[first : first + 100]
        structs = [{"bytes": image, "path": None} for image in images]
        write_parquet(root / "rows" / f"{first}.parquet", {"image": structs, "id": ids})
        write_tar(
            root / "tars" / f"{first}.tar", [(f"{name}.jpg", image) for name, image in zip(ids, images, strict=True)]
        )
    ended = d2v("embed", MODEL, root / "files", root / "expected.npy", "--skip-unreadable", "--workers", "0")
    assert ended.returncode == 0, ended.stderr
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this process's: two cores for actors, one for those who read."""
    # Workers find the package and the recipes as this process does.
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]), "OMP_NUM_THREADS": "1"}
    # Without the address, Ray may bind one that a sandbox does not route, and wait.
    options = {"include_dashboard": False, "log_to_driver": False, "runtime_env": {"env_vars": variables}}
    ray.init(num_cpus=3, _node_ip_address="127.0.0.1", **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def check(out: Path, expected: Path) -> None:
    """Compare a folder of Parquet files with the embeddings of ``d2v embed``."""
    import pyarrow.dataset

    table = pyarrow.dataset.dataset(out, format="parquet").to_table()
    rows = dict(
        zip(names_of(table), zip(table["embedding"].to_pylist(), table["error"].to_pylist(), strict=True), strict=True)
    )
    assert table.num_rows == len(rows) == NUM_IMAGES
    assert sorted(rows) == [f"{number:04}" for number in range(NUM_IMAGES)]
    embedding, error = rows.pop(f"{BAD:04}")
    assert embedding is None
    assert error.endswith(": not an image that can be read (12 bytes)")
    assert {error for _, error in rows.values()} == {None}
    np.testing.assert_allclose([rows[name][0] for name in sorted(rows)], np.load(expected), **TOLERANCE)


def names_of(table: Any) -> list[str]:
    column = next(name for name in ("id", "path", "__key__") if name in table.column_names)
    return [Path(name).stem for name in table[column].to_pylist()]


@pytest.mark.parametrize(("kind", "column"), [("files", ""), ("rows", "image"), ("tars", ".jpg")])
@pytest.mark.usefixtures("cluster")
def test_ray_embeds_every_kind_of_source_as_the_command(sources: Path, tmp_path: Path, kind: str, column: str) -> None:
    from recipes import ray_embed

    out = tmp_path / "out"
    ray_embed.main(MODEL, str(sources / kind), str(out), column)
    check(out, sources / "expected.npy")
    with pytest.raises(ValueError, match="already exists"):  # nothing is mixed
        ray_embed.main(MODEL, str(sources / kind), str(out), column)


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

"""How fast images come from an object store once an epoch is under way: nothing cached, against all cached.

One data set, several times as large as the images on disk, is read almost shard after shard, so that shards are fetched
all the time. What comes before a quarter of an epoch does not count: the start of the workers, and the first shards.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader

from d2v_composer.benchmarks.measure import Rates
from d2v_composer.benchmarks.object_store import ObjectStore
from d2v_composer.benchmarks.readers import our_loader

__all__ = ["measure_going_on", "upload_copies"]

COPIES = 4
NOT_COUNTED = 0.25


def upload_copies(store: ObjectStore, folder: Path, bucket: str) -> str:
    """Store a data set whose shards are those of ``folder``, several times; its address."""
    address, client = store.create_bucket(bucket), store.client()
    index = json.loads((folder / "index.json").read_text())
    shards = []
    for shard in index["shards"] * COPIES:
        name = f"shard.{len(shards):05}.mds"
        client.upload_file(str(folder / shard["raw_data"]["basename"]), bucket, name)
        shards.append(shard | {"raw_data": shard["raw_data"] | {"basename": name}})
    client.put_object(Bucket=bucket, Key="index.json", Body=json.dumps(index | {"shards": shards}).encode())
    return address


def measure_going_on(
    remote: str,
    cache: Path,
    workers: int,
    rounds: int,
    progress: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Rates, Rates]:
    """Read an epoch with nothing cached and one with all cached, in turns.

    Args:
        remote: From :func:`upload_copies`.
        cache: A folder that does not exist yet; it is removed.
        workers: Processes that read.
        rounds: How many of both count, after one that does not.
        progress: Called with a name before each epoch.
        clock: In seconds.

    Returns:
        Images a second, cold and warm.
    """
    each: tuple[list[float], list[float]] = [], []
    for _ in range(rounds + 1):
        loader = our_loader(cache, remote, workers, shuffle_block_size=1)
        for rates, name in zip(each, ("cold", "warm"), strict=True):
            progress(name)
            rates.append(_rate(loader, clock))
        del loader
        shutil.rmtree(cache)
    return Rates(each[0][1:]), Rates(each[1][1:])


def _rate(loader: DataLoader, clock: Callable[[], float]) -> float:
    """Images a second, from a quarter of an epoch to its end."""
    batches: Iterator[dict] = iter(loader)
    for _ in islice(batches, round(NOT_COUNTED * len(loader))):
        pass
    begin = clock()
    count = sum(len(batch["image"]) for batch in batches)
    return count / (clock() - begin)

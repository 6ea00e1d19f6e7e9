"""Embed images or clips on a Ray cluster, or on all cores and GPUs of this machine.

    pip install -e '.[ray]'
    python recipes/ray_embed.py student.safetensors photos embeddings
    python recipes/ray_embed.py hf://ORG/NAME s3://bucket/parquet s3://bucket/embeddings image
    python recipes/ray_embed.py hf://ORG/NAME s3://bucket/tars s3://bucket/embeddings .jpg

usage: ray_embed.py MODEL SOURCE OUT [COLUMN]

SOURCE is a folder of images or clips, of Parquet files or of WebDataset tars. COLUMN names the column of the samples in
Parquet files or, with a dot, the suffix of the samples in tars. OUT is a new folder of Parquet files, with a row for
each sample, in any order. The columns embedding and error replace the column of the samples; all other columns stay.
The name of a sample is in the column path if SOURCE has images or clips, and in the column __key__ if it has tars.
Every machine needs access to MODEL, SOURCE and OUT. The cluster needs at least two cores.
"""

import sys
from collections.abc import Iterator
from typing import Any

from d2v_composer.system.command_line import show_help

if __name__ == "__main__":
    show_help(sys.argv[1:], __doc__)

import ray  # pyright: ignore[reportMissingImports]  (an extra)

from d2v_composer import Embedder
from d2v_composer.sources.listing import list_files
from d2v_composer.sources.tars import read_tar
from d2v_composer.system.errors import reading
from d2v_composer.system.fetch import fetch


def read_samples(tar: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a dict for each sample of a tar: ``__key__`` → key, and suffix → bytes for each file of the sample."""
    with reading(tar["address"]), fetch(tar["address"], tar["version"]).open("rb") as file:
        for key, members in read_tar(file):
            sample: dict[str, Any] = {"__key__": key}
            for suffix, offset, size in members:
                file.seek(offset)
                sample[suffix] = file.read(size)
            if key is not None:
                yield sample


def main(model: str, source: str, out: str, column: str = "") -> None:
    """Embed all samples."""
    if not column:
        rows, column = ray.data.read_binary_files(source, include_paths=True), "bytes"
    elif column[0] == ".":
        # Ray's own reader takes damage for the end of a tar.
        root, files, *_ = list_files(source, (".tar",), {}) or (source, [])
        tars = [{"address": f"{root}/{file.path}", "version": file.version} for file in files]
        rows, column = ray.data.from_items(tars).flat_map(read_samples), column[1:]
    else:
        rows = ray.data.read_parquet(source)
    rows.map_batches(
        Embedder,
        fn_constructor_args=[model, column],
        batch_size=64,
        batch_format="pyarrow",
        # Ray starts as many as the cluster holds, and keeps cores to read.
        compute=ray.data.ActorPoolStrategy(max_size=1000),
        num_gpus=0.25 if "GPU" in ray.cluster_resources() else 0,  # four share a GPU, and each decodes on a core
    ).drop_columns([column]).write_parquet(out, mode=ray.data.SaveMode.ERROR)
    unreadable = ray.data.read_parquet(out, columns=["error"]).filter(lambda row: row["error"] is not None)
    print(f"wrote {out}; unreadable samples: {unreadable.count()} (the column 'error' has the reasons)")


if __name__ == "__main__":
    main(*sys.argv[1:])

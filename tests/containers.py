"""The same samples in a folder, Parquet files, tars, zips and MDS."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from helpers import write_files, write_mds

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": [f"class {label}" for label in range(10)]},
}


def write_parquet(path: Path, columns: Mapping[str, Any], rows: int = 50, features: Any = None) -> Path:
    """Write a Parquet file with row groups of so many rows, and the hub's metadata if there are features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(columns))
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows)
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, members: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def write_tables(root: Path, name: str, images: Sequence[bytes], labels: Sequence[int], numbers: range) -> None:
    """Write some of the images as bytes, as the hub's structs, and as paths."""
    span = slice(numbers.start, numbers.stop)
    texts = {"label": labels[span], "caption": ["a"] * len(numbers)}
    write_parquet(root / "bytes" / name, {"image": images[span], **texts})
    structs = [{"bytes": image, "path": None} for image in images[span]]
    write_parquet(root / "struct" / name, {"image": structs, **texts}, features=FEATURES)
    paths = [f"../folder/{number:05}.png" for number in numbers]
    write_parquet(root / "paths" / name, {"image": paths, "label": labels[span]})


def write_archives(root: Path, name: str, images: Sequence[bytes], labels: Sequence[int], numbers: range) -> None:
    """Write some of the images as a tar of samples with labels, and as a zip of folders; the first zip is stored."""
    members = [
        (f"{number:05}.{suffix}", content)
        for number in numbers
        for suffix, content in (("png", images[number]), ("cls", str(labels[number]).encode()), ("txt", b"a"))
    ]
    write_tar(root / "tars" / f"{name}.tar", members)
    in_classes = [(f"photos/{labels[number]}/{number:05}.png", images[number]) for number in numbers]
    compression = zipfile.ZIP_DEFLATED if numbers.start else zipfile.ZIP_STORED
    write_zip(root / "zips" / f"{name}.zip", [("photos/notes.txt", b"a"), *in_classes], compression)


def write_all(root: Path, images: Sequence[bytes], labels: Sequence[int], num_files: int = 3) -> dict[str, list[str]]:
    """Write the same images several times; the files of a set hold unequal numbers of them.

    Returns:
        The name of each kind of source → SOURCE and the options of its labels.
    """
    write_files(root / "folder", {f"{number:05}.png": image for number, image in enumerate(images)})
    (root / "labels.csv").write_text("\n".join(f"{number:05}.png,{label}" for number, label in enumerate(labels)))
    size = len(images) // num_files + 1
    for number, first in enumerate(range(0, len(images), size)):
        numbers = range(first, min(first + size, len(images)))
        write_tables(root, f"{number:05}.parquet", images, labels, numbers)
        write_archives(root, f"{number:05}", images, labels, numbers)
    write_mds(root / "mds", list(images), list(labels))
    options = {
        "folder": ["--labels", str(root / "labels.csv")],
        **{name: ["--label-column", "label"] for name in ("bytes", "struct", "paths", "mds")},
        "tars": ["--label-column", "cls"],
        "zips": [],
    }
    return {name: [str(root / name), *given] for name, given in options.items()}

"""Convert images or audio to MDS shards, in a folder or in an object store.

A worker writes a shard, then a record of the shard. A resumed conversion keeps the shards that match their records. The
index is written last.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from streaming import MDSWriter
from typing_extensions import TypedDict

from d2v_composer.conversion.parts import Parts
from d2v_composer.data.images import Images
from d2v_composer.models.provenance import Json, Record
from d2v_composer.sources.labeled import open_cifar
from d2v_composer.sources.mds import INDEX, SUMMARY, ShardFile
from d2v_composer.sources.open import open_source
from d2v_composer.sources.source import Int64Array, Source, hash_of, map_in_threads, map_in_workers
from d2v_composer.system.addresses import place_to_write
from d2v_composer.system.errors import InputError, RunError, UnreadableSampleError, reading, writing
from d2v_composer.system.fetch import cache_folder, is_remote, list_etags, names_in, put
from d2v_composer.system.files import check_owned, read_json, sole_user, write_atomically
from d2v_composer.system.processes import ALL, Part, if_interrupted
from d2v_composer.system.progress import progress_bar

CIFAR10 = "cifar10:"
HASHES = ["sha1", "xxh64"]
# A resized JPEG has 0.3 bytes per pixel, at an aspect ratio of 4:3. Only the size of shards depends on it.
BYTES_PER_SQUARE = 0.4
LOCK_SECONDS = 10.0
MAX_HELD_OUT = 5000
IMAGES = Images()  # a conversion does not resize images to a model's size


def open_samples(source: str | Path, split: str | None = None, part: Part = ALL, **options: Json) -> Source:
    """Open the images or the clips of a split."""
    if str(source).startswith(CIFAR10):
        return replace(_cifar10_images(Path(str(source).removeprefix(CIFAR10)), split or "train"), part=part)
    return open_source(str(source), split=split, part=part, **{"modality": IMAGES, "labels": None, **options})


def _cifar10_images(folder: Path, split: str) -> Source:
    splits = open_cifar("cifar10", folder, download=True)
    if split not in splits:
        raise InputError(f"{CIFAR10}{folder}: no split {split!r}; available: {', '.join(splits)}")
    load = splits[split].load

    def load_png(number: int) -> bytes:
        buffer = io.BytesIO()
        load(number).save(buffer, "PNG")
        return buffer.getvalue()

    return replace(splits[split], load=load_png, keeps_files=True)


def hold_out(source: Source, record: Path) -> tuple[dict[str, Source], int]:
    """Split samples into ``test`` and ``train``.

    A tenth of the samples, chosen by hashes of their ids, but at most :data:`MAX_HELD_OUT`, and all copies of these
    samples are in ``test``; the remaining samples are in ``train``.

    Returns:
        Split → samples; and the number of copies in ``test``.
    """
    by_hash = sorted(range(len(source)), key=lambda number: _sha256(os.fsencode(str(source.ids[number]))))
    numbers = sorted(by_hash[: min(len(source) // 10, MAX_HELD_OUT)])
    hashed = _hash_contents(source, numbers)
    held = {sha256 for _, sha256 in hashed.values()} - {""}
    write_atomically(record, json.dumps(sorted(held)))
    # If a source knows the sizes of its samples, a copy has the size of one of these.
    is_sized = all(source.sizes[number] == size for number, (size, _) in hashed.items())
    may_be_copies = np.isin(source.sizes, source.sizes[numbers]) if is_sized else np.full(len(source), True)
    may_be_copies[numbers] = False
    hashed |= _hash_contents(source, np.flatnonzero(may_be_copies).tolist())
    test = sorted(number for number, (_, sha256) in hashed.items() if sha256 in held)
    num_copies = len(test) - len({hashed[number] for number in test})
    train = np.delete(np.arange(len(source)), test)
    return {"test": source.select(test), "train": source.select(train)}, num_copies


def _hash_contents(source: Source, numbers: Sequence[int]) -> dict[int, tuple[int, str]]:
    """Return index → size in bytes and SHA-256 of the stored sample; the hash of an unreadable sample is ''."""

    def hash_content(number: int) -> tuple[int, str]:
        try:
            stored = source.load(number)
        except UnreadableSampleError:
            return int(source.sizes[number]), ""
        content = stored if isinstance(stored, bytes) else stored.tobytes()
        return len(content), _sha256(content)

    hashes = map_in_threads(hash_content, numbers)
    bar = progress_bar(hashes, total=len(numbers), desc="comparing", unit=source.modality.unit)
    return dict(zip(numbers, bar, strict=True))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Finished(TypedDict):
    """The record of a finished shard; see :meth:`_Task.finish_shard`."""

    entry: Record | None
    etag: str | None
    skipped: list[str]
    lengths: list[int]


class _Task(NamedTuple):
    """The settings and the source of a conversion, which each worker gets."""

    source: Source
    groups: Sequence[Int64Array]
    """For each shard, the indices of its samples in ``source``."""
    options: Record
    """Options of :meth:`Modality.encode <d2v_composer.data.modality.Modality.encode>`."""
    skip_unreadable: bool
    out: str
    work: Path
    """Local folder of the unfinished conversion; see :func:`work_folder`."""
    records: Path
    """The folder in ``work`` that holds the records of finished shards."""

    etags: dict[str, str]
    """Name → ETag of the known objects in ``out``; empty unless ``out`` is in S3."""

    def finish_shard(self, number: int) -> Record:
        """Write shard ``number`` and its record, or return the record of a shard that is already finished.

        Returns:
            The shard's record: its ``entry`` in the index, or ``None`` if no sample was readable; its ``etag`` in S3;
            the ``skipped`` samples; the ``lengths`` of clips; and ``is_kept`` if the shard was not written again.
        """
        record, name = self.records / f"{number}.json", f"shard.{number:05}.mds"
        if record.exists():
            done: Json = read_json(record, _Finished)
            path = Path(self.out, name)
            is_whole = (
                done["entry"] is None
                or self.etags.get(name, "") == done.get("etag")
                or (path.exists() and ShardFile(**done["entry"]["raw_data"]).find_fault(path) is None)
            )
            if is_whole and (self.skip_unreadable or not done["skipped"]):
                return done | {"is_kept": True}
        source, column = self.source, self.source.modality.name
        columns = {column: "bytes"} | ({} if source.label is None else {"label": "int"})
        done = {"entry": None, "skipped": [], "lengths": []}
        with _published(self.out, name, self.work) as path:
            writer = MDSWriter(columns=columns, out=str(path.parent), hashes=HASHES, size_limit=None)
            writer.shards = [None] * number  # the next shard is named by how many there are
            for sample in self.groups[number].tolist():
                try:
                    stored, length = source.load(sample), None
                    if not source.keeps_files:
                        with reading(source.name(sample)):
                            stored, length = source.modality.encode(stored, source.name(sample), **self.options)
                except UnreadableSampleError as error:
                    if not self.skip_unreadable:
                        raise InputError(f"{error}; --skip-unreadable skips such {source.modality.unit}") from error
                    done["skipped"].append(str(error).removeprefix(f"{source.root}/"))
                    continue
                label = {} if source.label is None else {"label": source.label(sample)}
                writer.write({column: stored, **label})
                done["lengths"] += [] if length is None else [length]
            if writer.new_samples:  # finish() would write an index of an unfinished data set
                writer.flush_shard()
                done["entry"] = writer.shards[-1]
            writer.executor.shutdown()
        self.etags.update(list_etags(self.out, name) if done["entry"] else {})
        done["etag"] = self.etags.get(name)
        write_atomically(record, json.dumps(done))
        return done


def work_folder(out: str) -> Path:
    """Return the local folder for the records and partial files of an unfinished conversion to OUT."""
    if is_remote(out):
        return cache_folder() / "conversions" / hash_of(out)[:16]
    return Path(out, ".converting")


def _check_out(out: str, work: Path) -> None:
    """Check that OUT, local or in a store, is missing, is empty or holds an interrupted conversion."""
    names = {*names_in(out)} - {work.name}
    if INDEX in names:
        shutil.rmtree(work, ignore_errors=True)  # if the conversion was killed after its index
        raise InputError(f"{out} holds a finished data set; remove it, or choose another OUT")
    is_ours = SUMMARY in names and "seed" in (Parts.load(f"{out}/{SUMMARY}") or ())
    check_owned(out, names, SUMMARY if is_ours else "", "OUT")


class Conversion(NamedTuple):
    """Result of a conversion."""

    samples: int
    lengths: list[int]
    """Length of each clip, in samples at 16 kHz; empty for images."""
    bytes: int
    """Total size of the shards, in bytes."""
    shards: int
    skipped: list[str]
    """Why each unreadable sample was skipped."""
    resumed: int
    """Number of shards that an earlier, interrupted conversion had finished."""


def convert(
    source: Source,
    out: str | Path,
    *,
    seed: int = 0,
    workers: int = 1,
    shard_bytes: int = 1 << 26,
    skip_unreadable: bool = False,
    plan: Record | None = None,
    **options: Json,
) -> Conversion:
    """Write samples to the column ``image`` or ``audio`` of an MDS data set, and their labels, if any, to ``label``."""
    out = place_to_write(out)
    work, folder, unit = work_folder(out), Path(out), source.modality.unit
    _check_out(out, work)
    groups = source.part.of(_groups(source, options.get("resize"), seed, shard_bytes))
    labels = source.label and [*map(source.label, range(len(source)))]
    fingerprints, modality = source.fingerprints.tolist(), source.modality.name
    contents = fingerprints, labels, modality, options, seed, shard_bytes, version("d2v-composer")
    records = work / hash_of(*contents)[:16]
    class_names = None if source.label is None else source.class_names
    summary = {"classes": class_names, "seed": seed, **options} | ({"part": plan} if plan else {})
    with sole_user(work / "lock", LOCK_SECONDS) as alone:
        if not alone:
            raise InputError(
                f"{out}: another conversion is writing to OUT; wait until the conversion ends, or choose another OUT"
            )
        _check_out(out, work)
        _write_json(out, work, {SUMMARY: summary})  # from now on, it says that OUT is ours
        task = _Task(source, groups, options, skip_unreadable, out, work, records, list_etags(out))
        shards = []
        left = if_interrupted(lambda: "finished shards are kept; the same command resumes")
        with left, progress_bar(total=sum(map(len, groups)), desc="converting", unit=unit) as bar:
            done = map_in_workers(task.finish_shard, range(len(groups)), workers)
            for group, shard in zip(groups, done, strict=True):
                shards.append(shard)
                bar.update(len(group))
        entries = [shard["entry"] for shard in shards if shard["entry"] is not None]
        if not (entries or plan):
            raise InputError(f"{source.root}: none of its {unit} can be read ({len(source)} in all)")
        etags = {shard["entry"]["raw_data"]["basename"]: shard.get("etag") for shard in shards if shard["entry"]}
        for path in folder.glob("shard.[0-9]*.mds"):
            if path.name not in etags:  # left by a conversion with other settings
                path.unlink()
        if out.startswith("s3://") and (lost := sorted(name for name, _ in etags.items() - list_etags(out).items())):
            raise RunError(
                f"{out}: shards were removed or replaced after their upload, such as {lost[0]} ({len(lost)} in all); "
                "run the same command to write these shards again"
            )
        skipped = [line for shard in shards for line in shard["skipped"]]
        lengths = [length for shard in shards for length in shard["lengths"]]
        num_samples = sum(entry["samples"] for entry in entries)
        summary |= {unit: num_samples, "skipped": skipped} | ({"lengths": lengths} if lengths else {})
        _write_json(out, work, {SUMMARY: summary, INDEX: {"version": 2, "shards": entries}})
        shutil.rmtree(work)
    num_bytes = sum(entry["raw_data"]["bytes"] for entry in entries)
    num_kept = sum("is_kept" in shard for shard in shards)
    return Conversion(num_samples, lengths, num_bytes, len(entries), skipped, num_kept)


def merge_shards(out: str) -> Conversion:
    """Merge all parts into one MDS data set, without moving their shards."""
    parts, entries = Parts(out), []
    records, is_local = parts.read_all(), not is_remote(out)
    for part in records:
        for entry in parts.load(f"{parts.path(part)}/{INDEX}")["shards"]:
            raw, name = entry["raw_data"], Path(entry["raw_data"]["basename"]).name
            shard = parts.files.get(f"{part.name}/{name}")
            if shard is None or (shard.version and shard.size != raw["bytes"]):  # some stores tell neither
                raise InputError(
                    f"{parts.path(part)}: {name} is missing or damaged; remove this part, and run its command again"
                )
            entries.append(entry | {"raw_data": raw | {"basename": f"parts/{part.name}/{name}"}})
    summary = next(iter(records.values()))
    unit = summary.pop("part")["unit"]
    summary[unit] = sum(record[unit] for record in records.values())
    for name in ("skipped", "lengths"):
        if listed := [value for record in records.values() for value in record.get(name, ())]:
            summary[name] = listed
    if not entries:
        raise InputError(f"{parts.folder}: no part has {unit} that can be read")
    files = {SUMMARY: summary, INDEX: {"version": 2, "shards": entries}}
    for name, content in files.items():
        if parts.load(f"{parts.out}/{name}") not in (None, content):
            raise InputError(f"{parts.out} holds another data set; remove its {name}")
    _write_json(parts.out, Path(parts.folder) if is_local else None, files)
    num_bytes = sum(entry["raw_data"]["bytes"] for entry in entries)
    return Conversion(summary[unit], summary.get("lengths", []), num_bytes, len(entries), summary["skipped"], 0)


def _write_json(out: str, work: Path | None, files: Record) -> None:
    """Write JSON files, name → content, in the given order; the index of a data set must be last."""
    for name, content in files.items():
        with _published(out, name, work) as path:
            path.write_text(json.dumps(content, sort_keys=True))


@contextmanager
def _published(out: str, name: str, work: Path | None) -> Iterator[Path]:
    """Yield a local path, and move the file that the ``with`` block writes there to ``out``."""
    with writing(out), TemporaryDirectory(dir=work) as folder:
        path = Path(folder, name)
        yield path
        if path.exists():
            put(path, f"{out}/{name}")


def _groups(source: Source, resize: int | None, seed: int, shard_bytes: int) -> list[Int64Array]:
    """Group the samples into shards of about ``shard_bytes`` bytes; return the indices of each shard's samples."""
    sizes, order = source.sizes, np.arange(len(source))
    if resize:
        sizes = np.minimum(sizes, resize**2 * BYTES_PER_SQUARE)
    if source.in_folders:
        order = np.random.default_rng(seed).permutation(order)
    shards = sizes[order].cumsum() // shard_bytes
    return np.split(order, np.flatnonzero(np.diff(shards)) + 1)


def convert_cifar10(images: Path, out: Path, num_train: int = 50_000, num_test: int = 10_000) -> None:
    """Write the first images of CIFAR-10's splits to the MDS data sets ``out``/train and ``out``/test.

    A data set that exists is kept. CIFAR-10 is downloaded to the folder ``images`` if it is missing.

    Raises:
        InputError: CIFAR-10 cannot be read, or ``out`` holds other files.
    """
    for split, num_images in (("train", num_train), ("test", num_test)):
        if num_images and not (out / split / INDEX).exists():
            source = open_samples(f"{CIFAR10}{images}", split)
            convert(source.select(range(min(num_images, len(source)))), out / split, workers=os.cpu_count() or 1)

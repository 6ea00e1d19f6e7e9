"""Find, check and read the parts of a conversion or of a file of embeddings."""

import re
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from d2v_composer.models.provenance import Json, Record
from d2v_composer.sources.mds import INDEX, SUMMARY
from d2v_composer.sources.source import Source
from d2v_composer.system.addresses import place_to_write
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.fetch import File, download_existing, exists, is_remote, list_store, names_in
from d2v_composer.system.files import read_json
from d2v_composer.system.processes import Part

TABLE_SUFFIXES = (".npy", ".parquet")


def plan_of(source: Source, part: Part, **settings: Json) -> Record:
    """Return a part's plan: its index; and the source, settings and number of parts, which all parts share."""
    same = {"unit": source.modality.unit, "source": source.content, "version": version("d2v-composer")}
    return part._asdict() | same | settings


def fetch_if_remote(address: str, folder: Path) -> Path:
    """Return the local path of a file, which may be missing; download a file in a store to ``folder`` first."""
    if not is_remote(address):
        return Path(address)
    path = folder / address.rpartition("/")[2]
    download_existing(address, path)
    return path


class Parts:
    """The parts of OUT, such as OUT/parts/00003-of-00016 for MDS, or OUT.parts/00003-of-00016.npy for embeddings.

    Args:
        out: An MDS data set's folder, or a file of embeddings; local or in a store.

    Attributes:
        folder: The folder of the parts.
        suffix: Suffix of a file of embeddings; '' for an MDS data set.
    """

    def __init__(self, out: str) -> None:
        self.out = place_to_write(out)
        self.suffix = Path(out).suffix if out.endswith(TABLE_SUFFIXES) else ""
        self.folder = f"{self.out}.parts" if self.suffix else f"{self.out}/parts"
        self._last, self._record = (self.suffix, ".json") if self.suffix else (f"/{INDEX}", f"/{SUMMARY}")

    def path(self, part: Part) -> str:
        """Return the path or address of a part."""
        return f"{self.folder}/{part.name}{self.suffix}"

    def has(self, part: Part, plan: Record) -> bool:
        """Return True if a part is finished; otherwise, check that the part can be made."""
        if exists(f"{self.folder}/{part.name}{self._last}"):
            self._read(part, plan, "this command")
            return True
        names = set() if self.suffix else {name.partition("/")[0] for name in names_in(self.out)}
        # What merge writes stays: the part that is made again was damaged.
        if others := names - {"parts"} - ({INDEX, SUMMARY} if "parts" in names else set()):
            raise InputError(f"{self.out} has files other than parts, such as {min(others)}; choose another OUT")
        return False

    def read_all(self) -> dict[Part, Record]:
        """Return part → record, in order; check that all parts are finished."""
        pattern = re.compile(rf"(\d{{5,}})-of-(\d{{5,}}){re.escape(self._last)}")
        parts = sorted(Part(*map(int, match.groups())) for match in map(pattern.fullmatch, self.files) if match)
        if not parts:
            raise InputError(f"{self.folder}: no finished parts")
        counts = sorted({part.total for part in parts})
        if len(counts) > 1:
            made = " and ".join(f"--part I/{count}" for count in counts)
            raise InputError(f"{self.folder} has parts made with {made}; keep only those made with one of them")
        if missing := sorted({*range(counts[0])} - {part.number for part in parts}):
            raise InputError(f"{self.folder}: of {counts[0]} parts, these are missing: {', '.join(map(str, missing))}")
        first = self._read(parts[0], {}, "")
        return {part: self._read(part, first["part"], parts[0].name) for part in parts}

    @cached_property
    def files(self) -> dict[str, File]:
        """Path below ``folder`` → file."""
        if is_remote(self.folder):
            return {file.path: file for file in list_store(self.folder)}
        paths = {path.relative_to(self.folder).as_posix(): path for path in Path(self.folder).rglob("*")}
        return {name: File.of(name, path) for name, path in paths.items()}

    def _read(self, part: Part, plan: Record, whose: str) -> Record:
        with reading(address := f"{self.folder}/{part.name}{self._record}"):
            record = self.load(address)
            has = record["part"]
            if (has["number"], has["total"]) != part:
                raise InputError(f"{self.path(part)} is in fact part {has['number']}/{has['total']}; remove it")
            if keys := [key for key in plan if key != "number" and has.get(key) != plan[key]]:
                raise InputError(f"{self.path(part)} differs from {whose} in {', '.join(keys)}; remove it")
            return record

    @staticmethod
    def load(address: str) -> Json:
        """Return the content of a JSON file that this package wrote; ``None`` if the file is missing."""
        with reading(address), TemporaryDirectory() as folder:
            path = fetch_if_remote(address, Path(folder))
            return read_json(path, Record) if path.exists() else None

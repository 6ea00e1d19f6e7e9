"""Where a data set is written: a folder or an object store, in which each file appears whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from streaming.base.storage import CloudUploader
from streaming.base.util import retry
from typing_extensions import Self

from d2v_composer.data.mds_index import INDEX, SUMMARY
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import cache_folder, download, is_remote
from d2v_composer.system.retry import reason

__all__ = ["ATTEMPTS", "Destination"]

ATTEMPTS = 6  # to upload or read back a file, with Streaming's back-off: half a minute


class Destination(NamedTuple):
    """Where a data set is written. It is one where its index is; nothing else may be taken for one."""

    address: str
    remote: bool
    work: Path
    """For what is not finished: records of finished shards, and the files being written."""

    @classmethod
    def at(cls, address: str) -> Self:
        """The destination at a folder's path or an object store's address.

        Raises:
            InputError: A store would read the address otherwise than it is written.
        """
        if is_remote(address):
            address = address.rstrip("/")
            return cls(address, True, _conversions() / hashlib.sha256(address.encode()).hexdigest()[:16])
        return cls(address, False, Path(address).resolve() / ".converting")

    @property
    def lock(self) -> Path:
        """What is locked while a process of this machine writes there."""
        identity = hashlib.sha256(str(self.work.absolute()).encode()).hexdigest()[:16]
        return _conversions() / f"{identity}.lock"

    def open(self) -> None:
        """Make sure that it can be written, and read where it is remote, and has no finished data set.

        Raises:
            InputError: One of it is not so.
        """
        self._refuse_finished()
        folder = Path(self.address)
        if not self.remote and folder.is_dir() and any(folder.iterdir()) and not self.work.is_dir():
            raise InputError(f"{folder}: is not empty, and what it has is not of an interrupted conversion")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self.publish_text(SUMMARY, json.dumps({"finished": False}))
        except Exception as error:
            raise InputError(f"{self.address}: cannot be written ({reason(error)})") from error
        with self.read_back(SUMMARY) as path:
            if not path.exists():
                raise InputError(f"{self.address}: can be written, but what was written cannot be read back")
        self._refuse_finished()  # again: an index that could not be read at first was not necessarily absent

    def _refuse_finished(self) -> None:
        with self.read_back(INDEX) as path:
            if path.exists():
                shutil.rmtree(self.work, ignore_errors=True)  # an interruption may have come between index and close
                raise InputError(f"{self.address}: has a finished data set; remove it, or write elsewhere")

    def close(self) -> None:
        """Remove what only an unfinished data set needs."""
        shutil.rmtree(self.work)

    @contextmanager
    def published(self, name: str) -> Iterator[Path]:
        """A path for a file that comes to its place, whole, when the block ends; none made there, none published."""
        folder = _empty_folder(self.work / f"{name}.writing")
        # Before the file is made: the uploader insists on an empty folder, and finds out whether there is a bucket.
        uploader = None
        if self.remote:
            uploader = CloudUploader.get((str(folder), self.address), keep_local=True, retry=ATTEMPTS)
        yield folder / name
        if (folder / name).exists():
            if uploader is not None:
                uploader.upload_file(name)
            else:
                (folder / name).replace(Path(self.address) / name)
        shutil.rmtree(folder)

    def publish_text(self, name: str, text: str) -> None:
        """Publish a file of this text."""
        with self.published(name) as path:
            path.write_text(text)

    @contextmanager
    def read_back(self, name: str, attempts: int = 1) -> Iterator[Path]:
        """What it has of that name: a path that does not exist where it has nothing, or cannot be reached."""
        if not self.remote:
            yield Path(self.address) / name
            return
        folder = _empty_folder(self.work / f"{name}.reading")
        try:
            with suppress(InputError):
                retry(InputError, num_attempts=attempts)(download)(f"{self.address}/{name}", folder / name)
            yield folder / name
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def names(self, prefix: str) -> list[str]:
        """The names of its files that begin so.

        Raises:
            InputError: The store cannot be listed: Streaming cannot (it lists S3, GCS and OCI), or we may not.
        """
        if not self.remote:
            return sorted(path.name for path in Path(self.address).glob(f"{prefix}*"))
        folder = _empty_folder(self.work / "listing")
        try:
            keys = CloudUploader.get((str(folder), self.address)).list_objects(prefix)
        except Exception as error:
            raise InputError(f"{self.address}: cannot be listed ({reason(error)})") from error
        return sorted(key.rsplit("/", 1)[-1] for key in keys)


def _conversions() -> Path:
    return cache_folder() / "conversions"


def _empty_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

"""Write a data set to a folder or an object store, in which each file appears complete or not at all."""

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

ATTEMPTS = 6  # to upload or read back a file: half a minute with Streaming's back-off


class Destination(NamedTuple):
    """The place of a data set. Readers look for its index, so the index must not appear before it is complete."""

    address: str
    remote: bool
    work: Path
    """The local folder of an unfinished conversion: records of finished shards, and files being written."""

    @classmethod
    def at(cls, address: str) -> Self:
        """Return the destination at a path or an object store's address.

        Raises:
            InputError: The address is malformed.
        """
        if is_remote(address):
            address = address.rstrip("/")
            return cls(address, True, _conversions() / hashlib.sha256(address.encode()).hexdigest()[:16])
        return cls(address, False, Path(address).resolve() / ".converting")

    @property
    def lock(self) -> Path:
        """The file that a conversion on this machine locks."""
        identity = hashlib.sha256(str(self.work.absolute()).encode()).hexdigest()[:16]
        return _conversions() / f"{identity}.lock"

    def open(self) -> None:
        """Check that the destination can be written and read, and holds no finished data set.

        Raises:
            InputError: One of these does not hold.
        """
        self._refuse_finished()
        folder = Path(self.address)
        if not self.remote and folder.is_dir() and any(folder.iterdir()) and not self.work.is_dir():
            raise InputError(f"{folder}: is not empty, and holds no interrupted conversion")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self.publish_text(SUMMARY, json.dumps({"finished": False}))
        except Exception as error:
            raise InputError(f"{self.address}: cannot be written ({reason(error)})") from error
        with self.read_back(SUMMARY) as path:
            if not path.exists():
                raise InputError(f"{self.address}: can be written, but what was written cannot be read back")
        self._refuse_finished()  # again: an index that could not be read is not necessarily missing

    def _refuse_finished(self) -> None:
        with self.read_back(INDEX) as path:
            if path.exists():
                shutil.rmtree(self.work, ignore_errors=True)  # killed between writing the index and close()
                raise InputError(f"{self.address}: has a finished data set: remove it, or choose another OUT")

    def close(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.work)

    @contextmanager
    def published(self, name: str) -> Iterator[Path]:
        """Yield a path to write to, and publish the file, if there is one, when the block ends."""
        folder = _empty_folder(self.work / f"{name}.writing")
        # Before the file is written: the uploader requires an empty folder, and checks that the bucket exists.
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
        """Publish a text file."""
        with self.published(name) as path:
            path.write_text(text)

    @contextmanager
    def read_back(self, name: str, attempts: int = 1) -> Iterator[Path]:
        """Yield a local path to a published file; it does not exist if the file is missing or unreachable."""
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
        """Return the sorted names of the published files with a prefix.

        Raises:
            InputError: Access is denied, or Streaming cannot list this kind of store (it lists S3, GCS and OCI).
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

"""Check the permissions that a run needs in its ``save_folder``."""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from composer.utils import maybe_create_object_store_from_uri
from composer.utils.object_store import S3ObjectStore

from d2v_composer.callbacks.checkpoint_retention import IMPATIENT_CLIENT
from d2v_composer.system.addresses import Address
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = ["check_permissions", "remove_prefix"]


def check_permissions(save_folder: str) -> str:
    """Write, list, read and delete a small file in a ``save_folder``, and return one line about it.

    Args:
        save_folder: A folder, which may not exist yet, or an address in an object store.

    Raises:
        InputError: A permission is missing; the message names it.
    """
    backend, bucket, prefix = Address.parse(save_folder)
    name = f".preflight-{uuid4().hex}"
    if not backend:
        return _check_folder(Path(save_folder), name)
    key = f"{prefix}/{name}".lstrip("/")
    if backend == "s3":
        client = S3ObjectStore(bucket, client_config=dict(IMPATIENT_CLIENT)).client
        _try_each(
            save_folder,
            write=lambda: client.put_object(Bucket=bucket, Key=key, Body=b"preflight"),
            list=lambda: client.list_objects_v2(Bucket=bucket, Prefix=key),
            read=lambda: client.get_object(Bucket=bucket, Key=key)["Body"].read(),
            delete=lambda: client.delete_object(Bucket=bucket, Key=key),
        )
        return f"{save_folder}: write, list, read, delete"
    store = maybe_create_object_store_from_uri(save_folder)
    assert store is not None  # the address has a backend
    _try_each(save_folder, list=lambda: store.list_objects(prefix))
    return f"{save_folder}: list; the rehearsal writes and reads; nothing can be deleted from {backend}://"


def _check_folder(folder: Path, name: str) -> str:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())  # maybe a file
    probe = existing / name
    _try_each(
        str(folder),
        write=lambda: probe.write_bytes(b"preflight"),
        list=lambda: list(existing.iterdir()),
        read=probe.read_bytes,
        delete=probe.unlink,
    )
    return f"{folder}: write, list, read, delete"


def _try_each(place: str, **attempts: Callable[[], object]) -> None:
    for permission, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            raise InputError(f"{place}: no permission to {permission} ({reason(error)})") from error


def remove_prefix(address: str) -> None:
    """Delete everything below an address in S3; in other stores, do nothing."""
    backend, bucket, prefix = Address.parse(address)
    if backend != "s3":
        return
    store = S3ObjectStore(bucket, client_config=dict(IMPATIENT_CLIENT))
    for key in store.list_objects(f"{prefix}/"):
        store.client.delete_object(Bucket=bucket, Key=key)

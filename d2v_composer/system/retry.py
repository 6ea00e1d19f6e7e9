"""Retry, with pauses, after faults that may pass: an unreachable store, a broken connection."""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import FULL, reason

# Timeout of a connection: a reachable host answers immediately. Clients' defaults are a minute and several attempts.
CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0
# A store that is starting may briefly answer that a file is missing or access denied.
LASTING_ATTEMPTS = 4
LASTING_STATUS = (401, 403, 404)
LASTING = (FileNotFoundError, NotImplementedError, ValueError)
# Errors of botocore, which may not be installed.
LASTING_NAMES = ("NoCredentialsError", "PartialCredentialsError")
# Faults of the local disk: full, denied, or something else in the way.
LOCAL = (
    *FULL,
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


def retry(
    attempt: Callable[[], ResultT],
    what: str,
    timeout: float,
    lasting_attempts: int = LASTING_ATTEMPTS,
    denial_passes: bool = False,
) -> ResultT:
    """Call ``attempt`` until it succeeds, and return its result.

    Faults of this machine are raised immediately, lasting ones (missing, denied, corrupt) after
    ``lasting_attempts``, others after ``timeout``. Each failure is logged.

    Args:
        attempt: Called at least once.
        what: Name of what is attempted, for the log.
        timeout: Seconds in which new attempts start; a running attempt is not interrupted.
        lasting_attempts: Number of attempts for lasting faults; 1 reports a wrong address or key immediately.
        denial_passes: Treat a store that denies access as unreachable.
    """
    start = time.monotonic()
    pause, num_lasting = FIRST_PAUSE, 0
    dice = random.Random()  # not the global generator, which training uses
    while True:
        try:
            return attempt()
        except Exception as error:
            num_lasting += is_lasting(error) and not (denial_passes and _status(error))
            left = timeout - (time.monotonic() - start)
            if is_local(error) or num_lasting >= lasting_attempts or left <= 0:
                raise
            level = logging.INFO if is_missing(error) else logging.WARNING  # it may well be missing
            log.log(level, "%s: %s; retrying for %.0f s", hide_secrets(what), reason(error), left)
            time.sleep(min(pause * dice.uniform(0.5, 1), left))
        pause = min(2 * pause, LONGEST_PAUSE)


def is_local(error: BaseException) -> bool:
    """Return True if a fault is local: a disk or path error, or a package that is not installed."""
    return isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno in LOCAL)


def is_lasting(error: BaseException) -> bool:
    """Return True if a retry is unlikely to help."""
    known = isinstance(error, LASTING) or type(error).__name__ in LASTING_NAMES
    return not _is_unreachable(error) and (known or _status(error) in LASTING_STATUS)


def is_missing(error: BaseException) -> bool:
    """Return True if a store answered that a file does not exist; denied access does not count."""
    return not _is_unreachable(error) and (isinstance(error, FileNotFoundError) or _status(error) == 404)


def _is_unreachable(error: BaseException) -> bool:
    # If Hugging Face is unreachable, its client reports that its cache lacks the file: a FileNotFoundError.
    return isinstance(error, LocalEntryNotFoundError) and not isinstance(error.__cause__, OfflineModeIsEnabled)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an error from botocore, google-cloud, azure, oci or requests."""
    if type(error).__name__ == "S3UploadFailedError" and error.__context__ is not None:  # boto3's, of another error
        error = error.__context__
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    codes = [getattr(response, "status_code", None), *(getattr(error, name, None) for name in ("status_code", "code"))]
    return next((value for value in [*codes, getattr(error, "status", None)] if isinstance(value, int)), None)

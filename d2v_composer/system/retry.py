"""Trying again, with pauses, what may work in a while: a store that is away, a connection that broke."""

import errno
import logging
import random
import threading
import time
from collections.abc import Callable

from botocore.exceptions import NoCredentialsError, PartialCredentialsError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from d2v_composer.system.addresses import hide_secrets

__all__ = ["CONNECT_SECONDS", "is_lasting", "is_missing", "reason", "retry"]

# For a connection. A host that is there answers at once; clients' own limits are a minute, and several attempts.
CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0
# A store that is just starting may say for a moment that something is not there, or not for us.
LASTING_ATTEMPTS = 4
LASTING_STATUS = (401, 403, 404)
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
LOCAL_FAULTS = (*FULL, *FORBIDDEN, *IN_THE_WAY)

log = logging.getLogger(__name__)


def retry(attempt: Callable[[], None], what: str, timeout: float, stop: threading.Event | None = None) -> None:
    """Call ``attempt`` until it does not raise.

    A fault of this machine's disk is raised at once, one that waiting seldom mends (not there, not allowed, damaged)
    after four attempts, any other once ``timeout`` is over. Each failure is logged.

    Args:
        attempt: Called at least once.
        what: Named in the log.
        timeout: In seconds; an attempt under way is not cut off.
        stop: Where it is set, a failure is raised without another attempt.
    """
    start, stop = time.monotonic(), stop or threading.Event()
    pause, lasting_attempts = FIRST_PAUSE, 0
    dice = random.Random()  # not the process's: training draws from that one
    while True:
        try:
            return attempt()
        except Exception as error:
            lasting_attempts += is_lasting(error)
            left = timeout - (time.monotonic() - start)
            if is_local(error) or lasting_attempts >= LASTING_ATTEMPTS or left <= 0:
                raise
            log.warning("%s: %s; tried again for %.0f s", hide_secrets(what), reason(error), left)
            if stop.wait(min(pause * dice.uniform(0.5, 1), left)):
                raise
        pause = min(2 * pause, LONGEST_PAUSE)


def is_local(error: BaseException) -> bool:
    """Whether the fault is this machine's disk: full, read-only, not ours, a folder where a file should be."""
    return isinstance(error, OSError) and error.errno in LOCAL_FAULTS


def is_lasting(error: BaseException) -> bool:
    """Whether the fault will hardly go away by itself."""
    if _is_unreachable(error):
        return False
    return isinstance(error, (*NO_CREDENTIALS, FileNotFoundError, ValueError)) or _status(error) in LASTING_STATUS


def is_missing(error: BaseException) -> bool:
    """Whether a store answered that there is no such file, which is not the same as forbidding to look."""
    return (isinstance(error, FileNotFoundError) and not _is_unreachable(error)) or _status(error) == 404


def _is_unreachable(error: BaseException) -> bool:
    """Whether Hugging Face's client could not ask: it says that it has no such file itself."""
    return isinstance(error, LocalEntryNotFoundError) and not isinstance(error.__cause__, OfflineModeIsEnabled)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of botocore, google-cloud, azure, oci or requests."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    candidates = (
        getattr(response, "status_code", None),
        *(getattr(error, name, None) for name in ("status_code", "code", "status")),
    )
    return next((value for value in candidates if isinstance(value, int)), None)


def reason(error: BaseException) -> str:
    """An error in one line, without the secrets of an address."""
    lines = str(error).strip().splitlines()
    return hide_secrets(lines[0]) if lines else type(error).__name__

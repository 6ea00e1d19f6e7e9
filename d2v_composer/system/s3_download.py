"""Download files from S3, one request each, with a minimum rate."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from urllib3 import BaseHTTPResponse

from d2v_composer.system import retry

__all__ = ["S3_SCHEME", "S3Downloader"]

S3_SCHEME = "s3://"
# Bytes a second. A link may be slow, and shared by many requests; below this rate, the download is stopped.
LEAST_RATE = 1024
READ_BYTES = 1 << 20
MOST_CONNECTIONS = 128


class S3Downloader:
    """Downloads files, in one request each, from ``S3_ENDPOINT_URL`` or AWS.

    Streaming's downloader has no limit for the time of a read, and sends two or more requests for a file, at half the
    speed. One object serves all threads of a process, and processes forked from it.

    Args:
        patience: Timeout of a connection and of an answer, in seconds, and the period in which a body must average
            :data:`LEAST_RATE`. A body above this rate may take any time.
        attempts: Number of requests, for callers that do not retry.
    """

    def __init__(self, patience: float, attempts: int = 1) -> None:
        self.patience = patience
        self.attempts = attempts
        self._client: Any = None
        self._user: int | None = None  # process ID of the client's first use

    def download(self, address: str, path: Path, stop: threading.Event | None = None) -> None:
        """Download a file, without retries; a failure leaves a partial file.

        Args:
            address: s3://BUCKET/KEY.
            path: The local file.
            stop: If set, end the download with an error.

        Raises:
            FileNotFoundError: The file does not exist.
            ConnectionError: The connection broke.
            TimeoutError: The rate was too low.
            InterruptedError: ``stop`` was set.
            Exception: Other errors of botocore and urllib3.
        """
        bucket, _, key = address.removeprefix(S3_SCHEME).partition("/")
        request = {"Bucket": bucket, "Key": key}
        if bucket in os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(","):
            request["RequestPayer"] = "requester"
        client = self._connect()
        try:
            response = client.get_object(**request)
        except (client.exceptions.NoSuchKey, client.exceptions.NoSuchBucket) as error:
            raise FileNotFoundError(f"{address}: not found ({error})") from error
        # botocore's own reads block until they are full.
        with closing(response["Body"]) as body, path.open("wb") as file:
            for chunk in _steady(body._raw_stream, self.patience, stop or threading.Event()):
                file.write(chunk)
            if file.tell() < (length := response.get("ContentLength", 0)):
                raise ConnectionError(f"truncated after {file.tell()} of {length} bytes")

    def prepare(self) -> None:
        """Create the client before processes are forked, which saves each of them 50 ms or more."""
        with suppress(BotoCoreError, ValueError):  # the first download will report the error
            self._client = self._make_client()

    def _connect(self) -> Any:
        # A forked process may use its parent's client only if that has no connections yet.
        if self._client is None or self._user not in (None, os.getpid()):
            self._client = self._make_client()
        self._user = os.getpid()
        return self._client

    def _make_client(self) -> Any:
        config = Config(
            connect_timeout=min(self.patience, retry.CONNECT_SECONDS),
            read_timeout=self.patience,
            retries={"total_max_attempts": self.attempts, "mode": "standard"},
            max_pool_connections=MOST_CONNECTIONS,
            response_checksum_validation="when_required",  # the caller verifies
        )
        return Session().client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=config)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_user": None}


def _steady(body: BaseHTTPResponse, patience: float, stop: threading.Event) -> Iterator[bytes]:
    """Yield the chunks of a body as they arrive; raise an error if the rate is too low."""
    since, came = time.monotonic(), 0
    while chunk := body.read1(READ_BYTES):
        yield chunk
        came += len(chunk)
        seconds = time.monotonic() - since
        if seconds > patience:
            if came < LEAST_RATE * seconds:
                raise TimeoutError(f"too slow: {came} bytes in {seconds:.0f} s")
            since, came = time.monotonic(), 0
        if stop.is_set():
            raise InterruptedError("the download was stopped")

"""Files from an S3 store: a request for each, which is given up when it brings hardly anything."""

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

__all__ = ["SCHEME", "S3Downloader"]

SCHEME = "s3://"
# Bytes a second. A link may be slow, and shared by many requests; one that is slower than this is not waited for.
LEAST_RATE = 1024
READ_BYTES = 1 << 20
MOST_CONNECTIONS = 128


class S3Downloader:
    """Download files, in one request each, from the store of ``S3_ENDPOINT_URL``, or from AWS.

    Not Streaming's: a read of that one waits for a number of bytes, however long they take, and it asks twice or more
    for a file, at half the speed. One object serves all threads of a process, and processes forked from it.

    Args:
        patience: How long a connection, an answer or :data:`LEAST_RATE` bytes for each of its seconds may take, in
            seconds. A body that brings less is given up, and one that brings more may take any time.
        attempts: How often an answer is asked for, where the caller does not try again.
    """

    def __init__(self, patience: float, attempts: int = 1) -> None:
        self.patience = patience
        self.attempts = attempts
        self._client: Any = None
        self._user: int | None = None  # the process that first used the client

    def download(self, address: str, path: Path, stop: threading.Event | None = None) -> None:
        """Download a file, once; a failure leaves what came.

        Args:
            address: s3://BUCKET/KEY.
            path: Where to.
            stop: Ends the download with an error, where it is set.

        Raises:
            FileNotFoundError: There is no such file.
            ConnectionError: It broke off.
            TimeoutError: Too little came.
            InterruptedError: ``stop`` was set.
            Exception: Whatever else botocore and urllib3 raise.
        """
        bucket, _, key = address.removeprefix(SCHEME).partition("/")
        request = {"Bucket": bucket, "Key": key}
        if bucket in os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(","):
            request["RequestPayer"] = "requester"
        client = self._connect()
        try:
            response = client.get_object(**request)
        except (client.exceptions.NoSuchKey, client.exceptions.NoSuchBucket) as error:
            raise FileNotFoundError(f"{address}: not found ({error})") from error
        # boto's own reads wait for all bytes that they ask for.
        with closing(response["Body"]) as body, path.open("wb") as file:
            for chunk in _steady(body._raw_stream, self.patience, stop or threading.Event()):
                file.write(chunk)
            if file.tell() < (length := response.get("ContentLength", 0)):
                raise ConnectionError(f"broke off after {file.tell()} of {length} bytes")

    def prepare(self) -> None:
        """Make the client now, for processes that are forked from this one: 50 ms or more for each of them."""
        with suppress(BotoCoreError, ValueError):  # as it will be at the first download, where it can be reported
            self._client = self._make_client()

    def _connect(self) -> Any:
        # A client that was not used yet has no connection that two forked processes could share.
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
    """The chunks of a body as they come, as long as they do."""
    since, came = time.monotonic(), 0
    while chunk := body.read1(READ_BYTES):
        yield chunk
        came += len(chunk)
        seconds = time.monotonic() - since
        if seconds > patience:
            if came < LEAST_RATE * seconds:
                raise TimeoutError(f"given up: {came} bytes came in {seconds:.0f} s")
            since, came = time.monotonic(), 0
        if stop.is_set():
            raise InterruptedError("the download was stopped")

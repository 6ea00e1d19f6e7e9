"""Retries: which errors are retried, and for how long."""

import errno
import logging
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from d2v_composer.system import retry as retry_module
from d2v_composer.system.retry import is_lasting, retry
from helpers import time_limit


class Attempts:
    """Raises the given errors in turn, then succeeds."""

    def __init__(self, *failures: Exception) -> None:
        self.failures: Iterator[Exception] = iter(failures)
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        failure = next(self.failures, None)
        if failure is not None:
            raise failure


def test_retries_until_success_or_the_timeout_or_an_error_that_will_not_pass(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_module, "FIRST_PAUSE", 0.01)
    attempts = Attempts(*[ConnectionError("connection refused")] * 6)
    with caplog.at_level(logging.WARNING):
        retry(attempts, "s3://bucket/shard", timeout=30)
    said = [record.message.split(";")[0] for record in caplog.records]
    assert (attempts.count, said) == (7, ["s3://bucket/shard: connection refused"] * 6)
    for failure, timeout, counts in (
        (ConnectionError("connection refused"), 0.1, range(3, 1000)),
        (FileNotFoundError("not there"), 30, [4]),
        (OSError(errno.ENOSPC, "No space left on device"), 30, [1]),
    ):
        attempts = Attempts(*[failure] * 10_000)
        with pytest.raises(type(failure)), time_limit(20):
            retry(attempts, "a shard", timeout)
        assert attempts.count in counts


class GoogleError(Exception):
    """As google.api_core's, whose import warns."""

    code = HTTPStatus.NOT_FOUND


def test_tells_lasting_errors_from_passing_ones() -> None:
    def client_error(status: int) -> ClientError:
        answer = {"Error": {"Code": "?"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return ClientError(answer, "GetObject")  # pyright: ignore[reportArgumentType]

    for error in (client_error(404), client_error(403), NoCredentialsError(), GoogleError()):
        assert is_lasting(error)
    for error in (client_error(400), client_error(503), ConnectionResetError("reset"), TimeoutError("late")):
        assert not is_lasting(error)

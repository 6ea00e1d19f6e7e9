"""Retries: which errors are retried, and for how long."""

import errno
import logging
from collections.abc import Iterator
from http import HTTPStatus

import azure.core.exceptions
import pytest
import requests
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


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FIRST_PAUSE", 0.01)


def test_retries_until_an_attempt_succeeds_and_logs_each_failure(caplog: pytest.LogCaptureFixture) -> None:
    attempts = Attempts(*[ConnectionError("connection refused")] * 6)
    with caplog.at_level(logging.WARNING):
        retry(attempts, "s3://bucket/shard", timeout=30)
    assert attempts.count == 7
    said = [record.message.split(";")[0] for record in caplog.records]
    assert said == ["s3://bucket/shard: connection refused"] * 6


def test_gives_up_after_the_timeout_or_an_error_that_will_not_pass() -> None:
    for failure, timeout, counts in (
        (ConnectionError("connection refused"), 0.1, range(3, 1000)),
        (FileNotFoundError("not there"), 30, [4]),
        (OSError(errno.ENOSPC, "No space left on device"), 30, [1]),
    ):
        attempts = Attempts(*[failure] * 10_000)
        with pytest.raises(type(failure)), time_limit(20):
            retry(attempts, "a shard", timeout)
        assert attempts.count in counts


def client_error(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # pyright: ignore


class GoogleError(Exception):
    """As google.api_core's, whose import warns."""

    def __init__(self, code: HTTPStatus) -> None:
        super().__init__()
        self.code = code


def http_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (client_error(404, "NoSuchKey"), True),
        (client_error(403, "AccessDenied"), True),
        (client_error(400, "RequestTimeout"), False),
        (client_error(503, "SlowDown"), False),
        (NoCredentialsError(), True),
        (GoogleError(HTTPStatus.NOT_FOUND), True),
        (GoogleError(HTTPStatus.SERVICE_UNAVAILABLE), False),
        (azure.core.exceptions.ResourceNotFoundError("gone", response=http_error(404).response), True),  # pyright: ignore
        (http_error(404), True),
        (http_error(502), False),
        (ConnectionResetError("reset"), False),
        (TimeoutError("late"), False),
    ],
)
def test_tells_lasting_errors_from_passing_ones(error: Exception, lasting: bool) -> None:
    assert is_lasting(error) is lasting

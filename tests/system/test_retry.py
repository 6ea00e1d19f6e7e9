"""Retries: which errors are retried, and for how long."""

import errno
import logging
from http import HTTPStatus
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, NoCredentialsError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from d2v_composer.system import fetch as retry_module
from d2v_composer.system.fetch import is_lasting, is_missing, retry
from helpers import time_limit


def test_retries_until_success_or_the_timeout_or_an_error_that_will_not_pass(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_module, "FIRST_PAUSE", 0.01)
    address = "https://user:hunter2@host/f?token=topsecret"
    attempt = Mock(side_effect=[*[ConnectionError(f"no answer of {address}")] * 6, None])
    with caplog.at_level(logging.WARNING):
        retry(attempt, address, timeout=30)
    said = [record.message.split(";")[0] for record in caplog.records]
    assert (attempt.call_count, said) == (7, ["https://host/f: no answer of https://host/f"] * 6)
    for failure, timeout, counts in (
        (ConnectionError("connection refused"), 0.1, range(3, 1000)),
        (FileNotFoundError("not there"), 30, [4]),
        (OSError(errno.ENOSPC, "No space left on device"), 30, [1]),
    ):
        attempt = Mock(side_effect=failure)
        with pytest.raises(type(failure)), time_limit(20):
            retry(attempt, "a shard", timeout)
        assert attempt.call_count in counts
    denied = Mock(side_effect=[*[denial()] * 6, None])
    retry(denied, "a later save", timeout=30, denial_passes=True)
    with pytest.raises(S3UploadFailedError):
        retry(Mock(side_effect=denial()), "the first save", timeout=30)


def client_error(status: int) -> ClientError:
    answer = {"Error": {"Code": "?"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")  # pyright: ignore[reportArgumentType]


def denial() -> S3UploadFailedError:
    """Return boto3's error for an upload that S3 denies."""
    try:
        try:
            raise client_error(403)
        except ClientError:
            raise S3UploadFailedError("denied")  # noqa: B904  (as boto3 does)
    except S3UploadFailedError as error:
        return error


class GoogleError(Exception):
    """As google.api_core's, whose import warns."""

    code = HTTPStatus.NOT_FOUND


def hub_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response = requests.Response()
    response.status_code = status
    return kind("refused", response=response)


def offline_error() -> LocalEntryNotFoundError:
    error = LocalEntryNotFoundError("offline mode is enabled")
    error.__cause__ = OfflineModeIsEnabled("offline")
    return error


def test_tells_lasting_errors_from_passing_ones_and_missing_files_from_denied_ones() -> None:
    missing = (client_error(404), GoogleError(), hub_error(EntryNotFoundError, 404), offline_error())
    denied = (client_error(403), denial(), NoCredentialsError(), hub_error(RepositoryNotFoundError, 401))
    unreachable = (ConnectionResetError("reset"), TimeoutError("late"))
    passing = (client_error(400), client_error(503), hub_error(HfHubHTTPError, 429), *unreachable)
    for errors, answers in ((missing, (True, True)), (denied, (True, False)), (passing, (False, False))):
        for error in errors:
            assert (is_lasting(error), is_missing(error)) == answers, error


def test_an_unreachable_hugging_face_is_not_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own attempts
    with pytest.raises(FileNotFoundError) as caught:
        hf_hub_download("someone/images", "index.json", cache_dir=tmp_path, endpoint="http://127.0.0.1:9")
    assert (is_lasting(caught.value), is_missing(caught.value)) == (False, False)

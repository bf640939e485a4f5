"""Retry remote operations: which failures are retried, how often, and which errors the others become."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from .redact import redacted

TRIES = 6
FIRST_WAIT_S = 1.0  # doubled each time, with up to half of it off at random: about 25 s of waiting in all

_RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}  # 409: two conditional writes at once
_RETRIED_CODES = {
    "RequestTimeout",
    "InternalError",
    "SlowDown",
    "ServiceUnavailable",
}  # the first comes with status 400
_FINAL_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# by name: their packages are installed only with the store that raises them
_RETRIED_NAMES = {
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "ChecksumError",  # botocore
    "FlexibleChecksumError", "ClientConnectionError", "ClientPayloadError",  # botocore, aiohttp
    "IncompleteRead", "ProtocolError",  # urllib3
}  # fmt: skip

_Result = TypeVar("_Result")
logger = logging.getLogger(__name__)


class StorageError(ValueError):
    """A path or URL that cannot be used; the message names it and says what to do."""


class MissingError(StorageError):
    """Nothing matches a pattern, or there is no such bucket. The store has answered; any other StorageError may hide existing files."""


class ChangedError(StorageError):
    """The file is now another version than the one asked for."""


class ConditionError(StorageError):
    """The store has no conditional writes."""


class FencedError(StorageError):
    """A write by a process that lost its lease on the folder, or by a worker of such a process."""


@dataclass(frozen=True)
class _Response:
    """An HTTP error response."""

    status: int
    code: str
    message: str


def attempt(verb: str, url: str, call: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
    """Call `call(*arguments, **options)`; retry while it fails with a transient error.

    Args:
        verb: what the call does, for messages: "read", "write", "look-up", ….

    Raises:
        FileNotFoundError: there is no such file.
        ChangedError: a condition on the file's version does not hold.
        StorageError: no permission, no such bucket, no credentials; or TRIES failures in a row.
    """
    started = time.monotonic()
    for number in itertools.count(1):
        try:
            return call(*arguments, **options)
        except Exception as error:
            reason = describe(error)
            if not is_transient(error):
                final = _final(verb, url, error)
                if final is error:
                    raise
                raise final from error
            if number == TRIES:
                raise StorageError(
                    f"{redacted(url)}: {verb} failed: {reason}; tried {TRIES} times in {time.monotonic() - started:.0f} s. "
                    "Check the store and the network, then give the same command again: it continues"
                ) from error
            logger.info("%s: %s failed (%s); trying again, %d of %d", redacted(url), verb, reason, number, TRIES)
        time.sleep(FIRST_WAIT_S * 2 ** (number - 1) * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


def is_transient(error: Exception) -> bool:
    """Whether a failure may pass: an overloaded server, a broken or stalled connection, a short read."""
    if isinstance(error, StorageError):
        return False
    answer = _answer(error)
    if answer is not None:
        return answer.status in _RETRIED_STATUS or answer.code in _RETRIED_CODES
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL_ERRORS)
    return not _RETRIED_NAMES.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def describe(error: Exception) -> str:
    """An error on one line, without secrets."""
    answer = _answer(error)
    if answer is not None:
        code = "" if answer.code == str(answer.status) else f" {answer.code}"  # a response to HEAD has no code
        return redacted(f"{answer.status}{code} ({answer.message})")
    text = " ".join(str(error).split())
    return redacted(f"{type(error).__name__}: {text}" if text else f"{type(error).__name__} (no answer in time)")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: Exception) -> _Response | None:
    """The HTTP response that caused an error: s3fs raises Python's errors with botocore's as their cause; aiohttp's have a status."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return _Response(status, str(response["Error"].get("Code")), str(response["Error"].get("Message")))
        if type(link).__name__ == "ClientResponseError":
            status = int(getattr(link, "status", 0))
            return _Response(status, str(status), str(getattr(link, "message", "")))
    return None


def _final(verb: str, url: str, error: Exception) -> Exception:
    """The exception to raise for a failure that is not transient."""
    where, answer = redacted(url), _answer(error)
    if answer is not None and answer.code == "NoSuchBucket":
        return MissingError(f"{where}: there is no such bucket; check the name, or create it")
    if answer is not None and answer.status == 412:
        return ChangedError(f"{where}: it was changed by another process meanwhile")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where)
    if isinstance(error, PermissionError):
        return StorageError(
            f"{where}: {verb} refused: {describe(error)}. Check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE) and their permissions; without the permission to list, S3 gives this error for a missing file too"
        )
    if answer is not None and answer.status in (401, 403):
        return StorageError(f"{where}: {verb} refused: {describe(error)}. Check the credentials and their permissions")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if answer is not None or isinstance(error, OSError) or type(error).__module__.startswith(("botocore", "aiohttp")):
        return StorageError(f"{where}: {verb} failed: {describe(error)}; retrying would not help")
    return error  # a bug: keep its own traceback

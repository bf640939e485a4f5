"""Remote operations fail now and then: which failures are tried again, how often, and how the others are reported."""

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

from data.storage.redact import redacted

TRIES = 6
FIRST_WAIT_S = 1.0  # doubled each time, less up to a half by chance: about 25 s of waiting in all

_AGAIN_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}  # 409: two conditional writes at the same moment
_AGAIN_CODES = {"RequestTimeout", "InternalError", "SlowDown", "ServiceUnavailable"}  # the first comes with status 400
_NOT_AGAIN = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# by name: the packages that define them come with the store in use
_AGAIN_NAMES = {
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "ChecksumError",  # botocore
    "FlexibleChecksumError", "ClientConnectionError", "ClientPayloadError",  # botocore, aiohttp
    "IncompleteRead", "BadStatusLine", "LineTooLong", "ProtocolError",  # http.client, urllib3
}  # fmt: skip

_Result = TypeVar("_Result")
logger = logging.getLogger(__name__)


class StorageError(ValueError):
    """A path or URL that cannot be used; the message names it and says what to do."""


class MissingError(StorageError):
    """Nothing matches a pattern, or there is no such bucket: the store has answered. No other StorageError may be taken for "there is
    nothing"."""


class ChangedError(StorageError):
    """Another version of the file is there than the one that was asked for."""


class ConditionError(StorageError):
    """A store that cannot write on the condition that nobody else has."""


class FencedError(StorageError):
    """A write by a process that does not hold the folder any more, or by a worker of such a one."""


@dataclass(frozen=True)
class _Answer:
    """What an HTTP server said."""

    status: int
    code: str
    message: str


def attempt(verb: str, url: str, call: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
    """`call(*arguments, **options)`, tried again while it fails in a way that may pass.

    Args:
        verb: what the call does, for the message: "read", "write", "look-up", ….

    Raises:
        FileNotFoundError: nothing is there.
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
    """True for a failure that may pass: an overloaded server, a broken or stalled connection, a short read."""
    if isinstance(error, StorageError):
        return False
    answer = _answer(error)
    if answer is not None:
        return answer.status in _AGAIN_STATUS or answer.code in _AGAIN_CODES
    if isinstance(error, OSError):
        return not isinstance(error, _NOT_AGAIN)
    return not _AGAIN_NAMES.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def describe(error: Exception) -> str:
    """One line on what went wrong, without secrets."""
    answer = _answer(error)
    if answer is not None:
        code = (
            "" if answer.code == str(answer.status) else f" {answer.code}"
        )  # an answer to HEAD has no code of its own
        return redacted(f"{answer.status}{code} ({answer.message})")
    text = " ".join(str(error).split())
    return redacted(f"{type(error).__name__}: {text}" if text else f"{type(error).__name__} (no answer in time)")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: Exception) -> _Answer | None:
    """The HTTP answer behind an error: s3fs raises Python's own errors, and botocore's are their cause; aiohttp's have a status."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return _Answer(status, str(response["Error"].get("Code")), str(response["Error"].get("Message")))
        if type(link).__name__ == "ClientResponseError":
            status = int(getattr(link, "status", 0))
            return _Answer(status, str(status), str(getattr(link, "message", "")))
    return None


def _final(verb: str, url: str, error: Exception) -> Exception:
    """What to raise for a failure that will not pass."""
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
            "or AWS_PROFILE) and what they may do; without the permission to list, S3 says so of a missing file too"
        )
    if answer is not None and answer.status in (401, 403):
        return StorageError(f"{where}: {verb} refused: {describe(error)}. Check the credentials and what they may do")
    if type(error).__name__ == "InvalidURL" or isinstance(error, UnicodeEncodeError):
        return StorageError(f"{where}: not a URL ({error}); write a blank as %20, and other signs the same way")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if answer is not None or isinstance(error, OSError) or type(error).__module__.startswith("botocore"):
        return StorageError(f"{where}: {verb} failed: {describe(error)}; trying again would not help")
    return error  # a bug: its own traceback says more

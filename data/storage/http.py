"""Read a file on an HTTP server by ranges; for `data.storage.remote`, which reads ahead and retries.

Every range is of the version that was opened: each request names its tag (If-Range), and another version raises ChangedError.
Connections are kept between requests (`data.storage.web_session`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .redact import redacted
from .retry import ChangedError, StorageError
from .web_tokens import TOKEN_VARIABLE, origin_of, token_for

if TYPE_CHECKING:
    from .web_session import Answer


def is_http(url: str) -> bool:
    """True for http:// and https://."""
    return url.startswith(("http://", "https://"))


def is_sendable(url: str) -> bool:
    """Whether a URL has only characters that a request may have."""
    return url.isascii() and url.isprintable() and " " not in url


def without_query(url: str) -> str:
    """An http:// URL without what follows its `?`; any other URL or path as it is."""
    return url.partition("?")[0] if is_http(url) else url


class HttpError(OSError):
    """An HTTP error status, shaped like botocore's `response`, so that `data.storage.retry` treats both alike."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        answer = {"Code": str(status), "Message": message}
        self.response = {"Error": answer, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpFile:
    """A file as `data.storage.remote.RemoteFile` uses it: `size` (bytes), `details`, `seek`, `read`, `close`."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """Raises FileNotFoundError, HttpError, StorageError."""
        self._url, self._timeout_s, self._position = url, timeout_s, 0
        answer = _ask(url, {"Range": "bytes=0-0"}, timeout_s, 1)  # not HEAD: its errors have no message
        length = answer.headers.get("Content-Length", "")
        if answer.status == 206:
            length = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not length.isdigit():
            raise StorageError(f"{redacted(url)}: the server does not say how large the file is (Content-Length)")
        self.size, self.details = int(length), {"ETag": _tag(answer), "version": _version(answer)}

    def seek(self, position: int) -> None:
        """Set the byte at which the next read begins."""
        self._position = position

    def read(self, length: int) -> bytes:
        """`length` bytes. Raises as the constructor, ChangedError for another version, and aiohttp's errors of connections."""
        start, tag = self._position, self.details["ETag"]
        headers = {"Range": f"bytes={start}-{start + length - 1}"} | ({"If-Range": tag} if tag else {})
        answer = _ask(self._url, headers if length < self.size else {}, self._timeout_s, length)
        found = _tag(answer)  # may lack what the first answer had: a 206 need not repeat Last-Modified
        if found != tag and (found or _version(answer) != self.details["version"]):
            raise ChangedError(f"{redacted(self._url)}: it was replaced on the server while it was read; read it again")
        if answer.status != 206 and start:
            raise StorageError(f"{redacted(self._url)}: the server does not answer ranges; expected one that does")
        return answer.content

    def close(self) -> None:
        """Do nothing: connections belong to the process."""


def _tag(answer: Answer) -> str:
    """The version for If-Range: a strong ETag, or Last-Modified; empty without either."""
    etag = answer.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _version(answer: Answer) -> str:
    """The version for comparison: any ETag, or Last-Modified; empty without either."""
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")


def _ask(url: str, headers: dict[str, str], timeout_s: float, max_bytes: int) -> Answer:
    from .web_session import get  # aiohttp, which most commands do not need

    if not is_sendable(url):
        raise StorageError(
            f"{redacted(url)}: not a URL; write a blank as %20, and other special characters the same way"
        )
    if token := token_for(url):
        headers = headers | {"Authorization": f"Bearer {token}"}
    try:
        answer = get(url, headers, timeout_s, max_bytes)
    except ValueError as error:  # of a host or a port
        raise StorageError(f"{redacted(url)}: not a URL ({error})") from error
    if answer.status >= 400:
        message = " ".join(answer.content.decode("utf-8", "replace").split())
        raise _failure(url, answer.status, message or answer.reason)
    return answer


def _failure(url: str, status: int, message: str) -> Exception:
    where = redacted(url)
    if status == 404:
        return FileNotFoundError(where)
    if status in (401, 403):
        origin = origin_of(url) or "http://HOST:PORT"
        return StorageError(
            f"{where}: refused ({status} {message}); expected the server's token: {TOKEN_VARIABLE}={origin}=TOKEN"
        )
    if status == 416:
        return ChangedError(f"{where}: it was replaced on the server by a shorter one while it was read; read it again")
    return HttpError(status, message)

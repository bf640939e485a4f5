"""Read a file on an HTTP server by ranges; for `data.storage.remote`, which reads ahead and retries.

Every range is of the version that was opened: each request names its tag (If-Range), and another version raises ChangedError.
"""

from __future__ import annotations

from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from .redact import redacted
from .retry import ChangedError, StorageError
from .web_tokens import TOKEN_VARIABLE, origin_of, token_for

_MESSAGE_CHARACTERS = 300  # of an error response's body


def is_http(url: str) -> bool:
    """True for http:// and https://."""
    return url.startswith(("http://", "https://"))


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
        with _ask(url, {"Range": "bytes=0-0"}, timeout_s) as answer:  # not HEAD: its errors have no message
            ranged = (answer.headers["Content-Range"] or "").rpartition("/")[2]
            length = ranged if answer.status == 206 else answer.headers["Content-Length"] or ""
            if not length.isdigit():
                raise StorageError(f"{redacted(url)}: the server does not say how large the file is (Content-Length)")
            self.size, self.details = int(length), {"ETag": _tag(answer), "version": _version(answer)}

    def seek(self, position: int) -> None:
        """Set the byte at which the next read begins."""
        self._position = position

    def read(self, length: int) -> bytes:
        """`length` bytes; fewer when the connection breaks. Raises as the constructor, and ChangedError for another version."""
        start, tag = self._position, self.details["ETag"]
        headers = {"Range": f"bytes={start}-{start + length - 1}"} | ({"If-Range": tag} if tag else {})
        with _ask(self._url, headers if length < self.size else {}, self._timeout_s) as answer:
            if _tag(answer) != tag:
                raise ChangedError(
                    f"{redacted(self._url)}: it was replaced on the server while it was read; read it again"
                )
            if answer.status != 206 and start:
                raise StorageError(f"{redacted(self._url)}: the server does not answer ranges; expected one that does")
            return bytes(answer.read(length))

    def close(self) -> None:
        """Do nothing: no connection is open between two reads."""


def _tag(answer: Any) -> str:
    """The version for If-Range: a strong ETag, or Last-Modified; empty without either."""
    etag = answer.headers["ETag"] or ""
    return str(etag if etag and not etag.startswith("W/") else answer.headers["Last-Modified"] or "")


def _version(answer: Any) -> str:
    """The version for comparison: any ETag, or Last-Modified; empty without either."""
    return str(answer.headers["ETag"] or answer.headers["Last-Modified"] or "")


def _ask(url: str, headers: dict[str, str], timeout_s: float) -> Any:
    request = Request(url, headers=headers)
    if token := token_for(url):  # not sent along redirects to other servers
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urlopen(request, timeout=timeout_s)
    except HTTPError as error:
        with error:
            message = error.read(_MESSAGE_CHARACTERS).decode("utf-8", "replace")
        raise _failure(url, error.code, " ".join(message.split()) or error.reason) from None


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

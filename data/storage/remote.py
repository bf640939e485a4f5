"""Object stores and other fsspec file systems; for `data.storage` alone. Every operation is retried (`data.storage.retry`).

This module avoids parts of fsspec that give wrong results: its listings cache misses what another process wrote; its glob, find and
walk treat a failed listing as empty; its bulk delete ignores files that it could not delete.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec

from .http import HttpFile, is_http
from .redact import redacted
from .retry import ChangedError, ConditionError, StorageError, attempt

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 20.0  # without a byte, the connection counts as broken
PART_BYTES = 50 << 20  # of an upload; up to twice as much is sent in one piece
UPLOAD_BYTES_PER_S = 256 << 10  # a slower upload counts as stalled; no other timeout covers sending
PARALLEL_REQUESTS = 8
"""Files read or copied at once: an object store answers each request after tens of milliseconds."""
SMALL_REQUESTS = 64
"""Small ranges read at once: 13,000 of them after 30 ms each take 6 s, and the CPU time of 64 answers is less than 30 ms."""
_PIECE_BYTES = 32 << 20  # of a large read
_FIRST_AHEAD, _MAX_AHEAD = 64 << 10, 8 << 20  # bytes read ahead: doubled from read to read
_MAX_GAP = 256 << 10  # bytes skipped by a read that still counts as going forward
_S3 = ("s3", "s3a")
_VERSION_FIELDS = (  # names by which file systems give a file's version; the first that is present counts: tags before times
    "ETag", "etag", "blob_id", "LastModified", "last_modified", "updated", "modified", "mtime", "created",
)  # fmt: skip
_memory_lock = threading.Lock()

_Result = TypeVar("_Result")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises StorageError for a missing package or an unknown protocol."""
    protocol = _protocol(url)
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(protocol))
    except ImportError as error:
        cure = "pip install 'noisy-student-pipeline[s3]'" if protocol in _S3 else str(error)
        raise StorageError(f"{redacted(url)}: a package for {protocol}:// is missing: {cure}") from error
    except ValueError as error:
        raise StorageError(f"{redacted(url)}: {redacted(str(error))}") from error
    if protocol in _S3:
        fs.retries = 1  # `attempt` retries; nested retries would multiply
    return fs, path


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def _options(protocol: str) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in _S3:
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S, "tcp_keepalive": True}
        options["config_kwargs"] = timeouts | {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": SMALL_REQUESTS,  # botocore's 10 would let the others wait
        }
    return options


class FileInfo(NamedTuple):
    """What a listing tells about a file.

    Attributes:
        size: bytes.
        version: ETag or modification time, different for another version of the file; empty where the store gives neither.
    """

    size: int
    version: str


class RemoteFile(io.RawIOBase):
    """A file open for reading. Each request is checked for its length and retried by itself.

    Reads ahead while reads go forward (a whole shard); after a jump (one image) fetches exactly what is asked for. A read returns all
    bytes that it is asked for, or the rest of the file.
    """

    def __init__(self, url: str, max_ahead: int | None = None) -> None:
        """Open it. Raises FileNotFoundError or StorageError. `max_ahead`: bytes to read ahead, 8 MiB by default; 0: none."""
        self._file: Any = None  # for `close`, when opening fails
        self._url = url
        self._file = _open(url)
        self._size, self.tag = int(self._file.size), str((getattr(self._file, "details", None) or {}).get("ETag", ""))
        self._position, self._ahead = 0, 0
        self._max_ahead = _MAX_AHEAD if max_ahead is None else max_ahead
        self._block, self._start = b"", 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position; read nothing."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readall(self) -> bytes:
        """The rest of the file."""
        return self.read(max(0, self._size - self._position)) or b""

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, or its beginning with the rest of the file; return the number of bytes.

        Raises:
            ChangedError: the file is another version than the one opened.
            StorageError: reading failed, retries too.
        """
        view = memoryview(buffer).cast("B")
        wanted, done = min(len(view), max(0, self._size - self._position)), 0
        while done < wanted:
            part = self._next(wanted - done)
            view[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return done

    def _next(self, wanted: int) -> memoryview:
        """1 to `wanted` bytes at the position."""
        if not 0 <= self._position - self._start < len(self._block):
            self._fetch(wanted)
        within = self._position - self._start
        return memoryview(self._block)[within : within + wanted]

    def _fetch(self, wanted: int) -> None:
        forward = 0 <= self._position - (self._start + len(self._block)) <= _MAX_GAP
        self._ahead = min(max(2 * self._ahead, _FIRST_AHEAD), self._max_ahead) if forward else 0
        length = min(max(wanted, self._ahead), _PIECE_BYTES, self._size - self._position)
        self._block = attempt("read", self._url, self._read_range, self._position, length)
        self._start = self._position

    def _read_range(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        try:
            content = bytes(self._file.read(length))
        except IndexError as error:  # s3fs reads the first argument of every OSError; a timeout has none
            raise TimeoutError(f"no byte came for {READ_TIMEOUT_S:.0f} s, or the connection broke") from error
        if len(content) != length:  # a connection that ended early must not look like the end of the file
            raise ConnectionError(f"{len(content)} bytes came of {length} at byte {start}")
        return content

    def close(self) -> None:
        """Close the file."""
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()


def _open(url: str) -> Any:
    if is_http(url):
        return attempt("open", url, HttpFile, url, READ_TIMEOUT_S)
    fs, path = filesystem(url)
    return attempt("open", url, fs.open, path, "rb", cache_type="none")


def read(url: str, offset: int, size: int | None) -> bytes:
    """As `storage.read_bytes`."""

    def from_offset(file: RemoteFile) -> bytes:
        file.seek(offset)
        return (file.readall() if size is None else file.read(size)) or b""

    return _whole(url, from_offset)


def read_range(url: str, offset: int, size: int) -> bytes:
    """As `storage.read_range`."""
    if is_http(url):
        return read(url, offset, size)
    fs, path = filesystem(url)
    return attempt("read", url, _read_exactly, fs, path, offset, size)


def _read_exactly(fs: Any, path: str, offset: int, size: int) -> bytes:
    content = bytes(fs.cat_file(path, start=offset, end=offset + size))
    if len(content) != size:
        raise ConnectionError(f"{len(content)} bytes came of {size} at byte {offset}")
    return content


def read_version(url: str) -> tuple[bytes, str]:
    """As `storage.read_version`."""

    def with_tag(file: RemoteFile) -> tuple[bytes, str]:
        content = file.readall()
        return content, file.tag or hashlib.sha256(content).hexdigest()

    return _whole(url, with_tag)


def _whole(url: str, use: Callable[[RemoteFile], _Result]) -> _Result:
    """Open, read and close; start again when the file was replaced in between."""
    for _ in range(2):
        try:
            with RemoteFile(url, max_ahead=0) as file:
                return use(file)
        except ChangedError:
            continue
    with RemoteFile(url, max_ahead=0) as file:
        return use(file)


def info(url: str) -> dict[str, Any] | None:
    """fsspec's facts about a file or folder: `type` (file or directory), `size`, …; None when there is no such thing."""
    try:
        if is_http(url):
            file = _open(url)
            return {"type": "file", "size": file.size, "ETag": file.details["version"]}
        fs, path = filesystem(url)
        return dict(attempt("look-up", url, fs.info, path))
    except FileNotFoundError:
        return None


def upload(local: str, url: str) -> None:
    """Publish a local file under `url`. A failed upload leaves nothing visible."""
    fs, path = filesystem(url)
    parts = {"chunksize": PART_BYTES} if _protocol(url) in _S3 else {}
    attempt("write", url, fs.put_file, local, path, **parts, **_upload_timeout(fs, Path(local).stat().st_size))


def _upload_timeout(fs: Any, size: int) -> dict[str, float]:
    """The `timeout` option of fsspec's asynchronous file systems; the others have none."""
    return {"timeout": CONNECT_TIMEOUT_S + READ_TIMEOUT_S + size / UPLOAD_BYTES_PER_S} if fs.async_impl else {}


def write_if(url: str, content: bytes, tag: str | None) -> None:
    """As `storage.write_if`. `memory://` belongs to one process: a lock makes comparing and writing one step."""
    fs, path = filesystem(url)
    if _protocol(url) in _S3:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            attempt("write", url, fs.pipe_file, path, content, **condition, **_upload_timeout(fs, len(content)))
        except FileNotFoundError as error:
            raise ChangedError(f"{redacted(url)}: it was removed by another process meanwhile") from error
        return
    if _protocol(url) != "memory":
        raise ConditionError(
            f"{redacted(url)}: only s3:// has conditional writes; {_protocol(url)}:// cannot keep two writers apart"
        )
    with _memory_lock:
        found = read_version(url)[1] if info(url) is not None else None
        if found != tag:
            raise ChangedError(f"{redacted(url)}: it was changed by another process meanwhile")
        attempt("write", url, fs.pipe_file, path, content)


def list_names(url: str) -> list[str]:
    """Names in a folder, unordered; empty when there is no such folder."""
    return [name for name, _ in _list(url)]


def list_files(url: str) -> dict[str, FileInfo]:
    """Name → size and version of the files in a folder; empty when there is no such folder."""
    return {name: file_info_of(found) for name, found in _list(url) if found["type"] == "file"}


def file_info_of(found: Mapping[str, Any]) -> FileInfo:
    """Size and version from `info` or a listing."""
    versions = (found[field] for field in _VERSION_FIELDS if found.get(field))
    return FileInfo(int(found["size"]), next(map(_version, versions), ""))


def _version(value: Any) -> str:
    """A version as text; the same for a time as datetime and as float."""
    if isinstance(value, datetime):
        value = value.timestamp()
    return f"{value:.6f}" if isinstance(value, float) else str(value).strip('"')


def list_kinds(url: str) -> dict[str, bool]:
    """Name → whether it is a folder, of what is in a folder; empty when there is no such folder."""
    return {name: entry["type"] == "directory" for name, entry in _list(url)}


def _list(url: str) -> list[tuple[str, dict[str, Any]]]:
    fs, path = filesystem(url)
    try:
        found = attempt("list", url, fs.ls, path, detail=True)
    except FileNotFoundError:
        return []
    folder = path.strip("/")  # a file lists itself, and so does the marker that consoles make for a folder
    return [(name.rpartition("/")[2], entry) for entry in found if (name := entry["name"].strip("/")) != folder]


def _files_below(fs: Any, url: str, path: str) -> Iterator[str]:
    """Paths of all files below a folder, or of the one file. S3 lists them in one request."""
    if _protocol(url) in _S3:
        yield from attempt("list", url, fs.find, path)
        return
    try:
        found = attempt("list", url, fs.ls, path, detail=True)
    except FileNotFoundError:
        return
    for entry in found:
        if entry["type"] == "directory" and entry["name"].strip("/") != path.strip("/"):
            yield from _files_below(fs, url, entry["name"])
        elif entry["type"] != "directory":
            yield entry["name"]


def remove(url: str) -> None:
    """As `storage.remove`."""
    fs, path = filesystem(url)
    attempt("remove", url, _remove, fs, url, path)


def _remove(fs: Any, url: str, path: str) -> None:
    try:
        fs.rm(path, recursive=True)
    except FileNotFoundError:
        return
    if left := list(_files_below(fs, url, path)):
        raise ConnectionError(f"{len(left)} files are still there")


def move(source: str, target: str) -> None:
    """Copy all files, then delete. fsspec's `mv` cannot be retried once a part of the target exists."""
    (fs, start), (_, end) = filesystem(source), filesystem(target)
    files = list(_files_below(fs, source, start))

    def copy(path: str) -> None:
        attempt("copy", source, fs.cp_file, path, end + path.removeprefix(start))

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        list(pool.map(copy, files))
    remove(source)

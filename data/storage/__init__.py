"""Read, write and list files by local path or fsspec URL (`s3://`, `gs://`, `memory://`, …). Only this package opens URLs.

A file under its final name is whole: a local file is written beside its place, synced and renamed; an object store publishes an object
when its upload completes. Remote operations are retried (`data.storage.retry`) and end in a StorageError; errors of a local disk are
OSErrors.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeGuard, TypeVar, cast

import pyarrow as pa

from . import local, remote
from .fence import reason_not_to_write
from .http import without_query
from .local import is_local as is_local
from .local import path_of, refuse_pipe
from .patterns import expand as expand
from .redact import redacted
from .remote import PARALLEL_REQUESTS as PARALLEL_REQUESTS
from .remote import FileInfo as FileInfo
from .retry import ChangedError as ChangedError
from .retry import ConditionError as ConditionError
from .retry import FencedError as FencedError
from .retry import MissingError as MissingError
from .retry import StorageError as StorageError

if TYPE_CHECKING:
    from .ranges import RangeFile

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def local_path(url: str) -> Path:
    """The path of a local URL. Raises StorageError for a remote one."""
    if not is_local(url):
        refuse_pipe(url)
        raise StorageError(f"{url!r} is not a local path")
    return Path(path_of(url))


def join(base: str, *parts: str) -> str:
    """`base/part/…`, for paths and URLs alike."""
    return "/".join([base.rstrip("/") or "/", *[part.strip("/") for part in parts]])


def base_name(url: str) -> str:
    """The last component of a path or URL, without the query of an http:// URL (`?download=true`, a signature)."""
    return without_query(url).rstrip("/").rsplit("/", 1)[-1]


def parent(url: str) -> str:
    """The folder of a file; `.` for a bare name."""
    return without_query(url).rpartition("/")[0] or "."


def exists(url: str) -> bool:
    """Whether there is such a file or folder. Raises StorageError when the store does not answer."""
    return local_path(url).exists() if is_local(url) else remote.info(url) is not None


def size(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError, naming it."""
    return file_info(url).size


def file_info(url: str) -> FileInfo:
    """Size and version of a file. Raises FileNotFoundError, naming it."""
    if is_local(url):
        return local.info_of(local_path(url).stat())
    found = remote.info(url)
    if found is None or found["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return remote.file_info_of(found)


def open_read(url: str) -> BinaryIO:
    """Open a file for reading; it can seek. Raises FileNotFoundError; for a URL also StorageError, later reads too."""
    refuse_pipe(url)
    return io.BufferedReader(local.LocalFile(path_of(url))) if is_local(url) else cast(BinaryIO, remote.RemoteFile(url))


def open_ranges(url: str) -> RangeFile | None:
    """Open a remote file for reads of ranges that are begun before they are needed; None for a store that cannot."""
    from .ranges import RangeFile, can_begin  # aiohttp, which most commands do not need

    return RangeFile(url) if can_begin(url) else None


def open_native(url: str) -> BinaryIO | pa.NativeFile:
    """As `open_read`, for pyarrow: it reads a local file without holding the GIL."""
    refuse_pipe(url)
    return pa.OSFile(path_of(url)) if is_local(url) else open_read(url)


def read_bytes(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """`size` bytes from `offset` (default: to the end); fewer when the file ends before. Raises as `open_read`."""
    refuse_pipe(url)
    if not is_local(url):
        return remote.read(url, offset, size)
    with open_read(url) as file:
        if offset:
            file.seek(offset)
        return file.read() if size is None else file.read(size)


def read_range(url: str, offset: int, size: int) -> bytes:
    """Exactly `size` bytes from `offset` of a file known to be that long, in one request to a store.

    Raises FileNotFoundError, or StorageError when it is shorter.
    """
    if not is_local(url):
        return remote.read_range(url, offset, size)
    content = local.pread(path_of(url), offset, size)
    if len(content) != size:
        raise StorageError(f"{url}: expected {offset + size} bytes or more; it has become shorter; run again")
    return content


def in_parallel(
    call: Callable[[_Item], _Result], items: Iterable[_Item], threads: int = remote.SMALL_REQUESTS
) -> Iterator[_Result]:
    """`call` of each item, in order, in threads: for small reads, of which a store answers many at once. Raises as `call`.

    Holds at most twice as many results as there are threads.
    """
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[_Result]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(call, item))
                if len(begun) == 2 * threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


def read_text(url: str) -> str:
    """The whole file as text. Raises UnicodeDecodeError, naming the file, when it is not UTF-8."""
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as error:
        error.reason += f": {redacted(url)}"
        raise


def read_text_if_there(url: str) -> str | None:
    """As `read_text`; None when there is no such file. Raises StorageError when the store does not answer."""
    try:
        return read_text(url)
    except FileNotFoundError:
        return None


@contextmanager
def writing(url: str) -> Iterator[BinaryIO]:
    """Open a file for writing. It appears under `url` when the block ends, and not at all when the block raises.

    Makes folders as needed. Raises StorageError for a URL that cannot be written, OSError for a local file.
    """
    _check_may_write(url)
    if is_local(url):
        with local.writing(path_of(url)) as file:
            yield file
        return
    # a local copy first: an upload that ends early must not be published, and one that fails can be done again
    with tempfile.NamedTemporaryFile() as copy:
        with local.naming(copy.name):
            yield cast(BinaryIO, copy)
            copy.flush()
        _check_may_write(url)
        remote.upload(copy.name, url)


@contextmanager
def writing_together() -> Iterator[Callable[[str], AbstractContextManager[BinaryIO]]]:
    """`writing` for thousands of files: wait for the disk once instead of twice per file.

    Gives a function to use like `writing`. Local files appear when the outer block ends, and none of them when it raises; remote files
    appear one by one.
    """
    batch = local.Batch()

    @contextmanager
    def write(url: str) -> Iterator[BinaryIO]:
        _check_may_write(url)
        with batch.write(path_of(url)) if is_local(url) else writing(url) as file:
            yield file

    try:
        yield write
        batch.commit()
    except BaseException:
        batch.discard()
        raise


def is_out_of_room(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error says that a disk is full or a quota used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_bytes(url: str, content: bytes) -> None:
    """Write a whole file atomically (see `writing`)."""
    with writing(url) as file:
        file.write(content)


def write_text(url: str, text: str) -> None:
    """Write a whole UTF-8 text file atomically (see `writing`)."""
    write_bytes(url, text.encode("utf-8"))


def read_version(url: str) -> tuple[bytes, str]:
    """A remote file's content, and its version's tag for `write_if`. Raises FileNotFoundError, StorageError."""
    return remote.read_version(url)


def write_if(url: str, content: bytes, tag: str | None) -> None:
    """Write a remote file if its version still has this tag; None: if there is no such file. Of two writers, one succeeds.

    Raises:
        ConditionError: the store has no conditional writes.
        ChangedError: another version is there. It may be our own, when the answer was lost and the write was retried.
        StorageError: as `writing`.
    """
    _check_may_write(url)
    remote.write_if(url, content, tag)


def _check_may_write(url: str) -> None:
    refuse_pipe(url)
    if why := reason_not_to_write(url, read_bytes):
        raise FencedError(why)


def list_names(url: str) -> list[str]:
    """Sorted names in a folder, without temporary files; empty when there is no such folder."""
    names = local.list_names(path_of(url)) if is_local(url) else remote.list_names(url)
    return sorted(name for name in names if not name.startswith(local.TEMPORARY))


def list_sizes(url: str) -> dict[str, int]:
    """Name → bytes of the files in a folder, as `list_files`."""
    return {name: file.size for name, file in list_files(url).items()}


def list_files(url: str) -> dict[str, FileInfo]:
    """Name → size and version of the files in a folder, in one listing, without temporary files; empty when there is no such folder."""
    files = local.list_files(path_of(url)) if is_local(url) else remote.list_files(url)
    return {name: file for name, file in files.items() if not name.startswith(local.TEMPORARY)}


def remove(url: str) -> None:
    """Delete a file, or a folder with everything in it, if it is there."""
    _check_may_write(url)
    if is_local(url):
        local.remove(local_path(url))
    else:
        remote.remove(url)


def remove_temporary(url: str) -> None:
    """Delete the temporary files of killed writers in a local folder and its subfolders, and nothing else."""
    if is_local(url) and local_path(url).is_dir():
        local.remove_temporary(local_path(url))


def move(source: str, target: str) -> None:
    """Rename a file or folder; on an object store, copy and delete."""
    _check_may_write(source)
    if not is_local(source):
        remote.move(source, target)
        return
    local_path(target).parent.mkdir(parents=True, exist_ok=True)
    local_path(source).rename(local_path(target))

"""Where bytes live: local paths and fsspec URLs (`s3://`, `gs://`, `memory://`, …). The only module that opens URLs.

A file under its final name is whole: local files are written beside their place, fsynced and renamed; object stores
publish an object when its upload completes. Remote operations are tried again while a failure may pass (`data.storage.retry`), and end
in a StorageError that says so; what happens on a local disk is raised as it is.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast

import pyarrow as pa

from data.storage import remote
from data.storage.failpoint import failpoint
from data.storage.fence import reason_not_to_write
from data.storage.http import is_http
from data.storage.patterns import expand_braces, has_glob, matches
from data.storage.redact import redacted
from data.storage.remote import Entry as Entry
from data.storage.retry import ChangedError as ChangedError
from data.storage.retry import ConditionError as ConditionError
from data.storage.retry import FencedError as FencedError
from data.storage.retry import MissingError as MissingError
from data.storage.retry import StorageError as StorageError

_TEMPORARY = ".tmp-"


def is_local(url: str) -> bool:
    """True for a plain path or a file:// URL."""
    return "://" not in url or url.startswith("file://")


def _check(url: str) -> None:
    if url.startswith("pipe:"):
        raise StorageError(f"{url!r}: pipe: URLs run a shell command and are refused; use a path or an fsspec URL")


def local_path(url: str) -> Path:
    """The local path behind `url`; raises StorageError for a remote one."""
    _check(url)
    if not is_local(url):
        raise StorageError(f"{url!r} is not a local path")
    return Path(_local(url))


def _local(url: str) -> str:
    """As `local_path`, of a URL that is checked: making a Path takes longer than opening a file."""
    return url.removeprefix("file://")


def join(base: str, *parts: str) -> str:
    """`base/part/…`, for paths and URLs alike."""
    return "/".join([base.rstrip("/") or "/", *[part.strip("/") for part in parts]])


def base_name(url: str) -> str:
    """The last component of a path or URL; without what a web server's URL asks for (`?download=true`, a signature)."""
    return _without_query(url).rstrip("/").rsplit("/", 1)[-1]


def parent(url: str) -> str:
    """The folder of a file; `.` for a bare name."""
    return _without_query(url).rpartition("/")[0] or "."


def _without_query(url: str) -> str:
    return url.partition("?")[0] if is_http(url) else url


def exists(url: str) -> bool:
    """True when a file or folder is there."""
    if is_local(url):
        return local_path(url).exists()
    return remote.info(url) is not None


def size(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError, naming it."""
    return entry(url).size


def entry(url: str) -> Entry:
    """Bytes and version of a file. Raises FileNotFoundError, naming it."""
    if is_local(url):
        return _local_entry(local_path(url).stat())
    found = remote.info(url)
    if found is None or found["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return remote.entry_of(found)


def _local_entry(found: os.stat_result) -> Entry:
    return Entry(found.st_size, str(found.st_mtime_ns))


def open_read(url: str) -> BinaryIO:
    """A seekable binary file, open for reading. Raises FileNotFoundError; for a URL, StorageError too, also when it is read."""
    _check(url)
    return io.BufferedReader(_LocalFile(local_path(url))) if is_local(url) else cast(BinaryIO, remote.RemoteFile(url))


class _LocalFile(io.FileIO):
    """A file open for reading that is named when reading it fails: the system tells the number of the error alone."""

    def readinto(self, buffer: Any) -> int | None:
        """As `FileIO.readinto`."""
        with _naming(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """As `FileIO.readall`."""
        with _naming(self.name):
            return super().readall()


@contextmanager
def _naming(path: object) -> Iterator[None]:
    """Name a file in errors that do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def open_native(url: str) -> BinaryIO | pa.NativeFile:
    """As `open_read`, for pyarrow: it reads a local file by itself, without the GIL that other threads want."""
    _check(url)
    return pa.OSFile(_local(url)) if is_local(url) else open_read(url)


def read_bytes(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """`size` bytes from `offset` (all to the end by default); fewer when the file ends before. Raises as `open_read`."""
    _check(url)
    if not is_local(url):
        return remote.read(url, offset, size)
    with open_read(url) as file:
        if offset:
            file.seek(offset)
        return file.read() if size is None else file.read(size)


def read_text(url: str) -> str:
    """The whole file as UTF-8 text. Raises UnicodeDecodeError, naming it, for any other."""
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as error:
        error.reason += f": {redacted(url)}"
        raise


def read_text_if_there(url: str) -> str | None:
    """As `read_text`; None where there is no such file. An outage is no such answer: it raises StorageError."""
    try:
        return read_text(url)
    except FileNotFoundError:
        return None


@contextmanager
def writing(url: str) -> Iterator[BinaryIO]:
    """A binary file that appears under `url` when the block ends, and not at all when it raises.

    Folders are made as needed. Locally: temporary name, fsync, rename, fsync of the folder. Raises StorageError for a URL that
    cannot be written.
    """
    _check_may_write(url)
    if not is_local(url):
        # a local copy first: an upload that ends early must not be published, and one that fails can be done again
        with tempfile.NamedTemporaryFile() as local:
            with _naming(local.name):
                yield cast(BinaryIO, local)
                local.flush()
            _check_may_write(url)
            remote.upload(local.name, url)
        return
    target = _local(url)
    with _beside(target) as temporary:
        with _open_temporary(temporary, target) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _give_name(temporary, target)
    _sync(os.path.dirname(target) or ".")


@contextmanager
def writing_together() -> Iterator[Callable[[str], AbstractContextManager[BinaryIO]]]:
    """`writing` for thousands of files, which wait for the disk once instead of twice each.

    Gives a function to use like `writing`. Local files appear when the outer block ends, and none of them when it raises; remote
    ones as each is written. The folder's file system is synced before the first is renamed, so what has its final name is whole.
    """
    written: dict[str, str] = {}  # temporary name → final name

    @contextmanager
    def write(url: str) -> Iterator[BinaryIO]:
        if not is_local(url):
            with writing(url) as file:
                yield file
            return
        _check_may_write(url)
        target = _local(url)
        with _beside(target) as temporary, _open_temporary(temporary, target) as file:
            yield file
        written[temporary] = target

    try:
        yield write
        _sync_files(written)
        for temporary, target in written.items():
            _give_name(temporary, target)
    except BaseException:
        for temporary in written:
            _remove(temporary)
        raise
    for folder in {os.path.dirname(target) or "." for target in written.values()}:
        _sync(folder)


@contextmanager
def _beside(target: str) -> Iterator[str]:
    """A temporary name in the target's folder, which is made; what has that name is removed when the block raises."""
    folder, name = os.path.split(target)
    if folder:
        os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{name}")
    try:
        with _naming(target):  # a write that fails does not say where
            yield temporary
    except BaseException:
        _remove(temporary)
        raise


@contextmanager
def _open_temporary(temporary: str, target: str) -> Iterator[BinaryIO]:
    name = os.path.basename(target)
    with open(temporary, "wb") as file:
        failpoint(f"before-write/{name}")
        yield file
        file.flush()
        failpoint(f"after-write/{name}")


def _give_name(temporary: str, target: str) -> None:
    name = os.path.basename(target)
    failpoint(f"before-rename/{name}")
    os.replace(temporary, target)
    failpoint(f"after-rename/{name}")


def _remove(temporary: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(temporary)


def is_out_of_room(error: BaseException) -> TypeGuard[OSError]:
    """True when a disk is full or a quota used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _sync_files(paths: Collection[str]) -> None:
    """Wait until the files are on disk: all at once where the system has `syncfs` (Linux), else one by one."""
    sync_file_system = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if sync_file_system is None:
        for path in paths:
            _sync(path)
    else:
        for folder in {os.path.dirname(path) or "." for path in paths}:
            _sync(folder, sync_file_system)


def _sync(path: str, sync: Callable[[int], int | None] | None = None) -> None:
    """Sync a file, a folder, or the file system of either."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            if (sync or os.fsync)(descriptor):  # not 0: a C function failed; `os.fsync` raises
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


def write_bytes(url: str, content: bytes) -> None:
    """Write a whole file atomically (see `writing`)."""
    with writing(url) as file:
        file.write(content)


def write_text(url: str, text: str) -> None:
    """Write a whole UTF-8 text file atomically (see `writing`)."""
    write_bytes(url, text.encode("utf-8"))


def read_version(url: str) -> tuple[bytes, str]:
    """A remote file's content, and the tag by which `write_if` knows this version. Raises FileNotFoundError, StorageError."""
    return remote.read_version(url)


def write_if(url: str, content: bytes, tag: str | None) -> None:
    """Write a remote file if it is still the version with `tag`; None: if there is none. Of two writers at once, one succeeds.

    Raises:
        ConditionError: the store knows no such condition.
        ChangedError: another version is there. It may be our own, when an answer was lost and the write was tried again.
        StorageError: as `writing`.
    """
    _check_may_write(url)
    remote.write_if(url, content, tag)


def _check_may_write(url: str) -> None:
    _check(url)
    if why := reason_not_to_write(url, read_bytes):
        raise FencedError(why)


def list_names(url: str) -> list[str]:
    """Sorted names in a folder, without temporary files; empty when the folder is not there."""
    if is_local(url):
        folder = local_path(url)
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    else:
        names = remote.list_names(url)
    return sorted(name for name in names if not name.startswith(_TEMPORARY))


def list_sizes(url: str) -> dict[str, int]:
    """Name → bytes of the files in a folder, as `list_entries`."""
    return {name: entry.size for name, entry in list_entries(url).items()}


def list_entries(url: str) -> dict[str, Entry]:
    """Name → bytes and version of the files in a folder, in one listing; without temporary files, empty when there is no folder."""
    if not is_local(url):
        return {name: entry for name, entry in remote.list_entries(url).items() if not name.startswith(_TEMPORARY)}
    entries = {}
    for name in list_names(url):
        with suppress(FileNotFoundError):  # gone since the listing
            found = (local_path(url) / name).stat()
            if stat.S_ISREG(found.st_mode):
                entries[name] = _local_entry(found)
    return entries


def remove(url: str) -> None:
    """Delete a file or a folder with all in it; nothing happens when it is not there."""
    _check_may_write(url)
    if not is_local(url):
        remote.remove(url)
        return
    path = local_path(url)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_temporary(url: str) -> None:
    """Delete what killed writers left in a folder under temporary names: files named as `writing` names them, nothing else."""
    if is_local(url) and local_path(url).is_dir():
        for entry in local_path(url).rglob(f"{_TEMPORARY}{'[0-9a-f]' * 8}-*"):
            if entry.is_file():
                entry.unlink(missing_ok=True)


def move(source: str, target: str) -> None:
    """Rename a file or folder; on an object store, copy and delete."""
    _check_may_write(source)
    if not is_local(source):
        remote.move(source, target)
        return
    local_path(target).parent.mkdir(parents=True, exist_ok=True)
    local_path(source).rename(local_path(target))


def expand(patterns: str | Iterable[str]) -> list[str]:
    """Paths or URLs of shards: brace ranges `{000..012}` and lists `{a,b}`, then globs, in order, each once.

    A path that is there as it is written wins over what its signs would match, and of a web server's URL, what follows the `?` is
    no pattern.

    Raises:
        MissingError: a pattern matches nothing.
        StorageError: a folder cannot be listed, or a `pipe:` URL is given.
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        _check(pattern)
        head = _literal_head(pattern)
        for item in expand_braces(pattern.removeprefix(head)):
            found.update(dict.fromkeys(_expand_glob(head + item)))
    return list(found)


def _literal_head(pattern: str) -> str:
    """The part of a local pattern up to the last folder with braces in its name that is there as it is written."""
    if "{" not in pattern or not is_local(pattern):
        return ""
    ends = [number for number, sign in enumerate(pattern + "/") if sign == "/" and "{" in pattern[:number]]
    return next((pattern[:end] for end in reversed(ends) if os.path.lexists(_local(pattern[:end]))), "")


def _expand_glob(item: str) -> list[str]:
    _check(item)
    if not has_glob(_without_query(item)):
        return [item]
    if _without_query(item) != item:
        raise StorageError(f"{redacted(item)!r}: a URL with a query is one file; name each, or give {{000..012}}")
    local = is_local(item)
    found = matches(_local(item) if local else item, _entries, with_hidden=not local)
    if not found:
        raise MissingError(f"{redacted(item)!r} matches no file; check the path")
    return found


def _entries(url: str) -> dict[str, bool]:
    """Name → whether it is a folder, of what is in a folder; empty when the folder is not there."""
    if not is_local(url):
        return remote.list_kinds(url)
    try:
        with os.scandir(_local(url)) as entries:
            return {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(_TEMPORARY)}
    except (FileNotFoundError, NotADirectoryError):
        return {}

"""Local files: read with errors that name the file, written beside their place, synced and renamed.

For `data.storage` alone, and by plain strings: making a Path takes longer than opening a small file, and there are thousands.
"""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .failpoint import failpoint
from .remote import FileInfo
from .retry import StorageError

TEMPORARY = ".tmp-"
"""Prefix of files that are being written; no listing shows them."""


def is_local(url: str) -> bool:
    """True for a plain path or a file:// URL."""
    return "://" not in url or url.startswith("file://")


def refuse_pipe(url: str) -> None:
    """Raise StorageError for a `pipe:` URL."""
    if url.startswith("pipe:"):
        raise StorageError(f"{url!r}: pipe: URLs run a shell command and are refused; use a path or an fsspec URL")


def path_of(url: str) -> str:
    """The path of a local URL. Raises StorageError for a `pipe:` URL."""
    refuse_pipe(url)
    return url.removeprefix("file://")


class LocalFile(io.FileIO):
    """A file open for reading. A failed read raises an OSError that names the file, which Python's own does not."""

    def readinto(self, buffer: Any) -> int | None:
        """As `FileIO.readinto`."""
        with naming(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """As `FileIO.readall`."""
        with naming(self.name):
            return super().readall()


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Add the file's name to an OSError that has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def writing(path: str) -> Iterator[BinaryIO]:
    """As `storage.writing`: temporary name, fsync, rename, fsync of the folder."""
    with _beside(path) as temporary:
        with _open_temporary(temporary, path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    _sync(os.path.dirname(path) or ".")


class Batch:
    """Files that are written under temporary names, then synced and renamed together."""

    def __init__(self) -> None:
        self._written: dict[str, str] = {}  # temporary name → final name

    @contextmanager
    def write(self, path: str) -> Iterator[BinaryIO]:
        """One of the files, open for writing."""
        with _beside(path) as temporary, _open_temporary(temporary, path) as file:
            yield file
        self._written[temporary] = path

    def commit(self) -> None:
        """Sync the file systems, then rename all files: a file under its final name is whole."""
        _sync_files(self._written)
        for temporary, path in self._written.items():
            _rename(temporary, path)
        for folder in {os.path.dirname(path) or "." for path in self._written.values()}:
            _sync(folder)

    def discard(self) -> None:
        """Remove the files that are not renamed yet."""
        for temporary in self._written:
            _remove_if_there(temporary)


@contextmanager
def _beside(path: str) -> Iterator[str]:
    """A temporary name in the folder of `path`. Makes the folder; removes the temporary file when the block raises."""
    folder, name = os.path.split(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{name}")
    try:
        with naming(path):
            yield temporary
    except BaseException:
        _remove_if_there(temporary)
        raise


@contextmanager
def _open_temporary(temporary: str, path: str) -> Iterator[BinaryIO]:
    name = os.path.basename(path)
    with open(temporary, "wb") as file:
        failpoint(f"before-write/{name}")
        yield file
        file.flush()
        failpoint(f"after-write/{name}")


def _rename(temporary: str, path: str) -> None:
    name = os.path.basename(path)
    failpoint(f"before-rename/{name}")
    os.replace(temporary, path)
    failpoint(f"after-rename/{name}")


def _remove_if_there(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _sync_files(paths: Collection[str]) -> None:
    """Wait until the files are on disk: all at once with `syncfs` (Linux), else one by one."""
    sync_file_system = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if sync_file_system is None:
        for path in paths:
            _sync(path)
    else:
        for folder in {os.path.dirname(path) or "." for path in paths}:
            _sync(folder, sync_file_system)


def _sync(path: str, sync: Callable[[int], int | None] | None = None) -> None:
    """Sync a file or folder, or with `sync` its file system. Raises OSError, naming the path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            if (sync or os.fsync)(descriptor):  # not 0: a C function failed; `os.fsync` raises
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


def pread(path: str, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset`; three system calls, a third of what opening a Python file takes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def info_of(found: os.stat_result) -> FileInfo:
    """Size and version of a file."""
    return FileInfo(found.st_size, str(found.st_mtime_ns))


def list_names(path: str) -> list[str]:
    """As `storage.list_names`, unsorted and with temporary files."""
    return os.listdir(path) if os.path.isdir(path) else []


def list_files(path: str) -> dict[str, FileInfo]:
    """As `storage.list_files`."""
    files = {}
    for name in sorted(list_names(path)):
        with suppress(FileNotFoundError):  # gone since the listing
            found = os.stat(os.path.join(path, name))
            if stat.S_ISREG(found.st_mode):
                files[name] = info_of(found)
    return files


def list_kinds(path: str) -> dict[str, bool]:
    """Name → whether it is a folder, of what is in a folder; empty when there is no such folder."""
    try:
        with os.scandir(path) as entries:
            return {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(TEMPORARY)}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def remove(path: Path) -> None:
    """As `storage.remove`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # a read-only disk refuses to remove a file that is not there, too
        path.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """As `storage.remove_temporary`."""
    for entry in folder.rglob(f"{TEMPORARY}{'[0-9a-f]' * 8}-*"):
        if entry.is_file():
            entry.unlink(missing_ok=True)

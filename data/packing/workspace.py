"""The temporary folder of a packing: beside the output, which has room; in TMPDIR for an output that is read-only or in a store."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .. import storage
from ..errors import DataError

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def workspace(out: str, kind: str, may_be_done: bool = False) -> Iterator[str]:
    """Yield an empty folder, locked for this command and removed with the block; also a killed command's folder is emptied.

    Folders that were made for it are removed again when nothing else came into them.

    Args:
        may_be_done: `out` has a packing, so nothing may be left to write, and a read-only `out` is no error yet.

    Raises:
        DataError: another command packs into `out`.
        OSError: nothing can be written to `out`.
    """
    target = storage.local_path(out).absolute() if storage.is_local(out) else None
    made = [folder for folder in (target, *target.parents) if not folder.exists()] if target else []
    if target is None or not _make(inside := target / f".packing-{kind}", may_be_done):
        with tempfile.TemporaryDirectory(prefix="data-pack-") as folder:
            yield folder
        return
    with _locked(inside / "lock", out):
        _empty(inside)
        try:
            yield str(inside)
        finally:
            _empty(inside)
            (inside / "lock").unlink()
            with suppress(OSError):  # from the first folder on that has other files
                for path in (inside, *made):
                    path.rmdir()


def _make(folder: Path, may_be_read_only: bool) -> bool:
    """Make a folder; False where nothing can be written, if that may be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not may_be_read_only or error.errno not in _READ_ONLY:
            raise
        return False
    return True


@contextmanager
def _locked(path: Path, out: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"out={out}: another data.pack writes there; wait until it ends") from None
    try:
        yield
    finally:
        lock.release()


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != "lock":
            entry.unlink()

"""The temporary folder of a packing: beside the output, which has room, or in TMPDIR for an output in an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .. import storage
from ..errors import DataError


@contextmanager
def workspace(out: str, kind: str) -> Iterator[str]:
    """Yield an empty folder, locked for this command and removed with the block; also a killed command's folder is emptied.

    Folders that were made for it are removed again when nothing else came into them.

    Raises:
        DataError: another command packs into `out`.
    """
    if not storage.is_local(out):
        with tempfile.TemporaryDirectory(prefix="data-pack-") as folder:
            yield folder
        return
    target = storage.local_path(out).absolute()
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    inside = target / f".packing-{kind}"
    inside.mkdir(parents=True, exist_ok=True)
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

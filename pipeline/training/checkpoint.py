"""Checkpoints: everything to continue a training at its next step. Tensors and plain values only; never pickled code.

A checkpoint is a torch.save file, which is a zip archive. Its comment is the SHA-256 of all before it: a zip's own checksums cover its
members, but not its directory. Files of earlier versions have no comment.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import pickle
import re
import zipfile
from typing import Any

import torch

from data import storage

_NAME = re.compile(r"step-(\d{9})\.pt")
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64  # bytes
_NO_COMMENT = b"\0\0"  # the last bytes of an archive without a comment: its length
_END = 22  # bytes of a zip's end record without a comment

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """None of the checkpoints can be read."""


class _DamagedError(Exception):
    """A file is damaged; the message says which check failed."""


def save_checkpoint(folder: str, step: int, content: dict[str, Any], keep: int = 2) -> None:
    """Write `step-<step>.pt` atomically; then remove all but the last `keep` up to it.

    Later checkpoints are removed, too: they are damaged, and the training went back.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _seal(buffer)
    storage.write_bytes(storage.join(folder, _name(step)), buffer.getvalue())
    names = _names(folder)
    keeping = names[: names.index(_name(step)) + 1][-keep:]
    for name in names:
        if name not in keeping:
            storage.remove(storage.join(folder, name))


def load_newest(folder: str) -> dict[str, Any] | None:
    """The newest undamaged checkpoint; None if there are no checkpoints. Log a warning for each damaged one.

    Raises:
        CheckpointError: all are damaged. Starting over unasked would throw a training away.
        StorageError, OSError: storage does not answer. Going back would remove newer, undamaged checkpoints.
    """
    names = _names(folder)
    for name in reversed(names):
        url = storage.join(folder, name)
        try:
            return _load(_read(url))
        except _DamagedError as error:
            logger.warning("%s is damaged (%s); continuing from the one before", url, error)
    if names:
        raise CheckpointError(f"{folder}: none of the {len(names)} checkpoints can be read; delete them to start over")
    return None


def _read(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except OSError as error:
        if error.errno == errno.EIO:  # a lost block on the disk
            raise _DamagedError(str(error)) from error
        raise


def _seal(buffer: io.BytesIO) -> None:
    """Add the archive's digest as its comment."""
    content = buffer.getbuffer()
    assert bytes(content[-2:]) == _NO_COMMENT, "torch.save writes no comment"
    digest = hashlib.sha256(content).hexdigest().encode()
    content.release()
    buffer.seek(-len(_NO_COMMENT), io.SEEK_END)
    buffer.write(_COMMENT.to_bytes(2, "little") + _MARK + digest)


def _check(content: bytes) -> None:
    """Raise _DamagedError when a checksum differs."""
    comment = content[-_COMMENT:]
    if content[-_COMMENT - 2 : -_COMMENT] == _COMMENT.to_bytes(2, "little") and comment.startswith(_MARK):
        digest = hashlib.sha256(memoryview(content)[: -_COMMENT - 2])
        digest.update(_NO_COMMENT)
        if digest.hexdigest().encode() != comment[len(_MARK) :]:
            raise _DamagedError("its digest differs")
        return
    if not (content[-_END:].startswith(b"PK\5\6") and content.endswith(_NO_COMMENT)):
        raise _DamagedError("it ends before its digest, or that is damaged")
    try:  # torch does not verify the checksums that it writes
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged directory raises all kinds
        raise _DamagedError(_reason(error)) from error
    if damaged is not None:
        raise _DamagedError(f"wrong checksum of {damaged}")


def _load(content: bytes) -> dict[str, Any]:
    _check(content)
    try:
        return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except MemoryError:
        raise
    except Exception as error:  # torch, its unpickler and zlib raise a dozen types
        raise _DamagedError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises to load it unsafely
        return "it holds more than tensors and plain values"
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _name(step: int) -> str:
    return f"step-{step:09d}.pt"


def _names(folder: str) -> list[str]:
    return [name for name in storage.list_names(folder) if _NAME.fullmatch(name)]

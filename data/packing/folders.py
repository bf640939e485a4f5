"""Scan a folder of images: the files to pack, the files to leave out with reasons, and the classes."""

from __future__ import annotations

import os
import re
import shlex
import stat
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from .. import storage
from ..errors import DataError
from ..modalities import MODALITIES, Modality
from ..shards.samples import media_extension, printable

SYSTEM_NAMES = {
    "__MACOSX", "__pycache__", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information",
    "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r",
}  # fmt: skip
"""Names that operating systems and programs put among images, besides hidden files."""
IMAGES = MODALITIES["image"]
NOT_AN_IMAGE = f"not an image file ({', '.join(IMAGES.extensions)})"
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "unlabeled"))
_SHOWN = 5
_UNPRINTABLE = ("Cc", "Zl", "Zp")  # control characters, line and paragraph separators
_DIGITS = re.compile(r"(\d+)")
_INSPECTED_TOGETHER = 32  # entries of a folder, in one thread
_SLOW_S = 1e-4  # an entry; a local disk takes 5 µs, a network's a millisecond
_THREADS = 32
_Entry = tuple[str, str]  # path below the scanned folder, kind


@dataclass(frozen=True, order=True, slots=True)
class ImageFile:
    """An image file to pack; `size` in bytes."""

    path: Path
    size: int

    @property
    def field(self) -> str:
        """Its field in a shard: `jpg`, `png`, `mp4`, …"""
        return media_extension(self.path.suffix)

    def read(self, start: int = 0, size: int = -1) -> bytes:
        """`size` bytes from `start`; by default all. Raises DataError, naming the file, when reading fails."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"{printable(str(self.path))}: {reason}; when it can be read, the same command continues"
            ) from error


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not packed, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{printable(str(self.path))}: {self.reason}"


class ScannedImage(NamedTuple):
    """An image file below the scanned folder."""

    name: str  # path below the folder
    size: int  # bytes
    modified: int  # nanoseconds


@dataclass
class Found:
    """What a scan found, in memory that grows with the number of class folders and of reasons.

    Attributes:
        by_class: whether the folders in the scanned one are classes; the next two are filled only then.
        images_of: class folder → number of images below it, in the order of the scan.
        first_left_out_of: class folder → the first file or folder below it that is left out.
        num_images: in all.
        stray: the first image in no class folder.
        reasons: of what is left out → how often.
        first_left_out: of all.
    """

    by_class: bool
    images_of: dict[str, int] = field(default_factory=dict)
    first_left_out_of: dict[str, LeftOut] = field(default_factory=dict)
    num_images: int = 0
    stray: str = ""
    reasons: Counter[str] = field(default_factory=Counter)
    first_left_out: LeftOut | None = None

    def add_image(self, image: ScannedImage) -> None:
        """Count an image."""
        self.num_images += 1
        if self.by_class:
            folder, slash, _ = image.name.partition("/")
            if slash:
                self.images_of[folder] = self.images_of.get(folder, 0) + 1
            else:
                self.stray = self.stray or image.name

    def add_left_out(self, root: Path, entry: LeftOut) -> None:
        """Count what is left out."""
        self.reasons[entry.reason] += 1
        self.first_left_out = self.first_left_out or entry
        if self.by_class:
            self.first_left_out_of.setdefault(entry.path.relative_to(root).parts[0], entry)


def scan(root: Path, modality: Modality = IMAGES) -> Iterator[ScannedImage | LeftOut]:
    """Yield the images (or files of another modality) below a folder and what is left out, sorted by the parts of paths.

    Follows links to files, but not to folders. Memory grows with the largest folder alone. On a slow disk, many files of a folder are
    inspected at once.

    Raises:
        OSError: the folder itself cannot be read.
    """
    pending = [_inspected(root, modality, _entries(root, ""))]
    while pending:
        if (entry := next(pending[-1], None)) is None:
            pending.pop()
            continue
        name, found = entry
        if isinstance(found, str):
            yield LeftOut(root / name, found)
        elif not stat.S_ISDIR(found.st_mode):
            yield ScannedImage(name, found.st_size, found.st_mtime_ns)
        else:
            try:
                pending.append(_inspected(root, modality, _entries(root, f"{name}/")))
            except OSError as error:
                yield LeftOut(root / name, f"a folder that cannot be read ({error.strerror})")


def _inspected(root: Path, modality: Modality, entries: Iterator[_Entry]) -> Iterator[tuple[str, os.stat_result | str]]:
    """The entries' paths with what `_inspect` says. In threads, if the first entries show that the disk is slow: with a fast one,
    threads take twice as long."""

    def inspect(part: list[_Entry]) -> list[tuple[str, os.stat_result | str]]:
        return [(name, _inspect(root, modality, name, kind)) for name, kind in part]

    started = time.perf_counter()
    first = inspect(list(islice(entries, _INSPECTED_TOGETHER)))
    is_slow = time.perf_counter() - started > _SLOW_S * len(first)
    yield from first
    parts = iter(lambda: list(islice(entries, _INSPECTED_TOGETHER)), [])
    yield from chain.from_iterable(storage.in_parallel(inspect, parts, _THREADS) if is_slow else map(inspect, parts))


def _entries(root: Path, prefix: str) -> Iterator[_Entry]:
    """(path below `root`, kind) of what is in a folder, sorted by name: kinds are `folder`, `link` and `file`."""
    kinds: dict[str, str] = {}
    names = []
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            names.append(entry.name)
            if entry.is_dir(follow_symlinks=False):
                kinds[entry.name] = "folder"
            elif entry.is_symlink():
                kinds[entry.name] = "link"
    names.sort()
    return ((prefix + name, kinds.get(name, "file")) for name in names)


def _inspect(root: Path, modality: Modality, name: str, kind: str) -> os.stat_result | str:
    """The file status of an image or a folder to scan; for anything else, the reason to leave it out."""
    base = name.rpartition("/")[2]
    if is_hidden(base):
        return f"a hidden or system {'folder' if kind == 'folder' else 'file'}"
    path = f"{root}/{name}"
    try:
        state = os.stat(path)  # noqa: PTH116 (a Path for each of millions of files takes longer than the call)
    except OSError as error:
        return "a dead link" if kind == "link" else f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(state.st_mode):
        return "a link to a folder; these are not followed" if kind == "link" else state
    if not stat.S_ISREG(state.st_mode):
        return "not a regular file"
    if "." not in base or media_extension(base) not in modality.extensions:
        return NOT_AN_IMAGE if modality is IMAGES else f"not a video file ({', '.join(modality.extensions)})"
    if not os.access(path, os.R_OK):
        return "cannot be read (no permission)"
    return state


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden by a dot or a system's: neither class nor image."""
    return name.startswith(".") or name in SYSTEM_NAMES


def find_classes(root: Path, found: Found, out: str) -> dict[str, str]:
    """Folder name → class name of each class, in label order. Class names are Unicode NFC, so that every system sorts them alike.

    Args:
        out: the output folder, for the commands in a message.

    Raises:
        DataError: there is no class folder; one has no images, is a link, or has a name that cannot be a class name; an image is in
            none; or the folders are splits instead of classes.
    """
    with os.scandir(root) as scan:
        entries = [entry for entry in scan if not is_hidden(entry.name) and entry.is_dir()]
    if not entries:
        raise DataError(f"images={root}: expected one folder per class; for unlabeled images say labeled=false")
    names = {entry.name: _class_name(root, entry.name) for entry in entries}
    if links := [names[entry.name] for entry in entries if entry.is_symlink()]:
        raise DataError(
            f"images={root}: {_listed(links)}: a link to a folder, and these are not followed; put the folder in its place"
        )
    _require_different(root, names)
    _refuse_splits(root, names, out)
    _require_images(root, found, names)
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _class_name(root: Path, folder: str) -> str:
    where = f"{root}: the class folder {folder!a}"
    try:
        folder.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where} has a name that is not UTF-8; rename it") from None
    if any(unicodedata.category(sign) in _UNPRINTABLE for sign in folder):
        raise DataError(f"{where} has a line break or another control character in its name; rename it")
    return unicodedata.normalize("NFC", folder)


def _require_different(root: Path, names: dict[str, str]) -> None:
    for name, count in Counter(names.values()).items():
        if count > 1:
            same = ", ".join(ascii(folder) for folder in sorted(names) if names[folder] == name)
            raise DataError(
                f"{root}: {same} are one name, in two ways to write its accents in Unicode; move both into one folder"
            )


class SplitFoldersError(DataError):
    """The folders are splits, not classes. `names`: of the folders."""

    names: list[str]


def _refuse_splits(root: Path, names: Iterable[str], out: str) -> None:
    """Raise SplitFoldersError when the folders are `train`, `test`, …, with the commands that pack each."""
    if not {name.lower() for name in names} <= _SPLITS:
        return
    validation = 0 if any(name.lower().startswith("val") for name in names) else 0.1
    commands = []
    for name in sorted(names):
        words = [f"out={out}/{name}", "validation=0"]
        if name.lower().startswith("train"):
            words = [f"out={out}", f"validation={validation}"]
        elif name.lower() == "unlabeled":
            words = [f"out={out}", "labeled=false"]
        commands.append("    " + shlex.join(["python", "-m", "data.pack", f"images={root / name}", *words]))
    error = SplitFoldersError(
        f"images={root}: {', '.join(sorted(names))} are splits, not classes; pack each by itself:\n"
        + "\n".join(commands)
    )
    error.names = sorted(names)
    raise error


def _require_images(root: Path, found: Found, names: dict[str, str]) -> None:
    if found.stray:
        raise DataError(
            f"{printable(str(root / found.stray))}: not in a class folder; move it into one, or say labeled=false"
        )
    empty = sorted(names.keys() - found.images_of.keys())
    if not empty:
        return
    inside = found.first_left_out_of.get(empty[0])
    first = f" ({inside})" if inside else ""
    raise DataError(
        f"images={root}: no images in {_listed(empty)}{first}, and every folder is a class; put images there, or move the folder away"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:_SHOWN])) + ", …" * (len(names) > _SHOWN)


def natural_order(names: Sequence[str]) -> list[str]:
    """Names in the order of classes in timm's folder reader: numbers by value, case ignored."""
    return sorted(
        names, key=lambda name: [int(part) if part.isdecimal() else part for part in _DIGITS.split(name.lower())]
    )

"""Shards by pattern: brace ranges and lists, and globs against listings. Opens nothing: `data.storage` gives the listings.

A listing that fails is an error, never an empty folder: whoever takes an outage for "no shards" commits a result without them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator

from data.storage.retry import StorageError

Entries = Callable[
    [str], dict[str, bool]
]  # URL of a folder → name in it → whether that is a folder; empty: no such folder

_BRACES = re.compile(r"\{([^{}]*)\}")
_GLOB = re.compile(r"[*?[]")
_NOT_ENTERED = "lost+found"  # of a mounted disk: root's alone, and never data


def expand_braces(pattern: str) -> list[str]:
    """`{000..012}` (downwards too) and `{a,b}`, in order. Raises StorageError for a range of anything but whole numbers."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [full for item in _brace_items(match.group(1)) for full in expand_braces(head + item + tail)]


def _brace_items(body: str) -> list[str]:
    first, dots, last = body.partition("..")
    if not dots:
        return body.split(",")
    if not (first.isdecimal() and last.isdecimal()):
        raise StorageError(f"{{{body}}}: a brace range needs two whole numbers, as in {{000..012}}")
    start, end = int(first), int(last)
    width = len(min(first, last, key=int))
    step = 1 if start <= end else -1
    return [str(number).zfill(width) for number in range(start, end + step, step)]


def has_glob(path: str) -> bool:
    """Whether a path has one of the signs * ? [ in it."""
    return _GLOB.search(path) is not None


def matches(pattern: str, entries: Entries, with_hidden: bool) -> list[str]:
    """Sorted paths or URLs that match a glob (`**`: any number of folders). A name that is there as it is written wins over what it
    would match: a folder may be called `run [1]`.

    Args:
        with_hidden: whether * and ? match names that begin with a dot.
    """
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if has_glob(part))
    found: list[str | None] = ["/".join(parts[:first])] if first else [None]  # None: the current folder
    for number, part in enumerate(parts[first:], first):
        is_last = number == len(parts) - 1
        step = _Step(entries, with_hidden, part, is_last)
        found = [path for parent in found for path in step.of(parent)]
    return sorted(path for path in found if path is not None)


class _Step:
    """One component of a pattern."""

    def __init__(self, entries: Entries, with_hidden: bool, part: str, is_last: bool) -> None:
        self._entries, self._with_hidden, self._part, self._is_last = entries, with_hidden, part, is_last

    def of(self, parent: str | None) -> Iterator[str | None]:
        """What it matches in a folder."""
        if self._part == "**":
            yield from self._below(parent)
        elif self._part in ("", ".", ".."):
            yield _join(parent, self._part)
        else:
            there = self._list(parent)
            names = [self._part] if self._part in there else fnmatch.filter(there, self._part)
            for name in names:
                hidden = name.startswith(".") and not self._part.startswith(".") and not self._with_hidden
                if not hidden and (self._is_last or there[name]):
                    yield _join(parent, name)

    def _below(self, parent: str | None) -> Iterator[str | None]:
        """The folder and all folders in it; as the last component, all files."""
        if not self._is_last:
            yield parent
        for name, is_folder in self._list(parent).items():
            if name.startswith(".") and not self._with_hidden:
                continue
            if is_folder:
                yield from self._below(_join(parent, name))
            elif self._is_last:
                yield _join(parent, name)

    def _list(self, parent: str | None) -> dict[str, bool]:
        there = self._entries("." if parent is None else parent or "/")
        return {name: is_folder for name, is_folder in there.items() if name != _NOT_ENTERED or self._part == name}


def _join(parent: str | None, name: str) -> str:
    return name if parent is None else f"{parent}/{name}"

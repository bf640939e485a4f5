"""Expand patterns to the files that they name: brace ranges and lists, then globs.

A listing that fails raises; it never counts as an empty folder, or a run would commit a result without those shards.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator

from . import local, remote
from .http import without_query
from .local import is_local, path_of, refuse_pipe
from .redact import redacted
from .retry import MissingError, StorageError

_BRACES = re.compile(r"\{([^{}]*)\}")
_GLOB = re.compile(r"[*?[]")
_NOT_ENTERED = "lost+found"  # at the root of a mounted disk; readable by root alone


def expand(patterns: str | Iterable[str]) -> list[str]:
    """Paths or URLs of shards: brace ranges `{000..012}` and lists `{a,b}`, then globs; in order, each once.

    A file whose name contains pattern characters is found by its exact name. The query of an http:// URL is no pattern.

    Raises:
        MissingError: a pattern matches nothing.
        StorageError: a folder cannot be listed, a brace range is not of whole numbers, or a `pipe:` URL is given.
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        refuse_pipe(pattern)
        head = _literal_head(pattern)
        for item in _expand_braces(pattern.removeprefix(head)):
            found.update(dict.fromkeys(_expand_glob(head + item)))
    return list(found)


def _literal_head(pattern: str) -> str:
    """The longest beginning of a local pattern that has braces and is the path of an existing file or folder."""
    if "{" not in pattern or not is_local(pattern):
        return ""
    ends = [number for number, sign in enumerate(pattern + "/") if sign == "/" and "{" in pattern[:number]]
    return next((pattern[:end] for end in reversed(ends) if os.path.lexists(path_of(pattern[:end]))), "")


def _expand_braces(pattern: str) -> list[str]:
    """`{000..012}` (downwards too) and `{a,b}`, in order. Raises StorageError for a range of anything but whole numbers."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [full for item in _brace_items(match.group(1)) for full in _expand_braces(head + item + tail)]


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


def _expand_glob(item: str) -> list[str]:
    refuse_pipe(item)
    if not _has_glob(without_query(item)):
        return [item]
    if without_query(item) != item:
        raise StorageError(f"{redacted(item)!r}: a URL with a query is one file; name each, or give {{000..012}}")
    found = _Glob(is_local(item)).matches(path_of(item))
    if not found:
        raise MissingError(f"{redacted(item)!r} matches no file; check the path")
    return found


def _has_glob(path: str) -> bool:
    return _GLOB.search(path) is not None


class _Glob:
    """Glob on local paths, where * and ? skip hidden files as in a shell, or on URLs. A parent of None is the current folder."""

    def __init__(self, is_local: bool) -> None:
        self._is_local = is_local

    def matches(self, pattern: str) -> list[str]:
        """Sorted paths or URLs that match (`**`: any number of folders). A component that exists as written matches only itself."""
        parts = pattern.split("/")
        first = next(number for number, part in enumerate(parts) if _has_glob(part))
        found: list[str | None] = ["/".join(parts[:first])] if first else [None]
        for number, part in enumerate(parts[first:], first):
            is_last = number == len(parts) - 1
            found = [path for parent in found for path in self._component(parent, part, is_last)]
        return sorted(path for path in found if path is not None)

    def _component(self, parent: str | None, part: str, is_last: bool) -> Iterator[str | None]:
        """What one component of the pattern matches in a folder."""
        if part == "**":
            yield from self._below(parent, is_last)
        elif part in ("", ".", ".."):
            yield _join(parent, part)
        else:
            there = self._list(parent, part)
            for name in [part] if part in there else fnmatch.filter(there, part):
                if (is_last or there[name]) and not (self._is_hidden(name) and not part.startswith(".")):
                    yield _join(parent, name)

    def _below(self, parent: str | None, is_last: bool) -> Iterator[str | None]:
        """The folder and all folders in it; for the last component, all files."""
        if not is_last:
            yield parent
        for name, is_folder in self._list(parent, "**").items():
            if self._is_hidden(name):
                continue
            if is_folder:
                yield from self._below(_join(parent, name), is_last)
            elif is_last:
                yield _join(parent, name)

    def _is_hidden(self, name: str) -> bool:
        return self._is_local and name.startswith(".")

    def _list(self, parent: str | None, part: str) -> dict[str, bool]:
        """Name → whether it is a folder."""
        folder = "." if parent is None else parent or "/"
        there = local.list_kinds(folder) if self._is_local else remote.list_kinds(folder)
        return {name: is_folder for name, is_folder in there.items() if name != _NOT_ENTERED or part == name}


def _join(parent: str | None, name: str) -> str:
    return name if parent is None else f"{parent}/{name}"

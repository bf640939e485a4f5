"""Sort more lines of text than memory holds: sorted parts in files, merged while they are read."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Self

LINES_AT_ONCE = 200_000


class LineWriter:
    """Write lines, which may have line breaks in them, for `read_lines`; use as a context manager."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w", encoding="ascii")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, line: str) -> None:
        """Append a line."""
        self._file.write(json.dumps(line) + "\n")


def read_lines(path: str) -> Iterator[str]:
    """The lines of a `LineWriter`, one at a time."""
    with Path(path).open(encoding="ascii") as file:
        yield from map(json.loads, file)


def sort_lines(lines: Iterable[str], folder: str) -> Iterator[str]:
    """The lines in order, with files in `folder` if there are more than `LINES_AT_ONCE`."""
    stream, paths = iter(lines), list[str]()
    while len(part := sorted(islice(stream, LINES_AT_ONCE))) == LINES_AT_ONCE:
        paths.append(f"{folder}/sorted-{len(paths)}")
        with LineWriter(paths[-1]) as file:
            for line in part:
                file.add(line)
    return heapq.merge(part, *map(read_lines, paths))

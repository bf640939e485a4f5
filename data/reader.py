"""Reading image bytes by (shard, row), seeking to exactly the images that are wanted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import BinaryIO

from data import storage
from data.manifest import DataError, Shard, Split
from data.sample import iterate_samples

_OPEN_FILES = 64
_MAX_WASTE = 2  # bytes read per byte wanted, rather than seeking


class ImageReader:
    """Image bytes in shards; keeps recently used files open. One per process."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the shard at position `shard`. Raises DataError, naming it, when they are not there."""
        file = self._file(shard)
        file.seek(offset)
        content = file.read(size)
        if len(content) != size:
            raise DataError(f"{self._urls[shard]}: cut short before byte {offset + size}; restore the shard")
        return content

    def read_many(self, shard: int, rows: Sequence[tuple[int, int]]) -> list[bytes]:
        """As `read` for several (offset, size), ascending: in one piece where they lie close together. A size of 0 reads nothing."""
        wanted = [(offset, size) for offset, size in rows if size]
        start = min((offset for offset, _ in wanted), default=0)
        stop = max((offset + size for offset, size in wanted), default=0)
        if stop - start > _MAX_WASTE * sum(size for _, size in wanted):
            return [self.read(shard, offset, size) if size else b"" for offset, size in rows]
        piece = memoryview(self.read(shard, start, stop - start))
        return [bytes(piece[offset - start : offset - start + size]) if size else b"" for offset, size in rows]

    def _file(self, shard: int) -> BinaryIO:
        file = self._files.pop(shard, None)
        if file is None:
            file = storage.open_read(self._urls[shard])
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files[shard] = file
        return file

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}  # open files do not travel to a loader process


def check_labeled(split: Split, num_classes: int) -> None:
    """Check every row of labeled shards: training data must be right.

    Raises:
        DataError: the first sample with a problem, without a label, or with one out of range.
    """
    for shard in split.shards:
        table = shard.index()
        columns = [table.column(name).to_pylist() for name in ("key", "label", "problem")]
        for ordinal, (key, label, problem) in enumerate(zip(*columns, strict=True)):
            where = f"{shard.url}, sample {ordinal} (key {key!r})"
            if problem:
                raise DataError(f"{where}: {problem}; repair or remove it")
            if label is None:
                raise DataError(f"{where}: {_no_label(shard, ordinal)}; labeled shards need one in every sample")
            if not 0 <= label < num_classes:
                raise DataError(f"{where}: label {label} is out of range; expected 0 to {num_classes - 1}")


def _no_label(shard: Shard, ordinal: int) -> str:
    """What is there instead of a label. The index doesn't say, so the shard is read again."""
    with storage.open_read(shard.url) as file:
        sample = next(islice(iterate_samples(file), ordinal, None), None)
    if sample is None or sample.label_text is None:
        return "no .cls member with a class index (0, 1, …)"
    return f".cls holds {sample.label_text!r}; expected a class index (0, 1, …)"

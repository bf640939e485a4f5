"""Pseudo-labels joined to the images of their shard: a WebDataset archive that need not be stored to be read.

Of each sample: the image's bytes as the source shard has them, `.cls` and `.json`. The layout follows from the label rows alone, so
the size is known before any image is read, and a range of bytes reads only the images in it. An export writes these bytes
to a file; a server streams them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby
from typing import Protocol

import numpy as np
import pyarrow as pa

from data.shards.image_reader import Place
from data.shards.samples import LABEL_FIELD
from data.shards.tar import end_of_archive, member, member_header, padding

JSON_FIELD = "json"
LABEL_COLUMNS = ("ordinal", "__key__", "offset", "size", "label", "confidence", "topk_index", "topk_prob", "rest")
_CHUNK, _CHUNK_BYTES = (
    64,
    1 << 20,
)  # made at once: at most so many samples, and no more bytes unless one sample has them
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")


class ByteSource(Protocol):
    """Where images come from; `data.shards.image_reader.ImageReader` is one."""

    def images(self, shard: int, places: Sequence[Place]) -> list[bytes]:
        """The images at several places, ascending, of the shard at position `shard`."""


@dataclass(frozen=True)
class Provenance:
    """What is said of every sample alike."""

    generation: int
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """A sample of the archive: its members but for the image, and where the image lies (in the source at position `shard`)."""

    key: str
    extension: str
    shard: int
    place: Place
    fields: dict[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self.place.size

    def around_image(self) -> tuple[bytes, bytes]:
        """The archive's bytes before the image's and after them, members sorted by field."""
        before = [member(f"{self.key}.{f}", self.fields[f]) for f in sorted(self.fields) if f < self.extension]
        after = [member(f"{self.key}.{f}", self.fields[f]) for f in sorted(self.fields) if f > self.extension]
        head = member_header(f"{self.key}.{self.extension}", self.size)
        return b"".join([*before, head]), b"".join([padding(self.size), *after])


class Entries(Protocol):
    """Samples in the archive's order, made as they are asked for."""

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> Iterator[Entry]:
        """Entries `start` to `stop`."""


class JoinedTar:
    """An archive of `entries`: its layout, and any range of its bytes."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        sizes = (sum(map(len, entry.around_image())) + entry.size for entry in entries.part(0, len(entries)))
        self._ends = np.fromiter(sizes, np.int64, len(entries)).cumsum()
        self._samples_end = int(self._ends[-1]) if len(entries) else 0
        self.size = self._samples_end + len(end_of_archive(self._samples_end))

    def read(self, source: ByteSource, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Bytes `start` to `stop` of the archive, in pieces of some samples each; images outside are not read.

        A piece has at most a MiB, or one sample, so that many archives can be read at once.

        Raises:
            DataError: as the source's `images`.
        """
        stop = self.size if stop is None else min(stop, self.size)
        first, last = (int(np.searchsorted(self._ends, at, side="right")) for at in (start, stop - 1))
        begin, last = first, min(last + 1, len(self._entries))
        while begin < last:
            at = int(self._ends[begin - 1]) if begin else 0
            full = int(np.searchsorted(self._ends, at + _CHUNK_BYTES, side="right"))
            end = min(begin + _CHUNK, max(full, begin + 1), last)
            samples = sample_bytes(list(self._entries.part(begin, end)), source)
            piece = b"".join(chain.from_iterable(samples))
            yield piece[max(start - at, 0) : max(stop - at, 0)]
            begin = end
        if stop > self._samples_end:
            tail = end_of_archive(self._samples_end)
            yield tail[max(start - self._samples_end, 0) : stop - self._samples_end]


def sample_bytes(entries: Sequence[Entry], source: ByteSource) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Of each entry: the archive's bytes before the image's, the image, and those after. Neighbours in a shard are read together."""
    for shard, group in groupby(entries, key=lambda entry: entry.shard):
        run = list(group)
        order = sorted(range(len(run)), key=lambda i: run[i].place.offset)
        contents = source.images(shard, [run[i].place for i in order])
        images = dict(zip(order, contents, strict=True))
        for position, entry in enumerate(run):
            before, after = entry.around_image()
            yield before, images[position], after


@dataclass(frozen=True, eq=False)
class Rows:
    """Label rows that are handed out, of one shard or of several.

    Attributes:
        labels: LABEL_COLUMNS.
        shard: position of each row's shard in the source, int [n].
        copies: how often the student sees the image, int [n].
        number: which of these copies the row is, int [n]: 0 but where repeats are written out.
        extension: of the image, string [n].
    """

    labels: pa.Table
    shard: np.ndarray
    copies: np.ndarray
    number: np.ndarray
    extension: pa.ChunkedArray

    def __len__(self) -> int:
        return int(self.labels.num_rows)

    def take(self, rows: np.ndarray) -> Rows:
        """The rows at these positions, in this order, int [m]."""
        at = pa.array(rows)
        return Rows(
            self.labels.take(at), self.shard[rows], self.copies[rows], self.number[rows], self.extension.take(at)
        )


class LabelEntries:
    """Label rows as samples of an archive.

    Args:
        names: of the shards, by position in the source.
    """

    def __init__(self, rows: Rows, names: Sequence[str], provenance: Provenance) -> None:
        self._rows, self._names, self._provenance = rows, names, provenance

    def __len__(self) -> int:
        return len(self._rows)

    def part(self, start: int, stop: int) -> Iterator[Entry]:
        """Entries `start` to `stop`."""
        rows, part, names = self._rows, slice(start, stop), self._provenance.class_names
        labels = rows.labels.slice(start, stop - start)
        extensions = rows.extension.slice(start, stop - start).to_pylist()
        numbers = (values[part].tolist() for values in (rows.shard, rows.copies, rows.number))
        plain = (labels.column(name).to_pylist() for name in ("__key__", "offset", "size"))
        for key, offset, size, said, shard, copies, number, extension in zip(
            *plain, _said(labels), *numbers, extensions, strict=True
        ):
            ordinal, label, confidence, top_k, rest = said
            name = self._names[shard]
            class_name = json.dumps(names[label] if names else None)
            text = (
                f'{{"label":{label},"class_name":{class_name},"confidence":{confidence:.9g},"top_k":[{top_k}],"rest":{rest:.9g},'
                f'"copies":{copies},"generation":{self._provenance.generation},'
                f'"source":{{"shard":{json.dumps(name)},"ordinal":{ordinal},"key":{json.dumps(key)}}}}}'
            )
            fields = {LABEL_FIELD: str(label).encode(), JSON_FIELD: text.encode()}
            place = Place(ordinal, key, offset, size)
            yield Entry(sample_key(name, ordinal, number), extension, shard, place, fields)


def _said(labels: pa.Table) -> Iterator[tuple[int, int, float, str, float]]:
    """Ordinal, label, confidence, top k as JSON, and rest, row by row. Probabilities keep the digits of their type: 9, or 5 of fp16.

    Column by column: pyarrow's rows of lists take four times as long.
    """
    top_k = labels.schema.field("topk_index").type.list_size
    index = labels.column("topk_index").combine_chunks().flatten().to_numpy().reshape(-1, top_k).tolist()
    prob = labels.column("topk_prob").combine_chunks().flatten().to_numpy().reshape(-1, top_k).tolist()
    plain = (labels.column(name).to_numpy().tolist() for name in ("ordinal", "label", "confidence", "rest"))
    for ordinal, label, confidence, rest, classes, probs in zip(*plain, index, prob, strict=True):
        pairs = ",".join([f"[{c},{p:.5g}]" for c, p in zip(classes, probs, strict=True)])
        yield ordinal, label, confidence, pairs, rest


def sample_key(shard: str, ordinal: int, number: int = 0) -> str:
    """Key of a sample that is handed out; of a further copy, with its number."""
    return f"{key_prefix(shard)}-{ordinal:07d}" + (f"-{number}" if number else "")


@cache
def key_prefix(shard: str) -> str:
    """What the keys of a shard's samples begin with: its name, or, where that may not be in a key, one made of it and its digest."""
    if _SAFE_NAME.fullmatch(shard):
        return shard
    cleaned = re.sub(r"[^A-Za-z0-9_-]", "_", shard)[:64]
    return f"{cleaned}-{hashlib.sha256(shard.encode()).hexdigest()[:8]}"

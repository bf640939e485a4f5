"""Join pseudo-labels and the images of their shard into a WebDataset archive, any byte range of which can be made by itself.

A sample has the image's bytes unchanged, `.cls` and `.json`. The layout follows from the label rows, so the size is known before any
image is read, and a byte range reads only its own images. An export writes the archive to a file; a server streams it.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, groupby
from json.encoder import encode_basestring_ascii
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..shards.image_ranges import FileRange, ImageRanges
from ..shards.image_reader import ImageReader, Place
from ..shards.samples import LABEL_FIELD
from ..shards.tar import end_of_archive, member_headers, padding
from .top_k import top_k_columns

JSON_FIELD = "json"
_CHUNK, _CHUNK_BYTES = 64, 2 << 20  # limits of what is made at once: samples; bytes, unless one sample has more
_LAID_OUT = 512  # samples whose sizes are computed together
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")

Images = ImageReader | ImageRanges
Part = bytes | FileRange


@dataclass(frozen=True)
class Provenance:
    """Metadata shared by all samples: the generation of the labels, and the class names in label order."""

    generation: int
    class_names: tuple[str, ...] | None = None


class Entry(NamedTuple):
    """A sample of the archive: the place of its image in the source's shard `shard`, and the content of its other fields."""

    key: str
    extension: str
    shard: int
    place: Place
    fields: dict[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self.place.size


def frames(entries: Sequence[Entry]) -> list[tuple[bytes, bytes]]:
    """For each entry, the sample's bytes before the image and after it; members are sorted by field."""
    fields = [sorted([*entry.fields.items(), (entry.extension, None)]) for entry in entries]
    names = [f"{entry.key}.{field}" for entry, own in zip(entries, fields, strict=True) for field, _ in own]
    sizes = [
        entry.size if content is None else len(content)
        for entry, own in zip(entries, fields, strict=True)
        for _, content in own
    ]
    headers = iter(member_headers(names, sizes))
    return [_frame(own, entry.size, headers) for entry, own in zip(entries, fields, strict=True)]


def _frame(fields: Sequence[tuple[str, bytes | None]], size: int, headers: Iterator[bytes]) -> tuple[bytes, bytes]:
    """The bytes around an image of `size` bytes; `fields` has None in its place. Takes a header for each field."""
    before: list[bytes] = []
    after: list[bytes] = []
    parts = before
    for _, content in fields:
        parts.append(next(headers))
        if content is None:
            parts = after
            parts.append(padding(size))
        else:
            parts += content, padding(len(content))
    return b"".join(before), b"".join(after)


class JoinedTar:
    """An archive of `entries`: its size in bytes, and any range of its bytes."""

    def __init__(self, entries: LabelEntries) -> None:
        self._entries = entries
        parts = (list(entries.part(at, at + _LAID_OUT)) for at in range(0, len(entries), _LAID_OUT))
        sizes = [
            len(b) + entry.size + len(a) for part in parts for entry, (b, a) in zip(part, frames(part), strict=True)
        ]
        self._ends = np.array(sizes, np.int64).cumsum()
        self._samples_end = int(self._ends[-1]) if len(entries) else 0
        self.size = self._samples_end + len(end_of_archive(self._samples_end))

    def parts(self, source: Images, start: int = 0, stop: int | None = None) -> Iterator[Sequence[Part]]:
        """Bytes `start` to `stop` of the archive, in pieces, each as parts to put together. Reads only the images in this range.

        A piece has at most 2 MiB or one sample, to keep memory small when many archives are read at once. Images are as `source` gives
        them.

        Raises:
            DataError: as `ImageReader.images`.
        """
        stop = self.size if stop is None else min(stop, self.size)
        first, last = (int(np.searchsorted(self._ends, at, side="right")) for at in (start, stop - 1))
        begin, last = first, min(last + 1, len(self._entries))
        while begin < last:
            at = int(self._ends[begin - 1]) if begin else 0
            full = int(np.searchsorted(self._ends, at + _CHUNK_BYTES, side="right"))
            end = min(begin + _CHUNK, max(full, begin + 1), last)
            samples = sample_bytes(list(self._entries.part(begin, end)), source)
            yield cut(chain.from_iterable(samples), start - at, stop - at)
            begin = end
        if stop > self._samples_end:
            yield cut([end_of_archive(self._samples_end)], start - self._samples_end, stop - self._samples_end)


def cut(parts: Iterable[Part], start: int, stop: int) -> list[Part]:
    """The parts of bytes `start` to `stop` of all parts together."""
    found: list[Part] = []
    at = 0
    for part in parts:
        size = len(part)
        if at >= start and at + size <= stop:
            found.append(part)
        elif at < stop and at + size > start:
            found.append(part[max(start - at, 0) : stop - at])
        at += size
    return found


def sample_bytes(entries: Sequence[Entry], source: Images) -> Iterator[tuple[bytes, Part, bytes]]:
    """For each entry: the bytes before the image, the image, the bytes after it. Reads neighbours in a shard together."""
    for shard, group in groupby(entries, key=lambda entry: entry.shard):
        run = list(group)
        order = sorted(range(len(run)), key=lambda i: run[i].place.offset)
        contents = source.images(shard, [run[i].place for i in order])
        images = dict(zip(order, contents, strict=True))
        for position, (before, after) in enumerate(frames(run)):
            yield before, images[position], after


@dataclass(frozen=True, eq=False)
class Rows:
    """Label rows to hand out, from one shard or several.

    Attributes:
        labels: `data.labels.label_files.LABEL_COLUMNS`.
        shard: position of each row's shard in the source, int [n].
        copies: how often the student sees the image, int [n].
        number: which copy the row is, int [n]; 0 unless copies are written out.
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
        """The rows at these positions (int [m]), in this order."""
        at = pa.array(rows)
        return Rows(
            self.labels.take(at), self.shard[rows], self.copies[rows], self.number[rows], self.extension.take(at)
        )


class LabelEntries:
    """Label rows as samples of an archive; their JSON is made once.

    Args:
        names: of the source's shards, by position.
    """

    def __init__(self, rows: Rows, names: Sequence[str], provenance: Provenance) -> None:
        self._names = names
        # Lists and arrays, of which any range is cheap: a slice of a table costs as much as twenty samples.
        self._keys = rows.labels.column("__key__").to_pylist()
        self._extensions = list(map(sys.intern, rows.extension.to_pylist()))
        numbers = (rows.labels.column(name).to_numpy() for name in ("ordinal", "label", "offset", "size"))
        self._numbers = [*numbers, rows.shard, rows.number]
        self._json = list(_json_contents(self._keys, rows, names, provenance))

    def __len__(self) -> int:
        return len(self._json)

    def part(self, start: int, stop: int) -> Iterator[Entry]:
        """Entries `start` to `stop`, or to the last."""
        columns = (column[start:stop] for column in (self._keys, self._extensions, self._json))
        numbers = (values[start:stop].tolist() for values in self._numbers)
        for key, extension, text, ordinal, label, offset, size, shard, number in zip(*columns, *numbers, strict=True):
            place = Place(ordinal, key, offset, size)
            fields = {LABEL_FIELD: b"%d" % label, JSON_FIELD: text}
            yield Entry(sample_key(self._names[shard], ordinal, number), extension, shard, place, fields)


def _json_contents(keys: Sequence[str], rows: Rows, names: Sequence[str], provenance: Provenance) -> Iterator[bytes]:
    """The `.json` of each row. Float32 is written with 9 digits, fp16 with 5."""
    class_names, generation = [_json_text(name) for name in provenance.class_names or ()], provenance.generation
    columns = [rows.labels.column(name).to_numpy() for name in ("ordinal", "label", "confidence", "rest")]
    columns += [*top_k_columns(rows.labels), rows.shard, rows.copies]
    parts = (slice(at, at + _LAID_OUT) for at in range(0, len(rows), _LAID_OUT))
    rows_of = (zip(keys[part], *(values[part].tolist() for values in columns), strict=True) for part in parts)
    for key, ordinal, label, confidence, rest, classes, probs, shard, copies in chain.from_iterable(rows_of):
        class_name = class_names[label] if class_names else "null"
        top_k = ",".join([f"[{c},{_five_digits(p)}]" for c, p in zip(classes, probs, strict=True)])
        yield (
            f'{{"label":{label},"class_name":{class_name},"confidence":{confidence:.9g},"top_k":[{top_k}],"rest":{rest:.9g},'
            f'"copies":{copies},"generation":{generation},'
            f'"source":{{"shard":{_json_text(names[shard])},"ordinal":{ordinal},"key":{_json_text(key)}}}}}'
        ).encode()


_json_text = encode_basestring_ascii


@lru_cache(maxsize=2**16)
def _five_digits(value: float) -> str:
    """A cache, as there are 15,361 probabilities in fp16, and making their texts takes half of an entry's time."""
    return f"{value:.5g}"


def sample_key(shard: str, ordinal: int, number: int = 0) -> str:
    """Key of a sample that is handed out; with the copy's number, if not 0."""
    return f"{key_prefix(shard)}-{ordinal:07d}" + (f"-{number}" if number else "")


@cache
def key_prefix(shard: str) -> str:
    """The beginning of a shard's keys: its name, or a cleaned name and a digest when the name may not be in a key."""
    if _SAFE_NAME.fullmatch(shard):
        return shard
    cleaned = re.sub(r"[^A-Za-z0-9_-]", "_", shard)[:64]
    return f"{cleaned}-{hashlib.sha256(shard.encode()).hexdigest()[:8]}"

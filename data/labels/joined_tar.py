"""Join pseudo-labels and the images of their shard into a WebDataset archive, any byte range of which can be made by itself.

A sample has the image's bytes unchanged, `.cls` and `.json`. The layout follows from the label rows, so the size is known before any
image is read, and a byte range reads only its own images. An export writes the archive to a file; a server streams it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, groupby
from json.encoder import encode_basestring_ascii
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..shards.image_reader import ImageReader, Place
from ..shards.image_views import ImageViews
from ..shards.samples import LABEL_FIELD
from ..shards.tar import end_of_archive, member, member_header, padding
from .top_k import top_k_columns

JSON_FIELD = "json"
_CHUNK, _CHUNK_BYTES = 64, 2 << 20  # limits of what is made at once: samples; bytes, unless one sample has more
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")

Images = ImageReader | ImageViews


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

    def around_image(self) -> tuple[bytes, bytes]:
        """The sample's bytes before the image and after it; members are sorted by field."""
        key, extension, size = self.key, self.extension, self.place.size
        before: list[bytes] = []
        after = [padding(size)]
        for field, content in sorted(self.fields.items()):
            (before if field < extension else after).append(member(f"{key}.{field}", content))
        before.append(member_header(f"{key}.{extension}", size))
        return b"".join(before), b"".join(after)


class JoinedTar:
    """An archive of `entries`: its size in bytes, and any range of its bytes."""

    def __init__(self, entries: LabelEntries) -> None:
        self._entries = entries
        sizes = (sum(map(len, entry.around_image())) + entry.size for entry in entries.part(0, len(entries)))
        self._ends = np.fromiter(sizes, np.int64, len(entries)).cumsum()
        self._samples_end = int(self._ends[-1]) if len(entries) else 0
        self.size = self._samples_end + len(end_of_archive(self._samples_end))

    def read(self, source: Images, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Bytes `start` to `stop` of the archive, in pieces. Limits and errors as for `parts`."""
        return (b"".join(parts) for parts in self.parts(source, start, stop))

    def parts(self, source: Images, start: int = 0, stop: int | None = None) -> Iterator[Sequence[bytes | memoryview]]:
        """Bytes `start` to `stop` of the archive, in pieces, each as parts to put together. Reads only the images in this range.

        A piece has at most 2 MiB or one sample, to keep memory small when many archives are read at once. Images are as `source` gives
        them: views are valid until the next piece.

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


def cut(parts: Iterable[bytes | memoryview], start: int, stop: int) -> list[bytes | memoryview]:
    """The parts of bytes `start` to `stop` of all parts together; copies nothing that is a view."""
    found, at = [], 0
    for part in parts:
        size = len(part)
        if at >= start and at + size <= stop:
            found.append(part)
        elif at < stop and at + size > start:
            found.append(part[max(start - at, 0) : stop - at])
        at += size
    return found


def sample_bytes(entries: Sequence[Entry], source: Images) -> Iterator[tuple[bytes, bytes | memoryview, bytes]]:
    """For each entry: the bytes before the image, the image, the bytes after it. Reads neighbours in a shard together."""
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
    """Label rows as samples of an archive.

    Args:
        names: of the source's shards, by position.
    """

    def __init__(self, rows: Rows, names: Sequence[str], provenance: Provenance) -> None:
        self._names, self._provenance = names, provenance
        self._class_names = [_json_text(name) for name in provenance.class_names or ()]
        # Columns, of which any range is cheap: a slice of a table costs as much as twenty samples.
        self._texts = [_combined(column) for column in (rows.labels.column("__key__"), rows.extension)]
        plain = [
            rows.labels.column(name).to_numpy() for name in ("ordinal", "label", "confidence", "rest", "offset", "size")
        ]
        self._numbers = [*plain, *top_k_columns(rows.labels), rows.shard, rows.copies, rows.number]
        self._length = len(rows)

    def __len__(self) -> int:
        return self._length

    def part(self, start: int, stop: int) -> Iterator[Entry]:
        """Entries `start` to `stop`. Float32 is written with 9 digits, fp16 with 5."""
        texts = (column.slice(start, stop - start).to_pylist() for column in self._texts)
        numbers = (values[start:stop].tolist() for values in self._numbers)
        generation = self._provenance.generation
        for (
            key, extension, ordinal, label, confidence, rest, offset, size, classes, probs, shard, copies, number,
        ) in zip(*texts, *numbers, strict=True):  # fmt: skip
            name = self._names[shard]
            class_name = self._class_names[label] if self._class_names else "null"
            top_k = ",".join([f"[{c},{_five_digits(p)}]" for c, p in zip(classes, probs, strict=True)])
            text = (
                f'{{"label":{label},"class_name":{class_name},"confidence":{confidence:.9g},"top_k":[{top_k}],"rest":{rest:.9g},'
                f'"copies":{copies},"generation":{generation},'
                f'"source":{{"shard":{_json_text(name)},"ordinal":{ordinal},"key":{_json_text(key)}}}}}'
            )
            content = {LABEL_FIELD: b"%d" % label, JSON_FIELD: text.encode()}
            place = Place(ordinal, key, offset, size)
            yield Entry(sample_key(name, ordinal, number), extension, shard, place, content)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


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

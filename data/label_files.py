"""Pseudo-labels as an overlay: one Parquet file per unlabeled shard, rows in the shard's order; images are never copied.

Samples that could not be used are in the same file's metadata, so that a shard's labels are one commit: samples in the shard =
rows + quarantined, always.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.manifest import DataError, Shard

LABELS_MANIFEST = "manifest.json"
QUARANTINE_NAME = "quarantine.parquet"
COPIES_COLUMN = "copies"
MAX_CLASSES = 32_767  # `topk_index` is int16
_LAST_CLASS = 0xFFFF
_QUARANTINE_KEY, _SOURCE_KEY = b"quarantine", b"source"
_DELTA = "DELTA_BINARY_PACKED"
_ENCODINGS = {
    "ordinal": _DELTA, "offset": _DELTA, "size": _DELTA, "confidence": "PLAIN", "rest": "PLAIN", "image_hash": "PLAIN",
}  # fmt: skip
_BUFFER = 2**16  # bytes of a local file that are read at once: they stay in a core's cache
# Hardly smaller compressed, and selection reads them again and again.
_UNCOMPRESSED = {"ordinal", "label", "confidence", "image_hash"}


@dataclass(frozen=True)
class Quarantined:
    """A sample that could not be labeled."""

    shard: str
    ordinal: int
    key: str
    offset: int
    reason: str


def label_schema(top_k: int) -> pa.Schema:
    """Columns of a label file. `confidence` is the calibrated probability of `label`; rank by it, never by the rounded `topk_prob`."""
    return pa.schema(
        [
            pa.field("ordinal", pa.int32()),  # position in the shard; (shard, ordinal) is the identity
            pa.field("__key__", pa.string()),
            pa.field("offset", pa.int64()),  # of the image member's bytes in the tar
            pa.field("size", pa.int64()),
            pa.field("label", pa.int32()),
            pa.field("confidence", pa.float32()),
            pa.field("topk_index", pa.list_(pa.int16(), top_k)),
            pa.field("topk_prob", pa.list_(pa.float16(), top_k)),
            pa.field("rest", pa.float32()),  # probability of all other classes together
            pa.field("image_hash", pa.uint64()),
        ]
    )


def write_label_table(table: pa.Table, where: BinaryIO) -> None:
    """Write rows of `label_schema` in a layout of which selection reads its columns in half the time of pyarrow's own."""
    leaves = {name: f"{name}.list.element" if name.startswith("topk_") else name for name in table.column_names}
    pq.write_table(
        table,
        where,
        compression={leaf: "none" if name in _UNCOMPRESSED else "zstd" for name, leaf in leaves.items()},
        use_dictionary=[leaf for name, leaf in leaves.items() if name not in _ENCODINGS],
        column_encoding=_ENCODINGS,
    )


@dataclass(frozen=True, eq=False)
class TopK:
    """The highest probabilities of N images: `index` int64 (N, K) and `prob` float32 (N, K), highest first; `rest` float32 (N,)."""

    index: np.ndarray
    prob: np.ndarray
    rest: np.ndarray

    @staticmethod
    def concatenate(parts: Sequence[TopK], top_k: int) -> TopK:
        """One after the other; `top_k` tells the shape when there are none."""
        none = TopK(np.empty((0, top_k), np.int64), np.empty((0, top_k), np.float32), np.empty(0, np.float32))
        parts = [none, *parts]
        return TopK(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("index", "prob", "rest")))


def top_k_of(probabilities: np.ndarray, top_k: int) -> TopK:
    """Of equal probabilities, the lower class comes first.

    Args:
        probabilities: (N, C) float32, calibrated, non-negative; rows sum to 1.
        top_k: at most C.
    """
    # One integer per entry, probability bits above class, makes every order the same; argsort takes eight times as long.
    bits = np.ascontiguousarray(probabilities).view(np.int32).astype(np.int64)
    keys = np.negative((bits << 16) | (_LAST_CLASS - np.arange(bits.shape[1])))
    top = np.sort(np.partition(keys, top_k - 1, axis=1)[:, :top_k], axis=1)
    index = _LAST_CLASS - (np.negative(top) & _LAST_CLASS)
    prob = np.take_along_axis(probabilities, index, axis=1)
    rest = np.clip(1.0 - prob.sum(axis=1, dtype=np.float64), 0, 1).astype(np.float32)
    return TopK(index, prob, rest)


def label_table(index: pa.Table, ordinals: np.ndarray, top_k: TopK, image_hashes: np.ndarray) -> pa.Table:
    """Rows for the samples `ordinals` of a shard.

    Args:
        index: the shard's index table.
        ordinals: (N,) int, ascending.
        image_hashes: (N,) uint64.
    """
    rows, width = index.take(pa.array(ordinals, pa.int64())), top_k.index.shape[1]
    columns = {
        "ordinal": pa.array(ordinals.astype(np.int32)),
        "__key__": rows.column("key"),
        "offset": rows.column("offset"),
        "size": rows.column("size"),
        "label": pa.array(top_k.index[:, 0].astype(np.int32)),
        "confidence": pa.array(top_k.prob[:, 0]),
        "topk_index": _fixed_lists(top_k.index.astype(np.int16), width),
        "topk_prob": _fixed_lists(top_k.prob.astype(np.float16), width),
        "rest": pa.array(top_k.rest),
        "image_hash": pa.array(image_hashes, pa.uint64()),
    }
    return pa.table(columns, schema=label_schema(width))


def _fixed_lists(values: np.ndarray, length: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), length)


@dataclass(frozen=True)
class LabeledShard:
    """A label file and the shard that it belongs to: an entry of the labels' manifest."""

    name: str
    source_bytes: int
    index_sha256: str
    rows: int
    quarantined: int
    bytes: int
    sha256: str
    made_by: str  # digest of what the labels depend on besides the shard: teacher and configuration

    def is_of(self, shard: Shard, made_by: str) -> bool:
        """True for labels of this shard as it is now, by this teacher and configuration."""
        return (self.source_bytes, self.index_sha256, self.made_by) == (shard.bytes, shard.index_sha256, made_by)


def write_labels(
    url: str, shard: Shard, table: pa.Table, quarantined: Sequence[Quarantined], made_by: str
) -> LabeledShard:
    """Commit a shard's labels and its quarantined samples as one file, which says whose they are."""
    source = {"bytes": shard.bytes, "index_sha256": shard.index_sha256, "made_by": made_by}
    ledger = [asdict(row) for row in quarantined]
    metadata = {_SOURCE_KEY: json.dumps(source).encode(), _QUARANTINE_KEY: json.dumps(ledger).encode()}
    buffer = io.BytesIO()
    write_label_table(table.replace_schema_metadata(metadata), buffer)
    storage.write_bytes(url, buffer.getvalue())
    return _describe(shard.name, table.num_rows, metadata, buffer.getvalue())


def describe_label_file(url: str) -> LabeledShard | None:
    """What a label file holds, or None when it is damaged."""
    content = storage.read_bytes(url)
    try:
        file = pq.ParquetFile(io.BytesIO(content))
    except (pa.ArrowInvalid, OSError):  # OSError: of a damaged footer
        return None
    return _describe(
        storage.base_name(url).removesuffix(".parquet"), file.metadata.num_rows, file.schema_arrow.metadata, content
    )


def _describe(name: str, rows: int, metadata: Mapping[bytes, bytes], content: bytes) -> LabeledShard:
    source, ledger = json.loads(metadata[_SOURCE_KEY]), json.loads(metadata[_QUARANTINE_KEY])
    sha256 = hashlib.sha256(content).hexdigest()
    identity = source["bytes"], source["index_sha256"]
    return LabeledShard(name, *identity, rows, len(ledger), len(content), sha256, source.get("made_by", ""))


def read_labels(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a label file; with `columns`, only these are read (all by default)."""
    if columns is None:
        return pq.read_table(io.BytesIO(storage.read_bytes(url)))
    with open_label_file(url) as file:
        return file.read(columns=list(columns), use_threads=False)


def has_all_samples(file: pq.ParquetFile) -> bool:
    """True where no sample of a label file's shard is quarantined: its ordinals are 0, 1, 2 …, and need not be read."""
    return (file.schema_arrow.metadata or {}).get(_QUARANTINE_KEY) == b"[]"


@contextmanager
def open_label_file(url: str) -> Iterator[pq.ParquetFile]:
    """A label or copies file of which some columns are read. Raises FileNotFoundError, or pyarrow's errors of a damaged one.

    What is needed is read ahead where a store has it; of a local file that costs more than it saves.
    """
    is_local = storage.is_local(url)
    with (
        storage.open_native(url) as stream,
        pq.ParquetFile(stream, pre_buffer=not is_local, buffer_size=_BUFFER * is_local) as file,
    ):
        yield file


def read_quarantined(table: pa.Table) -> list[Quarantined]:
    """The quarantined samples in a label table's metadata."""
    ledger = (table.schema.metadata or {}).get(_QUARANTINE_KEY, b"[]")
    return [Quarantined(**row) for row in json.loads(ledger)]


def quarantine_table(rows: Sequence[Quarantined]) -> pa.Table:
    """The table of `quarantine.parquet`."""
    schema = pa.schema(
        [
            ("shard", pa.string()),
            ("ordinal", pa.int32()),
            ("key", pa.string()),
            ("offset", pa.int64()),
            ("reason", pa.string()),
        ]
    )
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)


def soft_targets(table: pa.Table, num_classes: int) -> np.ndarray:
    """(N, C) float32 class probabilities of label rows; what is not in the top k is spread evenly over the other classes."""
    top_k = table.schema.field("topk_index").type.list_size
    index = table.column("topk_index").combine_chunks().flatten().to_numpy().reshape(-1, top_k).astype(np.int64)
    top = table.column("topk_prob").combine_chunks().flatten().to_numpy().reshape(-1, top_k).astype(np.float32)
    others = max(num_classes - top_k, 1)
    rest = table.column("rest").to_numpy() if num_classes > top_k else np.zeros(len(top), np.float32)
    targets = np.repeat((rest / others)[:, None], num_classes, axis=1).astype(np.float32)
    np.put_along_axis(targets, index, top, axis=1)
    return np.asarray(targets / targets.sum(axis=1, keepdims=True), np.float32)


def read_manifest(folder: str) -> list[LabeledShard]:
    """The shards in a labels folder's manifest. Raises DataError for a damaged one."""
    url = storage.join(folder, LABELS_MANIFEST)
    try:
        content = json.loads(storage.read_text(url))
        return [LabeledShard(**entry) for entry in content["shards"]]
    except ValueError as error:
        raise DataError(f"{url}: damaged ({error}); remove it and run stage=label, which keeps the labels") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{url}: of another version ({error}); run stage=label force=true") from error

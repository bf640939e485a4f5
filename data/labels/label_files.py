"""Label files: one Parquet file of pseudo-labels per unlabeled shard, rows in the shard's order, without images.

Quarantined samples are in the file's metadata, so that one commit has both: samples in the shard = rows + quarantined.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError

from .. import storage
from ..errors import DataError, damaged
from ..json_files import first_problem, parse_json, read_json
from ..shards.split import Shard
from ..storage.redact import redacted
from ..tables import END_OF_FILE, TableFile, open_content, open_table, read_whole, to_parquet
from .top_k import TopK

LABELS_MANIFEST = "manifest.json"
QUARANTINE_NAME = "quarantine.parquet"
VALIDATION_NAME = "validation.parquet"  # validation images as the teacher labels them
COPIES_COLUMN = "copies"
LABELS_REMEDY = "stage=label verify=true moves it aside, and stage=label makes it again"
MANIFEST_REMEDY = "remove it and run stage=label, which keeps the labels"
LABELS_OUTPUT_REMEDY = "delete it and run stage=label, which keeps the labels and makes it again"
COPIES_REMEDY = "stage=select force=true makes it again"
_QUARANTINE_KEY, _SOURCE_KEY = b"quarantine", b"source"
_MAX_FETCHED = 4 << 20  # bytes of a file that is read whole for some columns; 10,000 labels have 0.6 MB
_DELTA = "DELTA_BINARY_PACKED"
_ENCODINGS = {
    "ordinal": _DELTA, "offset": _DELTA, "size": _DELTA, "confidence": "PLAIN", "rest": "PLAIN", "image_hash": "PLAIN",
}  # fmt: skip
# hardly smaller when compressed, and selection reads them several times
_UNCOMPRESSED = {"ordinal", "label", "confidence", "image_hash"}


@dataclass(frozen=True)
class Quarantined:
    """A sample that could not be labeled, and why."""

    shard: str
    ordinal: int
    key: str
    offset: int
    reason: str


_QUARANTINE = TypeAdapter(list[Quarantined])


def label_schema(top_k: int) -> pa.Schema:
    """Columns of a label file.

    `confidence` is the calibrated probability of `label`; rank by it, never by the rounded `topk_prob`. Calibrated: probabilities have
    temperatures (one of the model; with several views or teachers, one of their mean as well), fitted on the validation images as these
    are labeled. So of many images like those, as many are right as their confidences promise on average. This says nothing about a
    single class, about the labels above a threshold, or about images unlike the validation images; without validation images there is
    no temperature, and confidences are the model's own, mostly too high.
    """
    return pa.schema(
        [
            pa.field("ordinal", pa.int32()),  # position in the shard; (shard, ordinal) is the identity
            pa.field("__key__", pa.string()),
            pa.field("offset", pa.int64()),  # byte of the image in the tar
            pa.field("size", pa.int64()),
            pa.field("label", pa.int32()),
            pa.field("confidence", pa.float32()),
            pa.field("topk_index", pa.list_(pa.int16(), top_k)),
            pa.field("topk_prob", pa.list_(pa.float16(), top_k)),
            pa.field("rest", pa.float32()),  # total probability of the other classes
            pa.field("image_hash", pa.uint64()),
        ]
    )


LABEL_COLUMNS = tuple(name for name in label_schema(1).names if name != "image_hash")
"""Columns handed out to other projects: all but `image_hash`."""


def label_file_bytes(table: pa.Table) -> bytes:
    """The label file of rows of `label_schema`, encoded so that selection reads its columns in half the time of pyarrow's default."""
    leaves = {name: f"{name}.list.element" if name.startswith("topk_") else name for name in table.column_names}
    return to_parquet(
        table,
        compression={leaf: "none" if name in _UNCOMPRESSED else "zstd" for name, leaf in leaves.items()},
        use_dictionary=[leaf for name, leaf in leaves.items() if name not in _ENCODINGS],
        column_encoding=_ENCODINGS,
    )


def label_table(index: pa.Table, ordinals: np.ndarray, top_k: TopK, image_hashes: np.ndarray) -> pa.Table:
    """Label rows for the samples `ordinals` of a shard.

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
    """A label file and its shard: an entry of the labels' manifest.

    Attributes:
        sha256: of the file; empty where its footer alone was read (`data.labels.label_footers`).
    """

    name: str
    source_bytes: int
    index_sha256: str
    rows: int
    quarantined: int
    bytes: int
    sha256: str
    made_by: str  # digest of teacher and configuration

    def is_of(self, shard: Shard, made_by: str) -> bool:
        """Whether the labels are of this shard as it is now, by this teacher and configuration."""
        return (self.source_bytes, self.index_sha256, self.made_by) == (shard.bytes, shard.index_sha256, made_by)


def write_labels(
    url: str, shard: Shard, table: pa.Table, quarantined: Sequence[Quarantined], made_by: str
) -> LabeledShard:
    """Commit a shard's labels and quarantined samples as one file, whose metadata identifies shard and teacher."""
    source = {"bytes": shard.bytes, "index_sha256": shard.index_sha256, "made_by": made_by}
    ledger = [asdict(row) for row in quarantined]
    metadata = {_SOURCE_KEY: json.dumps(source).encode(), _QUARANTINE_KEY: json.dumps(ledger).encode()}
    content = label_file_bytes(table.replace_schema_metadata(metadata))
    storage.write_bytes(url, content)
    return describe(url, table.num_rows, metadata, len(content), hashlib.sha256(content).hexdigest())


def describe_label_file(url: str) -> LabeledShard | None:
    """The manifest's entry for a label file, from the file itself; None when it is damaged or no label file. Reads all of it."""
    content = storage.read_bytes(url)
    try:
        with open_content(content, url, "") as file:
            sha256 = hashlib.sha256(content).hexdigest()
            return describe(url, file.read().num_rows, file.metadata, len(content), sha256)
    except (DataError, LookupError):  # LookupError: a Parquet file without our metadata
        return None


def describe(url: str, rows: int, metadata: Mapping[bytes, bytes], num_bytes: int, sha256: str) -> LabeledShard:
    """The manifest's entry for a label file with this metadata.

    Raises:
        LookupError: it has no metadata of ours.
        DataError: its metadata are damaged.
    """
    name = storage.base_name(url).removesuffix(".parquet")
    source = _source(metadata, url)
    if source is None:
        raise LookupError(name)
    identity = source["bytes"], source["index_sha256"]
    quarantined = len(quarantined_in(metadata, url))
    return LabeledShard(name, *identity, rows, quarantined, num_bytes, sha256, source.get("made_by", ""))


class _Source(BaseModel):
    """A label file's metadata on its shard and teacher; earlier versions have no `made_by`."""

    bytes: int
    index_sha256: str
    made_by: str = ""


def _source(metadata: Mapping[bytes, bytes], url: str) -> dict[str, Any] | None:
    """The metadata of `_Source`; None for a file without it. Raises DataError when it is damaged."""
    if not {_SOURCE_KEY, _QUARANTINE_KEY} <= metadata.keys():
        return None
    return parse_json(metadata[_SOURCE_KEY], url, LABELS_REMEDY, _Source)


def read_labels(url: str, columns: Sequence[str] | None = None, entry: LabeledShard | None = None) -> pa.Table:
    """Read rows of a label file, all columns or these.

    Args:
        entry: the file's entry in the labels' manifest, to refuse another file under its name, and, when reading all columns, other
            bytes.

    Raises:
        DataError: the file is damaged, or not the committed one.
        FileNotFoundError, StorageError: as `storage.read_bytes`.
    """
    if columns is None:
        with open_content(_committed(url, entry), url, LABELS_REMEDY) as file:
            return file.read()
    with open_label_file(url, entry) as file:
        return file.read(columns)


def has_all_samples(file: TableFile) -> bool:
    """Whether a label file has no quarantined samples, so that its ordinals are 0, 1, 2, … and need not be read."""
    return file.metadata.get(_QUARANTINE_KEY) == b"[]"


@contextmanager
def open_label_file(url: str, entry: LabeledShard | None = None, content: bytes | None = None) -> Iterator[TableFile]:
    """Open a label file to read some of its columns; `entry` and errors as for `read_labels`.

    A file of an earlier version has no checksums, so it is read whole when its digest is known.

    Args:
        content: of the file, if it is known.
    """
    content = fetch_label_file(url, entry) if content is None else content
    opened = open_table(url, LABELS_REMEDY) if content is None else open_content(content, url, LABELS_REMEDY)
    with opened as file:
        if entry is None or file.is_sealed:
            _check_origin(file, entry)
            yield file
            return
    with open_content(_committed(url, entry, content), url, LABELS_REMEDY) as file:
        yield file


def fetch_label_file(url: str, entry: LabeledShard | None) -> bytes | None:
    """The content of a label file in a store, in one request instead of three.

    None for a local file, a large one, or one whose size is not known or another one: reading some of its columns tells what is wrong.
    """
    if storage.is_local(url) or entry is None or entry.bytes > _MAX_FETCHED:
        return None
    with suppress(FileNotFoundError, storage.StorageError):
        content = storage.read_range(url, 0, entry.bytes)
        return content if content.endswith(END_OF_FILE) else None
    return None


def _committed(url: str, entry: LabeledShard | None, content: bytes | None = None) -> bytes:
    """The content of a label file, read if it is not known. Raises DataError when its digest is not the recorded one."""
    content = storage.read_bytes(url) if content is None else content
    if entry is not None and hashlib.sha256(content).hexdigest() != entry.sha256:
        with open_content(
            content, url, LABELS_REMEDY
        ) as file:  # raises a more precise error if the file is another one
            _check_origin(file, entry)
        raise DataError(f"{redacted(url)}: not the file that was committed (another SHA-256); {LABELS_REMEDY}")
    return content


def _check_origin(file: TableFile, entry: LabeledShard | None) -> None:
    """Raise DataError for labels by another teacher or of another shard than the labels' manifest says, or of another size."""
    if entry is None:
        return
    check_source(file.url, file.metadata, entry)
    if file.num_bytes != entry.bytes:
        where = redacted(file.url)
        raise DataError(f"{where}: {file.num_bytes} bytes, and {entry.bytes} were written; {LABELS_REMEDY}")


def check_source(url: str, metadata: Mapping[bytes, bytes], entry: LabeledShard) -> None:
    """Raise DataError for labels by another teacher or of another shard than the labels' manifest says."""
    found, where = _source(metadata, url), redacted(url)
    if found is None:
        raise DataError(f"{where}: not a label file of this pipeline; {LABELS_REMEDY}")
    if found.get("made_by", "") != entry.made_by:
        raise DataError(
            f"{where}: made by another teacher or configuration ({found.get('made_by')}) than the manifest beside it says "
            f"({entry.made_by}); {LABELS_REMEDY}"
        )
    if (found["bytes"], found["index_sha256"]) != (entry.source_bytes, entry.index_sha256):
        raise DataError(
            f"{where}: has the labels of a shard with {found['bytes']} bytes and index {found['index_sha256']}, but the manifest "
            f"beside it says {entry.source_bytes} bytes and index {entry.index_sha256}; {LABELS_REMEDY}"
        )


def read_copies(url: str, sha256: str | None = None) -> np.ndarray:
    """Read a selection's column for a shard: how often each label row is used, uint16 [n].

    Args:
        sha256: of the file, in hex, from the selection's done-record; None: not checked.

    Raises:
        DataError: the file is damaged, or not the committed one.
        FileNotFoundError, StorageError: as `storage.read_bytes`.
    """
    with open_content(read_whole(url, sha256, COPIES_REMEDY), url, COPIES_REMEDY) as file:
        return np.asarray(file.read([COPIES_COLUMN]).column(0).to_numpy())


def read_quarantined(table: pa.Table, url: str) -> list[Quarantined]:
    """As `quarantined_in`, for the table of a label file."""
    return quarantined_in(table.schema.metadata or {}, url)


def quarantined_in(metadata: Mapping[bytes, bytes], url: str) -> list[Quarantined]:
    """The quarantined samples in a label file's metadata. Raises DataError when their record is damaged."""
    try:
        return _QUARANTINE.validate_json(metadata.get(_QUARANTINE_KEY, b"[]"), strict=True)
    except ValidationError as error:
        what = f"the record of quarantined samples: {first_problem(error)}"
        raise DataError(damaged(url, what, LABELS_REMEDY)) from None


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


def copies_digests(selection: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each shard's column of copies, by shard name, from the selection's done-record."""
    names = (name for name in selection["outputs"] if name.endswith(".parquet"))
    return {storage.base_name(name).removesuffix(".parquet"): selection["outputs"][name]["sha256"] for name in names}


class _Manifest(BaseModel):
    """The fields of the labels' `manifest.json` that are read."""

    shards: list[LabeledShard]


def read_labels_manifest(folder: str) -> dict[str, LabeledShard]:
    """The label files of a labels folder, by shard name, as its manifest lists them. Raises DataError for a damaged manifest."""
    url = storage.join(folder, LABELS_MANIFEST)
    content = read_json(url, MANIFEST_REMEDY)
    try:
        return {entry.name: entry for entry in _Manifest.model_validate(content).shards}
    except ValidationError as error:
        raise DataError(
            f"{redacted(url)}: damaged, or of another version ({first_problem(error)}); run stage=label force=true"
        ) from error

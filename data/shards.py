"""Writing WebDataset shards: the same samples give the same bytes, and a shard under its final name is whole."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import BinaryIO

from data import storage
from data.manifest import (
    INDEX_FOLDER,
    MANIFEST_NAME,
    DataError,
    Manifest,
    ShardRecord,
    build_index,
    index_digest,
    write_table,
)
from data.sample import LABEL_FIELD, check_key
from data.tar import archive

Members = Mapping[str, bytes]  # field (extension) → content


def labeled_members(extension: str, image: bytes, label: int | None) -> dict[str, bytes]:
    """The members of a sample: the image's bytes as they are, and its class index if there is one."""
    members = {extension: image}
    if label is not None:
        members[LABEL_FIELD] = str(label).encode()
    return members


def write_shards(
    samples: Iterable[tuple[str, Members]],
    folder: str,
    prefix: str,
    samples_per_shard: int,
    class_names: Sequence[str] | None = None,
    before_manifest: Callable[[], None] | None = None,
) -> Manifest:
    """Write samples to `folder/prefix-000000.tar` …, with an index per shard and, last, the manifest.

    Args:
        samples: (key, members) in the order in which they are to be written; keys are checked and must be unique.
        samples_per_shard: the last shard may have fewer.
        before_manifest: called when all shards are written, for files that must be there when the manifest is.

    Raises:
        DataError: a manifest is there already, or a duplicate key.
        ValueError: a key that may not be written (see `data.sample.check_key`).
    """
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        raise DataError(f"{folder} holds shards already (it has a {MANIFEST_NAME}); choose another folder or remove it")
    storage.remove_temporary(folder)
    for name in storage.list_names(folder):  # what a killed packing left would count as shards of their own
        if name.startswith(f"{prefix}-") and name.endswith(".tar"):
            storage.remove(storage.join(folder, name))
    stream = iter(_checked(samples))
    records: list[ShardRecord] = []
    while chunk := list(islice(stream, samples_per_shard)):
        records.append(_write_shard(storage.join(folder, f"{prefix}-{len(records):06d}.tar"), chunk))
    if before_manifest:
        before_manifest()
    manifest = Manifest(class_names=list(class_names) if class_names else None, shards=records)
    storage.write_text(storage.join(folder, MANIFEST_NAME), manifest.model_dump_json(indent=1) + "\n")
    return manifest


def _checked(samples: Iterable[tuple[str, Members]]) -> Iterator[tuple[str, Members]]:
    seen: set[str] = set()
    for key, members in samples:
        if check_key(key) in seen:
            raise DataError(f"key {key!r} appears twice; keys must be unique in a data set")
        seen.add(key)
        yield key, members


def _write_shard(url: str, samples: Sequence[tuple[str, Members]]) -> ShardRecord:
    with tempfile.TemporaryFile() as local:
        write_tar(local, samples)
        num_bytes = local.tell()
        local.seek(0)
        sha256 = hashlib.file_digest(local, "sha256").hexdigest()
        local.seek(0)
        with storage.writing(url) as file:
            while block := local.read(1 << 20):
                file.write(block)
    table = build_index(url)
    name = storage.base_name(url)
    write_table(storage.join(url.rpartition("/")[0], INDEX_FOLDER, name.removesuffix(".tar") + ".parquet"), table)
    return ShardRecord(
        name=name, bytes=num_bytes, num_samples=table.num_rows, index_sha256=index_digest(table), sha256=sha256
    )


def write_tar(file: BinaryIO, samples: Iterable[tuple[str, Members]]) -> None:
    """Write samples as a ustar archive: sorted fields, no owner, no time, so that equal samples are equal bytes."""
    members = ((f"{key}.{field}", fields[field]) for key, fields in samples for field in sorted(fields))
    for piece in archive(members):
        file.write(piece)

"""Write WebDataset shards: equal samples give equal bytes, and a shard under its final name is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from .. import storage
from ..errors import DataError
from ..tables import write_table
from .index import index_digest, index_table
from .samples import LABEL_FIELD, Sample, check_key, written_samples
from .split import MANIFEST_NAME, Manifest, ShardRecord, index_url
from .tar import end_of_archive, member_header, padding

Fields = Mapping[str, bytes]  # field (extension) → content
MARKER_NAME = ".packing.json"  # in the folder: how many shards a packing, perhaps killed, began to write


def labeled_members(extension: str, image: bytes, label: int | None) -> dict[str, bytes]:
    """The fields of a sample: the image's bytes unchanged, and its class index if it has one."""
    members = {extension: image}
    if label is not None:
        members[LABEL_FIELD] = str(label).encode()
    return members


def write_shards(
    samples: Iterable[tuple[str, Fields]],
    folder: str,
    prefix: str,
    samples_per_shard: int,
    class_names: Sequence[str] | None = None,
    before_manifest: Callable[[], None] | None = None,
) -> Manifest:
    """Write samples to `folder/prefix-000000.tar` …, with an index per shard and, last, the manifest.

    The folder must be missing, empty, or hold an unfinished packing of `prefix`: its shards, which a marker lists, are removed first.

    Args:
        samples: (key, fields) in the order to write; keys must be unique.
        samples_per_shard: at most; the last shard may have fewer.
        before_manifest: called when all shards are written, to write files that must exist before the manifest.

    Raises:
        DataError: the folder has a manifest or files of no packing, or a key is repeated.
        ValueError: `data.shards.samples.check_key` refuses a key.
    """
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        raise DataError(f"{folder} holds shards already (it has a {MANIFEST_NAME}); choose another folder or remove it")
    remove_begun(folder, prefix)
    stream = iter(_checked(samples))
    records: list[ShardRecord] = []
    while chunk := list(islice(stream, samples_per_shard)):
        mark_begun(folder, prefix, len(records) + 1)
        records.append(write_shard(storage.join(folder, shard_name(prefix, len(records))), chunk))
    if before_manifest:
        before_manifest()
    return write_manifest(folder, records, class_names)


def write_manifest(folder: str, records: Sequence[ShardRecord], class_names: Sequence[str] | None) -> Manifest:
    """Write the manifest of a folder whose shards are complete."""
    manifest = Manifest(class_names=list(class_names) if class_names else None, shards=list(records))
    storage.write_text(storage.join(folder, MANIFEST_NAME), manifest.model_dump_json(indent=1) + "\n")
    return manifest


def shard_name(prefix: str, number: int) -> str:
    """The file name of a shard that this project writes."""
    return f"{prefix}-{number:06d}.tar"


def mark_begun(folder: str, prefix: str, num_shards: int) -> None:
    """Record, before writing the last of them, that shards 0 to `num_shards` - 1 are ours and may be removed."""
    marker = {"schema_version": 1, "prefix": prefix, "shards": num_shards}
    storage.write_text(storage.join(folder, MARKER_NAME), json.dumps(marker) + "\n")


def require_ours(folder: str, prefix: str) -> int:
    """Check that a folder is empty or holds a packing of `prefix`; return the number of shards that the packing began.

    Raises:
        DataError: the folder has files and no marker, another prefix's marker, or shards that the marker does not list.
    """
    names = storage.list_names(folder)
    begun = _read_marker(folder, prefix) if MARKER_NAME in names else None
    ours = {shard_name(prefix, number) for number in range(begun or 0)}
    visible = [name for name in names if not name.startswith(".")]
    if begun is None and visible:
        raise DataError(
            f"{folder} holds {visible[0]}{' and others' * (len(visible) > 1)}, and no packing began there ({MARKER_NAME} is "
            "missing), so nothing is written or removed; choose another out=, or remove the folder by hand"
        )
    if foreign := [name for name in names if name.endswith(".tar") and name not in ours]:
        raise DataError(
            f"{storage.join(folder, foreign[0])}: not of the packing that began there ({MARKER_NAME} does not list it), so it is "
            "not removed; move it elsewhere, or choose another out="
        )
    return begun or 0


def _read_marker(folder: str, prefix: str) -> int:
    url = storage.join(folder, MARKER_NAME)
    try:
        marker = json.loads(storage.read_text(url))
        found, begun = str(marker["prefix"]), int(marker["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{url}: not a marker of a packing; remove the folder by hand, or choose another out="
        ) from error
    if found != prefix:
        raise DataError(f"{folder}: a packing of {found} began there, not one of {prefix}; choose another out=")
    return begun


def remove_begun(folder: str, prefix: str, first: int = 0) -> None:
    """Remove a killed packing's shards from number `first` on, their indexes and temporary files, and nothing else."""
    begun = require_ours(folder, prefix)
    for number in range(first, begun):
        name = shard_name(prefix, number)
        storage.remove(storage.join(folder, name))
        storage.remove(index_url(folder, name))
    if begun:
        storage.remove_temporary(folder)


def _checked(samples: Iterable[tuple[str, Fields]]) -> Iterator[tuple[str, Fields]]:
    seen: set[str] = set()
    for key, members in samples:
        if check_key(key) in seen:
            raise DataError(f"key {key!r} appears twice; keys must be unique in a data set")
        seen.add(key)
        yield key, members


def write_shard(url: str, samples: Iterable[tuple[str, Fields]]) -> ShardRecord:
    """Write one shard and its index, from samples with keys that `check_key` takes, no two alike.

    Fields are sorted, and members have no owner and no time, so that equal samples give equal bytes.
    """
    digest, size, found = hashlib.sha256(), 0, list[Sample]()
    with storage.writing(url) as file:
        for key, fields in samples:
            written = []
            for field in sorted(fields):
                header = member_header(f"{key}.{field}", len(fields[field]))
                written.append((field, fields[field], size + len(header)))
                for piece in (header, fields[field], padding(len(fields[field]))):
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
            found += written_samples(key, written)
        end = end_of_archive(size)
        file.write(end)
        digest.update(end)
    table, name = index_table(found), storage.base_name(url)
    write_table(index_url(url.rpartition("/")[0], name), table)
    return ShardRecord(
        name=name,
        bytes=size + len(end),
        num_samples=table.num_rows,
        index_sha256=index_digest(table),
        sha256=digest.hexdigest(),
    )

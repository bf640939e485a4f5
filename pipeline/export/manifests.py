"""Write the manifests of an export, in the formats of this pipeline, timm, wids and open_clip."""

from __future__ import annotations

import json
from collections.abc import Sequence

from data import storage
from data.json_files import read_json
from data.shards.split import MANIFEST_NAME, Manifest, ShardRecord
from pipeline.pages.text import checksum_line, class_lines

CHECKSUMS_NAME = "SHA256SUMS"
CLASSES_NAME = "classes.txt"
SIZES_NAME = "sizes.json"  # open_clip
TIMM_NAME = "_info.json"
WIDS_NAME = "wids.json"


def write_manifests(
    folder: str, records: Sequence[ShardRecord], class_names: Sequence[str] | None, has_images: bool
) -> list[str]:
    """Write the manifests; return their names.

    Args:
        records: of all files, in order.
        has_images: False for labels without images, which have checksums, counts and class names only.
    """
    counts = {record.name: record.num_samples for record in records}
    texts = {
        CHECKSUMS_NAME: "".join(checksum_line(record.sha256, record.name) for record in records),
        SIZES_NAME: json.dumps(counts, indent=1) + "\n",
        MANIFEST_NAME: _manifest(records, class_names),
    }
    if class_names:
        texts[CLASSES_NAME] = class_lines(class_names)
    if has_images:
        texts |= {TIMM_NAME: _timm(counts), WIDS_NAME: _wids(records)}
    for name, text in texts.items():
        storage.write_text(storage.join(folder, name), text)
    return sorted(texts)


def read_manifest(folder: str) -> Manifest:
    """Read manifest.json. Raises DataError if it is damaged."""
    url, remedy = storage.join(folder, MANIFEST_NAME), "delete it and run stage=export, which makes it again"
    return Manifest.model_validate(read_json(url, remedy, Manifest))


def _manifest(records: Sequence[ShardRecord], class_names: Sequence[str] | None) -> str:
    """Return this pipeline's own manifest: an export can be used as data.labeled."""
    names = list(class_names) if class_names else None
    return Manifest(class_names=names, shards=list(records)).model_dump_json(indent=1) + "\n"


def _timm(counts: dict[str, int]) -> str:
    split = {
        "name": "train",
        "num_samples": sum(counts.values()),
        "filenames": list(counts),
        "shard_lengths": list(counts.values()),
    }
    return json.dumps({"splits": {"train": split}}, indent=1) + "\n"


def _wids(records: Sequence[ShardRecord]) -> str:
    shards = [{"url": r.name, "nsamples": r.num_samples, "filesize": r.bytes} for r in records]
    return json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}, indent=1) + "\n"

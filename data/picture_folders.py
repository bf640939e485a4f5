"""Folders of images where shards are expected: which field names one, and where a run keeps the shards made of them.

    RUN/packed/labeled/  validation/  unlabeled/      of data.labeled (and the share of it that is held out) and data.unlabeled
    RUN/packed/validation_folder/labeled/             of data.validation
    RUN/packed/test/labeled/                          of data.test

`data.packing` writes them. They are named here, so that whoever reads a run finds them, also where the folder of images is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from . import storage
from .shards.split import HASHES_NAME, MANIFEST_NAME

PACKED = "packed"
_SHARDS_OF = {
    "labeled": "labeled",
    "validation": "validation_folder/labeled",
    "test": "test/labeled",
    "unlabeled": "unlabeled",
}
_HELD_OUT = "validation"  # the share of the labeled images
_PATTERN = re.compile(r"[*?\[{]|\.tar$")


def folder_of(patterns: Sequence[str]) -> str | None:
    """The folder of images that a field names: its only entry, which is no shard and no pattern of shards. It may be gone."""
    if len(patterns) != 1 or not patterns[0] or not storage.is_local(patterns[0]):
        return None
    is_folder = storage.local_path(patterns[0]).is_dir() or not _PATTERN.search(patterns[0])
    return patterns[0] if is_folder else None


def packing_folder(run_dir: str, name: str) -> str:
    """`out` of the packing of `data.<name>`."""
    above = _SHARDS_OF[name].rpartition("/")[0]
    return storage.join(run_dir, PACKED, above) if above else storage.join(run_dir, PACKED)


def packed_shards(run_dir: str, name: str) -> list[str]:
    """The pattern of the shards made of the folder `data.<name>`; empty while they are not complete."""
    return _complete(storage.join(run_dir, PACKED, _SHARDS_OF[name]))


def held_out_share(run_dir: str) -> list[str]:
    """The pattern of the shards of the held-out share of the folder `data.labeled`; empty if there are none."""
    return _complete(storage.join(run_dir, PACKED, _HELD_OUT))


def shards_or_folder(run_dir: str, name: str, patterns: Sequence[str]) -> list[str]:
    """`patterns`, or where they name a folder whose shards are complete, those."""
    return (packed_shards(run_dir, name) if folder_of(patterns) else []) or list(patterns)


def hashes_beside(pattern: str) -> str:
    """The file of hashes beside packed shards."""
    return storage.join(storage.parent(pattern), HASHES_NAME)


def _complete(folder: str) -> list[str]:
    return [storage.join(folder, "*.tar")] if storage.exists(storage.join(folder, MANIFEST_NAME)) else []

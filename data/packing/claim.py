"""What a packing records of itself in its output, so that the same command continues and any other is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import storage
from ..errors import DataError
from ..json_files import read_json
from ..shards.samples import printable
from ..shards.split import MANIFEST_NAME
from ..shards.write import require_ours
from .file_list import find_changes, has_file_list, read_copies, write_file_list
from .groups import Indices
from .listing import Listing
from .plan import Plan
from .sidecars import read_sources


@dataclass(frozen=True)
class Claim:
    """The record of a packing, `packing-labeled.json` or `packing-unlabeled.json`, and the list of its files beside it.

    Attributes:
        settings: of this command.
        before: the record as it was when this command began; None for a first packing.
    """

    out: str
    kind: str
    settings: Mapping[str, Any]
    before: Mapping[str, Any] | None

    @property
    def url(self) -> str:
        """Of the record."""
        return storage.join(self.out, f"packing-{self.kind}.json")

    @property
    def list_folder(self) -> str:
        """Of the list of files."""
        return storage.join(self.out, f"packing-{self.kind}-files")

    @property
    def digest(self) -> str:
        """Hex digest of the settings, without the folders."""
        named = {name: value for name, value in self.settings.items() if name != "images"}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def read_claim(out: str, kind: str, settings: Mapping[str, Any]) -> Claim:
    """Read what an earlier run recorded in `out`. Raises DataError when it had other settings."""
    claim = Claim(out, kind, settings, None)
    if not storage.exists(claim.url):
        return claim
    before = read_json(claim.url, "choose another out=")
    if {"group": "", **before, "files": None} != {**settings, "files": None}:
        raise DataError(f"{out} was packed with other settings ({json.dumps(before)}); choose another out=")
    return Claim(out, kind, settings, before)


def known_copies(claim: Claim, images: Listing) -> Indices | None:
    """Return `Plan.copy_of` if it is known: the folder has the files that it had when packing began, with the same times.

    Raises:
        DataError: files were added or removed, or have other sizes; the message names the first few.
    """
    count = _recorded_count(claim)
    if count is None or not has_file_list(claim.list_folder):
        return None
    if changes := find_changes(claim.list_folder, count, images):
        if others := find_changes(claim.list_folder, count, images, with_times=False):
            _refuse(claim, images, ", ".join(dict.fromkeys([*others, *changes])))
        return None
    return read_copies(claim.list_folder, count) if claim.kind == "labeled" else None


def _require_same_times(claim: Claim, images: Listing) -> None:
    """Raise DataError, naming the first few files that were written since packing began."""
    if has_file_list(claim.list_folder) and (changes := find_changes(claim.list_folder, len(images), images)):
        _refuse(claim, images, ", ".join(changes))


def _recorded_count(claim: Claim) -> int | None:
    files = (claim.before or {}).get("files")
    return files["count"] if isinstance(files, dict) and isinstance(files.get("count"), int) else None


def make_claim(claim: Claim, plan: Plan, folders: Mapping[str, str]) -> None:
    """Record settings and files of the packing.

    Args:
        folders: split → folder of its shards.

    Raises:
        DataError: a folder has shards or files of no packing, or of a packing of other files.
    """
    files = {"count": len(plan.images), "digest": plan.digest}
    if claim.before is None:
        for name, folder in folders.items():
            if is_packed(folder):
                raise DataError(f"{folder} holds shards of another packing; choose another out=")
            require_ours(folder, name)
    elif "files" in claim.before:
        if claim.before["files"] != files:
            _refuse(claim, plan.images, "other names, sizes or copies")
        if not all(map(is_packed, folders.values())):  # else the files may have been copied, with other times
            _require_same_times(claim, plan.images)
        return
    elif not _has_splits_left(plan, folders):
        return
    write_file_list(claim.list_folder, plan.images, plan.copy_of)
    storage.write_text(claim.url, json.dumps({**claim.settings, "files": files}) + "\n")


def is_packed(folder: str) -> bool:
    """Whether a split is complete."""
    return storage.exists(storage.join(folder, MANIFEST_NAME))


def _refuse(claim: Claim, images: Listing, changes: str) -> None:
    count = _recorded_count(claim)
    then = "other images then" if count is None else f"{count:,} images then"
    splits = ("labeled", "validation") if claim.kind == "labeled" else ("unlabeled",)
    parts = " and ".join(f"{claim.out}/{name}" for name in splits)
    raise DataError(
        f"images={images.root}: other files than when packing into {claim.out} began ({then}, {len(images):,} now): {changes}. Images "
        "could be lost, or be in two splits; restore the files, choose another out=, or remove "
        f"{parts} and {claim.url} to begin again"
    )


def _has_splits_left(plan: Plan, folders: Mapping[str, str]) -> bool:
    """Whether a packing of an earlier version, which did not record its files, has splits left to pack.

    Raises:
        DataError: a finished split has images that would now be in another split.
    """
    if all(is_packed(folder) for folder in folders.values()):
        return False
    for name, folder in folders.items():
        if not is_packed(folder):
            continue
        planned = {printable(str(plan.images[position].path)) for position in plan.splits[name].read()}
        if others := sorted(set(read_sources(folder)) - planned):
            raise DataError(
                f"{folder}: {others[0]} was packed into it, but images={plan.root} has changed since and would be split another way, "
                "so images could be in two splits; choose another out="
            )
    return True

"""Plan a packing before anything is written: which images, with which labels, in which split."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data import storage
from data.errors import DataError
from data.images.decode import DecodeError, decode
from data.packing import groups
from data.packing.folders import Found, ImageFile, find_classes, find_images
from data.packing.groups import Indices
from data.shards.samples import IMAGE_EXTENSIONS, printable
from data.tables import read_table

SOURCES_NAME = "sources.parquet"  # beside packed shards: key → path
REJECTED_NAME = "rejected.txt"  # beside packed shards: what was left out, and why


@dataclass(frozen=True)
class Plan:
    """The images below a folder, and the split of each.

    Attributes:
        classes: names in label order; None for unlabeled images.
        labels: int64 (N,), of `found.images`; zeros for unlabeled images.
        splits: name → shuffled positions in `found.images`, int64.
        copies: positions of byte-identical images, a list for each content; empty for unlabeled images.
        groups: int64 (N,), equal for images that stay in one split.
    """

    root: Path
    found: Found
    classes: tuple[str, ...] | None
    labels: Indices
    splits: dict[str, Indices]
    copies: list[list[int]]
    groups: Indices

    @property
    def images(self) -> tuple[ImageFile, ...]:
        """The images, sorted by path."""
        return self.found.images

    @cached_property
    def digest(self) -> str:
        """Hex digest of path, size, label, split and group of each image."""
        split_of = np.zeros(len(self.images), np.int64)
        for number, positions in enumerate(self.splits.values()):
            split_of[positions] = number
        digest = hashlib.sha256("\n".join([*self.splits, *(self.classes or ())]).encode())
        columns = (column.tolist() for column in (self.labels, split_of, self.groups))
        for image, label, split, group in zip(self.images, *columns, strict=True):
            path = os.fsencode(image.path.relative_to(self.root))
            digest.update(b"%s\0%d %d %d %d\n" % (path, image.size, label, split, group))
        return digest.hexdigest()[:16]


def plan_packing(root: Path, out: str, labeled: bool, validation: float, seed: int, group: str) -> Plan:
    """Scan a folder and plan its packing. `group`: a regular expression for paths below it, or empty.

    Raises:
        DataError: as `data.packing.folders.find_classes`; there are no images; or `validation` or `group` is wrong.
    """
    found = find_images(root)
    classes = find_classes(root, found, out) if labeled else {}
    if not found.images:
        first = f"; {found.left_out[0]}" if found.left_out else ""
        raise DataError(f"images={root}: no images ({', '.join(IMAGE_EXTENSIONS)}) below it{first}")
    names = [image.path.relative_to(root).as_posix() for image in found.images]
    numbers = {folder: label for label, folder in enumerate(classes)}
    labels = np.array([numbers[name.partition("/")[0]] if classes else 0 for name in names], np.int64)
    copies = groups.same_bytes(found.images) if labeled else []
    views = groups.same_name(names, group) if group else []
    together = groups.merged(len(names), [*copies, *views])
    splits = groups.split(labels, together, validation if labeled else 0.0, seed)
    if not labeled:
        splits = {"unlabeled": splits["labeled"]}
    return Plan(root, found, tuple(classes.values()) if classes else None, labels, splits, copies, together)


def require_decodable(plan: Plan) -> None:
    """Raise DataError, naming the class, when none of a class's training images can be decoded."""
    assert plan.classes is not None, "unlabeled images have no classes"
    pending, first = set(plan.labels.tolist()), dict[int, str]()
    for position in plan.splits["labeled"].tolist():
        label = int(plan.labels[position])
        if label in pending:
            try:
                decode(plan.images[position].read())
                pending.remove(label)
            except DecodeError as error:
                first.setdefault(label, f"{printable(str(plan.images[position].path))}: {error}")
        if not pending:
            return
    label = min(pending)
    raise DataError(
        f"class {printable(plan.classes[label])!r}: none of its images that are to be trained on can be decoded ({first[label]}); "
        "mend or remove them, or move the folder away"
    )


def read_sources(folder: str) -> set[str]:
    """The paths of the images that were packed into a split.

    Raises:
        DataError: `sources.parquet` does not exist or is damaged.
    """
    url = storage.join(folder, SOURCES_NAME)
    remedy = "pack into another out="
    try:
        return set(read_table(url, remedy, ["path"]).column("path").to_pylist())
    except FileNotFoundError as error:
        raise DataError(f"{url}: not there; {remedy}") from error

"""Plan a packing before anything is written: which images, with which labels, in which split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..images.decode import DecodeError
from ..modalities import Modality
from ..shards.samples import printable
from . import groups
from .folders import IMAGES, Found, ScannedImage, scan
from .groups import Indices
from .lines import LineWriter
from .listing import Listing, ListingWriter, Order, Row, shuffled, write_order

LEFT_OUT = "left-out"


@dataclass(frozen=True)
class Plan:
    """The images below a folder, and the split of each.

    Attributes:
        root: the folder.
        found: counts of images and of what is left out.
        images: sorted by path.
        folders: class folder → class name, in label order; None for unlabeled images.
        splits: name → its images' positions, shuffled.
        copy_of: int64 (N,), the first byte-identical image of each; None for unlabeled images.
        digest: hex, of path, size, label, split and group of each image.
    """

    root: Path
    found: Found
    images: Listing
    folders: dict[str, str] | None
    splits: dict[str, Order]
    copy_of: Indices | None
    digest: str

    @property
    def kind(self) -> str:
        """`labeled` or `unlabeled`."""
        return "unlabeled" if self.folders is None else "labeled"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in label order; None for unlabeled images."""
        return None if self.folders is None else tuple(self.folders.values())

    @cached_property
    def labels(self) -> dict[str, int] | None:
        """Class folder → label; None for unlabeled images."""
        return None if self.folders is None else {folder: label for label, folder in enumerate(self.folders)}

    @cached_property
    def copies(self) -> list[list[int]]:
        """Positions of byte-identical images, a list for each content."""
        return [] if self.copy_of is None else groups.members(self.copy_of)

    def label(self, position: int) -> int:
        """The label of a labeled image."""
        assert self.labels is not None, "unlabeled images have no labels"
        return self.labels[os.fsdecode(self.images.row(position).name).partition("/")[0]]


def scan_images(root: Path, folder: str, labeled: bool, modality: Modality = IMAGES) -> tuple[Listing, Found]:
    """List the images below `root` in `folder`, and there in the file LEFT_OUT what is left out."""
    found = Found(labeled)
    with ListingWriter(folder) as listing, LineWriter(f"{folder}/{LEFT_OUT}") as left_out:
        for entry in scan(root, modality):
            if isinstance(entry, ScannedImage):
                found.add_image(entry)
                listing.add(Row(os.fsencode(entry.name), entry.size, entry.modified))
            else:
                found.add_left_out(root, entry)
                left_out.add(str(entry))
    return Listing(str(root), folder), found


def plan_packing(
    root: Path, images: Listing, found: Found, folders: dict[str, str] | None, validation: float, seed: int, group: str,
    copy_of: Indices | None,
) -> Plan:  # fmt: skip
    """Plan the packing of listed images, and keep the order of each split beside the listing.

    Args:
        folders: class folder → class name, in label order; None for unlabeled images.
        group: a regular expression for paths below the folder, or empty.
        copy_of: as in `Plan`, if known; else the images are compared.

    Raises:
        DataError: `validation` or `group` is wrong.
    """
    if folders is None:
        order = write_order(f"{images.folder}/unlabeled", shuffled(len(images), seed))
        rows = ((image, 0, 0, position) for position, image in enumerate(images.rows()))
        return Plan(root, found, images, None, {"unlabeled": order}, None, _digest(["unlabeled"], rows))
    numbers = {folder: label for label, folder in enumerate(folders)}
    labels = np.repeat([numbers[folder] for folder in found.images_of], list(found.images_of.values()))
    if copy_of is None:
        copy_of = groups.merged(len(images), groups.same_bytes(images, images.sizes()))
    names = (os.fsdecode(row.name) for row in images.rows())
    views = groups.same_name(list(names), group) if group else []
    together = groups.merged(len(images), [*groups.members(copy_of), *views])
    splits = groups.split(labels, together, validation, seed)
    split_of = np.zeros(len(images), np.int64)
    for number, positions in enumerate(splits.values()):
        split_of[positions] = number
    columns = (column.tolist() for column in (labels, split_of, together))
    digest = _digest([*splits, *folders.values()], zip(images.rows(), *columns, strict=True))
    orders = {name: write_order(f"{images.folder}/{name}", positions) for name, positions in splits.items()}
    return Plan(root, found, images, folders, orders, copy_of, digest)


def _digest(names: Sequence[str], rows: Iterable[tuple[Row, int, int, int]]) -> str:
    """Hex digest of splits and classes, and of image, label, split and group in each row."""
    digest = hashlib.sha256("\n".join(names).encode())
    for image, label, split, group in rows:
        digest.update(b"%s\0%d %d %d %d\n" % (image.name, image.size, label, split, group))
    return digest.hexdigest()[:16]


def require_decodable(plan: Plan, modality: Modality = IMAGES) -> None:
    """Raise DataError, naming the class, when none of a class's training images can be decoded."""
    assert plan.classes is not None, "unlabeled images have no classes"
    pending, first = set(range(len(plan.classes))), dict[int, str]()
    for position in plan.splits["labeled"].read():
        label = plan.label(position)
        if label in pending:
            image = plan.images[position]
            try:
                modality.check(image.read(), 0)
                pending.remove(label)
            except DecodeError as error:
                first.setdefault(label, f"{printable(str(image.path))}: {error}")
        if not pending:
            return
    label = min(pending)
    raise DataError(
        f"class {printable(plan.classes[label])!r}: none of its images that are to be trained on can be decoded ({first[label]}); "
        "mend or remove them, or move the folder away"
    )

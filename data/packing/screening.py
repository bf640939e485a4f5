"""Screen some images of a split: read and decode each, and keep the bytes of those that can be packed until their shard is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from ..images.decode import DecodeError
from ..images.held_out_hashes import HeldOutRow, held_out_row
from ..modalities import MODALITIES, ModalityName
from ..shards.samples import MAX_IMAGE_BYTES, printable
from .folders import LeftOut
from .listing import Listing, Order

_SCALED = (
    1  # pixels: a JPEG of an unlabeled image is decoded as small as can be, which finds the same damage in less time
)


@dataclass(frozen=True)
class SplitJob:
    """All that a process needs to know of a split that is packed. Picklable.

    Attributes:
        images: of the whole packing.
        order: positions of the split's images, shuffled.
        labels: class folder → label; None for unlabeled images.
        folder: of the shards.
        name: of the split; begins the shards' names.
        digest: hex, of the packing's files and settings.
        scratch: a local folder for temporary files.
        modality: of the files.
    """

    images: Listing
    order: Order
    labels: Mapping[str, int] | None
    folder: str
    name: str
    samples_per_shard: int
    digest: str
    scratch: str
    modality: ModalityName = "image"


class ScreenedImage(NamedTuple):
    """An image that can be packed."""

    place: int  # in the split's order
    path: str  # printable
    field: str
    size: int
    label: int | None
    hashes: HeldOutRow | None  # of a labeled image


@dataclass(frozen=True)
class Screened:
    """The result for some images of a split.

    Attributes:
        spool: a local file with the bytes of `images` one after the other.
        rejected: (place in the split's order, line for `rejected.txt`).
        num_images: of all.
    """

    spool: str
    images: list[ScreenedImage]
    rejected: list[tuple[int, str]]
    num_images: int


def screen(job: SplitJob, start: int, end: int) -> Screened:
    """Read and decode the images at places `start` to before `end` of the split's order.

    Raises:
        DataError: an image cannot be read, or is not as it was when the folder was scanned.
    """
    images, rejected = list[ScreenedImage](), list[tuple[int, str]]()
    spool = f"{job.scratch}/{job.name}-{start}"
    with Path(spool).open("wb") as file:
        for place, position in enumerate(job.order.read(start, end), start):
            image = job.images[position]
            if image.size > MAX_IMAGE_BYTES:
                reason = f"{image.size:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed"
                rejected.append((place, str(LeftOut(image.path, reason))))
                continue
            content = image.read()
            if len(content) != image.size:
                raise DataError(
                    f"{printable(str(image.path))}: {len(content):,} bytes, and {image.size:,} when the folder was scanned; pack when "
                    "nothing writes into it"
                )
            try:
                hashes = check_image(content, job.labels is not None, job.modality)
            except DecodeError as error:
                rejected.append((place, str(LeftOut(image.path, str(error)))))
                continue
            file.write(content)
            label = None if job.labels is None else job.labels[image.path.relative_to(job.images.root).parts[0]]
            images.append(ScreenedImage(place, printable(str(image.path)), image.field, image.size, label, hashes))
    return Screened(spool, images, rejected, end - start)


def check_image(content: bytes, is_labeled: bool, modality: ModalityName = "image") -> HeldOutRow | None:
    """Decode an image or a video; return its hashes if it is labeled. Raises DecodeError."""
    check = MODALITIES[modality].check
    if is_labeled:
        return held_out_row(check(content, 0))
    check(content, _SCALED)
    return None

"""Small copies of images, inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data import storage
from data.errors import DataError
from data.images.decode import DecodeError
from data.labels.label_files import LabeledShard, read_labels, read_labels_manifest
from data.modalities import modality_of
from data.shards.image_reader import PLACE_COLUMNS, Place, places_of, read_image
from data.shards.split import urls_by_name
from pipeline.report.survey import ShownLabel

_THUMBNAIL = 96  # pixels of the longer side
_SMALL = 64  # images up to this side stay as they are, without loss


def thumbnail(image: np.ndarray) -> str:
    """Encode (H, W, 3) uint8 as a data: URI: PNG if small, else a JPEG of at most 96 pixels."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    small = max(image.shape[:2]) <= _SMALL
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        picture.save(buffer, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail_at(url: str, place: Place) -> str | None:
    """Encode the image at a place of a shard, as `thumbnail` does; None if it cannot be read: the shard was moved or changed."""
    try:
        content = read_image(url, place)
        return thumbnail(modality_of(content).thumbnail(content))
    except (OSError, DataError, DecodeError):
        return None


def sample(source: str | None, is_right: bool | None, **texts: str) -> dict[str, str | None]:
    """Arguments of the template macro `sample`.

    Args:
        source: data: URI of the image; None if it is gone.
        is_right: frames the image; None if the true class is not known.
        texts: title, alt, words, verdict, perhaps more.
    """
    frame = {None: "", True: "is-right", False: "is-wrong"}[is_right]
    photo = "photo" if source and source.startswith("data:image/jpeg") else ""
    return {"source": source, "css": f"{frame} {photo}".strip(), **texts}


def load_pictures(
    labels_folder: str, unlabeled: Sequence[str], shown: Sequence[ShownLabel]
) -> list[tuple[str, str | None]]:
    """Read (key, data: URI) of pseudo-labeled images from the shards `unlabeled` (patterns); None for an image that cannot be read."""
    urls, entries = urls_by_name(unlabeled), read_labels_manifest(labels_folder)
    return [_load_picture(labels_folder, entries[item.shard], urls.get(item.shard), item.row) for item in shown]


def _load_picture(labels_folder: str, entry: LabeledShard, url: str | None, row: int) -> tuple[str, str | None]:
    table = read_labels(storage.join(labels_folder, f"{entry.name}.parquet"), PLACE_COLUMNS, entry)
    (place,) = places_of(table.slice(row, 1))
    return place.key, url and thumbnail_at(url, place)

"""Images on the report: small copies, inside the page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from data.images.decode import DecodeError, decode
from data.shards.image_reader import Place, read_image
from data.shards.split import DataError
from pipeline.pages.html import text

_THUMBNAIL = 96  # pixels of the longer side
_SMALL = 64  # images up to this side stay as they are, without loss


def thumbnail(image: np.ndarray) -> str:
    """A data: URI of (H, W, 3) uint8: PNG if small, else a JPEG of at most 96 pixels."""
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
    """As `thumbnail`, of the image at this place of a shard; None when it cannot be read any more: the report is of labels and figures,
    and a shard that moved or changed since is no reason to have none."""
    try:
        return thumbnail(decode(read_image(url, place)))
    except (OSError, DataError, DecodeError):
        return None


def card(data_uri: str | None, is_right: bool | None, title: str, alt: str, words: str, verdict: str) -> str:
    """A picture with words under it; framed by whether they are right, where that is known."""
    css = "" if is_right is None else " is-right" if is_right else " is-wrong"
    photo = " photo" if data_uri and data_uri.startswith("data:image/jpeg") else ""
    image = f'<img src="{data_uri}" alt="{text(alt)}">' if data_uri else '<div class="gone">image not there</div>'
    ending = f'<div class="verdict">{text(verdict)}</div>' if verdict else ""
    return f'<figure class="sample{css}{photo}" title="{text(title)}">{image}<figcaption>{text(words)}{ending}</figcaption></figure>'


def grid(cards: list[str]) -> str:
    """Cards in rows, as many to a row as there is room for."""
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""

"""What a sample is made of: an image, or a video of which clips are taken. A row per modality tells file names, decoding and pictures.

The clean view of a modality is `data.images.clean_view.EvalView` or `data.clips.clean_view.ClipEvalView`; its training view is made in
`pipeline.inputs`. Labels, selection, order and checkpoints know neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np

from .errors import DataError
from .images.decode import Pixels, decode, decode_fast
from .shards.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

ModalityName = Literal["image", "clip"]
_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # with which an MP4 or MOV begins, after four bytes
_MATROSKA = b"\x1a\x45\xdf\xa3"


@dataclass(frozen=True)
class Modality:
    """One modality.

    Attributes:
        name: as in `data.modality`.
        noun: of a file, for messages.
        extensions: of files to pack and of members of shards.
        picture: file, and wanted pixels of its shorter side (0: all) → pixels to hash and to compare, uint8 (H, W, 3).
        check: as `picture`; decodes the whole file, so that damage anywhere raises DecodeError.
        thumbnail: file → pixels to show.
    """

    name: ModalityName
    noun: str
    extensions: tuple[str, ...]
    picture: Callable[[bytes, int], Pixels]
    check: Callable[[bytes, int], Pixels]
    thumbnail: Callable[[bytes], Pixels]


def _video_picture(content: bytes, _: int) -> Pixels:
    from .clips.key_pictures import video_picture  # here: PyAV is an extra

    return video_picture(content)


def _checked_video(content: bytes, _: int) -> Pixels:
    from .clips.key_pictures import checked_video

    return checked_video(content)


def _video_strip(content: bytes) -> Pixels:
    from .clips.key_pictures import video_frames

    return np.concatenate(list(video_frames(content)), axis=1)


MODALITIES: dict[str, Modality] = {
    "image": Modality("image", "image", IMAGE_EXTENSIONS, decode_fast, decode_fast, decode),
    "clip": Modality("clip", "video", VIDEO_EXTENSIONS, _video_picture, _checked_video, _video_strip),
}


def modality_of(content: bytes) -> Modality:
    """The modality of a file, by its first bytes; what is no video counts as an image, whose decoder tells what is wrong."""
    is_avi = content.startswith(b"RIFF") and content[8:12] == b"AVI "
    is_video = is_avi or content.startswith(_MATROSKA) or content[4:8] in _MOV_BOXES
    return MODALITIES["clip" if is_video else "image"]


def require_decoder(name: ModalityName) -> None:
    """Raise DataError where the library that decodes a modality is missing."""
    if name == "clip" and find_spec("av") is None:
        raise DataError("videos need PyAV, which is not installed: pip install 'noisy-student-pipeline[video]'")

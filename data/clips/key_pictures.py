"""Pictures that stand for a video: four frames spread evenly over it, for perceptual hashes, thumbnails and reports."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..images.decode import Pixels
from .decode import Wanted, decode_frames

_NUMBER = 4
_SIDE = 128  # pixels: frames are reduced by whole factors to at least this shorter side


def spread_frames(num_frames: int) -> list[int]:
    """The frames at one, three, five and seven eighths of a video."""
    return [num_frames * (2 * part + 1) // (2 * _NUMBER) for part in range(_NUMBER)]


def reduce_frame(frame: Pixels) -> Pixels:
    """Average blocks of pixels, so that the shorter side keeps at least 128: uint8 (H, W, 3)."""
    factor = min(frame.shape[:2]) // _SIDE
    return frame if factor < 2 else np.array(Image.fromarray(frame).reduce(factor))


KEY_FRAMES = Wanted(spread_frames, reduce_frame)
_FIRST_AND_LAST = Wanted(lambda number: [0, number - 1], reduce_frame)


def stacked(frames: Pixels) -> Pixels:
    """Frames (n, h, w, 3), one below the other, so that the mirror image of the whole mirrors each: (n · h, w, 3)."""
    return frames.reshape(-1, *frames.shape[2:])


def video_frames(content: bytes) -> Pixels:
    """The four frames of a video, reduced, uint8 (4, h, w, 3). Raises DecodeError."""
    return decode_frames(content, KEY_FRAMES)[0]


def video_picture(content: bytes) -> Pixels:
    """The four frames of a video, one below the other, uint8 (4 h, w, 3). Raises DecodeError."""
    return stacked(video_frames(content))


def checked_video(content: bytes) -> Pixels:
    """As `video_picture`, decoding every frame up to the last: damage anywhere raises DecodeError."""
    return stacked(decode_frames(content, KEY_FRAMES, _FIRST_AND_LAST)[0])

"""The clean view of a video: what a model sees of it in labeling and evaluation, from bytes to pixels in one pass of decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..images.clean_view import EvalView
from ..images.decode import DecodeError, Pixels
from ..images.similarity import image_hash
from .decode import MAX_FRAME_PIXELS, Wanted, decode_frames, frame_pixels
from .key_pictures import KEY_FRAMES, stacked
from .sampling import ClipSampling

_DECODED_FRAMES = (
    6  # bytes a pixel: a frame of the codec, of which 17 may be held, has 1.5; the upright RGB frame twice 3
)
_REFERENCES = 17


@dataclass(frozen=True)
class ClipEvalView:
    """How an encoded video becomes pixels without noise: `clips` clips, `crops` crops of each, one after the other.

    Attributes:
        frame: the view of one frame.
        sampling: frames of a clip.
        clips: spread evenly over the video; 1: the middle.
        crops: 1: the frame view's; 3: those of the squares at both ends and in the middle of the longer side.
    """

    frame: EvalView
    sampling: ClipSampling
    clips: int = 1
    crops: int = 1

    @property
    def image_size(self) -> int:
        """Side of a frame, pixels."""
        return self.frame.image_size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view: frames of all clips and crops, height, width, 3."""
        side = self.frame.image_size
        return (self.clips * self.crops * self.sampling.frames, side, side, 3)

    def __call__(self, content: bytes) -> Pixels:
        """The view of one encoded video, uint8 of `shape`. Raises DecodeError."""
        return self._ordered(decode_frames(content, self._wanted)[0])

    def with_hash(self, content: bytes) -> tuple[Pixels, int]:
        """The view, and a 64-bit perceptual hash of four frames of the video. Raises DecodeError."""
        frames, keys = decode_frames(content, self._wanted, KEY_FRAMES)
        return self._ordered(frames), image_hash(stacked(keys))

    def decoding_bytes(self, content: bytes) -> int:
        """Bytes of memory that making the view takes at its peak, from the header alone; 0 for a file that is no video."""
        try:
            pixels = min(frame_pixels(content), MAX_FRAME_PIXELS)
        except DecodeError:
            return 0
        return pixels * (_DECODED_FRAMES + _REFERENCES * 3 // 2) + 2 * int(np.prod(self.shape))

    @property
    def _wanted(self) -> Wanted:
        return Wanted(lambda number: self.sampling.evenly(number, self.clips), self._crops_of)

    def _crops_of(self, frame: Pixels) -> Pixels:
        """uint8 (H, W, 3) → (crops, side, side, 3)."""
        if self.crops == 1:
            return self.frame.fit(frame)[None]
        return np.stack([self.frame.fit(square) for square in _squares(frame)])

    def _ordered(self, frames: Pixels) -> Pixels:
        """(clips · T, crops, …) → (clips · crops · T, …)."""
        by_clip = frames.reshape(self.clips, self.sampling.frames, *frames.shape[1:])
        return np.ascontiguousarray(by_clip.swapaxes(1, 2)).reshape(self.shape)


def _squares(frame: Pixels) -> list[Pixels]:
    """The squares at one end, in the middle and at the other end of a frame's longer side."""
    height, width = frame.shape[:2]
    side = min(height, width)
    places = [((height - side) * part // 2, (width - side) * part // 2) for part in range(3)]
    return [frame[top : top + side, left : left + side] for top, left in places]

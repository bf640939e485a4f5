"""Which frames of a video a clip has: a value that weights record."""

from __future__ import annotations

import random
from dataclasses import dataclass


def frame_indices(num_frames: int, offset: int, stride: int, frames: int) -> list[int]:
    """Give the frames of a clip: `offset`, `offset + stride`, …, counted cyclically in a video of `num_frames` (≥ 1)."""
    return [(offset + i * stride) % num_frames for i in range(frames)]


@dataclass(frozen=True)
class ClipSampling:
    """A clip: `frames` frames, `stride` apart. A shorter video repeats from its first frame.

    Attributes:
        frames: of a clip.
        stride: from one frame to the next.
    """

    frames: int
    stride: int = 1

    def evenly(self, num_frames: int, clips: int) -> list[int]:
        """The frames of `clips` clips one after the other, spread evenly over a video; of one clip, those of the middle."""
        room = self._room(num_frames)
        offsets = [room // 2] if clips == 1 else [round(room * number / (clips - 1)) for number in range(clips)]
        return [index for offset in offsets for index in frame_indices(num_frames, offset, self.stride, self.frames)]

    def draw(self, num_frames: int, generator: random.Random) -> list[int]:
        """The frames of one clip at a uniformly random offset."""
        offset = int(generator.random() * (self._room(num_frames) + 1))
        return frame_indices(num_frames, offset, self.stride, self.frames)

    def _room(self, num_frames: int) -> int:
        """The largest offset of a clip that does not repeat; 0 if the video is too short for one."""
        return max(0, num_frames - ((self.frames - 1) * self.stride + 1))

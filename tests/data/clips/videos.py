"""Videos that tests encode themselves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np


def encoded_frames(
    frames: Sequence[np.ndarray],
    *,
    lossless: bool = False,
    container: str = "mp4",
    options: dict[str, str] | None = None,
) -> bytes:
    """Encode frames, uint8 (H, W, 3), by libx264 on one thread; `lossless` keeps every RGB value."""
    file = io.BytesIO()
    codec, pixels, quality = ("libx264rgb", "rgb24", "0") if lossless else ("libx264", "yuv420p", "8")
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options={"crf": quality, **(options or {})})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def moving_square(motion: int, seed: int, frames: int = 16, side: int = 32) -> list[np.ndarray]:
    """Frames of a bright square on noise that moves to the right (motion 0) or down (1)."""
    generator = np.random.default_rng(seed)
    background = generator.integers(0, 60, (side, side, 3), dtype=np.uint8)
    start, color = generator.integers(2, side - 10), generator.integers(150, 255, 3)
    clip = []
    for number in range(frames):
        frame, along = background.copy(), number * (side - 8) // (frames - 1)
        top, left = (along, start) if motion else (start, along)
        frame[top : top + 8, left : left + 8] = color
        clip.append(frame)
    return clip

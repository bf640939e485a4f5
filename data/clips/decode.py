"""Decode the frames of a short video that a clip asks for, by one rule (PyAV, extra `[video]`).

The rule: MP4, MOV, Matroska, WebM or AVI, by content; the first video stream; frames counted in the order of presentation, whatever
the time between them; each turned as the container says; 8-bit RGB. A video of fewer frames than a clip needs repeats from its first.
A damaged video raises DecodeError; so does a clip of which one frame is missing. One thread decodes.

Decoding begins at the key frame before the first wanted frame and ends at the last wanted one: frames that are not wanted are dropped
at once, so memory holds one video's bytes, the clip at full size and one frame.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..images.decode import DecodeError, Pixels

MAX_FRAME_PIXELS = 4096 * 2304
"""Larger frames are refused (28 MB as RGB): a clip of 32 of them takes 0.9 GB."""

MAX_FRAMES = 500_000
"""Longer videos are refused: four and a half hours at 30 frames a second."""

_ONLY_VIDEOS = {
    "format_whitelist": "mov,mp4,matroska,webm,avi",
    "protocol_whitelist": "none",
}  # a playlist opens other files


def frame_indices(num_frames: int, offset: int, stride: int, frames: int) -> list[int]:
    """Give the frames of a clip: `offset`, `offset + stride`, …, counted cyclically in a video of `num_frames` (≥ 1)."""
    return [(offset + i * stride) % num_frames for i in range(frames)]


def decode_clip(content: bytes, *, offset: int, stride: int, frames: int) -> Pixels:
    """Decode a clip: uint8, shape (frames, height, width, 3).

    Args:
        content: the encoded video.
        offset: frame at which the clip begins; from 0, cyclic.
        stride: frames from one to the next (≥ 1).
        frames: how many (≥ 1).

    Raises:
        DecodeError: no video stream, no frames, damage, or over MAX_FRAME_PIXELS or MAX_FRAMES.
    """
    try:
        with av.open(io.BytesIO(content), "r", container_options=_ONLY_VIDEOS) as container:
            return _clip(container, _video_stream(container), offset, stride, frames)
    except av.FFmpegError as error:
        raise DecodeError(f"no complete video: {error.strerror}") from error


def _video_stream(container: InputContainer) -> VideoStream:
    """Take the first video stream, to be decoded by one thread that stops at damage."""
    if not container.streams.video:
        raise DecodeError("no video stream")
    stream = container.streams.video[0]
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise DecodeError(f"frames of {stream.width} × {stream.height} pixels, over {MAX_FRAME_PIXELS}")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}
    return stream


def _clip(container: InputContainer, stream: VideoStream, offset: int, stride: int, frames: int) -> Pixels:
    times = _presentation_times(container, stream)
    return _decoded(container, stream, np.array([times[i] for i in frame_indices(len(times), offset, stride, frames)]))


def _presentation_times(container: InputContainer, stream: VideoStream) -> list[int]:
    """Read the time of every frame from the packets, without decoding; the header's count of frames may be wrong or missing."""
    times = set()
    for packet in container.demux(stream):
        if packet.pts is not None:
            times.add(packet.pts)
        if len(times) > MAX_FRAMES:
            raise DecodeError(f"more than {MAX_FRAMES} frames")
    if not times:
        raise DecodeError("no frames")
    return sorted(times)


def _decoded(container: InputContainer, stream: VideoStream, wanted: np.ndarray) -> Pixels:
    """Decode the frames at these times, from the key frame before the first; each goes to its places in the clip at once."""
    container.seek(int(wanted.min()), stream=stream, backward=True)
    clip: Pixels | None = None
    missing = {*wanted.tolist()}
    num_wanted = len(missing)
    for frame in _frames_until(container, stream, int(wanted.max())):
        if frame.pts not in missing:
            continue
        pixels = _upright(frame)
        clip = np.empty((len(wanted), *pixels.shape), np.uint8) if clip is None else clip
        if pixels.shape != clip.shape[1:]:
            raise DecodeError("frames of several sizes")
        clip[wanted == frame.pts] = pixels
        missing.remove(frame.pts)
    if clip is None or missing:
        raise DecodeError(f"{len(missing)} of {num_wanted} frames are missing")
    return clip


def _frames_until(container: InputContainer, stream: VideoStream, last: int) -> Iterator[VideoFrame]:
    for frame in container.decode(stream):
        if frame.width * frame.height > MAX_FRAME_PIXELS:
            raise DecodeError(f"frames of {frame.width} × {frame.height} pixels, over {MAX_FRAME_PIXELS}")
        if frame.is_corrupt:
            raise DecodeError("a damaged frame")
        yield frame
        if frame.pts is not None and frame.pts >= last:
            return


def _upright(frame: VideoFrame) -> Pixels:
    """Convert to RGB and turn as the container says: whole quarters, counter-clockwise."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))

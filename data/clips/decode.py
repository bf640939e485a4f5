"""Decode the frames of a short video that a clip asks for, by one rule (PyAV, extra `[video]`).

The rule: MP4, MOV, Matroska, WebM or AVI, by content; the first video stream; frames counted in the order of presentation, whatever
the time between them; each turned as the container says; interlaced ones as they are; 8-bit RGB. A video of fewer frames than a clip
needs repeats from its first. A damaged video raises DecodeError; so does a clip of which one frame is missing. One thread decodes.

Decoding begins at the key frame before the first wanted frame and ends at the last wanted one. Two kinds of video are decoded from
their start: AVI and others whose packets have no times of presentation, and those that miss a frame otherwise (open groups of
pictures, whose first frames need the group before). Each wanted frame is resized at once. So memory holds one video's bytes, the
resized frames, one frame at full size and those that the codec refers to: at most 16.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..images.decode import DecodeError, Pixels
from .sampling import frame_indices

MAX_FRAME_PIXELS = 4096 * 2304
"""Larger frames are refused (28 MB as RGB)."""

MAX_FRAMES = 500_000
"""Longer videos are refused: four and a half hours at 30 frames a second."""

MAX_CLIP_BYTES = 1 << 30
"""More resized pixels of one clip are refused."""

_ONLY_VIDEOS = {
    "format_whitelist": "mov,mp4,matroska,webm,avi",
    "protocol_whitelist": "none",
}  # a playlist opens other files


class Wanted(NamedTuple):
    """Frames to decode, and what to keep of each.

    Attributes:
        choose: number of frames of a video (≥ 1) → the numbers of the wanted ones, in any order, also repeated.
        resize: uint8 (H, W, 3) → uint8 of the same shape for every frame.
    """

    choose: Callable[[int], Sequence[int]]
    resize: Callable[[Pixels], Pixels]


def decode_clip(content: bytes, *, offset: int, stride: int, frames: int) -> Pixels:
    """Decode a clip at full size: uint8, shape (frames, height, width, 3).

    Args:
        content: the encoded video.
        offset: frame at which the clip begins; from 0, cyclic.
        stride: frames from one to the next (≥ 1).
        frames: how many (≥ 1).

    Raises:
        DecodeError: as `decode_frames`.
    """
    wanted = Wanted(lambda number: frame_indices(number, offset, stride, frames), lambda frame: frame)
    return decode_frames(content, wanted)[0]


def decode_frames(content: bytes, *wanted: Wanted) -> list[Pixels]:
    """Decode the frames of each `wanted` in one pass: uint8 (frames, …), in the order of its `choose`.

    Raises:
        DecodeError: no video stream, no frames, damage, or over MAX_FRAME_PIXELS, MAX_FRAMES or MAX_CLIP_BYTES.
    """
    try:
        with _opened(content) as (container, stream):
            times, num_frames = _presentation_times(container, stream)
            clips = [_Clip(each, num_frames) for each in wanted]
            if times is not None and _fill_from_key_frame(container, stream, times, clips):
                return [clip.pixels() for clip in clips]
        with _opened(content) as (container, stream):
            _fill(_frames(container, stream), times, clips)
        return [clip.pixels() for clip in clips]
    except av.FFmpegError as error:
        raise DecodeError(f"no complete video: {error.strerror}") from error


@contextmanager
def _opened(content: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first video stream, to be decoded by one thread that stops at damage."""
    with av.open(io.BytesIO(content), "r", container_options=_ONLY_VIDEOS) as container:
        if not container.streams.video:
            raise DecodeError("no video stream")
        stream = container.streams.video[0]
        _check_size(stream.width, stream.height)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise DecodeError(f"frames of {width} × {height} pixels, over {MAX_FRAME_PIXELS}")


def _presentation_times(container: InputContainer, stream: VideoStream) -> tuple[list[int] | None, int]:
    """Read times and number of the frames from the packets, without decoding; the header's count may be wrong or missing.

    The times are None where a packet has none, or an AVI's.
    """
    times, num_packets = set(), 0
    for packet in container.demux(stream):
        if not packet.size:  # the flush at the end
            continue
        num_packets += 1
        if packet.pts is not None:
            times.add(packet.pts)
        if num_packets > MAX_FRAMES:
            raise DecodeError(f"more than {MAX_FRAMES} frames")
    if not num_packets:
        raise DecodeError("no frames")
    is_timed = len(times) == num_packets and container.format.name != "avi"  # whose times are those of decoding
    return (sorted(times) if is_timed else None), num_packets


class _Clip:
    """The resized frames of one `Wanted`, filled frame by frame."""

    def __init__(self, wanted: Wanted, num_frames: int) -> None:
        self._resize, self.numbers = wanted.resize, np.array(wanted.choose(num_frames))
        self._pixels: Pixels | None = None
        self.missing = {*self.numbers.tolist()}

    def put(self, number: int, frame: Pixels) -> None:
        """Resize a frame into its places, if it is wanted."""
        if number not in self.missing:
            return
        small = self._resize(frame)
        if self._pixels is None:
            if small.nbytes * len(self.numbers) > MAX_CLIP_BYTES:
                raise DecodeError(f"{len(self.numbers)} frames of shape {small.shape}, over {MAX_CLIP_BYTES} bytes")
            self._pixels = np.empty((len(self.numbers), *small.shape), np.uint8)
        if small.shape != self._pixels.shape[1:]:
            raise DecodeError("frames of several sizes")
        self._pixels[self.numbers == number] = small
        self.missing.remove(number)

    def pixels(self) -> Pixels:
        """The whole clip. Raises DecodeError when a frame is missing."""
        if self._pixels is None or self.missing:
            raise DecodeError(f"{len(self.missing)} of {len({*self.numbers.tolist()})} frames are missing")
        return self._pixels


def _fill_from_key_frame(
    container: InputContainer, stream: VideoStream, times: Sequence[int], clips: Sequence[_Clip]
) -> bool:
    """Fill clips from the key frame before their first frame; return whether they are whole."""
    first = min(int(clip.numbers.min()) for clip in clips)
    container.seek(times[first], stream=stream, backward=True)
    try:
        _fill(_frames(container, stream), times, clips)
    except (av.FFmpegError, _DamagedError):
        if first == 0:  # decoding from the start would find the same
            raise
    return not any(clip.missing for clip in clips)


class _DamagedError(DecodeError):
    """A damaged frame: or one of an open group whose reference was not decoded."""


def _fill(frames: Iterator[VideoFrame], times: Sequence[int] | None, clips: Sequence[_Clip]) -> None:
    """Put frames into clips until the last wanted one. Without `times`, frames are numbered from the start of the video."""
    last = max(int(clip.numbers.max()) for clip in clips)
    numbers = None if times is None else {time: number for number, time in enumerate(times)}
    for count, frame in enumerate(frames):
        number = count if numbers is None else numbers.get(frame.pts if frame.pts is not None else -1, -1)
        if any(number in clip.missing for clip in clips):
            pixels = _upright(frame)
            for clip in clips:
                clip.put(number, pixels)
        if number >= last:
            return


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for frame in container.decode(stream):
        _check_size(frame.width, frame.height)
        if frame.is_corrupt:
            raise _DamagedError("a damaged frame")
        yield frame


def _upright(frame: VideoFrame) -> Pixels:
    """Convert to RGB and turn as the container says: whole quarters, counter-clockwise."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def frame_pixels(content: bytes) -> int:
    """Pixels of a video's frames, by its header. Raises DecodeError when it is no video."""
    try:
        with av.open(io.BytesIO(content), "r", container_options=_ONLY_VIDEOS) as container:
            streams = container.streams.video
            return streams[0].width * streams[0].height if streams else 0
    except av.FFmpegError as error:
        raise DecodeError(f"no complete video: {error.strerror}") from error

"""Clips are decoded frame for frame; a bad video costs an error that says what is wrong."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.clips import decode
from data.clips.decode import decode_clip
from data.clips.sampling import frame_indices
from data.images.decode import DecodeError

HEIGHT, WIDTH = 32, 64


def grey(index: int) -> int:
    return 20 + 7 * index


def encoded(num_frames: int, *, key_every: int = 8, bframes: int = 2) -> bytes:
    """Encode frames of one grey each, the left half black: the pixels tell which frame it is and which way up."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "g": str(key_every), "bf": str(bframes)})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(num_frames):
            pixels = np.full((HEIGHT, WIDTH, 3), grey(index), np.uint8)
            pixels[:, : WIDTH // 2] = 0
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def video() -> bytes:
    return encoded(30)


def seen(clip: np.ndarray) -> list[int]:
    """Tell frames' numbers from their right halves."""
    means = clip[:, HEIGHT // 2, WIDTH * 3 // 4].mean(axis=1)
    return [round((mean - grey(0)) / 7) for mean in means]


@pytest.mark.parametrize(("offset", "stride", "frames"), [(0, 1, 30), (0, 2, 4), (13, 3, 5), (29, 1, 1), (7, 1, 2)])
def test_exactly_the_wanted_frames_are_decoded(video: bytes, offset: int, stride: int, frames: int) -> None:
    clip = decode_clip(video, offset=offset, stride=stride, frames=frames)
    assert clip.shape == (frames, HEIGHT, WIDTH, 3)
    assert clip.dtype == np.uint8
    assert seen(clip) == frame_indices(30, offset, stride, frames)


def test_a_short_video_repeats() -> None:
    assert seen(decode_clip(encoded(3), offset=1, stride=1, frames=7)) == [1, 2, 0, 1, 2, 0, 1]
    assert seen(decode_clip(encoded(1), offset=0, stride=4, frames=3)) == [0, 0, 0]


def test_a_video_is_turned_as_its_container_says(video: bytes) -> None:
    matrix = video.index(b"tkhd") + 4 + 40
    quarter_clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    clip = decode_clip(video[:matrix] + quarter_clockwise + video[matrix + 36 :], offset=20, stride=1, frames=1)
    assert clip.shape == (1, WIDTH, HEIGHT, 3)
    assert clip[0, : WIDTH // 2 - 4].mean() < 5, "the left half is on top"
    assert clip[0, WIDTH // 2 + 4 :].mean() > 100


def test_bad_videos_say_what_is_wrong(video: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(content: bytes) -> str:
        with pytest.raises(DecodeError) as error:
            decode_clip(content, offset=0, stride=1, frames=30)
        return str(error.value)

    middle = video.index(b"mdat") + 4 + 800
    assert "no complete video" in reason(b"")
    assert "no complete video" in reason(b"GIF no video at all" * 20)
    assert "no complete video" in reason(video[: len(video) // 2])
    assert "no complete video" in reason(video[:middle] + b"\xff" * 200 + video[middle + 200 :])
    assert reason(sound()) == "no video stream"
    monkeypatch.setattr(decode, "MAX_FRAMES", 10)
    assert reason(video) == "more than 10 frames"
    monkeypatch.setattr(decode, "MAX_FRAME_PIXELS", 1000)
    assert reason(video) == "frames of 64 × 32 pixels, over 1000"


def test_a_playlist_opens_no_other_file(video: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.mp4").write_bytes(video)
    playlist = f"ffconcat version 1.0\nfile 'file:{tmp_path}/other.mp4'\n"
    with pytest.raises(DecodeError, match="Invalid argument"):
        decode_clip(playlist.encode(), offset=0, stride=1, frames=1)

"""A corpus of bad and odd videos, and what packing and labeling make of each."""

from __future__ import annotations

import io

import av
import numpy as np

from tests.data.clips.videos import encoded_frames, moving_square
from tests.picture_folder import picture

DAMAGED, NO_VIDEO = "no complete video: ", "no video stream"


def sound() -> bytes:
    """A Matroska file with a tone alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        assert isinstance(stream, av.AudioStream)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def without_frames() -> bytes:
    """A Matroska file whose video stream has no packet."""
    content = encoded_frames(moving_square(0, 0)[:2], container="matroska")
    cluster = content.index(b"\x1f\x43\xb6\x75")
    return content[:cluster]


def with_damage(content: bytes) -> bytes:
    """Overwrite a part of the encoded frames."""
    middle = content.index(b"mdat") + 4 + (len(content) - content.index(b"mdat")) // 3
    return content[:middle] + b"\xff" * 120 + content[middle + 120 :]


def huge() -> bytes:
    """A video whose frames are larger than allowed."""
    return encoded_frames([np.zeros((2400, 4112, 3), np.uint8)], options={"preset": "ultrafast"})


def corpus() -> dict[str, tuple[bytes, str]]:
    """File name → (content, the beginning of the reason to leave it out; empty for a video that is packed)."""
    frames = moving_square(0, 0)
    good = encoded_frames(frames)
    return {
        "audio-only.mkv": (sound(), NO_VIDEO),
        "corrupt-middle.mp4": (with_damage(good), DAMAGED),
        "empty.mp4": (b"", DAMAGED),
        "huge.mp4": (huge(), "frames of 4112 × 2400 pixels, over"),
        "in-avi.avi": (encoded_frames(frames, container="avi", options={"bf": "2"}), ""),
        "in-mkv.mkv": (encoded_frames(frames, container="matroska"), ""),
        "in-mov.MOV": (encoded_frames(frames, container="mov"), ""),
        "one-frame.mp4": (encoded_frames(frames[:1]), ""),
        "open-groups.mp4": (encoded_frames(frames, options={"g": "5", "bf": "2", "x264-params": "open-gop=1"}), ""),
        "picture.mp4": (picture(0), DAMAGED),
        "playlist.mp4": (b"ffconcat version 1.0\nfile 'file:/etc/passwd'\n", DAMAGED),
        "truncated.mp4": (good[: len(good) // 2], DAMAGED),
        "wrong-extension.webm": (good, ""),
        "zero-frames.mkv": (without_frames(), DAMAGED),
    }

"""A picture that moves over a background in one of ten kinds of motion, drawn so that a single frame should not tell which."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..images.decode import Pixels

MOTIONS = (
    "left", "right", "up", "down", "zoom_in", "zoom_out", "turn_left", "turn_right", "still", "shaking",
)  # fmt: skip
_SHIFT = (4.0, 9.0)  # pixels from the first frame to the last, least and most
_ZOOM = (1.25, 1.7)  # ratio of the sizes of the last frame and the first
_TURN = (30.0, 90.0)  # degrees from the first frame to the last
_SHAKE = (0.5, 1.5)  # standard deviation of a frame's place, pixels
_SCALE = (0.45, 0.65)  # of the picture in the middle of the clip
_OFF_CENTRE = 4.0  # pixels of the place in the middle of the clip, uniform in ±


class Pose(NamedTuple):
    """Where a picture is in a frame: place of its centre from the frame's, pixels to the right and down; scale; degrees to the left."""

    right: float
    down: float
    scale: float
    degrees: float


def draw_poses(motion: int, frames: int, generator: np.random.Generator) -> list[Pose]:
    """The poses of a clip with the motion MOTIONS[motion], in the order of its frames.

    In the middle of the clip, place, scale and turn are drawn alike for all motions.
    """
    right, down = generator.uniform(-_OFF_CENTRE, _OFF_CENTRE, 2)
    scale, degrees = generator.uniform(*_SCALE), generator.uniform(-180, 180)
    amounts = [generator.uniform(*limits) for limits in (_SHIFT, _ZOOM, _TURN, _SHAKE)]
    shift, zoom, turn, shake = amounts
    places = generator.normal(0, shake, (frames, 2))
    name, poses = MOTIONS[motion], []
    for number, time in enumerate(np.linspace(-0.5, 0.5, frames)):
        along = {
            "left": (-shift * time, 0),
            "right": (shift * time, 0),
            "up": (0, -shift * time),
            "down": (0, shift * time),
        }
        x, y = tuple(places[number]) if name == "shaking" else along.get(name, (0.0, 0.0))
        growth = {"zoom_in": time, "zoom_out": -time}.get(name, 0.0) * math.log(zoom)
        turned = {"turn_left": time, "turn_right": -time}.get(name, 0.0) * turn
        poses.append(Pose(right + x, down + y, scale * math.exp(growth), degrees + turned))
    return poses


def draw_clip(
    picture: NDArray[np.uint8],
    background: NDArray[np.uint8],
    motion: int,
    frames: int,
    side: int,
    generator: np.random.Generator,
) -> Pixels:
    """A clip of a moving picture: uint8 (frames, side, side, 3).

    Args:
        picture: grey, (h, w); black is transparent.
        background: grey, (h, w): enlarged, darkened, and still.
        side: of the frames, pixels.
    """
    color, ground = generator.uniform(0.6, 1, 3), generator.uniform(0.1, 0.4, 3)
    behind = np.asarray(Image.fromarray(background).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    clip = np.empty((frames, side, side, 3), np.uint8)
    for number, pose in enumerate(draw_poses(motion, frames, generator)):
        moved = _posed(picture, pose, side)[..., None]
        opaque = np.minimum(1, moved / 64)
        clip[number] = np.rint(opaque * moved * color + (1 - opaque) * behind[..., None] * ground)
    return clip


def _posed(picture: NDArray[np.uint8], pose: Pose, side: int) -> NDArray[np.float32]:
    """The picture on black in its pose: float32 (side, side)."""
    angle, height, width = math.radians(pose.degrees), *picture.shape
    cosine, sine = math.cos(angle) / pose.scale, math.sin(angle) / pose.scale
    x, y = side / 2 + pose.right, side / 2 + pose.down
    matrix = (cosine, -sine, width / 2 - cosine * x + sine * y, sine, cosine, height / 2 - sine * x - cosine * y)
    placed = Image.fromarray(picture).transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(placed, np.float32)

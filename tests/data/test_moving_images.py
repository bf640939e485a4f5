"""Moving pictures: the same bytes each time, equally many of each motion, and a motion that can be measured."""

from pathlib import Path

import numpy as np
import pytest

from data import moving_images
from data.clips.decode import decode_clip
from data.clips.motion import MOTIONS, draw_clip, draw_poses
from data.errors import DataError
from data.shards.image_reader import ImageReader, places_in
from data.shards.split import open_split
from data.tables import read_table

SIZES = {"labeled": 10, "validation": 10, "development": 10, "unlabeled": 20, "test": 10}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Fashion-MNIST of 60 training and 10 test pictures."""
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 255, (70, 28, 28)).astype(np.uint8)
    monkeypatch.setattr(moving_images, "find_files", lambda: {})
    monkeypatch.setattr(
        moving_images, "read_idx", lambda _, part: (pictures[:60] if part == "train" else pictures[60:], None)
    )
    monkeypatch.setattr(moving_images, "VALIDATION", 10)
    monkeypatch.setattr(moving_images, "DEVELOPMENT", 10)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_all_splits_are_written_the_same_each_time_with_equally_many_of_each_motion(tmp_path: Path) -> None:
    for name in ("one", "two"):
        moving_images.prepare(str(tmp_path / name), labeled=10, unlabeled=20)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    truth = read_table(str(tmp_path / "one/truth.parquet"), "")
    assert np.bincount(truth.column("label").to_numpy()).tolist() == [2] * 10
    for name, size in SIZES.items():
        split = open_split(f"{tmp_path}/one/{name}/*.tar", f"{tmp_path}/index")
        labels = [label for index in split.indexes() for label in index.column("label").to_pylist()]
        assert sorted(labels, key=str) == ([None] * size if name == "unlabeled" else sorted(range(10)) * (size // 10))
        with ImageReader([split.shards[0].url]) as reader:
            clip = reader.image(0, places_in(split.shards[0].index())[0])
        assert decode_clip(clip, offset=0, stride=1, frames=16).shape == (16, 32, 32, 3)


def test_other_settings_and_too_many_clips_are_refused(tmp_path: Path) -> None:
    moving_images.prepare(str(tmp_path), labeled=10, unlabeled=20)
    before = files(tmp_path)
    moving_images.prepare(str(tmp_path), labeled=10, unlabeled=20)
    assert files(tmp_path) == before
    with pytest.raises(DataError, match=r"choose another out="):
        moving_images.prepare(str(tmp_path), labeled=10, unlabeled=20, seed=1)
    with pytest.raises(DataError, match="at most 40 together"):
        moving_images.prepare(str(tmp_path / "more"), labeled=30, unlabeled=20)


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_the_picture_moves_in_its_direction_alone(motion: str, axis: int, sign: int) -> None:
    picture, black = np.full((28, 28), 255, np.uint8), np.zeros((28, 28), np.uint8)
    for seed in range(5):
        clip = draw_clip(picture, black, MOTIONS.index(motion), 16, 32, np.random.default_rng(seed))
        weight = clip.sum(axis=3).astype(float)
        centres = [[np.average(np.arange(32), weights=frame.sum(axis=1 - a)) for a in (0, 1)] for frame in weight]
        along, across = np.ptp(centres, axis=0)[[axis, 1 - axis]]
        assert sign * (centres[-1][axis] - centres[0][axis]) > 3
        assert along > 3 > 1 > across


def test_sizes_and_turns_change_in_their_motions_alone() -> None:
    for number, name in enumerate(MOTIONS):
        poses = draw_poses(number, 16, np.random.default_rng(3))
        growth, turn = poses[-1].scale / poses[0].scale, poses[-1].degrees - poses[0].degrees
        assert {"zoom_in": growth > 1.2, "zoom_out": growth < 0.84}.get(name, growth == pytest.approx(1))
        assert {"turn_left": turn > 25, "turn_right": turn < -25}.get(name, turn == 0)


def test_degrees_count_to_the_left() -> None:
    bar, black = np.zeros((28, 28), np.uint8), np.zeros((28, 28), np.uint8)
    bar[12:16, 14:] = 255  # from the centre to the right
    number, columns = MOTIONS.index("turn_left"), np.arange(32)
    clip = draw_clip(bar, black, number, 16, 32, np.random.default_rng(8))
    generator = np.random.default_rng(8)
    generator.uniform(size=6)  # the colours
    for frame, pose in zip(clip.sum(axis=3).astype(float), draw_poses(number, 16, generator), strict=True):
        right = np.average(columns, weights=frame.sum(axis=0)) + 0.5 - 16 - pose.right
        down = np.average(columns, weights=frame.sum(axis=1)) + 0.5 - 16 - pose.down
        found = np.degrees(np.arctan2(-down, right))
        assert abs((found - pose.degrees + 180) % 360 - 180) < 15

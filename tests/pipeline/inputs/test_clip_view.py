"""The training view of a clip treats all frames alike, and is a function of frames and generator."""

import random

import numpy as np
import pytest
import torch

from pipeline.inputs.clip_view import ClipView, draw_frames


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize("num_ops", [0, 2])
def test_equal_frames_stay_equal_and_other_draws_give_other_views(num_ops: int) -> None:
    view = ClipView(32, num_ops=num_ops)
    frames = np.stack([picture()] * 4)
    views = [view(frames, random.Random(seed)) for seed in range(20)]
    for made in views:
        assert made.shape == (3, 4, 32, 32)
        assert made.dtype == torch.uint8
        assert made.is_contiguous()
        assert all(torch.equal(made[:, 0], made[:, number]) for number in range(4))
    assert len({made.numpy().tobytes() for made in views}) > 15
    assert torch.equal(view(frames, random.Random(3)), views[3])


def test_a_whole_crop_is_the_frames_flipped_or_not() -> None:
    frames = np.stack([picture(0)[:, :40], picture(1)[:, :40]])
    whole = torch.from_numpy(frames).permute(3, 0, 1, 2)
    for hflip, expected in ((0.0, whole), (1.0, whole.flip(3))):
        view = ClipView(40, (1.0, 1.0), (1.0, 1.0), hflip)
        assert torch.equal(view(frames, random.Random(0)), expected)


def test_frames_are_a_stride_apart_from_any_offset_and_short_videos_repeat() -> None:
    drawn = [draw_frames(12, 4, 2, random.Random(seed)) for seed in range(200)]
    assert {indices[0] for indices in drawn} == set(range(6))  # 12 − (3 × 2 + 1) + 1 offsets
    assert all(np.diff(indices).tolist() == [2, 2, 2] for indices in drawn)
    assert draw_frames(3, 4, 2, random.Random(0)) == [0, 2, 1, 0]
    assert draw_frames(1, 3, 2, random.Random(0)) == [0, 0, 0]

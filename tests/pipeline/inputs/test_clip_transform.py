"""The training view of a clip treats all frames alike, and is a function of file and seed."""

import random

import numpy as np
import pytest
import torch

from data.clips.sampling import ClipSampling
from pipeline.core.schema import AugmentConfig
from pipeline.inputs.clip_transform import ClipTransform
from tests.data.clips.videos import encoded_frames

PLAIN = AugmentConfig(crop="pad_crop", pad=0, hflip=0, num_ops=0)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def still() -> bytes:
    return encoded_frames([picture()] * 4, lossless=True)


@pytest.mark.parametrize("augment", [{"num_ops": 0}, {"num_ops": 2}, {"crop": "pad_crop"}])
def test_equal_frames_stay_equal_and_other_seeds_give_other_views(still: bytes, augment: dict[str, object]) -> None:
    transform = ClipTransform(AugmentConfig.model_validate(augment), 32, "bilinear", ClipSampling(4))
    views = [view for view, _ in transform.views(still, range(20))]
    for made in views:
        assert made.shape == (4, 3, 32, 32)
        assert made.dtype == torch.uint8
        assert made.is_contiguous()
        assert all(torch.equal(made[0], made[number]) for number in range(4))
    assert len({made.numpy().tobytes() for made in views}) > 15
    assert torch.equal(transform.views(still, [3])[0][0], views[3])


def test_a_view_without_noise_is_the_frames_flipped_or_not() -> None:
    frames = [picture(number)[:, :40] for number in range(3)]
    video = encoded_frames(frames, lossless=True)
    for hflip in (0, 1):
        transform = ClipTransform(PLAIN.model_copy(update={"hflip": hflip}), 40, "bilinear", ClipSampling(2, stride=2))
        ((view, _),) = transform.views(video, [0])
        expected = torch.from_numpy(np.stack([frames[0], frames[2]])).permute(0, 3, 1, 2)
        assert torch.equal(view, expected.flip(3) if hflip else expected)


def test_frames_are_a_stride_apart_from_any_offset_and_short_videos_repeat() -> None:
    drawn = [ClipSampling(4, 2).draw(12, random.Random(seed)) for seed in range(200)]
    assert {indices[0] for indices in drawn} == set(range(6))  # 12 − (3 × 2 + 1) + 1 offsets
    assert all(np.diff(indices).tolist() == [2, 2, 2] for indices in drawn)
    assert ClipSampling(4, 2).draw(3, random.Random(0)) == [0, 2, 1, 0]
    assert ClipSampling(3, 2).draw(1, random.Random(0)) == [0, 0, 0]

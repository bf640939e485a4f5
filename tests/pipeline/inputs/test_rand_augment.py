"""RandAugment: the published operations, magnitudes and frequencies, and Pillow's pixels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform

from pipeline.inputs.rand_augment import NAMES, SIGNED, arguments, draw_operations, rand_augment
from pipeline.inputs.train_transform import sample_seed

MAX_LEVEL = 10
PUBLISHED: dict[str, Callable[[float], tuple[float, ...]]] = {
    "AutoContrast": lambda level: (),
    "Equalize": lambda level: (),
    "Invert": lambda level: (),
    "Rotate": lambda level: (level / MAX_LEVEL * 30,),
    "Posterize": lambda level: (int(level / MAX_LEVEL * 4),),
    "Solarize": lambda level: (int(level / MAX_LEVEL * 256),),
    "SolarizeAdd": lambda level: (int(level / MAX_LEVEL * 110),),
    "Color": lambda level: (level / MAX_LEVEL * 1.8 + 0.1,),
    "Contrast": lambda level: (level / MAX_LEVEL * 1.8 + 0.1,),
    "Brightness": lambda level: (level / MAX_LEVEL * 1.8 + 0.1,),
    "Sharpness": lambda level: (level / MAX_LEVEL * 1.8 + 0.1,),
    "ShearX": lambda level: (level / MAX_LEVEL * 0.3,),
    "ShearY": lambda level: (level / MAX_LEVEL * 0.3,),
    "TranslateX": lambda level: (level / MAX_LEVEL * 100,),  # pixels
    "TranslateY": lambda level: (level / MAX_LEVEL * 100,),
    "Cutout": lambda level: (int(level / MAX_LEVEL * 40),),  # pixels from the centre to the sides
}
"""tensorflow/tpu, models/official/efficientnet/autoaugment.py, level_to_arg: one of these, evenly, `num_layers` times."""

TIMMS = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}


@lru_cache
def photo(height: int = 60, width: int = 80) -> np.ndarray:
    return np.array(Image.fromarray(load_sample_image("china.jpg")).resize((width, height)))


def planes(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))[None]


def code(name: str, negative: bool = False) -> int:
    return 2 * NAMES.index(name) + negative


def test_the_operations_are_the_published_ones_except_cutout() -> None:
    assert set(NAMES) == set(PUBLISHED) - {"Cutout"}
    timms = [operation.name for operation in rand_augment_transform("rand-m15-n2-p1.0-mmax15").ops]
    assert [TIMMS.get(name, name) for name in NAMES] == timms


@pytest.mark.parametrize("magnitude", [0, 5, 10, 15, 27, 30])
@pytest.mark.parametrize("name", NAMES)
def test_magnitudes_are_the_published_ones_and_not_clipped_at_10(name: str, magnitude: float) -> None:
    ours, published = arguments(name, magnitude), PUBLISHED[name](magnitude)
    if name in TIMMS:  # a fraction of the side; the published pixels are those of 222 px
        ours = tuple(222 * value for value in ours)
    assert ours == pytest.approx(published, rel=2e-3)


def test_operations_and_signs_are_drawn_evenly() -> None:
    drawn = [draw_operations(2, random.Random(sample_seed(7, seed))) for seed in range(6000)]
    assert {len(codes) for codes in drawn} == {2}
    for position in (0, 1):
        counts = Counter(codes[position] for codes in drawn)
        assert len(counts) == 2 * len(NAMES)  # 200 of each expected, standard deviation 14
        assert 145 < min(counts.values()) <= max(counts.values()) < 260
    pairs = Counter((first // 2, second // 2) for first, second in drawn)
    assert len(pairs) == len(NAMES) ** 2, "operations are drawn with replacement, independently"
    assert 7 < min(pairs.values()) <= max(pairs.values()) < 56  # 27 of each expected, standard deviation 5


@pytest.mark.parametrize("magnitude", [5, 15])
@pytest.mark.parametrize("shape", [(224, 224), (60, 80), (2, 5), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_pixels_equal_pillows(name: str, shape: tuple[int, int], magnitude: float) -> None:
    """Exactly; if interpolated, one pixel in 12 may differ by one level (float64 and float32 are cut off differently)."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image in (photo(*shape), noise, np.full_like(noise, 77), photo(*shape).clip(30, 140)):
        for negative in (False, True):
            sign = -1 if negative and name in SIGNED else 1
            values = [sign * value for value in arguments(name, magnitude)]
            pillows = cast(Callable[..., Image.Image], NAME_TO_OP[TIMMS.get(name, name)])
            expected = pillows(
                Image.fromarray(image), *values, fillcolor=(128, 128, 128), resample=Image.Resampling.BILINEAR
            )
            ours = rand_augment(planes(image), [(code(name, negative),)], magnitude)[0].permute(1, 2, 0).numpy()
            difference = np.abs(ours.astype(int) - np.asarray(expected))
            assert difference.max() <= (1 if name in SIGNED else 0)
            assert (difference > 0).mean() <= 0.08


@pytest.mark.parametrize("name", SIGNED)
def test_signed_operations_have_the_directions_of_timms(name: str) -> None:
    options = {"interpolation": Image.Resampling.BILINEAR, "magnitude_max": 15}
    timms = rand_augment_transform("rand-m15-n1-p1.0-mmax15", options, transforms=[TIMMS.get(name, name)])
    theirs = {np.asarray(timms(Image.fromarray(photo()))).tobytes() for _ in range(40)}
    assert len(theirs) == 2
    for negative in (False, True):
        ours = rand_augment(planes(photo()), [(code(name, negative),)], 15)[0].permute(1, 2, 0).numpy().astype(int)
        distances = [np.abs(ours - np.frombuffer(other, np.uint8).reshape(ours.shape)).max() for other in theirs]
        assert min(distances) <= 1
        assert max(distances) > 50


def test_operations_are_applied_one_after_another() -> None:
    posterized = rand_augment(planes(photo()), [(code("Invert"), code("Posterize"))], 15)
    torch.testing.assert_close(posterized, (255 - planes(photo())) // 4 * 4)


def test_an_images_result_does_not_depend_on_its_batch() -> None:
    images = torch.cat([planes(photo(33, 37)), planes(photo(33, 37)).flip(3)]).repeat(100, 1, 1, 1)
    before = images.clone()
    drawn = [draw_operations(2, random.Random(seed)) for seed in range(200)]
    alone = [rand_augment(image[None], [codes], 15) for image, codes in zip(images, drawn, strict=True)]
    assert torch.equal(rand_augment(images, drawn, 15), torch.cat(alone))
    assert torch.equal(images, before)

"""Training views are a function of image and seed alone; each noise is as strong as configured."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import RandomResizedCrop

from pipeline.core.schema import AugmentConfig
from pipeline.inputs.train_transform import TrainTransform, normalize, sample_seed

MEAN = (0.4, 0.5, 0.6)
ALL_NOISE: dict[str, Any] = {
    "num_ops": 2,
    "magnitude": 15,
    "rotation": 15,
    "zoom": 0.2,
    "translate": 0.1,
    "shear": 0.1,
    "brightness": 0.3,
    "contrast": 0.3,
    "cutout": 8,
}


def transform(size: int, **augment: Any) -> TrainTransform:
    return TrainTransform(AugmentConfig(**({"num_ops": 0} | augment)), size, "bicubic", MEAN)


@lru_cache
def photo(width: int = 80, height: int = 60) -> np.ndarray:
    return np.array(Image.fromarray(load_sample_image("china.jpg")).resize((width, height)))


@pytest.mark.parametrize("crop", ["random_resized_crop", "pad_crop"])
@pytest.mark.parametrize("noise", [{}, ALL_NOISE])
@pytest.mark.parametrize("size", [(80, 60), (28, 28), (5, 200), (1, 1)])
def test_a_view_has_the_configured_size_for_any_image(size: tuple[int, int], noise: dict[str, Any], crop: str) -> None:
    view = transform(32, crop=crop, **noise)(photo(*size), seed=3)
    assert view.shape == (3, 32, 32)
    assert view.dtype == torch.uint8
    assert view.is_contiguous()


@pytest.mark.parametrize("crop", ["random_resized_crop", "pad_crop"])
def test_equal_seeds_give_equal_pixels_and_different_seeds_different_ones(crop: str) -> None:
    views = [transform(32, crop=crop, **ALL_NOISE)(photo(), seed) for seed in [*range(20), *range(20)]]
    assert all(torch.equal(a, b) for a, b in zip(views[:20], views[20:], strict=True))
    assert len({view.numpy().tobytes() for view in views}) == 20


@pytest.mark.parametrize("crop", ["random_resized_crop", "pad_crop"])
def test_the_image_itself_is_not_changed(crop: str) -> None:
    """Also when the view is the whole image at its own size, which a kernel might return without a copy."""
    image = photo(32, 32).copy()
    make = transform(32, crop=crop, crop_scale=(1, 1), crop_ratio=(1, 1), pad=0, hflip=0, cutout=8)
    for seed in range(10):
        make(image, seed).zero_()
    np.testing.assert_array_equal(image, photo(32, 32))


def test_global_random_generators_are_not_used() -> None:
    make = transform(32, **ALL_NOISE)
    states = []
    views = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        views.append(torch.stack([make(photo(), sample) for sample in range(20)]))
        states.append(before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()))
    assert torch.equal(*views)
    assert states == [True, True]


def test_views_are_the_same_in_threads() -> None:
    make, image = transform(32, **ALL_NOISE), photo()
    alone = [make(image, seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda seed: make(image, seed), range(40)))
    assert all(torch.equal(a, b) for a, b in zip(alone, threaded, strict=True))


def test_without_noise_pad_crop_is_a_shift_of_at_most_pad_pixels() -> None:
    image = np.full((28, 28, 3), 9, np.uint8)
    make = transform(32, crop="pad_crop", pad=3, hflip=0)
    shifts: Counter[tuple[int, ...]] = Counter()
    for seed in range(1500):
        rows, columns = np.nonzero(make(image, seed)[0].numpy())
        shifts[(rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)] += 1
    expected = {(max(y, 0), min(y + 28, 32), max(x, 0), min(x + 28, 32)) for y in range(-1, 6) for x in range(-1, 6)}
    assert set(shifts) == expected
    assert min(shifts.values()) > 10  # 1,500 / 49 = 31 each


def test_half_of_the_views_are_mirrored() -> None:
    image = photo(32, 32)
    make = transform(32, crop="pad_crop", pad=0, hflip=0.5)
    plain = torch.from_numpy(image).permute(2, 0, 1)
    mirrored = [torch.equal(make(image, seed), plain.flip(2)) for seed in range(1000)]
    assert 430 < sum(mirrored) < 570
    assert sum(torch.equal(make(image, seed), plain) for seed in range(1000)) == 1000 - sum(mirrored)


def test_random_resized_crops_have_the_distribution_of_torchvisions() -> None:
    """Pixels of the image are their own coordinates, so corner values of a view give its crop."""
    rows, columns = np.mgrid[0:240, 0:240].astype(np.uint8)
    image = np.stack([rows, columns, columns], axis=2)
    make = transform(60, hflip=0)
    views = torch.stack([make(image, seed) for seed in range(1000)]).double()
    heights, widths = views[:, 0, -1, 0] - views[:, 0, 0, 0], views[:, 1, 0, -1] - views[:, 1, 0, 0]
    ours = torch.stack([views[:, 0, 0, 0], views[:, 1, 0, 0], heights * 60 / 59, widths * 60 / 59], dim=1)
    torch.manual_seed(0)
    boxes = [
        RandomResizedCrop.get_params(views[0].new_empty(3, 240, 240), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(1000)
    ]
    for fraction in (0.05, 0.25, 0.5, 0.75, 0.95):
        theirs = torch.tensor(boxes, dtype=torch.float64).quantile(fraction, dim=0)
        torch.testing.assert_close(ours.quantile(fraction, dim=0), theirs, atol=14, rtol=0)
    areas, ratios = ours[:, 2] * ours[:, 3] / 240**2, ours[:, 3] / ours[:, 2]
    assert 0.07 < areas.min() < 0.1
    assert 0.9 < areas.max() < 1.02
    assert 0.72 < ratios.min() < 0.78
    assert 1.29 < ratios.max() < 1.4


def test_an_extreme_image_falls_back_to_its_centre() -> None:
    image = np.zeros((10, 400, 3), np.uint8)
    image[:, 193:207] = 200
    view = transform(32, crop_scale=(1.0, 1.0), hflip=0)(image, seed=0)
    assert view[:, :, 16].min() == 200


def test_rand_augment_changes_nearly_every_view() -> None:
    """At magnitude 15 Solarize does nothing (its threshold is 384); two of them in a row are rare."""
    plain, noised = transform(32, hflip=0), transform(32, hflip=0, num_ops=2, magnitude=15)
    same = sum(torch.equal(plain(photo(), seed), noised(photo(), seed)) for seed in range(200))
    assert same <= 6


def grid(size: int = 33) -> np.ndarray:
    """Black, with a white spot of 3 × 3 px right of the centre."""
    image = np.zeros((size, size, 3), np.uint8)
    image[size // 2 - 1 : size // 2 + 2, size // 2 + 8 : size // 2 + 11] = 255
    return image


def spot_offsets(num_views: int = 300, **augment: Any) -> np.ndarray:
    """Offsets of the spot from the centre: (N, 2), y and x, in pixels."""
    make = transform(33, crop="pad_crop", pad=0, hflip=0, **augment)
    result = []
    for seed in range(num_views):
        view = make(grid(), seed)[0].double().numpy()
        rows, columns = np.mgrid[0:33, 0:33] - 16
        result.append([(view * rows).sum() / view.sum(), (view * columns).sum() / view.sum()])
    return np.array(result)


def test_rotation_turns_about_the_centre_by_up_to_its_degrees() -> None:
    offsets = spot_offsets(rotation=30)
    angles = np.degrees(np.arctan2(offsets[:, 0], offsets[:, 1]))
    np.testing.assert_allclose(np.hypot(*offsets.T), 9, atol=0.4)
    assert -31 < angles.min() < -26
    assert 26 < angles.max() < 31


def test_zoom_enlarges_and_shrinks_about_the_centre() -> None:
    offsets = spot_offsets(zoom=0.3)
    assert 9 * 0.7 - 0.4 < offsets[:, 1].min() < 9 * 0.76
    assert 9 * 1.24 < offsets[:, 1].max() < 9 * 1.3 + 0.4
    assert np.abs(offsets[:, 0]).max() < 0.1


def test_translation_is_a_fraction_of_the_side() -> None:
    offsets = spot_offsets(translate=0.1) - (0, 9)
    assert np.abs(offsets).max() < 3.3 + 0.3
    assert (offsets.min(axis=0) < -2.7).all()
    assert (offsets.max(axis=0) > 2.7).all()


def test_shear_moves_the_spot_up_and_down_but_not_sideways() -> None:
    offsets = spot_offsets(shear=0.3)
    assert np.abs(offsets[:, 1] - 9).max() < 1.6
    assert -3.3 < offsets[:, 0].min() < -2
    assert 2 < offsets[:, 0].max() < 3.3


def test_the_affine_map_keeps_a_small_image_in_the_middle_of_its_larger_view() -> None:
    image = np.full((28, 28, 3), 200, np.uint8)
    view = transform(32, crop="pad_crop", pad=0, hflip=0, rotation=1e-9)(image, seed=0)
    expected = np.zeros((32, 32), np.uint8)
    expected[2:30, 2:30] = 200
    np.testing.assert_array_equal(view[0].numpy(), expected)


def test_brightness_multiplies_by_up_to_its_factor() -> None:
    image = np.full((32, 32, 3), 100, np.uint8)
    make = transform(32, crop="pad_crop", pad=0, brightness=0.3)
    levels = [int(make(image, seed)[0, 0, 0]) for seed in range(300)]
    assert 70 <= min(levels) < 74
    assert 126 < max(levels) <= 130


def test_contrast_spreads_levels_about_their_mean() -> None:
    image = np.full((32, 32, 3), 80, np.uint8)
    image[:16] = 120
    make = transform(32, crop="pad_crop", pad=0, contrast=0.5)
    views = [make(image, seed).double() for seed in range(300)]
    spreads = [float(view[0, 0, 0] - view[0, -1, 0]) for view in views]
    assert all(abs(float(view.mean()) - 100) <= 0.5 for view in views)
    assert 20 <= min(spreads) < 23
    assert 57 < max(spreads) <= 60


def test_bright_pixels_saturate_and_do_not_wrap() -> None:
    image = np.full((32, 32, 3), 250, np.uint8)
    make = transform(32, crop="pad_crop", pad=0, brightness=0.5, contrast=0.5)
    assert min(int(make(image, seed).min()) for seed in range(100)) >= 125


def test_cutout_covers_a_square_of_the_mean_colour_anywhere() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    make = transform(32, crop="pad_crop", pad=0, cutout=8)
    covered = torch.zeros(32, 32)
    for seed in range(500):
        view = make(image, seed)
        rows, columns = torch.nonzero(view[0], as_tuple=True)
        height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert 4 <= height <= 8
        assert 4 <= width <= 8
        assert len(rows) == height * width
        assert view[:, rows[0], columns[0]].tolist() == [102, 128, 153]
        covered += view[0] > 0
    assert covered.min() > 0
    assert (covered == 0).sum() == 0


def test_seeds_depend_on_every_part_and_their_order() -> None:
    parts = [1, 0, 2, 3, 4, 0]
    seeds = {sample_seed(*parts)}
    for position in range(6):
        seeds.add(sample_seed(*[part + (index == position) for index, part in enumerate(parts)]))
    seeds.add(sample_seed(*reversed(parts)))
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert sample_seed(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output from 0
    assert sample_seed(-1, 2) == sample_seed(2**64 - 1, 2)


def test_seeds_of_neighbouring_samples_differ_in_half_of_their_bits() -> None:
    seeds = [sample_seed(0, 0, 0, 5, ordinal, 0) for ordinal in range(2000)]
    assert len(set(seeds)) == 2000
    flips = [(a ^ b).bit_count() for a, b in itertools.pairwise(seeds)]
    assert 31 < np.mean(flips) < 33


def test_normalize_is_the_usual_formula_and_keeps_the_memory_format() -> None:
    batch = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).to(memory_format=torch.channels_last)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    result = normalize(batch, MEAN, (0.2, 0.3, 0.4))
    torch.testing.assert_close(result, (batch / 255 - mean) / std)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)

"""The 15 corruptions: as strong as published, a function of image and seed, at any size."""

import math

import numpy as np
import pytest
from PIL import Image

from data.images.corruptions import CORRUPTIONS, SEVERITIES, SMALL_SIDE, corrupt, effects
from data.images.corruptions.filters import gaussian, motion, zoom

GREY_224 = np.full((224, 224, 3), 128, np.uint8)


def spot(size: int, spread: int = 0) -> np.ndarray:
    """Black, with a white square of 2 × `spread` + 1 px in the middle."""
    image = np.zeros((size, size, 3), np.uint8)
    middle = slice(size // 2 - spread, size // 2 + spread + 1)
    image[middle, middle] = 255
    return image


def strength(image: np.ndarray, name: str, severity: int, seeds: int = 3) -> float:
    """Mean change of a pixel, in levels."""
    changed = [corrupt(image, name, severity, [0, seed]).astype(int) - image for seed in range(seeds)]
    return float(np.abs(changed).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_image_seed_and_severity(photo: np.ndarray, name: str) -> None:
    for image in (photo[100:190, 100:210], np.asarray(Image.fromarray(photo).resize((28, 28)))):
        before = image.copy()
        results = [corrupt(image, name, severity, [0, 7]) for severity in SEVERITIES]
        assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
        assert len({result.tobytes() for result in results}) == 5
        assert np.array_equal(corrupt(image, name, 3, [0, 7]), results[2])
        assert np.array_equal(image, before)
        drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
        others = [corrupt(image, name, 3, seed) for seed in ([0, 8], [1, 7])]
        assert all(np.array_equal(other, results[2]) != drawn for other in others)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in ("glass_blur", "elastic_transform")])
def test_it_grows_from_the_first_severity_to_the_last(photo: np.ndarray, name: str) -> None:
    """Not of glass and elastic, whose published constants trade one kind of strength for another."""
    image = photo[100:324, 100:324]
    assert strength(image, name, 5) > 1.2 * strength(image, name, 1) > 1.2


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (5, 90), (90, 5)])
def test_any_size_will_do(name: str, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert all(corrupt(image, name, severity, [0]).shape == image.shape for severity in SEVERITIES)


def test_noise_is_as_strong_as_published() -> None:
    gaussian_noise = corrupt(GREY_224, "gaussian_noise", 1, [0]).astype(float) / 255
    assert gaussian_noise.std() == pytest.approx(0.08, rel=0.02)
    shot = corrupt(GREY_224, "shot_noise", 1, [0]).astype(float) / 255
    assert shot.std() == pytest.approx(math.sqrt(128 / 255 / 60), rel=0.02)
    impulse = corrupt(GREY_224, "impulse_noise", 5, [0])
    assert (impulse == 0).mean() == pytest.approx(0.135, rel=0.03)
    assert (impulse == 255).mean() == pytest.approx(0.135, rel=0.03)
    assert ((impulse != 0) & (impulse != 255) & (impulse != 128)).sum() == 0


def test_small_images_take_the_constants_that_were_made_for_32_pixels() -> None:
    spreads = [corrupt(np.full((side, side, 3), 128, np.uint8), "gaussian_noise", 1, [0]).std() / 255
               for side in (32, SMALL_SIDE, SMALL_SIDE + 1, 224)]  # fmt: skip
    assert spreads == pytest.approx([0.04, 0.04, 0.08, 0.08], rel=0.05)


def test_contrast_and_brightness_have_their_closed_forms(photo: np.ndarray) -> None:
    image = photo[100:324, 100:324]
    x = image / 255
    flat = corrupt(image, "contrast", 5, [0]) / 255
    mean = x.mean(axis=(0, 1), keepdims=True)
    np.testing.assert_allclose(flat, (x - mean) * 0.05 + mean, atol=0.5 / 255 + 1e-4)
    bright = corrupt(image, "brightness", 2, [0]) / 255
    np.testing.assert_allclose(bright.max(axis=2), np.minimum(x.max(axis=2) + 0.2, 1), atol=0.5 / 255 + 1e-4)
    colored = image.min(axis=2) > 50
    ratios = [y[colored][:, 0] / y[colored][:, 2] for y in (x, bright)]
    np.testing.assert_allclose(ratios[1], ratios[0], rtol=0.05)  # hue and saturation stay


@pytest.mark.parametrize(("scale", "radius"), [(1, 10), (2, 20), (0.5, 5)])
def test_defocus_makes_a_disk_whose_radius_grows_with_the_image(scale: float, radius: float) -> None:
    white = (spot(101) / 255).astype(np.float32)
    disk = effects.defocus_blur(white, np.random.default_rng(0), scale, 10, 0.5)[..., 0]
    rows, columns = np.nonzero(disk > disk.max() / 2)
    assert np.hypot(rows - 50, columns - 50).max() == pytest.approx(radius, abs=0.7)
    assert len(rows) == pytest.approx(math.pi * radius**2, rel=0.15)


def test_lengths_grow_with_the_shorter_side() -> None:
    for side, reach in ((112, 5), (224, 10)):
        column = np.zeros((side, side + 9, 3), np.uint8)
        column[:, side // 2] = 255
        lit = np.nonzero(corrupt(column, "defocus_blur", 5, [0])[side // 2, :, 0])[0]
        assert lit.max() - side // 2 == pytest.approx(reach, abs=1)


def test_motion_blur_is_a_line_of_half_a_gaussian_in_its_direction() -> None:
    plane = spot(101)[..., 0].astype(np.float32)
    across = motion(plane, radius=10, sigma=5, degrees=0)
    columns = np.nonzero(across[50])[0]
    assert columns.tolist() == list(range(30, 51))
    assert across.sum() == pytest.approx(plane.sum(), rel=1e-4)
    assert across[50, 50] / across[50, 40] == pytest.approx(math.exp(10**2 / 50), rel=1e-3)
    rows, columns = np.nonzero(motion(plane, radius=10, sigma=5, degrees=30))
    assert np.degrees(np.arctan2(50 - rows[0], 50 - columns[0])) == pytest.approx(30, abs=2)


def test_gaussian_blur_and_zoom_have_their_closed_forms() -> None:
    blurred = gaussian(spot(41)[..., 0].astype(np.float32), 2.0)
    assert blurred[20, 20] / blurred[20, 23] == pytest.approx(math.exp(9 / 8), rel=1e-3)
    assert gaussian(np.ones((5, 7), np.float32), 9.0) == pytest.approx(1, abs=1e-5)
    ramp = np.tile(np.arange(41, dtype=np.float32), (9, 1))
    np.testing.assert_allclose(zoom(ramp, 2.0)[4], 20 + (np.arange(41) - 20) / 2, atol=1e-4)


def test_pixelate_leaves_blocks_and_elastic_moves_pixels_no_further_than_published() -> None:
    ramp = np.repeat(np.arange(224, dtype=np.uint8)[None, :, None], 224, axis=0).repeat(3, axis=2)
    assert len(np.unique(corrupt(ramp, "pixelate", 5, [0]))) == 56
    moved = corrupt(ramp, "elastic_transform", 4, [0])[20:-20, 40:-40].astype(int) - ramp[20:-20, 40:-40]
    assert 2 < np.abs(moved).max() < 17.08 + 3 * 4.88


def test_weather_whitens(photo: np.ndarray) -> None:
    image = photo[200:424, 200:424]
    for name in ("snow", "frost"):
        assert corrupt(image, name, 3, [0]).mean() > image.mean() + 20
    foggy = corrupt(image, "fog", 5, [0]).astype(float)
    assert np.corrcoef(foggy.ravel(), image.ravel())[0, 1] < 0.9
    assert foggy.max() <= image.max()

"""The fast decode and resize against Pillow's: the same pixels from the decoder, the same but for rounding from the resize."""

import io

import numpy as np
import pytest
from PIL import Image

from data.images.clean_view import EvalView
from data.images.decode import DecodeError, decode, decode_fast
from data.images.resize import eval_transform, eval_transform_fast
from data.images.similarity import image_hash


def jpeg(image: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_decoders_pixels_are_pillows(photo: np.ndarray, quality: int, subsampling: int, progressive: bool) -> None:
    content = jpeg(photo[:251, :333], quality=quality, subsampling=subsampling, progressive=progressive)
    assert np.array_equal(decode_fast(content), decode(content))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_follow_the_same_rule(photo: np.ndarray, mode: str) -> None:
    content = jpeg(photo, mode)
    assert np.array_equal(decode_fast(content), decode(content))


def test_an_exif_orientation_is_applied(photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg(photo, exif=exif)
    assert decode_fast(content).shape == (640, 427, 3)
    assert np.array_equal(decode_fast(content), decode(content))


def test_a_camera_photo_that_is_upright_is_scaled_while_it_is_decoded(photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010F] = "a camera"
    assert decode_fast(jpeg(photo, exif=exif), 53).shape == (107, 160, 3)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"\xff\xd8\xffno jpeg", b"GIF89a"])
def test_what_is_no_image_raises_decode_error(content: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_fast(content)


def test_a_truncated_file_raises_decode_error(photo: np.ndarray) -> None:
    content = jpeg(photo)
    with pytest.raises(DecodeError, match="truncated"):
        decode_fast(content[: len(content) // 2])


@pytest.mark.parametrize(("wanted", "shape"), [(0, (427, 640)), (256, (427, 640)), (106, (214, 320)), (53, (107, 160))])
def test_images_four_times_too_large_are_scaled_while_they_are_decoded(
    photo: np.ndarray, wanted: int, shape: tuple[int, int]
) -> None:
    assert decode_fast(jpeg(photo), wanted).shape == (*shape, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "shape", [(427, 640), (375, 500), (224, 224), (100, 130), (257, 256), (400, 60), (1, 1), (3, 900)]
)
def test_the_resize_is_pillows_but_for_rounding(photo: np.ndarray, shape: tuple[int, int], interpolation: str) -> None:
    image = np.array(Image.fromarray(photo).resize(shape[::-1]))
    fast, exact = (f(image, 224, 0.875, interpolation).astype(int) for f in (eval_transform_fast, eval_transform))
    assert fast.shape == exact.shape == (224, 224, 3)
    assert np.abs(fast - exact).mean() < 0.02
    assert np.abs(fast - exact).max() <= 2


def test_scaling_moves_neither_view_nor_hash_by_much(photo: np.ndarray) -> None:
    content = jpeg(np.array(Image.fromarray(photo).resize((1600, 1068), Image.Resampling.BICUBIC)), quality=95)
    views = [EvalView(224, 0.875, "bicubic", "crop", decoder) for decoder in ("fast", "pillow")]
    (fast, fast_hash), (exact, exact_hash) = (view.with_hash(content) for view in views)
    assert np.abs(fast.astype(int) - exact).mean() < 1
    assert (fast_hash ^ exact_hash).bit_count() <= 4
    assert exact_hash == image_hash(decode(content))


def test_a_padded_view_is_the_same_from_both_decoders(photo: np.ndarray) -> None:
    content = jpeg(photo[:28, :28])
    fast, exact = (EvalView(32, 1.0, "bicubic", "pad", decoder)(content) for decoder in ("fast", "pillow"))
    assert np.array_equal(fast, exact)


@pytest.mark.parametrize(("height", "width"), [(49, 49), (98, 120), (103, 49), (55, 71), (32, 32), (31, 500)])
@pytest.mark.parametrize("image_size", [32, 64, 224])
def test_without_a_margin_around_the_crop_no_pixel_is_lost(height: int, width: int, image_size: int) -> None:
    """49 · (32 / 49) is below 32 in floating point, and torch rounds down."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    fast, exact = (f(image, image_size, 1.0, "bilinear").astype(int) for f in (eval_transform_fast, eval_transform))
    assert fast.shape == exact.shape == (image_size, image_size, 3)
    assert np.abs(fast - exact).max() <= 1

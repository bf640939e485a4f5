"""Views for self-supervised training: operations are torchvision's, drawn as SimCLR draws them, a function of seeds alone."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from data.images.decode import decode
from data.shards.split import Split
from pipeline.core.schema import TrainConfig, ViewsConfig
from pipeline.inputs import loader as loading
from pipeline.inputs import pixel_ops
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.distortion import distort, draw_distortion
from pipeline.inputs.loader import load_batches
from pipeline.inputs.noise import add_noise, add_on_device, draw_noise
from pipeline.inputs.pieces import shared_memory_needed
from pipeline.inputs.streams import StreamSpec, labeled_stream
from pipeline.inputs.train_transform import TrainTransform, make_transform, sample_seed
from tests.pipeline.inputs.test_noise import Calls, jpeg
from tests.pipeline.inputs.test_train_transform import MEAN
from tests.pipeline.training.test_training import CONFIG

ALL = ViewsConfig(solarize=(0.3,))
SIZE = 48


def photo(name: str = "flower.jpg", width: int = 61, height: int = SIZE) -> torch.Tensor:
    """uint8 (1, 3, height, width)."""
    image = Image.fromarray(load_sample_image(name)).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()


def as_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


def from_image(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference in levels."""
    return float((one.float() - other.float()).abs().max())


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.77, 1.0, 1.31, 1.8])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_are_those_of_torchvision_on_pillows_images(
    name: str, factor: float
) -> None:
    ours = {"brightness": pixel_ops.brightness, "contrast": pixel_ops.contrast, "saturation": pixel_ops.color}[name]
    expected = getattr(tv, f"adjust_{name}")(as_image(photo()), factor)
    assert torch.equal(ours(photo(), factor), from_image(expected))


@pytest.mark.parametrize("turn", [-0.4, -0.2, -0.013, 0.0, 0.1, 0.2, 0.5])
def test_the_hue_is_turned_as_by_torchvision(turn: float) -> None:
    colors = torch.randint(256, (1, 3, 90, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for image in (photo("china.jpg"), photo(), colors):
        expected = tv.adjust_hue(image.double() / 255, turn) * 255
        assert distance(pixel_ops.hue(image, turn), expected) <= 0.5 + 1e-3, "rounded to whole levels"


def test_the_hue_of_grey_and_of_no_turn_stays() -> None:
    grey = pixel_ops.grey(photo())
    assert torch.equal(pixel_ops.hue(grey, 0.3), grey)
    assert torch.equal(pixel_ops.hue(photo(), 0.0), photo())


def test_grey_and_solarize_are_pillows() -> None:
    assert torch.equal(pixel_ops.grey(photo()), from_image(as_image(photo()).convert("L").convert("RGB")))
    assert torch.equal(pixel_ops.solarize(photo(), 128), from_image(tv.solarize(as_image(photo()), 128)))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.2, 2.0])
@pytest.mark.parametrize("side", [20, 32, SIZE, 110])
def test_the_blur_is_torchvisions(side: int, sigma: float) -> None:
    image, kernel = photo("china.jpg", side, side), side // 10 // 2 * 2 + 1
    expected = tv.gaussian_blur(image.double(), [kernel, kernel], [sigma, sigma])
    ours = pixel_ops.blur(image, *pixel_ops.gaussian_taps(side, sigma))
    assert distance(ours, expected) < 0.8, "half a level of rounding, and a little of the kernel's"
    assert (ours.float() - expected).mean().abs() < 0.02


@given(st.integers(8, 400), st.floats(0.1, 2))
def test_a_kernel_sums_to_one_and_falls(side: int, sigma: float) -> None:
    middle, *outer = pixel_ops.gaussian_taps(side, sigma)
    assert middle + 2 * sum(outer) == pixel_ops._KERNEL
    assert [middle, *outer] == sorted([middle, *outer], reverse=True)
    assert len(outer) <= side // 20


def drawn(count: int, config: ViewsConfig = ALL, size: int = SIZE, **which: Any) -> list[Any]:
    return [draw_distortion(config, size, random.Random(seed), **which) for seed in range(count)]


def test_a_batch_is_distorted_as_each_view_by_itself() -> None:
    views = torch.cat([photo(name, SIZE) for name in ("china.jpg", "flower.jpg")] * 200)
    rounds = drawn(len(views))
    expected = [distort(view[None].clone(), [each]) for view, each in zip(views, rounds, strict=True)]
    assert torch.equal(distort(views.clone(), rounds), torch.cat(expected))
    order = torch.randperm(len(views))
    mixed = distort(views[order], [rounds[row] for row in order])
    assert torch.equal(mixed, torch.cat(expected)[order])


def test_views_distorted_on_a_device_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for GPUs, run on the CPU."""
    make = TrainTransform(ALL, SIZE, "bicubic", MEAN)
    crops, noise = zip(*make.views(jpeg(90, 70), range(80)), strict=True)
    expected = torch.stack([make.add_noise(crop.clone(), each) for crop, each in zip(crops, noise, strict=True)])
    monkeypatch.setattr(pixel_ops, "_is_on_cpu", lambda images: False)
    assert torch.equal(add_on_device(torch.stack(crops), noise, ALL, MEAN), expected)


def test_the_distortion_of_a_batch_is_one_copy_to_the_device_and_no_kernel_per_view() -> None:
    """On the meta device, on which waiting for a value is an error."""

    def add(num_views: int) -> Calls:
        noise = [draw_noise(ALL, 32, random.Random(seed)) for seed in range(num_views)]
        with Calls() as calls:
            add_noise(torch.empty(num_views, 3, 32, 32, dtype=torch.uint8, device="meta"), noise, ALL, MEAN)
        return calls

    add(400)  # constants are copied once
    small, large = add(400), add(1600)
    assert small.uploads == large.uploads == 2, "what was drawn, and the distortion"
    assert large.operations == small.operations


def test_distortions_are_drawn_as_published() -> None:
    """Probabilities, and factors uniform in 1 ± 0.8 and ± 0.2, in an even order (arXiv 2002.05709, appendix A)."""
    rounds = drawn(6000)
    jitters = [each[:4] for each in rounds if each[0][0]]
    assert len(jitters) / len(rounds) == pytest.approx(0.8, abs=0.02)
    assert all(sorted(name for name, _ in each) == ["Brightness", "Contrast", "Hue", "Saturation"] for each in jitters)
    for name, low, high in (
        ("Brightness", 0.2, 1.8),
        ("Contrast", 0.2, 1.8),
        ("Saturation", 0.2, 1.8),
        ("Hue", -0.2, 0.2),
    ):
        factors = np.array([values[0] for each in jitters for found, values in each if found == name])
        np.testing.assert_allclose(np.quantile(factors, [0, 0.25, 0.5, 0.75, 1]), np.linspace(low, high, 5), atol=0.06)
    orders = Counter(tuple(name for name, _ in each) for each in jitters)
    assert len(orders) == 24
    assert max(orders.values()) < 1.5 * len(jitters) / 24
    changes = (2 - 0.235) / (2 - 0.1)  # a blur of less than 0.235 pixels changes no level and is left out
    for place, (name, share) in enumerate([("Grey", 0.2), ("Blur", 0.5 * changes), ("Solarize", 0.3)], 4):
        assert {each[place][0] for each in rounds} == {"", name}
        assert np.mean([each[place][0] == name for each in rounds]) == pytest.approx(share, abs=0.03)


def test_the_blurs_sigma_is_uniform() -> None:
    rounds = drawn(3000, ViewsConfig(blur=(1.0,)), size=224)
    middles = np.array([pixel_ops._KERNEL if not each[5][0] else each[5][1][0] for each in rounds])
    expected = [pixel_ops.gaussian_taps(224, sigma)[0] for sigma in np.linspace(0.1, 2, 2001)]
    np.testing.assert_allclose(np.quantile(middles, [0.2, 0.5, 0.8]), np.quantile(expected, [0.2, 0.5, 0.8]), rtol=0.06)


def test_blur_and_solarize_may_differ_from_view_to_view() -> None:
    byol = ViewsConfig(blur=(1.0, 0.0), solarize=(0.0, 1.0))
    first, second = (drawn(50, byol, size=224, view=view) for view in (0, 1))
    assert {each[6][0] for each in first} == {""}
    assert {(each[5][0], each[6][0]) for each in second} == {("", "Solarize")}
    assert sum(each[5][0] == "Blur" for each in first) > 40, "all but those of a sigma that changes nothing"
    assert drawn(50, byol, size=224, view=2) == first


def test_strength_scales_the_jitter_and_zero_is_none() -> None:
    half = drawn(500, ViewsConfig(color_jitter=0.5))
    hues = [values[0] for each in half for name, values in each if name == "Hue"]
    assert 0.09 < max(np.abs(hues)) <= 0.1
    none = ViewsConfig(color_jitter=0, grey=0, blur=(0,))
    assert {name for each in drawn(50, none) for name, _ in each} == {""}


@pytest.mark.slow
def test_views_have_the_statistics_of_torchvisions_simclr() -> None:
    """Of both pipelines on two photos: mean level, contrast, saturation and sharpness of a view."""
    jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    crop = v2.RandomResizedCrop(64, (0.08, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    blur = v2.RandomApply([v2.GaussianBlur(7, (0.1, 2))], 0.5)
    theirs = v2.Compose([crop, v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), blur])
    ours = TrainTransform(ViewsConfig(), 64, "bicubic", MEAN)
    torch.manual_seed(0)
    for name in ("china.jpg", "flower.jpg"):
        image = photo(name, 160, 120)[0]
        pixels = image.permute(1, 2, 0).numpy().copy()
        found = torch.stack([statistics(ours(pixels, seed)) for seed in range(600)])
        expected = torch.stack([statistics(theirs(image)) for _ in range(600)])
        error = ((found.var(0) + expected.var(0)) / 600).sqrt()
        assert ((found.mean(0) - expected.mean(0)).abs() < 4 * error).all(), "means"
        torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.2, atol=0)


def statistics(view: torch.Tensor) -> torch.Tensor:
    pixels = view.float()
    saturation = (pixels.amax(0) - pixels.amin(0)).mean()
    sharpness = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean()
    return torch.stack([pixels.mean(), pixels.std(), saturation, sharpness])


def test_a_grey_image_gets_no_colour_operation_and_the_same_pixels() -> None:
    grey = decode(jpeg(90, 70)).copy()
    grey[:] = grey[:, :, :1]
    make = TrainTransform(ALL, SIZE, "bicubic", MEAN)
    for seed in range(60):
        found = draw_distortion(ALL, SIZE, random.Random(seed), is_grey=True)
        every = draw_distortion(ALL, SIZE, random.Random(seed))
        assert {name for name, _ in found} <= {"", "Brightness", "Contrast", "Blur", "Solarize"}
        views = [distort(pixel_ops.grey(photo(width=SIZE)), [each]) for each in (found, every)]
        assert torch.equal(*views)
        view = make(grey, seed)
        assert torch.equal(view[0], view[2])


def stream(split: Split, images_per_step: int, views: int = 2) -> StreamSpec:
    return replace(labeled_stream(split, images_per_step), name="pretrain", targets="none", views=views)


VIEWS = CONFIG.model_copy(update={"augment": ViewsConfig(crop="random_resized_crop")})


def test_every_image_has_its_views_side_by_side(labeled: Split) -> None:
    with (
        closing(TrainBatches((stream(labeled, 12),), VIEWS, 10, seed=3)) as batches,
        closing(TrainBatches((stream(labeled, 12, views=1),), VIEWS, 10, seed=3)) as single,
    ):
        batch, alone, again = batches[4], single[4], batches[4]
    assert batch.images.shape == (12, 2, 3, VIEWS.image_size, VIEWS.image_size)
    assert batch.targets is None
    assert torch.equal(batch.images, again.images)
    assert torch.equal(batch.images[:, 0], alone.images), "the first view is that of a training with one"
    assert not torch.equal(batch.images[:, 0], batch.images[:, 1])
    views = {view.numpy().tobytes() for image in batch.images for view in image}
    assert len(views) == 24, "no view twice"


def test_a_view_is_a_function_of_seed_epoch_sample_and_number(labeled: Split) -> None:
    with closing(TrainBatches((stream(labeled, 100),), VIEWS, 10, seed=3)) as batches:
        epochs = [batches[step] for step in range(2)]
        entries = [list(batches._streams[0].entries(step).tuples()) for step in range(2)]
        make, source = make_transform(VIEWS), batches._streams[0]
        for batch, drawn_entries in zip(epochs, entries, strict=True):
            for place in (0, 57):
                entry = drawn_entries[place]
                content = source.reader.image(entry[1], source.rows(entry[1]).place(entry[2]))
                seeds = [sample_seed(3, 0, *entry), sample_seed(3, 0, *entry, 1)]
                expected = [make(decode(content), seed) for seed in seeds]
                assert torch.equal(batch.images[place], torch.stack(expected))
    assert sorted(entry[1:] for entry in entries[0]) == sorted(entry[1:] for entry in entries[1])
    assert entries[0] != entries[1]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("augment_on", ["host", "device"])
def test_views_are_the_same_from_any_number_of_processes_and_ranks(
    labeled: Split, monkeypatch: pytest.MonkeyPatch, augment_on: str, world: int
) -> None:
    config = VIEWS.model_copy(update={"augment_on": augment_on})
    monkeypatch.setattr(loading, "MAX_SHARED", shared_memory_needed(5 * 2 * 3 * config.image_size**2, 2))
    with closing(TrainBatches((stream(labeled, 20),), config, 10, seed=0)) as batches:
        whole = [batches[step] for step in range(3)]
    for rank in range(world):
        with closing(TrainBatches((stream(labeled, 20),), config, 10, seed=0, rank=rank, world_size=world)) as mine:
            joined = list(load_batches(mine, range(1, 3), 2, pin=False, name="pretrain"))
        for batch, expected in zip(joined, whole[1:], strict=True):
            rows = range(rank, 20, world)
            assert torch.equal(batch.images, expected.images[list(rows)])
            if augment_on == "device":
                assert batch.noise == [expected.noise[2 * row + view] for row in rows for view in range(2)]  # type: ignore[index]
            else:
                assert batch.noise is None


def test_noise_on_the_device_gives_the_hosts_views(labeled: Split) -> None:
    later = VIEWS.model_copy(update={"augment_on": "device"})
    with (
        closing(TrainBatches((stream(labeled, 20),), VIEWS, 10, seed=3)) as at_once,
        closing(TrainBatches((stream(labeled, 20),), later, 10, seed=3)) as bare,
    ):
        expected, batch = at_once[1].images, bare[1]
    assert batch.noise is not None
    views = add_noise(batch.images.flatten(0, 1), batch.noise, VIEWS.augment, VIEWS.mean)
    assert torch.equal(views.unflatten(0, (20, 2)), expected)


def test_the_views_of_a_large_jpeg_are_decoded_once_at_the_scale_of_the_smallest_crop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.inputs import train_transform

    sides: list[int] = []
    original = train_transform.decode_fast

    def counted(content: bytes, shorter_side: int = 0) -> Any:
        sides.append(shorter_side)
        return original(content, shorter_side)

    monkeypatch.setattr(train_transform, "decode_fast", counted)
    make, content = TrainTransform(ViewsConfig(), SIZE, "bicubic", MEAN, "fast"), jpeg(1600, 1067)
    for seed in range(10):
        make.from_file(content, seed)
        make.from_file(content, seed + 100)
        make.views(content, [seed, seed + 100])
        one, other, both = sides[-3:]
        assert both == max(one, other)
    assert len(sides) == 30


def test_a_training_without_views_has_no_distortion() -> None:
    assert not isinstance(TrainConfig().augment, ViewsConfig)
    assert draw_noise(TrainConfig().augment, 32, random.Random(0), is_grey=True).distortion == ()

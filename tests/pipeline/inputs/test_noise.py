"""Views from encoded files equal those from pixels; noise added to a batch equals noise added to each view."""

from __future__ import annotations

import io
import itertools
import random
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils._python_dispatch import TorchDispatchMode

from data.images.decode import decode
from data.shards.split import Split
from pipeline.core.config import Config
from pipeline.core.schema import AugmentConfig, TrainConfig
from pipeline.inputs import pixel_ops
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.noise import add_noise, add_on_device, draw_noise
from pipeline.inputs.streams import labeled_stream
from pipeline.inputs.train_transform import TrainTransform, make_transform
from pipeline.training.loop import fit
from tests.pipeline.inputs.test_train_transform import ALL_NOISE, MEAN
from tests.pipeline.training.test_training import CONFIG, make_job


def jpeg(width: int, height: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    photo = Image.fromarray(load_sample_image("china.jpg"))
    photo.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def transform(decoder: Any = "pillow", size: int = 64, **augment: Any) -> TrainTransform:
    return TrainTransform(AugmentConfig(**augment), size, "bicubic", MEAN, decoder)


def view(make: TrainTransform, content: bytes, seed: int) -> torch.Tensor:
    return make.add_noise(*make.from_file(content, seed))


@pytest.mark.parametrize("crop", ["random_resized_crop", "pad_crop"])
@pytest.mark.parametrize("noise", [ALL_NOISE, ALL_NOISE | {"num_ops": 0}, {"num_ops": 0, "cutout": 9}])
def test_noise_added_to_a_batch_equals_noise_added_to_each_view(noise: dict[str, Any], crop: str) -> None:
    make, image = transform(size=48, crop=crop, **noise), decode(jpeg(90, 70))
    content = jpeg(90, 70)
    crops, drawn = zip(*(make.from_file(content, seed) for seed in range(60)), strict=True)
    batch = add_noise(torch.stack(crops), drawn, make.augment, MEAN)
    assert torch.equal(batch, torch.stack([make(image, seed) for seed in range(60)]))


def test_noise_added_on_a_device_is_that_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for GPUs, run on the CPU."""
    make = transform(size=48, **ALL_NOISE)
    crops, drawn = zip(*(make.from_file(jpeg(90, 70), seed) for seed in range(60)), strict=True)
    expected = add_noise(torch.stack(crops), drawn, make.augment, MEAN)
    monkeypatch.setattr(pixel_ops, "_is_on_cpu", lambda images: False)
    monkeypatch.setattr(pixel_ops, "_GATHERED_AT_ONCE", 7 * 48 * 48)
    assert torch.equal(add_on_device(torch.stack(crops), drawn, make.augment, MEAN), expected)


class Calls(TorchDispatchMode):
    """Counts torch's operations, and copies from this host to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.uploads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[str(func)] += 1
        if isinstance(result, torch.Tensor) and result.is_meta and func is torch.ops.aten._to_copy.default:
            self.uploads += not args[0].is_meta
        return result


def test_a_batchs_noise_is_one_copy_to_the_device_and_no_kernel_per_image() -> None:
    """On the meta device, which takes the code for GPUs, and on which waiting for a value is an error."""
    config = AugmentConfig(**ALL_NOISE)

    def add(num_views: int) -> Calls:
        noise = [draw_noise(config, 32, random.Random(seed)) for seed in range(num_views)]
        with Calls() as calls:
            add_noise(torch.empty(num_views, 3, 32, 32, dtype=torch.uint8, device="meta"), noise, config, MEAN)
        return calls

    add(400)  # constants are copied once
    small, large = add(400), add(1600)  # all operations with both signs occur in both
    assert (small.uploads, large.uploads) == (1, 1)
    assert large.operations == small.operations


def test_a_batch_without_noise_carries_the_noise_to_add(labeled: Split) -> None:
    config = CONFIG.model_copy(update={"augment_on": "device"})
    streams = (labeled_stream(labeled, 20),)
    with (
        closing(TrainBatches(streams, CONFIG, 10, seed=3)) as at_once,
        closing(TrainBatches(streams, config, 10, seed=3)) as later,
    ):
        whole, bare = at_once[1], later[1]
    assert whole.noise is None
    assert bare.noise is not None
    assert not torch.equal(bare.images, whole.images)
    assert torch.equal(add_noise(bare.images, bare.noise, config.augment, config.mean), whole.images)


def test_training_is_the_same_wherever_noise_is_added(tmp_path: Path, labeled: Split) -> None:
    for name in ("host", "device"):
        fit(make_job(labeled, tmp_path / name, augment_on=name, epochs=1))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("host", "device")]
    assert lines[0] == lines[1]
    assert '"loss"' in lines[0]


def test_augment_on_and_decoder_are_in_the_fingerprint() -> None:
    fields = Config().fingerprint("")
    assert fields["student.augment_on"] == "host"
    assert fields["teacher.decoder"] == "pillow"


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_view_of_a_file_equals_the_view_of_its_pixels(decoder: str, orientation: int) -> None:
    """Both decoders give the same pixels for a JPEG that is not much larger than its crop needs."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content, make = jpeg(200, 150, exif=exif), transform(decoder, crop_scale=(0.3, 1))
    assert all(torch.equal(view(make, content, seed), make(decode(content), seed)) for seed in range(20))


def test_a_large_jpeg_is_scaled_while_decoding_and_shows_the_same_crop() -> None:
    content = jpeg(1600, 1067)
    exact, fast = (transform(decoder, size=96, num_ops=0) for decoder in ("pillow", "fast"))
    views = [(view(exact, content, seed).int(), view(fast, content, seed).int()) for seed in range(20)]
    differences = torch.stack([(a - b).abs().float().mean() for a, b in views])
    assert (differences > 0).sum() > 10, "hardly any was scaled"
    assert differences.mean() < 4  # levels: from blur, and from crop edges rounded to the scaled image's pixels
    assert differences.max() < 10
    others = torch.stack([(a - b).abs().float().mean() for (a, _), (_, b) in itertools.pairwise(views)])
    assert others.min() > 20


def test_small_crops_of_a_large_jpeg_are_decoded_in_full() -> None:
    content = jpeg(800, 533)
    exact, fast = (transform(decoder, size=96, crop_scale=(0.1, 0.2), num_ops=0) for decoder in ("pillow", "fast"))
    assert all(torch.equal(view(exact, content, seed), view(fast, content, seed)) for seed in range(10))


def test_the_configuration_names_the_decoder() -> None:
    assert make_transform(TrainConfig(decoder="fast")).decoder == "fast"
    assert make_transform(TrainConfig()).decoder == "pillow"


def test_scaled_decoding_does_not_move_the_crop() -> None:
    """A bright square's centre of mass moves by at most the rounding of its edges, a quarter of a view's pixel."""
    image = np.zeros((1200, 1600, 3), np.uint8)
    image[500:700, 700:900] = 255
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    columns = torch.arange(64.0)
    centres = []
    for decoder in ("pillow", "fast"):
        make = transform(decoder, crop_scale=(0.7, 1.0), hflip=0, num_ops=0)
        views = [view(make, buffer.getvalue(), seed)[0].float() for seed in range(10)]
        centres.append([[(v.sum(0) * columns).sum() / v.sum(), (v.sum(1) * columns).sum() / v.sum()] for v in views])
    torch.testing.assert_close(torch.tensor(centres[0]), torch.tensor(centres[1]), atol=0.25, rtol=0)

"""Training input beside its peers: decode, random resized crop, flip, RandAugment, batch.

    python -m benchmarks.bench_loader [rounds=7] [images=256]

JPEG photos of 500 × 375 pixels (50 kB) to 224 px in batches of 64, RandAugment with 2 operations at magnitude 15, always applied.
One process, one thread, no loader processes; images per second of CPU time, so that other load on the machine matters little.
Contenders take turns; medians over rounds. `ours` has timm's distribution except for SolarizeAdd's level
(`pipeline/inputs/rand_augment.py`); torchvision's has other operations and magnitudes.

    ours                the batches that `fit` trains on
    ours, on device     augment_on=device: the host decodes, crops and flips; the GPU does RandAugment
    timm                timm's create_transform in a WebLoader, uint8 out (as for its prefetcher)
    timm, floats        the same with ToTensor and normalization
    torchvision         v2 on uint8 tensors in a WebLoader, decode_jpeg
    decode              only libjpeg-turbo's decoder: the floor

Then `ours`, `ours` with decoder=fast, and timm on photos of 1,600 × 1,200, at 224 px. Last, images with two views each for SimCLR
(arXiv 2002.05709, appendix A: crop, flip, colour jitter, grey, blur), from the first photos:

    ours                 the batches that stage=pretrain trains on
    ours, on device      augment_on=device: the host decodes, crops and flips
    torchvision          v2 on uint8 tensors in a WebLoader, decode_jpeg once
    torchvision, Pillow  the same transforms on Pillow's images, as most published SimCLR code has them, with ToTensor
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import Any

import simplejpeg
import torch
import webdataset as wds
from timm.data import create_transform
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.photos import PHOTOS, make_photos
from data.settings import run_command
from data.shards.split import open_split
from pipeline.core.schema import TrainConfig, ViewsConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import labeled_stream

SIZE, BATCH, PER_SHARD, LARGE = 224, 64, 128, (1600, 1200)
TIMMS_AUGMENT = "rand-m15-n2-p1.0-mmax15"

Contender = Callable[[str], Iterator[int]]
"""Pattern of shards → endless iterator over the number of images in each batch."""


def ours(**fields: Any) -> Contender:
    """Yield sizes of the batches that `fit` trains on."""

    def run(pattern: str) -> Iterator[int]:
        config = TrainConfig(image_size=SIZE, **fields)
        stream = labeled_stream(open_split(pattern, "/nonexistent"), BATCH)
        with closing(TrainBatches((stream,), config, len(PHOTOS), seed=0)) as batches:
            yield from (len(batches[step].images) for step in range(1 << 30))

    return run


def our_views(**fields: Any) -> Contender:
    """As `ours`, for batches of two views for SimCLR of each image."""

    def run(pattern: str) -> Iterator[int]:
        config = TrainConfig(image_size=SIZE, augment=ViewsConfig(), **fields)
        stream = replace(labeled_stream(open_split(pattern, "/nonexistent"), BATCH), targets="none", views=2)
        with closing(TrainBatches((stream,), config, 0, seed=0)) as batches:
            yield from (len(batches[step].images) for step in range(1 << 30))

    return run


def timm(use_prefetcher: bool) -> Contender:
    """timm's training transform, on Pillow's images."""
    transform = create_transform(
        SIZE, is_training=True, auto_augment=TIMMS_AUGMENT, interpolation="bicubic", use_prefetcher=use_prefetcher
    )  # fmt: skip
    return lambda pattern: _web_loader(_dataset(pattern).decode("pil").to_tuple("jpg").map_tuple(transform))


def torchvision(pattern: str) -> Iterator[int]:
    """torchvision's own RandAugment on uint8 tensors."""
    crop = v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandAugment(2, 15)])

    def view(content: bytes) -> torch.Tensor:
        image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        return transform(image)

    return _web_loader(_dataset(pattern).to_tuple("jpg").map_tuple(view))


def torchvision_views(pattern: str) -> Iterator[int]:
    """torchvision's transforms for SimCLR on uint8 tensors, twice for each image."""
    transform = _simclr()

    def views(content: bytes) -> torch.Tensor:
        image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        return torch.stack([transform(image), transform(image)])

    return _web_loader(_dataset(pattern).to_tuple("jpg").map_tuple(views))


def torchvision_views_pillow(pattern: str) -> Iterator[int]:
    """The same on Pillow's images."""
    transform, to_tensor = _simclr(), v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = _dataset(pattern).decode("pil").to_tuple("jpg")
    return _web_loader(
        dataset.map_tuple(lambda image: torch.stack([to_tensor(transform(image)), to_tensor(transform(image))]))
    )


def _simclr() -> v2.Transform:
    kernel = SIZE // 10 // 2 * 2 + 1
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, (0.08, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5),
        ]
    )


def decode(pattern: str) -> Iterator[int]:
    """Yield after only decoding."""
    for (content,) in _dataset(pattern).to_tuple("jpg").repeat():
        simplejpeg.decode_jpeg(content, "RGB")
        yield 1


def _dataset(pattern: str) -> wds.WebDataset:
    return wds.WebDataset([shard.url for shard in open_split(pattern, "/nonexistent").shards], shardshuffle=False)


def _web_loader(dataset: wds.WebDataset) -> Iterator[int]:
    loader = wds.WebLoader(dataset.repeat().batched(BATCH), batch_size=None, num_workers=0)
    return (len(images) for (images,) in loader)


CONTENDERS: dict[str, Contender] = {
    "ours": ours(), "ours, on device": ours(augment_on="device"), "timm": timm(True), "timm, floats": timm(False),
    "torchvision": torchvision, "decode": decode,
}  # fmt: skip
CONTENDERS_LARGE: dict[str, Contender] = {
    "ours": ours(),
    "ours, decoder=fast": ours(decoder="fast"),
    "timm": timm(True),
}
CONTENDERS_VIEWS: dict[str, Contender] = {
    "ours": our_views(),
    "ours, on device": our_views(augment_on="device"),
    "torchvision": torchvision_views,
    "torchvision, Pillow": torchvision_views_pillow,
}


def bench(rounds: int = 7, images: int = 256, out: str = "runs/bench_loader") -> None:
    """Run all contenders in turn and print their rates."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*decode_jpeg.*")
    photos = make_photos(f"{out}/photos", 4, PER_SHARD, labeled=True)
    small = _rates(CONTENDERS, photos, rounds, images)
    _print_table("500 × 375", small, rounds, "timm")
    pattern = make_photos(f"{out}/large", 1, PER_SHARD, shape=LARGE, labeled=True)
    large = _rates(CONTENDERS_LARGE, pattern, rounds, images // 4)
    _print_table("1,600 × 1,200", large, rounds, "timm")
    views = _rates(CONTENDERS_VIEWS, photos, rounds, images // 4)
    _print_table("two views each, 500 × 375", views, rounds, "torchvision")
    record = {
        "bench": "loader", "unit": "img/s up", "ours": small["ours"], "ours_on_device": small["ours, on device"],
        "peers": {"timm": small["timm"], "timm_floats": small["timm, floats"], "torchvision": small["torchvision"]},
        "floor": small["decode"], "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "seeds": 1,
        "large": {"ours": large["ours"], "ours_scaled": large["ours, decoder=fast"], "timm": large["timm"]},
        "views": {
            "ours": views["ours"], "ours_on_device": views["ours, on device"], "torchvision": views["torchvision"],
            "torchvision_pillow": views["torchvision, Pillow"],
        },
    }  # fmt: skip
    print(json.dumps(record))


def _rates(contenders: dict[str, Contender], pattern: str, rounds: int, images: int) -> dict[str, float]:
    """Return median images per second of CPU time; each contender's first batch is not counted."""
    streams = {name: make(pattern) for name, make in contenders.items()}
    found: dict[str, list[float]] = {name: [] for name in streams}
    for stream in streams.values():
        next(stream)
    for _ in range(rounds):
        for name, stream in streams.items():
            done, started = 0, time.process_time()
            while done < images:
                done += next(stream)
            found[name].append(done / (time.process_time() - started))
    return {name: round(median(rates), 1) for name, rates in found.items()}


def _print_table(size: str, rates: dict[str, float], rounds: int, peer: str) -> None:
    print(f"\n{size} JPEG to {SIZE} px, medians of {rounds} rounds, images per second of one core:")
    for name, rate in rates.items():
        print(f"  {name:20} {rate:8,.0f}   {rate / rates[peer]:5.2f} times {peer}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

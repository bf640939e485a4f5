"""Host path of one labeling worker beside its peers: images from shards to the model, labels to disk.

    python -m benchmarks.bench_label [rounds=3] [images=4000] [only=NAME]

JPEG photos of 500 × 375 pixels (50 kB) to 224 px in batches of 256, with a model that costs nothing; two threads or two worker
processes each. Each measurement is a process of its own; medians over rounds; contenders take turns.

    ours         read, decode, resize, crop, batch, hash, top-k, write label files
    floor        only the same decode, resize and crop in two threads; no file is read or written
    timm         timm's evaluation transform in a WebLoader
    torchvision  torchvision's evaluation transform in a WebLoader
    ray_data     read_webdataset → map_batches(decode) → map_batches(model) → write_parquet, after a warm-up run
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from benchmarks.photos import make_photos
from data.images.clean_view import EvalView
from data.settings import run_command
from data.shards.image_reader import ImageReader
from data.shards.split import open_split
from pipeline.core.timing import peak_memory
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from teacher.labeling.label_shard import ShardLabeler

SIZE, CROP_PCT, BATCH, THREADS, NUM_CLASSES, PER_SHARD = 224, 0.875, 256, 2, 1000, 500
_CHUNK = 32


class StubPredictor(Predictor):
    """A model that costs nothing."""

    def __init__(self) -> None:
        preprocessing = Preprocessing(SIZE, CROP_PCT, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
        super().__init__(torch.nn.Identity(), preprocessing, "cpu", BATCH, decoder="fast")
        answer = np.random.default_rng(0).dirichlet(np.ones(NUM_CLASSES), BATCH).astype(np.float32)
        self._answer = torch.from_numpy(answer)

    def device_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Return the same probabilities for all images."""
        return self._answer[: len(images)]


def ours(pattern: str) -> float:
    """Return images per second through ShardLabeler, two shards in flight as in a labeling actor."""
    shards = open_split(pattern, "/nonexistent").shards
    labeler = ShardLabeler(StubPredictor(), NUM_CLASSES, 10, 1, THREADS, "stub")
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(2) as in_flight:
        labeler.label(shards[0], f"{out}/warm-up.parquet")
        started = time.perf_counter()
        results = list(in_flight.map(lambda shard: labeler.label(shard, f"{out}/{shard.name}.parquet"), shards))
        seconds = time.perf_counter() - started
    assert sum(result.rows for result in results) == sum(shard.num_samples for shard in shards)
    return sum(result.rows for result in results) / seconds


def floor(pattern: str) -> float:
    """Return images per second of decoding and resizing only."""
    torch.set_num_threads(1)
    view = EvalView(SIZE, CROP_PCT, "bicubic", "crop", "fast")
    contents = list(_contents(pattern))

    def decode(start: int) -> int:
        return sum(len(view(content)) > 0 for content in contents[start : start + _CHUNK])

    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(decode, range(0, 4 * _CHUNK, _CHUNK)))
        started = time.perf_counter()
        done = sum(pool.map(decode, range(0, len(contents), _CHUNK)))
        return done / (time.perf_counter() - started)


def _contents(pattern: str) -> Iterator[bytes]:
    split = open_split(pattern, "/nonexistent")
    with ImageReader([shard.url for shard in split.shards]) as reader:
        for position, shard in enumerate(split.shards):
            index = shard.index()
            for offset, size in zip(index.column("offset").to_pylist(), index.column("size").to_pylist(), strict=True):
                yield reader.read(position, offset, size)


def timm(pattern: str) -> float:
    """Return images per second of timm's transform in a WebLoader."""
    return _web_loader(pattern, create_transform((3, SIZE, SIZE), crop_pct=CROP_PCT, interpolation="bicubic"))


def torchvision(pattern: str) -> float:
    """Return images per second of torchvision's transform in a WebLoader."""
    steps = [v2.PILToTensor(), v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)]
    normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return _web_loader(pattern, v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), normalize]))


def _web_loader(pattern: str, transform: Callable[[Image.Image], torch.Tensor]) -> float:
    torch.set_num_threads(1)
    urls = [shard.url for shard in open_split(pattern, "/nonexistent").shards]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg").map_tuple(transform).batched(64)
    return loader_rate(images for (images,) in wds.WebLoader(dataset, batch_size=None, num_workers=THREADS))


def loader_rate(batches: Iterable[torch.Tensor]) -> float:
    """Return images per second of batches from loading processes; the first batch, for which they start, does not count."""
    done, started = 0, 0.0
    for images in batches:
        if not started:
            started = time.perf_counter()  # the workers have started
            continue
        done += len(images)
    return done / (time.perf_counter() - started)


def ray_data(pattern: str) -> float:
    """Return images per second of the pipeline that Ray's documentation recommends."""
    import ray

    ray.init(num_cpus=THREADS, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    urls = [str(Path(shard.url).resolve()) for shard in open_split(pattern, "/nonexistent").shards]
    _ray_seconds(urls[:1])  # its workers have started
    return len(urls) * PER_SHARD / _ray_seconds(urls)


def _ray_seconds(urls: list[str]) -> float:
    import ray

    transform = create_transform((3, SIZE, SIZE), crop_pct=CROP_PCT, interpolation="bicubic")

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        images = [transform(Image.fromarray(np.asarray(image)).convert("RGB")).numpy() for image in batch["jpg"]]
        return {"key": batch["__key__"], "image": np.stack(images)}

    class Model:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"key": batch["key"], "label": np.zeros(len(batch["image"]), np.int32)}

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        dataset = ray.data.read_webdataset(urls).map_batches(decode, batch_size=64)
        dataset.map_batches(Model, batch_size=BATCH, concurrency=1, num_cpus=0).write_parquet(out)
    return time.perf_counter() - started


CONTENDERS: dict[str, Callable[[str], float]] = {
    "ours": ours, "floor": floor, "timm": timm, "torchvision": torchvision, "ray_data": ray_data,
}  # fmt: skip
_SHARE = {"timm": 0.5, "torchvision": 0.5, "ray_data": 0.5}  # share of the shards; slow contenders need fewer images


def bench(rounds: int = 3, images: int = 4000, only: str = "", out: str = "runs/bench_label") -> None:
    """Run all contenders in turn and print their rates; with `only`, run one contender once, in this process."""
    pattern = make_photos(f"{out}/photos-{images}", images // PER_SHARD, PER_SHARD)
    if only:
        rate = CONTENDERS[only](_part(pattern, _SHARE.get(only, 1.0)))
        print(json.dumps({"rate": rate, "memory_mb": (peak_memory() or 0) / 2**20}))
        return
    _print_results(measured("benchmarks.bench_label", CONTENDERS, rounds, images, out))


def _part(pattern: str, share: float) -> str:
    folder = pattern.removesuffix("/*.tar")
    shards = sorted(Path(folder).glob("*.tar"))
    return f"{folder}/photos-{{000000..{max(2, int(len(shards) * share)) - 1:06d}}}.tar"


def measured(
    module: str, contenders: Iterable[str], rounds: int, images: int, out: str
) -> dict[str, list[dict[str, float]]]:
    """`rate` and `memory_mb` of each contender and round; they take turns, each in a process of its own (`python -m module only=…`)."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, found in results.items():
            command = [sys.executable, "-m", module, f"only={name}", f"images={images}", f"out={out}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}  {name:12} {found[-1]['rate']:8,.0f} img/s", flush=True)
    return results


def _print_results(results: dict[str, list[dict[str, float]]]) -> None:
    rates = {name: median(run["rate"] for run in runs) for name, runs in results.items()}
    print(f"\nmedians of {len(results['ours'])} rounds, 500 × 375 JPEG to {SIZE} px, {THREADS} threads or processes:")
    for name, rate in rates.items():
        low, high = min(run["rate"] for run in results[name]), max(run["rate"] for run in results[name])
        print(
            f"  {name:12} {rate:8,.0f} img/s  ({low:,.0f} to {high:,.0f})  ours is {rates['ours'] / rate:5.2f} times as fast"
        )
    memory = max(run["memory_mb"] for run in results["ours"])
    peers = {name: round(rate, 1) for name, rate in rates.items() if name not in ("ours", "floor")}
    record = {
        "bench": "label", "unit": "img/s up", "ours": round(rates["ours"], 1), "peers": peers, "floor": round(rates["floor"], 1),
        "memory_mb": round(memory), "seeds": 1,
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

"""Training's input from an object store, beside the same shards on disk and beside webdataset.

    python -m benchmarks.bench_remote [latencies=30,100] [images=1024] [rounds=5] [shards=16] [per_shard=512] [batch=128]

JPEG photos of 500 × 375 pixels (50 kB) to 224 px with RandAugment, as in `bench_loader`: one loading process, one thread. The store is
`benchmarks.object_store`, another process on this machine: it answers each request after so many milliseconds, and as many at once as
are asked for. Images per second of the clock; contenders take turns; medians over rounds. The first two batches of a turn are not
counted: an idle contender had time to read them.

    disk              the batches that `fit` trains on, from local shards
    ours, N ms        the same batches, from s3://
    webdataset, N ms  whole shards through webdataset (curl), its shuffle, then our decoding and augmentation
    timm, N ms        the same with timm's decoding and augmentation, which is what people run
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median

import torch
import webdataset as wds
from timm.data import create_transform

from benchmarks.bench_loader import SIZE, TIMMS_AUGMENT
from benchmarks.object_store import counted, object_store
from benchmarks.photos import PHOTOS, make_photos
from data.settings import run_command
from data.shards.split import open_split
from pipeline.core.schema import TrainConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import labeled_stream
from pipeline.inputs.train_transform import make_transform

_SHUFFLED = 1000  # samples in webdataset's shuffle buffer, as in its documentation
Sizes = Iterator[int]
"""Endless: the number of images in each batch."""


def ours(pattern: str, batch: int) -> Sizes:
    """The batches that `fit` trains on."""
    stream = labeled_stream(open_split(pattern, "/nonexistent"), batch)
    batches = TrainBatches((stream,), TrainConfig(image_size=SIZE), len(PHOTOS), seed=0)
    for step in range(1 << 30):
        batches.expect((after, 0, 1) for after in range(step, 1 << 30))
        yield len(batches[step].images)


def webdataset(urls: list[str], batch: int) -> Sizes:
    """Whole shards, then our decoding and augmentation."""
    transform = make_transform(TrainConfig(image_size=SIZE))

    def view(content: bytes) -> torch.Tensor:
        image, noise = transform.from_file(content, hash(content))
        return transform.add_noise(image, noise)

    return _batches(wds.WebDataset(urls, shardshuffle=100), batch, lambda data: data.to_tuple("jpg").map_tuple(view))


def timm(urls: list[str], batch: int) -> Sizes:
    """Whole shards, then timm's decoding and augmentation."""
    transform = create_transform(
        SIZE, is_training=True, auto_augment=TIMMS_AUGMENT, interpolation="bicubic", use_prefetcher=True
    )
    return _batches(
        wds.WebDataset(urls, shardshuffle=100),
        batch,
        lambda data: data.decode("pil").to_tuple("jpg").map_tuple(transform),
    )


def _batches(data: wds.WebDataset, batch: int, view: Callable[[wds.WebDataset], wds.WebDataset]) -> Sizes:
    loader = wds.WebLoader(view(data.repeat().shuffle(_SHUFFLED)).batched(batch), batch_size=None, num_workers=0)
    return (len(images) for (images,) in loader)


@contextmanager
def store_of(folder: str) -> Iterator[str]:
    """A store of a folder's files, and this process's credentials for it; give its address."""
    with object_store(folder) as address:
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "bench-key", "AWS_SECRET_ACCESS_KEY": "bench-secret"}
        yield address


def bench(
    latencies: str = "30,100",
    images: int = 1024,
    rounds: int = 5,
    shards: int = 16,
    per_shard: int = 512,
    batch: int = 128,
    out: str = "runs/bench_remote",
) -> None:
    """Print the rates of all contenders."""
    torch.set_num_threads(1)
    pattern = make_photos(f"{out}/photos", shards, per_shard, labeled=True)
    names = sorted(path.name for path in Path(out, "photos").glob("*.tar"))
    with store_of(out) as address:
        contenders = {"disk": ours(pattern, batch)}
        for latency in latencies.split(","):
            urls = [f"{address}/ms-{latency}/photos/{name}" for name in names]
            contenders[f"ours, {latency} ms"] = ours(f"s3://ms-{latency}/photos/*.tar", batch)
            contenders[f"webdataset, {latency} ms"] = webdataset(urls, batch)
            contenders[f"timm, {latency} ms"] = timm(urls, batch)
        rates, cpu_ms = _rates(contenders, rounds, images // batch)
        requests = counted(address)
    _report(rates, cpu_ms, requests, rounds)


def _rates(contenders: dict[str, Sizes], rounds: int, batches: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians: images per second of the clock, and milliseconds of this process's CPU per image."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, sizes in contenders.items():
            next(sizes)
            next(sizes)
            started, cpu_started = time.perf_counter(), time.process_time()
            done = sum(islice(sizes, batches))
            found[name].append(done / (time.perf_counter() - started))
            cpu[name].append((time.process_time() - cpu_started) / done * 1000)
    return {n: round(median(v), 1) for n, v in found.items()}, {n: round(median(v), 3) for n, v in cpu.items()}


def _report(rates: dict[str, float], cpu_ms: dict[str, float], requests: dict[str, int], rounds: int) -> None:
    print(f"medians of {rounds} rounds, images per second of one loading process; the store counted {requests}")
    for name, rate in rates.items():
        ratio = f"{rate / rates['disk']:5.2f} of the disk's"
        print(f"  {name:22} {rate:8,.0f}   {ratio}; {cpu_ms[name]:.2f} ms of CPU an image, without curl's", flush=True)
    ours_first = next(name for name in rates if name.startswith("ours"))
    latency = ours_first.removeprefix("ours")
    record = {
        "bench": "remote", "unit": "img/s up", "ours": rates[ours_first],
        "peers": {"webdataset": rates[f"webdataset{latency}"], "timm": rates[f"timm{latency}"]}, "floor": rates["disk"],
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "seeds": 1, "rates": rates, "cpu_ms": cpu_ms,
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

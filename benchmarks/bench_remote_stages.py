"""Labeling, exporting, searching near-duplicates and streaming from an object store, beside the same shards on disk.

    python -m benchmarks.bench_remote_stages [latencies=30,100] [rounds=5] [shards=8] [per_shard=512]

JPEG photos of 500 × 375 pixels (50 kB). Each latency is a bucket of `benchmarks.object_store`, another process on this machine. Labels
are on disk. Images per second of the clock, in one process with one decoding thread; contenders take turns; medians over rounds.

    label             read, decode and resize whole shards in batches of 64, as a labeling worker does; no model
    export            image shards of 512, in the shards' order
    export, shuffled  the same with export.shuffle_shards: images of all shards side by side
    near-duplicates   thumbnails of every 16th image, as of images that a hash proposes
    stream            whole shards from front to end, by the same server's http:// addresses, as PseudoLabels reads an export
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from benchmarks.bench_export import bench_overlay
from benchmarks.bench_remote import store_of
from benchmarks.object_store import counted
from benchmarks.photos import make_photos
from benchmarks.scratch import fresh_folder
from data import storage
from data.images.clean_view import EvalView
from data.labels.label_files import read_labels
from data.labels.overlay import Overlay
from data.settings import run_command
from data.shards.split import open_split
from pipeline.core.schema import Config, ExportConfig
from pipeline.export.plan import plan_files
from pipeline.export.tasks import ExportJob, make_file
from teacher.labeling.batches import BatchReader, ahead
from teacher.near_duplicates.search import read_thumbnails

BATCH, SIZE, EVERY = 64, 224, 16
_BLOCK = 1 << 18  # bytes
_MEMORY = 2 << 30  # bytes, as label.memory_mb's default
Work = Callable[[Overlay, str], int]
"""(shards and labels, scratch folder) → number of images."""


def label(overlay: Overlay, _: str) -> int:
    """Read, decode and resize all images."""
    reader = BatchReader(
        EvalView(SIZE, 0.875, "bicubic", "crop", "fast"),
        BATCH,
        1,
        lambda: None,
        _MEMORY,
        partial(np.empty, dtype=np.uint8),
    )
    for shard in overlay.shards:
        for batch in ahead(reader.batches(shard, shard.index()), reader.drop):
            batch.wait()
            reader.release(batch)
    return sum(shard.num_samples for shard in overlay.shards)


def export(shuffle_shards: int) -> Work:
    """Write image shards."""

    def work(overlay: Overlay, folder: str) -> int:
        fresh_folder(folder)
        config = Config(
            export=ExportConfig(samples_per_shard=overlay.shards[0].num_samples, shuffle_shards=shuffle_shards)
        )
        files, total = plan_files(config, overlay)
        job = ExportJob(overlay, config.export, str(Path(folder).absolute()))
        assert sum(make_file(job, file).num_samples for file in files) == total
        return total

    return work


def near_duplicates(overlay: Overlay, _: str) -> int:
    """Read thumbnails of some images of each shard."""
    done = 0
    for shard in overlay.shards:
        table = read_labels(storage.join(overlay.labels_dir, f"{shard.name}.parquet"))
        some = table.take(pa.array(np.arange(0, table.num_rows, EVERY)))
        assert read_thumbnails(shard.url, some)[1].all()
        done += some.num_rows
    return done


def stream(overlay: Overlay, _: str) -> int:
    """Read whole shards; those of the store by HTTP."""
    for shard in overlay.shards:
        with storage.open_read(shard.url.replace("s3://", os.environ["AWS_ENDPOINT_URL"] + "/")) as file:
            while file.read(_BLOCK):
                pass
    return sum(shard.num_samples for shard in overlay.shards)


WORKS: dict[str, Work] = {
    "label": label, "export": export(0), "export, shuffled": export(16), "near-duplicates": near_duplicates,
    "stream": stream,
}  # fmt: skip


def bench(
    latencies: str = "30,100",
    rounds: int = 5,
    shards: int = 8,
    per_shard: int = 512,
    out: str = "runs/bench_remote_stages",
) -> None:
    """Print the rates of all."""
    local = bench_overlay(make_photos(f"{out}/photos", shards, per_shard), f"{out}/labels", f"{out}/selection")
    with store_of(out) as address:
        places = {"disk": local}
        for latency in latencies.split(","):
            found = open_split(f"s3://ms-{latency}/photos/*.tar", "/nonexistent")
            places[f"{latency} ms"] = replace(local, shards=found.shards)
        rates = {name: _rates(work, places, rounds, f"{out}/exported") for name, work in WORKS.items()}
        requests = counted(address)
    _report(rates, requests, rounds)


def _rates(work: Work, places: dict[str, Overlay], rounds: int, folder: str) -> dict[str, float]:
    """Median images per second of the clock, by place; the first round is warm-up."""
    found: dict[str, list[float]] = {place: [] for place in places}
    for number in range(rounds + 1):
        for place, overlay in places.items():
            started = time.perf_counter()
            done = work(overlay, folder)
            if number:
                found[place].append(done / (time.perf_counter() - started))
    return {place: round(median(rates), 1) for place, rates in found.items()}


def _report(rates: dict[str, dict[str, float]], requests: dict[str, int], rounds: int) -> None:
    print(f"medians of {rounds} rounds, images per second; the store counted {requests}")
    for name, by_place in rates.items():
        told = (f"{place} {rate:,.0f} ({rate / by_place['disk']:.2f})" for place, rate in by_place.items())
        print(f"  {name:18} {'; '.join(told)}", flush=True)
    first = next(place for place in rates["label"] if place != "disk")
    record = {
        "bench": "remote_stages", "unit": "img/s up", "ours": rates["label"][first], "peers": {},
        "floor": rates["label"]["disk"], "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "seeds": 1, "rates": rates,
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

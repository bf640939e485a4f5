"""Does a labeling worker keep its model busy across shard boundaries, and its memory constant?

    python -m benchmarks.bench_label_flow [rate=500]

Utilization: the share of time in which the model is busy, with one and two shards in flight (a labeling actor has two), for shards
of one, two and eight batches of 256. The model takes 1/rate seconds per image and no CPU, like a GPU. Memory: the peak of a
process that labels 10 and 100 shards of 100 photos, and 1 shard of 10,000.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.bench_label import BATCH, NUM_CLASSES, THREADS, StubPredictor
from benchmarks.photos import make_photos
from data.settings import run_command
from data.shards.split import Shard, open_split
from pipeline.core.timing import peak_memory
from teacher.labeling.label_shard import ShardLabeler

SHAPES = ((10, 100), (100, 100), (1, 10_000))  # shards, images in each


class SleepingPredictor(StubPredictor):
    """A model that takes time and no CPU."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._seconds = 1 / rate

    def device_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Return the stub's probabilities after a sleep."""
        time.sleep(self._seconds * len(images))
        return super().device_probabilities(images)


def bench(rate: float = 500.0, out: str = "runs/bench_label", memory_of: str = "") -> None:
    """Print utilization and memory; with `memory_of`, label those shards in this process and print its peak memory."""
    if memory_of:
        _label(
            ShardLabeler(StubPredictor(), NUM_CLASSES, 10, 1, THREADS, "stub"),
            open_split(memory_of, "/nonexistent").shards,
            2,
        )
        print((peak_memory() or 0) >> 20)
        return
    utilization = {}
    for batches in (1, 2, 8):
        pattern = make_photos(f"{out}/flow-{batches}", max(2, 8 // batches), batches * BATCH)
        shards = open_split(pattern, "/nonexistent").shards
        one, two = (_utilization(rate, shards, in_flight) for in_flight in (1, 2))
        utilization[batches] = two
        print(
            f"shards of {batches} batches: the model works {one:.1%} of the time with one in flight, {two:.1%} with two",
            flush=True,
        )
    peaks = {f"{shards} shards of {size:,}": _memory(out, shards, size) for shards, size in SHAPES}
    print("peak memory, MB: " + ", ".join(f"{name}: {peak}" for name, peak in peaks.items()))
    record = {
        "bench": "label_flow",
        "unit": "share of time up",
        "ours": round(min(utilization.values()), 3),
        "floor": 1.0,
    }
    print(json.dumps(record | {"peers": peaks, "memory_mb": max(peaks.values()), "seeds": 1}))


def _utilization(rate: float, shards: tuple[Shard, ...], in_flight: int) -> float:
    """Return the utilization from the first batch on (no pipeline has that one ready at once)."""
    labeler = ShardLabeler(SleepingPredictor(rate), NUM_CLASSES, 10, 1, THREADS, "stub")
    _label(labeler, shards[:1], 1)
    before, started = labeler.meter.read()[1]["model"], time.perf_counter()
    _label(labeler, (*shards, *shards), in_flight)
    return (labeler.meter.read()[1]["model"] - before) / (time.perf_counter() - started)


def _label(labeler: ShardLabeler, shards: tuple[Shard, ...], in_flight: int) -> None:
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(in_flight) as threads:
        list(
            threads.map(lambda numbered: labeler.label(numbered[1], f"{out}/{numbered[0]}.parquet"), enumerate(shards))
        )


def _memory(out: str, num_shards: int, size: int) -> int:
    pattern = make_photos(f"{out}/memory-{num_shards}-{size}", num_shards, size)
    command = [sys.executable, "-m", "benchmarks.bench_label_flow", f"memory_of={pattern}"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

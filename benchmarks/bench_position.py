"""Time for a training of the paper's size to find its position: 13,000 shards of 10,000 pseudo-labeled images.

    python -m benchmarks.bench_position [shards=13000] [rows=10000] [step=1000000]

Times what a process does before it knows the images of a step: read each shard's selection (before its first step, too), then
find the images of step 0 and of a late step. No image is read.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.scratch import fresh_folder, remove_folder
from data.labels.label_files import COPIES_COLUMN
from data.settings import run_command
from data.tables import write_table
from pipeline.core.schema import TrainConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import StreamSpec

PER_STEP = 3584  # pseudo-labeled images in a batch of 4,096


def bench(shards: int = 13_000, rows: int = 10_000, step: int = 1_000_000, out: str = "runs/bench_position") -> None:
    """Print the seconds of each part."""
    fresh_folder(out)
    urls = _write(Path(out), shards, rows)
    spec = StreamSpec("pseudo_labeled", urls, urls, (rows,) * shards, PER_STEP, copies_urls=urls)
    started = time.perf_counter()
    batches = TrainBatches((spec,), TrainConfig(), 1000, 0)
    seconds = {"read the selection": time.perf_counter() - started}
    order = batches.order(0)
    for name, number in (("step 0", 0), (f"step {step:,}", step)):
        started = time.perf_counter()
        assert len(order.take(number * PER_STEP, PER_STEP)) == PER_STEP
        seconds[name] = time.perf_counter() - started
    remove_folder(out)
    print(
        f"{order.num_entries:,} images an epoch; "
        + ", ".join(f"{name}: {value:.3f} s" for name, value in seconds.items())
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = {"bench": "position", "unit": "s down", "ours": round(seconds[f"step {step:,}"], 4), "peers": {}}
    print(json.dumps(record | {"floor": round(seconds["step 0"], 4), "memory_mb": round(memory), "seeds": 1}))


def _write(folder: Path, shards: int, rows: int) -> tuple[str, ...]:
    """Write a selection of 0 to 3 copies per image: one file, hard-linked under all names."""
    first = folder / "first.parquet"
    write_table(str(first), pa.table({COPIES_COLUMN: np.random.default_rng(0).integers(0, 4, rows).astype(np.uint16)}))
    urls = [folder / f"images-{number:06d}.parquet" for number in range(shards)]
    for url in urls:
        url.hardlink_to(first)
    return tuple(str(url) for url in urls)


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

"""A list of a million excluded keys (`data.exclude`) against 13,000 shards of 10,000 rows: CPU time that it adds to a reading.

    python -m benchmarks.bench_exclusions [lines=1000000] [shards=13000] [rows=10000]

The list has lines `shard/key`, drawn at random. Read it, send it to another process (pickled, as to selection's processes), and find
the excluded rows of every shard, in one thread. Label files are not read: all shards have the same keys.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.scratch import fresh_folder, remove_folder
from data.labels.exclusions import read_keys
from data.settings import run_command


def bench(lines: int = 1_000_000, shards: int = 13_000, rows: int = 10_000, out: str = "runs/bench_exclusions") -> None:
    """Print the CPU time of each part."""
    url, keys = fresh_folder(out) / "exclude.txt", pa.array([f"{row:08d}" for row in range(rows)])
    written = _write(url, lines, shards, rows)
    seconds, started = {}, time.process_time()
    excluded = read_keys(str(url))
    seconds["read and group the list"] = time.process_time() - started
    started = time.process_time()
    excluded = pickle.loads(pickle.dumps(excluded))
    seconds["send it to a process"] = time.process_time() - started
    started = time.process_time()
    found = sum(int(excluded.mask(_name(shard), keys).sum()) for shard in range(shards))
    seconds["find the rows of all shards"] = time.process_time() - started
    remove_folder(out)
    if found != written:
        raise ValueError(f"{found} rows are excluded; the list has {written}")
    print(f"{written:,} lines; " + ", ".join(f"{name}: {value:.2f} s" for name, value in seconds.items()))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    record = {"bench": "exclusions", "unit": "s down", "ours": round(sum(seconds.values()), 2), "peers": {}}
    print(json.dumps(record | {"memory_mb": memory, "seeds": 1}))


def _name(shard: int) -> str:
    return f"images-{shard:06d}"


def _write(path: Path, lines: int, shards: int, rows: int) -> int:
    """Write the list; return the number of different lines."""
    random = np.random.default_rng(0)
    pairs = zip(random.integers(0, shards, lines).tolist(), random.integers(0, rows, lines).tolist(), strict=True)
    content = [f"{_name(shard)}/{row:08d}\n" for shard, row in pairs]
    path.write_text("".join(content))
    return len(set(content))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

"""A list of a million excluded keys (`data.exclude`) against 13,000 shards of 10,000 rows: CPU time that it adds to a reading.

    python -m benchmarks.bench_exclusions [lines=1000000] [shards=13000] [rows=10000]

The list has lines `shard/key`, or whole keys, drawn at random. Read it, send it to another process (pickled, as to selection's
processes), and find the excluded rows of every shard, in one thread. Label files are not read: all shards have the same keys.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.scratch import fresh_folder, remove_folder
from data.labels.exclusions import read_keys
from data.settings import run_command


def bench(lines: int = 1_000_000, shards: int = 13_000, rows: int = 10_000, out: str = "runs/bench_exclusions") -> None:
    """Print the CPU time of each part, for both forms of lines."""
    url = fresh_folder(out) / "exclude.txt"
    found = {form: _seconds(url, make(lines, shards, rows), shards, rows) for form, make in FORMS.items()}
    remove_folder(out)
    for form, seconds in found.items():
        parts = ", ".join(f"{name}: {value:.2f} s" for name, value in seconds.items())
        print(f"{lines:,} lines {form}: {sum(seconds.values()):.2f} s; {parts}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    totals = {form: round(sum(seconds.values()), 2) for form, seconds in found.items()}
    record = {"bench": "exclusions", "unit": "s down", "ours": totals["shard/key"], "peers": {}}
    print(json.dumps(record | {"memory_mb": memory, "seeds": 1, "totals": totals}))


def _seconds(url: Path, lines: set[str], shards: int, rows: int) -> dict[str, float]:
    """CPU seconds of each part with a list of these lines."""
    url.write_text("\n".join(lines))
    keys = pa.array([f"{row:08d}" for row in range(rows)])
    seconds, started = {}, time.process_time()
    excluded = read_keys(str(url))
    seconds["read and group the list"] = time.process_time() - started
    started = time.process_time()
    excluded = pickle.loads(pickle.dumps(excluded))
    seconds["send it to a process"] = time.process_time() - started
    started = time.process_time()
    found = sum(int(excluded.mask(_name(shard), keys).sum()) for shard in range(shards))
    seconds["find the rows of all shards"] = time.process_time() - started
    of_every_shard = len(lines.intersection(keys.to_pylist()))
    if found != sum("/" in line for line in lines) + shards * of_every_shard:
        raise ValueError(f"{found} rows are excluded; the list has other ones")
    return seconds


def _name(shard: int) -> str:
    return f"images-{shard:06d}"


def _of_shards(lines: int, shards: int, rows: int) -> set[str]:
    """Lines `shard/key`."""
    random = np.random.default_rng(0)
    pairs = zip(random.integers(0, shards, lines).tolist(), random.integers(0, rows, lines).tolist(), strict=True)
    return {f"{_name(shard)}/{row:08d}" for shard, row in pairs}


def _whole_keys(lines: int, shards: int, rows: int) -> set[str]:
    """Lines `key`, few of which a shard has."""
    return {f"{row:08d}" for row in np.random.default_rng(0).integers(0, min(shards * rows, 10**8), lines).tolist()}


FORMS: dict[str, Callable[[int, int, int], set[str]]] = {"shard/key": _of_shards, "key": _whole_keys}


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

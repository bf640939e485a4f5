"""Cost of scheduling a shard: shards per second through the pool, with simulated workers that do nothing.

python -m benchmarks.bench_pool [workers=1,8,64] [shards=2000]
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import ray

from data.labels.label_files import LabeledShard
from data.settings import run_command
from data.shards.split import Shard
from pipeline.core.ray_runtime import start_ray
from teacher.labeling.pool import PoolOptions, ShardPool, here


@ray.remote(num_cpus=0, concurrency_groups={"labeling": 2, "asking": 1})  # type: ignore[call-overload]
class Simulated:
    """A worker that does no work."""

    @ray.method(concurrency_group="asking")
    def place(self) -> tuple[str, int]:
        """Return node and process id."""
        return here()

    def prepare(self) -> None:
        """Load nothing."""

    @ray.method(concurrency_group="labeling")
    def label(self, shard: Shard, url: str, careful: bool) -> LabeledShard:  # noqa: ARG002 (the pool's interface)
        """Return at once, after the file `url` has appeared: all workers have started."""
        while not Path(url).exists():
            time.sleep(0.05)
        return LabeledShard(shard.name, 0, url, 10_000, 0, 0, "", "")

    @ray.method(concurrency_group="asking")
    def progress(self) -> tuple[int, dict[str, float]]:
        """None."""
        return 0, {}


def bench(workers: str = "1,8,64", shards: int = 2000) -> None:
    """Print milliseconds per shard, from first to last result."""
    start_ray(None)
    found = {int(number): _seconds_per_shard(int(number), shards) for number in workers.split(",")}
    ray.shutdown()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    ours = {f"{number} workers": round(1000 * seconds, 2) for number, seconds in found.items()}
    print(
        json.dumps(
            {
                "bench": "pool",
                "unit": "ms per shard down",
                "ours": ours,
                "peers": {},
                "floor": None,
                "memory_mb": memory,
                "seeds": 1,
            }
        )
    )


def _seconds_per_shard(workers: int, shards: int) -> float:
    some = [Shard(f"{number}.tar", 0, 10_000, "", "") for number in range(shards)]
    options = PoolOptions(workers, workers, {"CPU": 0})
    times = []
    with tempfile.TemporaryDirectory() as folder:
        gate = Path(folder) / "go"
        pool = ShardPool(Simulated.remote, options, some, [str(gate)] * shards)  # type: ignore[attr-defined]
        for result in pool.run():
            if pool.num_ready == workers:
                gate.touch()
            if result is not None:
                times.append(time.perf_counter())
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    print(
        f"{workers:3} workers: {1000 * seconds:6.2f} ms a shard, {1 / seconds:8,.0f} shards/s ({len(times)} shards)",
        flush=True,
    )
    return seconds


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

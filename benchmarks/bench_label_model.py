"""A real model end to end: the share of the ideal rate of model and host path that a labeling worker reaches.

    python -m benchmarks.bench_label_model [images=1024] [rounds=3] [threads=2]

EfficientNet-Lite0 with its ImageNet weights on JPEG photos of 500 × 375, as `stage=label` runs it: batch norms folded, channels_last.
On a CPU, model and host path share the cores: the ideal rate is 1 / (1/model + 1/host) images per second. The model as timm
builds it is measured too.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
import torch

from benchmarks.bench_label import StubPredictor
from benchmarks.photos import make_photos
from data.settings import run_command
from data.shards.split import Shard, open_split
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.efficientnet_lite0 import MODEL, lite0_weights
from pipeline.models.fold_batch_norm import fold_batch_norm
from pipeline.models.registry import build_model
from teacher.labeling.label_shard import ShardLabeler

SIZE, BATCH, PER_SHARD = 224, 64, 256


def bench(images: int = 1024, rounds: int = 3, threads: int = 2, out: str = "runs/bench_label") -> None:
    """Print median rates of model, host path and both, measured in turn."""
    torch.set_num_threads(threads)
    shards = open_split(make_photos(f"{out}/model-{images}", images // PER_SHARD, PER_SHARD), "/nonexistent").shards
    plain, fast = make_predictor(False), make_predictor(True)
    contenders: dict[str, Callable[[], float]] = {
        "timm's model": lambda: _model_rate(plain, images // 4),
        "model": lambda: _model_rate(fast, images // 2),
        _AT_ONCE: lambda: _two_at_once(fast, images // 2, threads),
        "host": lambda: _label_rate(StubPredictor(), shards, threads),
        "together": lambda: _label_rate(fast, shards, threads),
    }
    rates = {name: [] for name in contenders}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, run in contenders.items():
            rates[name].append(run())
            print(f"{name:16} {rates[name][-1]:8,.1f} img/s", flush=True)
    _print_results({name: median(found) for name, found in rates.items()}, rounds)


def make_predictor(fast: bool) -> Predictor:
    """Return EfficientNet-Lite0, as timm builds it or as `stage=label` runs it."""
    model = build_model(MODEL, 1000, {})
    model.load_state_dict(lite0_weights())
    preprocessing = Preprocessing(SIZE, 0.875, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    model = fold_batch_norm(model, (3, SIZE, SIZE)) if fast else model
    return Predictor(model, preprocessing, "cpu", BATCH, decoder="fast", channels_last=fast)


def _model_rate(predictor: Predictor, images: int) -> float:
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)).permute(
        0, 3, 1, 2
    )
    predictor.probabilities(batch)
    started = time.perf_counter()
    for _ in range(max(1, images // BATCH)):
        predictor.probabilities(batch)
    return max(1, images // BATCH) * BATCH / (time.perf_counter() - started)


def _two_at_once(predictor: Predictor, images: int, threads: int) -> float:
    """Return images per second of two batches at once, each on half the threads."""
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(max(1, threads // 2),)) as pool:
        return sum(pool.map(lambda _: _model_rate(predictor, images // 2), range(2)))


def _label_rate(predictor: Predictor, shards: tuple[Shard, ...], threads: int) -> float:
    labeler = ShardLabeler(predictor, 1000, 10, threads, threads, "stub")

    def label(shard: Shard) -> int:
        return labeler.label(shard, f"{out}/{shard.name}.parquet").rows

    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(2) as in_flight:
        started = time.perf_counter()
        rows = sum(in_flight.map(label, shards))
        return rows / (time.perf_counter() - started)


def _print_results(rates: dict[str, float], rounds: int) -> None:
    allowed = 1 / (1 / max(rates["model"], rates[_AT_ONCE]) + 1 / rates["host"])
    print(
        f"\nmedians of {rounds} rounds: together {rates['together']:.1f} img/s, {rates['together'] / allowed:.3f} of the {allowed:.1f}"
    )
    print(
        "that the model at its best and the host path allow on shared cores; "
        f"the model is {rates['model'] / rates[_TIMM]:.2f} times as fast as timm's"
    )
    record = {
        "bench": "label_model", "unit": "img/s up", "ours": round(rates["together"], 1), "floor": round(allowed, 1),
        "peers": {"timm model alone": round(rates[_TIMM], 1)}, "seeds": 1,
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip
    print(json.dumps(record))


_TIMM, _AT_ONCE = "timm's model", "model, 2 at once"


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

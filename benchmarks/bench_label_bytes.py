"""Bytes of a label on disk, by the number of stored probabilities.

    python -m benchmarks.bench_label_bytes [images=1024]

EfficientNet-Lite0 with its ImageNet weights (1,000 classes) labels JPEG photos once; label files are written with the k highest
probabilities (fp16) and `rest`, for several k.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile

import numpy as np
import torch

from benchmarks.bench_label_model import PER_SHARD, make_predictor
from benchmarks.photos import make_photos
from data.labels.label_files import label_table, write_labels
from data.labels.top_k import top_k_of
from data.settings import run_command
from data.shards.image_reader import ImageReader
from data.shards.split import Shard, open_split
from pipeline.inference.predictor import Predictor

TOP_KS = (1, 5, 10, 16, 1000)


def bench(images: int = 1024, out: str = "runs/bench_label") -> None:
    """Print bytes per label, averaged over all shards."""
    torch.set_num_threads(2)
    shards = open_split(make_photos(f"{out}/model-{images}", images // PER_SHARD, PER_SHARD), "/nonexistent").shards
    predictor = make_predictor(fast=True)
    answers = [_probabilities(shard, predictor) for shard in shards]
    sizes = {k: sum(map(_bytes, shards, answers, [k] * len(shards))) / images for k in TOP_KS}
    for k, size in sizes.items():
        kept = np.sort(np.concatenate(answers), axis=1)[:, -k:].sum(axis=1).mean()
        print(
            f"top_k={k:<5} {size:8.1f} bytes a label, {size * 0.13:6.1f} GB for 130 million; {kept:.4f} of the probability"
        )
    record = {
        "bench": "label_bytes", "unit": "bytes a label down", "ours": {str(k): round(size, 1) for k, size in sizes.items()},
        "peers": {}, "floor": None, "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "seeds": 1,
    }  # fmt: skip
    print(json.dumps(record))


def _probabilities(shard: Shard, predictor: Predictor) -> np.ndarray:
    """Return the probabilities of a shard's images, (N, 1000) float32."""
    index = shard.index()
    with ImageReader([shard.url]) as reader:
        rows = zip(index.column("offset").to_pylist(), index.column("size").to_pylist(), strict=True)
        images = np.stack([predictor.view(reader.read(0, offset, size)) for offset, size in rows])
    return predictor.probabilities(torch.from_numpy(images).permute(0, 3, 1, 2))


def _bytes(shard: Shard, probabilities: np.ndarray, top_k: int) -> int:
    """Return the size of a shard's label file in bytes; hashes are random, as those of different images are."""
    hashes = np.random.default_rng(0).integers(0, 2**64, len(probabilities), np.uint64)
    table = label_table(shard.index(), np.arange(len(probabilities)), top_k_of(probabilities, top_k), hashes)
    with tempfile.TemporaryDirectory() as folder:
        return write_labels(f"{folder}/labels.parquet", shard, table, [], "benchmark").bytes


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

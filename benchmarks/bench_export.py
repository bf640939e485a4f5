"""Exporting images with their labels, beside `tar` copying the same image bytes.

    python -m benchmarks.bench_export [rounds=5] [images=8000] [shards=8]

JPEG photos of 50 kB, all selected, shards of 1,000. Files are in the page cache; a contender's time includes `sync`, and its
output is removed and synced before the next starts. Medians over rounds; contenders take turns.

    ours    stage=export: plan, Ray tasks on both cores (Ray is running), image bytes with .cls and .json, index, labels as
            Parquet, SHA-256
    tar     one process: extracted image files to one archive per shard
    floor   `cp` of the unlabeled shards
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import ray

from benchmarks.photos import make_photos
from benchmarks.scratch import seconds_to_disk
from data.labels.joined_tar import Provenance
from data.labels.label_files import COPIES_COLUMN, label_table, write_labels
from data.labels.overlay import Overlay
from data.labels.top_k import top_k_of
from data.settings import run_command
from data.shards.split import open_split
from data.tables import write_table
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import Config, ExportConfig
from pipeline.export.plan import plan_files
from pipeline.export.tasks import ExportJob, make_files

NUM_CLASSES, TOP_K, PER_SHARD = 1000, 10, 1000


def bench(rounds: int = 5, images: int = 8000, shards: int = 8, out: str = "runs/bench_export") -> None:
    """Print images per second of each contender."""
    pattern = make_photos(f"{out}/photos", shards, images // shards)
    overlay, extracted = (
        bench_overlay(pattern, f"{out}/labels", f"{out}/selection"),
        _extract(pattern, Path(out) / "extracted"),
    )
    start_ray(None)
    contenders: dict[str, Callable[[Path], None]] = {
        "ours": lambda folder: _export(overlay, folder),
        "tar": lambda folder: _tar(extracted, folder),
        "floor": lambda folder: _copy(overlay, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            found = seconds_to_disk(run, Path(out) / "exported")
            if number:  # the first round is warm-up
                seconds[name].append(found)
    ray.shutdown()
    rates = {name: round(overlay_size(overlay) / median(times)) for name, times in seconds.items()}
    print("\n".join(f"{name:6} {rate:8,} images/s" for name, rate in rates.items()))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        json.dumps(
            {
                "bench": "export", "unit": "images/s up", "ours": rates["ours"], "peers": {"tar": rates["tar"]},
                "floor": rates["floor"], "memory_mb": memory, "seeds": rounds,
            }
        )
    )  # fmt: skip


def overlay_size(overlay: Overlay) -> int:
    """Return the number of images in all shards."""
    return sum(shard.num_samples for shard in overlay.shards)


def bench_overlay(pattern: str, labels: str, selection: str) -> Overlay:
    """Write labels and a selection of all photos, from random probabilities."""
    split, generator, digests = open_split(pattern, "/nonexistent"), np.random.default_rng(0), dict[str, str]()
    for shard in split.shards:
        number = shard.num_samples
        top_k = top_k_of(generator.dirichlet(np.full(NUM_CLASSES, 0.01), number).astype(np.float32), TOP_K)
        table = label_table(shard.index(), np.arange(number), top_k, np.zeros(number, np.uint64))
        entry = write_labels(f"{labels}/{shard.name}.parquet", shard, table, [], "random")
        write_table(
            copies := f"{selection}/{shard.name}.parquet", pa.table({COPIES_COLUMN: np.ones(number, np.uint16)})
        )
        digests[shard.name] = entry.sha256 + hashlib.sha256(Path(copies).read_bytes()).hexdigest()
    names = tuple(f"class {number}" for number in range(NUM_CLASSES))
    return Overlay(split.shards, labels, selection, Provenance(1, names), digests)


def _extract(pattern: str, folder: Path) -> list[Path]:
    """Extract each shard into a folder of image files."""
    folders = []
    for path in sorted(Path(pattern).parent.glob("*.tar")):
        folders.append(folder / path.stem)
        if not folders[-1].exists():
            with tarfile.open(path) as tar:
                tar.extractall(folders[-1], filter="data")
    return folders


def _export(overlay: Overlay, folder: Path) -> None:
    config = Config(export=ExportConfig(samples_per_shard=PER_SHARD))
    files, total = plan_files(config, overlay)
    records = make_files(ExportJob(overlay, config.export, str(folder.absolute())), files, {}, total)
    assert sum(record.num_samples for record in records) == overlay_size(overlay)


def _tar(extracted: list[Path], folder: Path) -> None:
    for images in extracted:
        target = (folder / f"{images.name}.tar").absolute()
        subprocess.run(["tar", "--create", "--file", target, "--directory", images, "."], check=True)


def _copy(overlay: Overlay, folder: Path) -> None:
    for shard in overlay.shards:
        subprocess.run(["cp", shard.url, folder], check=True)


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

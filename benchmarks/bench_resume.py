"""Time for a label stage of the paper's size to continue: 13,000 shards of 10,000 images, 12,000 shards labeled.

    python -m benchmarks.bench_resume [shards=13000] [labeled=12000] [rounds=3]

Shards and label files are sparse files of the right sizes. Measured is everything `stage=label` does before its workers start: read
the corpus's manifest (for foreign shards, the cached indexes), list the label files, and find the shards to label.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.scratch import fresh_folder, remove_folder
from data import storage
from data.labels.label_files import LabeledShard
from data.settings import run_command
from data.shards.foreign_shards import foreign_index_name
from data.shards.split import MANIFEST_NAME, Manifest, ShardRecord, open_split
from teacher.labeling.finished_shards import JOURNAL_NAME, Journal

_MADE_BY = "a teacher"
SHARD_BYTES, LABEL_BYTES, PER_SHARD = 500_000_000, 1_000_000, 10_000


def bench(shards: int = 13_000, labeled: int = 12_000, rounds: int = 3, out: str = "runs/bench_resume") -> None:
    """Print seconds per step, for packed and foreign shards."""
    fresh_folder(out)
    names = [f"images-{number:06d}" for number in range(shards)]
    for kind in ("packed", "foreign"):
        _write(Path(out) / kind, names, labeled, kind)
    medians = {kind: median(_resume(Path(out) / kind, kind) for _ in range(rounds)) for kind in ("packed", "foreign")}
    remove_folder(out)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = {
        "bench": "resume",
        "unit": "s down",
        "ours": round(medians["packed"], 2),
        "floor": None,
        "memory_mb": round(memory),
    }
    print(json.dumps(record | {"peers": {"foreign shards": round(medians["foreign"], 2)}, "seeds": 1}))


def _resume(folder: Path, kind: str) -> float:
    started = time.perf_counter()
    corpus = open_split(f"{folder}/corpus/*.tar", f"{folder}/index")
    opened = time.perf_counter() - started
    journal = Journal.open(f"{folder}/labels", corpus, _MADE_BY)
    todo = [shard for shard in corpus.shards if shard.name not in journal.shards]
    seconds = time.perf_counter() - started
    print(
        f"{kind:8} {len(corpus.shards):,} shards opened in {opened:.2f} s, {len(todo):,} to do after {seconds:.2f} s",
        flush=True,
    )
    return seconds


def _write(folder: Path, names: list[str], labeled: int, kind: str) -> None:
    for name in names:
        _empty(folder / "corpus" / f"{name}.tar", SHARD_BYTES)
    for name in names[:labeled]:
        _empty(folder / "labels" / f"{name}.parquet", LABEL_BYTES)
    if kind == "packed":
        records = [
            ShardRecord(
                name=f"{name}.tar", bytes=SHARD_BYTES, num_samples=PER_SHARD, index_sha256=name, sha256="0" * 64
            )
            for name in names
        ]
        (folder / "corpus" / MANIFEST_NAME).write_text(Manifest(shards=records).model_dump_json())
    else:
        _empty(folder / "index" / "shards.json", 0)
        known = {f"{folder}/corpus/{name}.tar": [SHARD_BYTES, PER_SHARD, name, 0, ""] for name in names}
        versions = {url: storage.file_info(url).version for url in known}
        (folder / "index" / "shards.json").write_text(json.dumps({"shards": known, "versions": versions}))
        for url in known:
            _empty(folder / "index" / foreign_index_name(url), 0)
    entries = [
        LabeledShard(name, SHARD_BYTES, name, PER_SHARD, 0, LABEL_BYTES, "0" * 64, _MADE_BY) for name in names[:labeled]
    ]
    journal = {"teacher_check": None, "shards": [asdict(entry) for entry in entries]}
    (folder / "labels" / JOURNAL_NAME).write_text(json.dumps(journal))


def _empty(path: Path, size: int) -> None:
    """Create a sparse file of this size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

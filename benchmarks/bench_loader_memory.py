"""Memory of a loading process at the paper's size: 1.2 million labeled and 130 million pseudo-labeled images, 1,000 classes.

    python -m benchmarks.bench_loader_memory [shards=13000] [rows=10000] [labeled_shards=120] [steps=200]

48 different label files and selections (two fifths of the rows, some up to 10 times), hard-linked under all names; no images. A
process gets what a spawned loading process gets, and computes places and targets of its pieces of `steps` batches of 2,048 images,
until the tables of 48 shards of each stream are cached. Its private memory (USS, /proc/self/smaps_rollup) is compared with that of a
process that has imported the same modules and decoded a photo.
"""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch

from benchmarks.photos import photo_jpeg
from benchmarks.process_memory import private_memory
from benchmarks.scratch import fresh_folder, remove_folder
from data.labels.label_files import COPIES_COLUMN, label_file_bytes, label_table
from data.labels.top_k import top_k_of
from data.settings import run_command
from data.shards.index import INDEX_SCHEMA, index_digest
from data.tables import write_table
from pipeline.core.schema import TrainConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import StreamSpec
from pipeline.inputs.train_transform import make_transform

NUM_CLASSES, TOP_K, PER_STEP, SIZE = 1000, 10, 2048, 224
_DIFFERENT = 48  # shards with tables of their own: as many as are cached
_PIECES, _PROCESSES = 21, 12  # of a batch at 224 px; see pipeline.inputs.pieces


def bench(
    shards: int = 13_000,
    rows: int = 10_000,
    labeled_shards: int = 120,
    steps: int = 200,
    out: str = "runs/bench_loader_memory",
) -> None:
    """Print the private memory of an idle process, of one that loads, and what the latter holds in parts."""
    folder = fresh_folder(out)
    specs = _labeled(folder, labeled_shards, rows), _pseudo_labeled(folder, shards, rows)
    batches = TrainBatches(specs, TrainConfig(image_size=SIZE, augment_on="device"), NUM_CLASSES, 0)
    (folder / "batches").write_bytes(pickle.dumps(batches))
    idle, loading = (_measured(folder, number) for number in (0, steps))
    held = loading["private"] - idle["private"]
    print(
        f"{batches.order(1).num_entries:,} pseudo-labeled images an epoch, {loading['tables']} tables cached: "
        f"{held / 1e6:.0f} MB beyond the {idle['private'] / 1e6:.0f} MB of a process that decodes; "
        f"{len(pickle.dumps(batches)) / 1e6:.0f} MB of them are sent to it"
    )
    record = {"bench": "loader_memory", "unit": "MB down", "ours": round(held / 1e6), "peers": {}}
    dense = loading["tables"] * rows * NUM_CLASSES * 4
    print(json.dumps(record | {"dense": round(dense / 1e6), "floor": round(idle["private"] / 1e6), "seeds": 1}))
    remove_folder(out)


def _measured(folder: Path, steps: int) -> dict[str, int]:
    """Private bytes and cached tables of a process that loads; with steps=0, of one that only decodes."""
    code = f"from benchmarks.bench_loader_memory import load; load({str(folder)!r}, {steps})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def load(folder: str, steps: int) -> None:
    """Be a loading process, and print what it holds; with steps=0, only decode a photo."""
    torch.set_num_threads(1)
    content = photo_jpeg(np.full((375, 500, 3), 128, np.uint8), 500, 375, np.random.default_rng(0))
    transform = make_transform(TrainConfig(image_size=SIZE))
    transform.add_noise(*transform.from_file(content, 1))
    tables = 0
    if steps:
        batches: TrainBatches = pickle.loads((Path(folder) / "batches").read_bytes())
        with mock.patch.multiple(TrainBatches, _read=_places, _samples=_no_pixels):
            for number in range(0, steps * _PIECES, _PROCESSES):
                batches.piece(*divmod(number, _PIECES), _PIECES)
        tables = sum(len(stream._tables) for stream in batches._streams)
    gc.collect()
    print(json.dumps({"private": private_memory(), "tables": tables}))


def _places(batches: TrainBatches, number: int, pieces: Iterator[Any]) -> Iterator[Any]:
    """Find the places of images; none is read."""
    stream = batches._streams[number]
    for piece in pieces:
        for entry in batches._entries_of(piece)[1][number].tuples():
            yield stream.rows(entry[1]).place(entry[2])


def _no_pixels(batches: TrainBatches, number: int, count: int) -> list[tuple[torch.Tensor, list[Any]]]:
    """One small image for all."""
    found = set(islice(batches._images[number], count))
    return [(torch.zeros(3, 1, 1, dtype=torch.uint8), [])] * max(len(found), 1)


def _labeled(folder: Path, shards: int, rows: int) -> StreamSpec:
    random, keys = np.random.default_rng(0), [f"n{number:08d}_{number}" for number in range(rows)]
    columns = {"key": keys, "extension": ["jpg"] * rows, "problem": [""] * rows} | _places_of(rows)
    names, digests = [], []
    for number in range(_DIFFERENT):
        labels = {"label": random.integers(0, NUM_CLASSES, rows).astype(np.int32)}
        table = pa.table(columns | labels).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
        names.append(folder / f"index-{number}")
        write_table(str(names[-1]), table)
        digests.append(index_digest(table))
    linked = _link(names, folder, "labeled", shards)
    return StreamSpec(
        "labeled", linked, linked, (rows,) * shards, PER_STEP // 4,
        table_digests=tuple(digests[number % _DIFFERENT] for number in range(shards)),
    )  # fmt: skip


def _pseudo_labeled(folder: Path, shards: int, rows: int) -> StreamSpec:
    random, labels, copies = np.random.default_rng(1), [], []
    index = pa.table({"key": [f"{number:012d}" for number in range(rows)]} | _places_of(rows))
    for number in range(_DIFFERENT):
        top_k = top_k_of(random.dirichlet(np.full(NUM_CLASSES, 0.01), rows).astype(np.float32), TOP_K)
        labels.append(folder / f"labels-{number}")
        table = label_table(index, np.arange(rows), top_k, np.zeros(rows, np.uint64))
        labels[-1].write_bytes(label_file_bytes(table))
        times = np.where(random.random(rows) < 0.05, random.integers(2, 11, rows), random.random(rows) < 0.4)
        copies.append(folder / f"copies-{number}")
        write_table(str(copies[-1]), pa.table({COPIES_COLUMN: times.astype(np.uint16)}))
    tables, columns = _link(labels, folder, "unlabeled", shards), _link(copies, folder, "selection", shards)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in labels]
    return StreamSpec(
        "pseudo_labeled", tables, tables, (rows,) * shards, PER_STEP - PER_STEP // 4, copies_urls=columns, targets="soft",
        table_digests=tuple(digests[number % _DIFFERENT] for number in range(shards)),
    )  # fmt: skip


def _places_of(rows: int) -> dict[str, np.ndarray]:
    """Offsets and sizes of images of 100 kB."""
    return {"offset": np.arange(rows) * 100_864 + 512, "size": np.full(rows, 100_000)}


def _link(files: list[Path], folder: Path, name: str, number: int) -> tuple[str, ...]:
    """Hard-link `files` in turn under `number` names."""
    paths = [folder / name / f"images-{position:06d}.parquet" for position in range(number)]
    (folder / name).mkdir()
    for position, path in enumerate(paths):
        path.hardlink_to(files[position % len(files)])
    return tuple(map(str, paths))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

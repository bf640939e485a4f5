"""Generated label files of the paper's size, for benchmarks of their readers."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.labels.label_files import label_file_bytes, label_schema

NUM_CLASSES = 1000
_BLOCK = 10_000  # rows generated per seed, so that files of any size have the same rows
_BYTES_PER_ROW = 20  # more than measured
_SCHEMA = label_schema(1).with_metadata({"quarantine": "[]"})  # no sample is missing, as in most shards


def make_label_files(folder: str, rows: int, per_file: int) -> list[str]:
    """Write `rows` label rows in files of `per_file` to `folder`, unless they exist; return the shard names.

    Columns that selection reads have values; the others are zeros, which take no space except in the footers. Classes are
    long-tailed: of 130 million rows the first has a twentieth, the last but one 15,000, the last none.

    Raises:
        ValueError: `rows` or `per_file` are not multiples of a block.
        OSError: too little disk space.
    """
    if rows % per_file or per_file % _BLOCK:
        raise ValueError(f"rows={rows}: expected a multiple of {per_file}, and that one of {_BLOCK}")
    shards = [f"images-{number:06d}" for number in range(rows // per_file)]
    todo = [number for number, shard in enumerate(shards) if not (Path(folder) / f"{shard}.parquet").exists()]
    if not todo:
        return shards
    Path(folder).mkdir(parents=True, exist_ok=True)
    needed, free = len(todo) * per_file * _BYTES_PER_ROW, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {needed / 1e9:.0f} GB are needed but {free / 1e9:.0f} GB are free; free space, or set fewer rows="
        )
    print(f"writing {len(todo):,} label files to {folder}", flush=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: _write_file(Path(folder), shards[number], number * per_file, per_file), todo))
    return shards


def _write_file(folder: Path, shard: str, first: int, num_rows: int) -> None:
    blocks = [_block(number) for number in range(first // _BLOCK, (first + num_rows) // _BLOCK)]
    zeros = np.zeros(num_rows, np.int64)
    columns = {
        "ordinal": np.arange(num_rows, dtype=np.int32),
        "__key__": pa.repeat("", num_rows),
        "offset": zeros,
        "size": zeros,
        "label": np.concatenate([label for label, _, _ in blocks]),
        "confidence": np.concatenate([confidence for _, confidence, _ in blocks]),
        "topk_index": pa.FixedSizeListArray.from_arrays(zeros.astype(np.int16), 1),
        "topk_prob": pa.FixedSizeListArray.from_arrays(zeros.astype(np.float16), 1),
        "rest": zeros.astype(np.float32),
        "image_hash": np.concatenate([image_hash for _, _, image_hash in blocks]),
    }
    path = folder / f"{shard}.parquet"
    temporary = path.with_suffix(".writing")
    temporary.write_bytes(label_file_bytes(pa.table(columns, schema=_SCHEMA)))
    temporary.rename(path)


def _block(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return label int32, confidence float32 and image hash uint64, all [_BLOCK]; a fifth of the confidences are below 0.3."""
    rng = np.random.default_rng(number)
    label = np.searchsorted(_cumulative(), rng.random(_BLOCK), side="right").astype(np.int32)
    confidence = 1 - np.float32(0.95) * rng.random(_BLOCK, np.float32) ** np.float32(1.5)
    return label, confidence, rng.integers(0, 2**64, _BLOCK, np.uint64)


@cache
def _cumulative() -> np.ndarray:
    weight = (np.arange(NUM_CLASSES) + 20.0) ** -1.5
    weight[-1] = 0
    return np.cumsum(weight) / weight.sum()

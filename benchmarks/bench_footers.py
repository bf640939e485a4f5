"""What stages read of the label files of 13,000 shards, on this disk and in a store 30 ms away.

    python -m benchmarks.bench_footers [files=2000] [rows=10000] [latency_ms=30] [rounds=3]

Label files of `rows` rows with ten probabilities each (47 bytes a row). Figures are scaled from `files` files to 13,000; medians of
rounds, in which the contenders take turns. The store is `benchmarks.object_store`, on the same cores.

    journal      the listing of the folder, and the journal, which has the digests of all files
    footers      the listing, and a footer of each file: what a continuation without a journal reads before it decides
    quarantine   the quarantined samples of all files, from their footers; every file has one
    whole files  all bytes of each file, verified: what a continuation without a journal reads then, and all that it did before
    select       classes and confidences of all rows: one of the two or three readings of a selection
    window       not scaled: the labels of the 16 shards that a training mixes, in one loading process
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from benchmarks.object_store import object_store
from benchmarks.scratch import fresh_folder, remove_folder
from data import storage
from data.labels.label_files import LabeledShard, Quarantined, describe_label_file, label_table, write_labels
from data.labels.label_footers import read_all_quarantined
from data.labels.top_k import top_k_of
from data.settings import run_command
from data.shards.split import Shard, Split
from data.training_order import WINDOW_SHARDS
from pipeline.inputs.streams import Stream, StreamSpec
from teacher.executors import Threads
from teacher.labeling.finished_shards import JOURNAL_NAME, Journal
from teacher.selection.label_reader import LabelSource
from teacher.selection.reuse import every_row

_MADE_BY, _SCALED_TO = "a teacher", 13_000
_NUM_CLASSES, _TOP_K = 1000, 10
_WHOLE, _SELECTED = 100, 500  # whole files are read of so many; labels to select


def bench(
    files: int = 2000, rows: int = 10_000, latency_ms: int = 30, rounds: int = 3, out: str = "runs/bench_footers"
) -> None:
    """Print seconds for 13,000 files."""
    folder = fresh_folder(out)
    corpus = Split(tuple(Shard(f"images-{n:06d}.tar", 5, rows + 1, "", f"{n:x}") for n in range(files)))
    entries = _write(str(folder / "labels"), corpus, rows)
    with ExitStack() as stack:
        places = {"disk": str(folder / "labels")}
        os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ["AWS_ENDPOINT_URL"] = stack.enter_context(object_store(str(folder)))
        places[f"{latency_ms} ms"] = f"s3://ms-{latency_ms}/labels"
        seconds = {
            where: _compare(place, corpus, entries, rounds, folder / "labels") for where, place in places.items()
        }
    remove_folder(out)
    for where, found in seconds.items():
        print(f"{where:6}", *(f"{name} {value:.2f} s" for name, value in found.items()), sep="   ")
    remote = seconds[f"{latency_ms} ms"]
    record = {"bench": "footers", "unit": "s down", "ours": round(remote.pop("footers"), 2), "floor": None}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    peers = {name: round(value, 2) for name, value in remote.items()}
    on_disk = {name: round(value, 2) for name, value in seconds["disk"].items()}
    print(json.dumps(record | {"peers": peers, "on_disk": on_disk, "memory_mb": memory, "seeds": rounds}))


def _compare(place: str, corpus: Split, entries: list[LabeledShard], rounds: int, local: Path) -> dict[str, float]:
    """Medians of the seconds of each contender for 13,000 files."""
    journal = local / JOURNAL_NAME

    def with_journal() -> None:
        assert len(Journal.open(place, corpus, _MADE_BY).shards) == len(entries)

    def without() -> None:
        text = journal.read_text()
        journal.unlink()
        with_journal()
        journal.write_text(text)

    def whole() -> None:
        found = storage.in_parallel(
            describe_label_file, [f"{place}/{entry.name}.parquet" for entry in entries[:_WHOLE]]
        )
        assert list(found) == entries[:_WHOLE]

    def quarantine() -> None:
        assert read_all_quarantined(place, entries).num_rows == len(entries)

    source = LabelSource(place, every_row(_NUM_CLASSES), labeled={entry.name: entry for entry in entries})
    names = list(source.labeled)[:_SELECTED]

    def count(shards: Iterable[str]) -> int:
        found = source.read_all(shards, needs_ordinals=False)
        return sum(len(rows.label) for _, batches in found for rows in batches)

    def select() -> None:
        assert sum(Threads(storage.PARALLEL_REQUESTS)(count, names, "")) == sum(e.rows for e in entries[: len(names)])

    mixed = entries[:WINDOW_SHARDS]
    urls, rows = tuple(f"{place}/{entry.name}.parquet" for entry in mixed), tuple(entry.rows for entry in mixed)
    spec = StreamSpec("labels", urls, urls, rows, 1, targets="soft")

    def window() -> None:
        Stream(spec, _NUM_CLASSES, 0.0, 0).load(np.arange(len(mixed)))

    contenders: dict[str, tuple[Callable[[], None], int]] = {
        "journal": (with_journal, len(entries)), "footers": (without, len(entries)),
        "quarantine": (quarantine, len(entries)), "whole files": (whole, min(_WHOLE, len(entries))),
        "select": (select, len(names)), "window": (window, _SCALED_TO),
    }  # fmt: skip
    with_journal()  # warm-up: connections
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (call, number) in contenders.items():
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) * _SCALED_TO / number)
    return {name: median(values) for name, values in times.items()}


def _write(folder: str, corpus: Split, rows: int) -> list[LabeledShard]:
    """Write a label file for each shard, with the same rows, and the journal that lists them."""
    generator = np.random.default_rng(0)
    keys = [f"n{n:08d}" for n in range(rows + 1)]
    index = pa.table(
        {
            "key": keys,
            "offset": np.arange(rows + 1) * 51_200 + 512,
            "size": generator.integers(10_000, 50_000, rows + 1),
        }
    )
    top_k = top_k_of(generator.dirichlet(np.full(_NUM_CLASSES, 0.02), rows).astype(np.float32), _TOP_K)
    table = label_table(index, np.arange(rows), top_k, generator.integers(0, 2**64, rows, np.uint64))
    journal = Journal(folder)
    for shard in corpus.shards:
        bad = [Quarantined(shard.name, rows, keys[rows], 0, "not a JPEG, PNG or WebP")]
        journal.shards[shard.name] = write_labels(f"{folder}/{shard.name}.parquet", shard, table, bad, _MADE_BY)
    journal.write()
    return list(journal.shards.values())


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

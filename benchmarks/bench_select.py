"""Selection from 130 million label rows (the paper's scale) beside DuckDB and Polars: cut-offs of 1,000 classes, all copies written.

    python -m benchmarks.bench_select [rows=130000000] [rounds=1] [peers=duckdb,polars] [peer_memory_gb=10]

The rows are generated once (2 GB per layout: files of a million rows, and of 10,000, as shards have), with a long tail. The rule is
Noisy Student's: confidence 0.3, the best thousandth of `rows` (130,000) per class, rarer classes repeated up to 10 times. Two
threads each (ours: two processes if there are many files; their own memory is added up); files in the page cache. Each measurement
is a process of its own; medians over rounds; contenders take turns. CPU seconds below twice the seconds mean that cores were idle
or busy elsewhere.

    ours     the whole stage: cut-offs, a file of copies per label file, selection.json, done-marker
    floor    only reads label and confidence, as often as ours (three times)
    duckdb   row_number() over (partition by label order by confidence desc), one file with the rows kept
    polars   a streaming group_by that sorts each class, one file with the rows kept
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import select_peers
from benchmarks.label_files import NUM_CLASSES, make_label_files
from benchmarks.process_memory import own_memory_of_worker
from benchmarks.scratch import fresh_folder, remove_folder
from data import storage
from data.settings import run_command
from pipeline.core.stage import Fingerprint, open_stage
from pipeline.core.timing import peak_memory
from teacher.executors import Threads, threads_or_processes
from teacher.selection.copies import write_all_copies
from teacher.selection.label_reader import LabelSource
from teacher.selection.quota_search import select_shards
from teacher.selection.rule import SelectRule
from teacher.selection.selection_file import selection_json

THREADS, LAYOUTS = 2, (1_000_000, 10_000)  # rows per file
_TIMEOUT_S = 1800
Run = dict[str, Any]


def bench(
    rows: int = 130_000_000, rounds: int = 1, peers: str = "duckdb,polars", peer_memory_gb: int = 10,
    per_file: int = 0, only: str = "", out: str = "runs/bench_select",
) -> None:  # fmt: skip
    """Run all contenders in turn and print their seconds; with `only` and `per_file`, run one once, in this process."""
    rule = SelectRule(NUM_CLASSES, confidence_threshold=0.3, per_class=max(rows // NUM_CLASSES, 1), max_copies=10)
    if only:
        print(json.dumps(_run(only, f"{out}/labels-{rows}-{per_file}", rule, peer_memory_gb, f"{out}/{only}")))
        return
    contenders = ["ours", "floor", *filter(None, peers.split(","))]
    results: dict[int, dict[str, list[Run]]] = {layout: {name: [] for name in contenders} for layout in LAYOUTS}
    for layout, runs in results.items():
        make_label_files(f"{out}/labels-{rows}-{layout}", rows, layout)
        for number, name in product(range(rounds), contenders):
            _warm(f"{out}/labels-{rows}-{layout}")
            common = {"rows": rows, "per_file": layout, "peer_memory_gb": peer_memory_gb, "out": out}
            runs[name].append(_in_process({"only": name, **common}))
            print(f"{rows // layout:7,} files  round {number + 1}  {name:8} {_line(runs[name][-1])}", flush=True)
    _print_results(rows, results)


def ours(labels: str, shards: Sequence[str], rule: SelectRule, out: str) -> Run:
    """Select as `teacher.selection.stage` does; return seconds per part, and selected images and copies by class."""
    clock = [time.perf_counter()]
    with contextlib.redirect_stdout(io.StringIO()):
        stage = open_stage(out, "select", Fingerprint({}, {}))
    with threads_or_processes(len(shards), max_processes=THREADS) as executor:
        selection = select_shards(LabelSource(labels, rule), shards, executor)
        clock.append(time.perf_counter())
        counts = write_all_copies(selection, shards, out, executor)
        clock.append(time.perf_counter())
        is_here = isinstance(executor, Threads)
        peaks = [0] if is_here else list(executor(own_memory_of_worker, shards, "measure"))
    storage.write_text(stage.path("selection.json"), json.dumps(selection_json(selection, counts), indent=1))
    stage.commit(["selection.json", *(f"{shard}.parquet" for shard in shards)], {})
    clock.append(time.perf_counter())
    parts = dict(zip(("cut-offs", "copies", "commit"), np.diff(clock).tolist(), strict=True))
    memory = (peak_memory() or 0) + executor.num_workers * max(peaks)
    return {
        "memory_mb": memory / 2**20,
        "parts": parts,
        "totals": [selection.cutoffs.kept.tolist(), selection.cutoffs.copies.tolist()],
    }


def floor(labels: str, shards: Sequence[str]) -> Run:
    """Read the columns that ours reads."""
    for _ in range(3):
        Threads(THREADS)(partial(_read, labels, ["label", "confidence"]), shards, "floor")
    return {}


def _read(labels: str, columns: list[str], shards: Iterable[str]) -> None:
    for shard in shards:
        with pa.OSFile(f"{labels}/{shard}.parquet") as stream, pq.ParquetFile(stream) as file:
            for _ in file.iter_batches(2**16, columns=columns, use_threads=False):
                pass


def _run(name: str, labels: str, rule: SelectRule, memory_gb: int, out: str) -> Run:
    """Run one contender in this process; return seconds, peak memory and its own results."""
    fresh_folder(out)
    shards = sorted(path.stem for path in Path(labels).glob("*.parquet"))
    started, cpu_started = time.perf_counter(), sum(os.times()[:4])
    if name in PEERS:
        # Let this process run out of memory, not the machine.
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 1.5e9),) * 2)
        PEERS[name](labels, out, rule, THREADS, memory_gb)
        found = {}
    else:
        found = floor(labels, shards) if name == "floor" else ours(labels, shards, rule, out)
    run = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": sum(os.times()[:4]) - cpu_started,
        "memory_mb": (peak_memory() or 0) / 2**20,
    }
    found |= {"totals": select_peers.totals(out)} if name in PEERS else {}
    remove_folder(out)
    return run | found


def _in_process(arguments: dict[str, Any]) -> Run:
    """Run one contender (`only=`) in a process of its own; `why` says why one died or was stopped."""
    command = [sys.executable, "-m", "benchmarks.bench_select", *(f"{key}={value}" for key, value in arguments.items())]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"why": f"more than {_TIMEOUT_S} s"}
    if result.returncode < 0 or (result.returncode and "memory" in result.stderr.lower()):
        return {"why": f"out of memory ({result.stderr.strip()[-200:]})"}
    if result.returncode:
        raise RuntimeError(f"{arguments['only']} failed:\n{result.stderr[-3000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _warm(folder: str) -> None:
    """Read all files into the page cache."""
    for path in Path(folder).glob("*.parquet"):
        path.read_bytes()


def _line(run: Run) -> str:
    if "why" in run:
        return str(run["why"])
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run.get("parts", {}).items())
    return (
        f"{run['seconds']:7.1f} s  {run['cpu_seconds']:7.1f} CPU s  {run['memory_mb']:7,.0f} MB"
        + f"  ({parts})" * bool(parts)
    )


def _print_results(rows: int, results: dict[int, dict[str, list[Run]]]) -> None:
    print(f"\n{rows:,} rows, {THREADS} threads each, medians of {len(next(iter(results.values()))['ours'])}:")
    records = {}
    for per_file, runs in results.items():
        medians = {name: _median(found) for name, found in runs.items()}
        seconds, memory = medians["ours"]["seconds"], medians["ours"]["memory_mb"]
        for name, run in medians.items():
            line = f"  {rows // per_file:7,} files  {name:8} {_line(run)}"
            if name in PEERS and "why" not in run:
                same = "the same totals" if run["totals"] == medians["ours"]["totals"] else "OTHER TOTALS"
                line += f"  ours: {run['seconds'] / seconds:.1f} times as fast, {memory / run['memory_mb']:.2f} of its memory; {same}"
            print(line)
        records[per_file] = {
            "ours": round(seconds, 1),
            "peers": {name: round(run["seconds"], 1) if "seconds" in run else None for name, run in medians.items() if name in PEERS},
            "floor": round(medians["floor"]["seconds"], 1),
            "memory_mb": round(memory),
        }  # fmt: skip
    first, second = (records[per_file] for per_file in LAYOUTS)
    seeds = len(results[LAYOUTS[0]]["ours"])
    print(json.dumps({"bench": "select", "unit": "s down", **first, "seeds": seeds, "small_files": second}))


def _median(runs: list[Run]) -> Run:
    """Return the run of median seconds; if any failed, that one."""
    failed = [run for run in runs if "why" in run]
    return failed[0] if failed else sorted(runs, key=lambda run: float(run["seconds"]))[len(runs) // 2]


PEERS: dict[str, Callable[[str, str, SelectRule, int, int], None]] = {
    "duckdb": select_peers.duckdb, "polars": select_peers.polars,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

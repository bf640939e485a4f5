"""Run all speed benchmarks in turn and print one table of their results.

    python -m benchmarks [names=label,select,…] [out=runs/benchmarks]

Accuracy benchmarks take hours and have make targets of their own; so has bench_ray_train (25 minutes). Each benchmark is a
process; its last line is a JSON record, appended to `out/records.jsonl`; the last record of a name counts. A benchmark that
fails is named, and the others still run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.settings import UsageError, run_command

NAMES = (
    "label", "predict", "decoder", "label_model", "label_flow", "pool", "label_bytes", "resume", "footers", "select",
    "near_duplicates", "loader", "remote", "remote_stages", "train", "loader_memory", "position", "exclusions", "pack", "export",
    "serve",
)  # fmt: skip


class BenchmarkError(ValueError):
    """Benchmarks that failed; the message names them."""


def bench(names: str = ",".join(NAMES), out: str = "runs/benchmarks") -> None:
    """Run the benchmarks and print the table; see the module docstring.

    Raises:
        UsageError: an unknown name.
        BenchmarkError: some failed.
    """
    wanted = names.split(",")
    if not set(wanted) <= set(NAMES):
        raise UsageError(f"names={names}: expected some of {', '.join(NAMES)}")
    records = Path(out) / "records.jsonl"
    records.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in wanted:
        print(f"== bench_{name}", flush=True)
        record = _run(name)
        if record is None:
            failed.append(name)
            continue
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
    if records.exists():
        print("\n".join(table([json.loads(line) for line in records.read_text().splitlines()])))
    if failed:
        raise BenchmarkError(f"these failed: {', '.join(failed)}; their output is above")


def _run(name: str) -> dict[str, Any] | None:
    """Run one benchmark; return its record, or None if it failed."""
    command = [sys.executable, "-m", f"benchmarks.bench_{name}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        last = ""
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line if line.startswith("{") else last
    return dict(json.loads(last)) if process.returncode == 0 and last else None


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table: the last record of each benchmark."""
    last = {record["bench"]: record for record in records}
    rows = [
        f"| {name} | {record['unit']} | {_value(record['ours'])} | {_value(record.get('peers'))} | {_value(record.get('floor'))} "
        f"| {_value(record.get('memory_mb'))} |"
        for name, record in last.items()
    ]
    return ["| benchmark | unit | ours | peers | floor | memory, MB |", "|---|---|---|---|---|---|", *rows]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items()) or "–"
    return "–" if value is None else f"{value:,.4g}" if isinstance(value, int | float) else str(value)


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    return run_command(bench, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Problems that nobody tuned for: what `data.pack` and `recipe=small` alone make of drawn pictures (benchmarks/surprise.py).

    python -m benchmarks.bench_surprise [seeds=0,1] [labels=10,30] [unlabeled=3000] [words="KEY=VALUE …"] [minutes=50]
                                        [out=runs/bench_surprise] [results=benchmarks/results/surprise.jsonl]

A seed is a problem; `labels` are the labeled pictures a class. Develop on seeds 0 to 9. Judge on seeds from 100 on, each looked at
once. Per cell (seed, labels): top-1 of teacher and student on 800 test pictures, their difference with its standard error (paired, on
the same pictures), how many kept labels are right (those of pictures of no class are wrong), and what the run said of them before
the student. `words` are other values of fields, for development. A finished cell is a line of `results`, keyed by its fields and the
recipe's file. No cell begins after `minutes`; the same command continues, with a cell that was stopped too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from benchmarks.surprise import read_truth, write_problem
from data.labels.selected_labels import SelectedLabels
from data.pack import main as pack
from data.packing.sidecars import read_sources
from data.settings import run_command
from data.shards.samples import printable
from data.tables import read_table
from pipeline.core.layout import SELECTION_NAME, Layout
from pipeline.core.stage import digest_of, require_done
from pipeline.evaluation.known import PREDICTIONS_NAME
from pipeline.run import main as pipeline
from teacher.label_quality import judge_kept
from teacher.validation_labels import ValidationLabels

CLEAR = 2.0  # standard errors of a difference beyond chance
_RECIPE = Path("pipeline/configs/recipes/small.yaml")
_SIGNALS = 128  # a command that a signal ended has this and the signal's number as its exit code
_STAGES = "teacher,label,select,student,evaluate"


class BenchmarkError(ValueError):
    """A command failed; the message gives it."""


class Cell(NamedTuple):
    """A problem, with so many labeled pictures a class and unlabeled ones, and values of fields beside the recipe's."""

    seed: int
    labels: int
    unlabeled: int
    words: str = ""

    @property
    def key(self) -> str:
        """What the result depends on, as a digest."""
        return digest_of([*self, _RECIPE.read_text()])


@dataclass(frozen=True)
class Result:
    """Of a cell.

    Attributes:
        teacher, student: top-1 on the test pictures, in 0 to 1.
        error: standard error of their difference.
        images: test pictures.
        kept: pseudo-labels.
        right: of the kept ones, in 0 to 1.
        said: of the kept labels, by the validation pictures, before the student.
    """

    teacher: float
    student: float
    error: float
    images: int
    kept: int
    right: float
    said: str

    @property
    def difference(self) -> float:
        """Top-1 of the student less that of its teacher."""
        return self.student - self.teacher

    @property
    def is_gain(self) -> bool:
        """Whether the student is better beyond chance."""
        return self.difference > CLEAR * self.error

    def describe(self, cell: Cell) -> str:
        """A line."""
        return (
            f"seed {cell.seed}, {cell.labels} labels: teacher {self.teacher:.1%}, student {self.student:.1%} "
            f"({100 * self.difference:+.1f} ± {100 * self.error:.1f}); {self.right:.1%} of {self.kept:,} kept labels right; {self.said}"
        )


def bench(
    seeds: str = "0,1",
    labels: str = "10,30",
    unlabeled: int = 3000,
    words: str = "",
    minutes: float = 50,
    out: str = "runs/bench_surprise",
    results: str = "benchmarks/results/surprise.jsonl",
) -> None:
    """Compute what is missing until the time is over, and print all; see the module docstring."""
    deadline, file = time.monotonic() + 60 * minutes, Path(results)
    cells = [Cell(seed, count, unlabeled, words) for seed in _numbers(seeds) for count in _numbers(labels)]
    done, found, failed = _read(file), dict[Cell, Result](), list[str]()
    for cell in cells:
        if cell.key not in done and time.monotonic() < deadline:
            try:
                done[cell.key] = measure(cell, Path(out) / f"{cell.seed}-{cell.labels}-{cell.key}")
            except BenchmarkError as error:  # a run may refuse its teacher; the other cells go on
                failed.append(str(error))
                continue
            _append(file, cell, done[cell.key])
        if cell.key in done:
            found[cell] = done[cell.key]
            print(found[cell].describe(cell), flush=True)
    _print(found, len(cells) - len(found))
    if failed:
        raise BenchmarkError("; ".join(failed))


def _numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def measure(cell: Cell, folder: Path) -> Result:
    """Draw, pack and run a cell, or continue."""
    pictures, packed, layout = folder / "pictures", folder / "packed", Layout(f"{folder}/run")
    if not (pictures / "truth.csv").exists():
        write_problem(str(pictures), cell.seed, cell.labels, unlabeled=cell.unlabeled)
    _command("data.pack", pack, [f"images={pictures}/train", f"out={packed}"])
    _command("data.pack", pack, [f"images={pictures}/test", f"out={packed}/test", "validation=0"])
    _command("data.pack", pack, [f"images={pictures}/unlabeled", f"out={packed}", "labeled=false"])
    splits = {"labeled": "labeled", "validation": "validation", "test": "test/labeled", "unlabeled": "unlabeled"}
    words = [f"data.{name}=[{packed}/{split}/*.tar]" for name, split in splits.items()]
    hashes = ",".join(f"{packed}/{splits[name]}/hashes.parquet" for name in ("validation", "test"))
    words += [f"data.held_out_hashes=[{hashes}]", f"run_dir={layout.run_dir}"]
    _command("pipeline.run", pipeline, [f"stage={_STAGES}", "recipe=small", *words, *cell.words.split()])
    return _result(layout, pictures, packed)


def _command(module: str, main: Any, words: list[str]) -> None:
    code = main(words)
    if code > _SIGNALS:  # the user stopped it, and with it the cells that would follow
        sys.exit(code)
    if code != 0:
        raise BenchmarkError(f"this command failed: python -m {module} {' '.join(words)}")


def _result(layout: Layout, pictures: Path, packed: Path) -> Result:
    table = read_table(f"{layout.evaluation}/{PREDICTIONS_NAME}", "run stage=evaluate again")
    label = table.column("label").to_numpy()
    teacher, student = (table.column(f"{role}_label").to_numpy() == label for role in ("teacher", "student"))
    difference = student.astype(float) - teacher
    selection = layout.current_selection()
    assert selection is not None, "stage=select is done"
    kept, right = count_right(layout, selection, pictures, packed)
    content = json.loads(Path(selection, SELECTION_NAME).read_text())
    return Result(
        teacher=float(teacher.mean()),
        student=float(student.mean()),
        error=float(difference.std(ddof=1) / sqrt(len(label))),
        images=len(label),
        kept=kept,
        right=right / max(kept, 1),
        said=judge_kept(ValidationLabels.read(layout.labels), content).headline(),
    )


def count_right(layout: Layout, selection: str, pictures: Path, packed: Path) -> tuple[int, int]:
    """Kept pseudo-labels, and the right ones of these; a picture of no class has none."""
    names = require_done(layout.labels, "label")["summary"]["class_names"]
    classes = {printable(str(pictures / path)): name for path, name in read_truth(pictures).items()}
    paths = list(read_sources(f"{packed}/unlabeled"))
    selected, counts = SelectedLabels.of(layout.labels, selection, require_done(selection, "select")), np.zeros(2, int)
    for shard in selected.labeled:
        rows, copies = selected.read(shard, ["__key__", "label"])
        keys, labels = rows.column("__key__").to_pylist(), rows.column("label").to_pylist()
        for key, label, times in zip(keys, labels, copies.tolist(), strict=True):
            if times:
                counts += [1, classes[paths[int(key)]] == names[label]]
    return int(counts[0]), int(counts[1])


def _read(file: Path) -> dict[str, Result]:
    """Results by key."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {record["key"]: Result(**record["result"]) for record in map(json.loads, lines)}


def _append(file: Path, cell: Cell, result: Result) -> None:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        line = {"key": cell.key, "commit": commit, **cell._asdict(), "result": asdict(result)}
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _print(found: Mapping[Cell, Result], missing: int) -> None:
    """Print a line per number of labels, and the record."""
    by_labels: dict[str, dict[str, float]] = {}
    for labels in dict.fromkeys(cell.labels for cell in found):
        by_labels[str(labels)] = _summary([result for cell, result in found.items() if cell.labels == labels])
    for count, one in by_labels.items():
        print(
            f"{count} labels a class, {one['seeds']} problems: teacher {one['teacher']:.1%}, student {one['student']:.1%} "
            f"({100 * one['difference']:+.1f} ± {100 * one['error']:.1f}), better beyond chance on {one['gains']}"
        )
    if missing:
        print(f"{missing} of {missing + len(found)} results are missing: the same command continues")
    values, roles = list(found.values()), {"ours": "student", "floor": "teacher"}
    record: dict[str, Any] = {"bench": "surprise", "unit": "top-1 up", "peers": {}, "memory_mb": None}
    record |= {name: mean(getattr(one, role) for one in values) for name, role in roles.items()} if values else {}
    print(json.dumps(record | {"seeds": len({cell.seed for cell in found}), "labels": by_labels, "missing": missing}))


def _summary(results: Sequence[Result]) -> dict[str, float]:
    """Means over problems; `error` of the mean difference, over problems; `gains`: problems with a gain beyond chance."""
    differences = [one.difference for one in results]
    return {
        "seeds": len(results),
        "teacher": mean(one.teacher for one in results),
        "student": mean(one.student for one in results),
        "difference": mean(differences),
        "error": stdev(differences) / sqrt(len(results)) if len(results) > 1 else results[0].error,
        "gains": sum(one.is_gain for one in results),
    }


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

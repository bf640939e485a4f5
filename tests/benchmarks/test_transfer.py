"""bench_transfer: a result is computed once, whatever stops a call; what supervised RS wins is counted by columns."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_transfer
from benchmarks.bench_transfer import bench, count_wins
from pipeline.transfer.cells import Cell

RIGHT = {"supervised_rs": 40, "supervised": 30, "student": 45, "scratch": 10}  # of 50


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Neither data nor trainings; results by backbone. Lists what was computed."""
    done: list[str] = []

    def measure(backbone: str, cells: Collection[Cell], seed: int, out: str) -> Iterator[tuple[Cell, dict[str, Any]]]:
        for cell in cells:
            done.append(f"{cell.row} {seed}")
            right = RIGHT.get(backbone, 0)
            yield (
                cell,
                {"top1": right / 50, "mean_per_class": 0, "right": [right], "images": [50], "chosen": {}, "grid": []},
            )

    nothing = SimpleNamespace(prepare=lambda out: None)
    monkeypatch.setattr(bench_transfer, "SETS", dict.fromkeys(bench_transfer.SETS, nothing))
    monkeypatch.setattr(bench_transfer, "_train", lambda *_: None)
    monkeypatch.setattr(bench_transfer, "_measure", measure)
    return done


def test_a_call_continues_where_the_last_one_stopped(
    tmp_path: Path, computed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    bench(seeds=2, minutes=0, results=str(results))
    assert not computed
    assert "results are missing: the same command continues" in capsys.readouterr().out
    bench(seeds=1, results=str(results))
    once = len(computed)
    assert once == len(set(computed)) == 10 * len(bench_transfer.BACKBONES)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0] * once
    kept = "".join(results.read_text().splitlines(keepends=True)[:-1])
    results.write_text(kept)
    bench(seeds=2, results=str(results))
    assert len(computed) == once + 1 + once  # the line that is gone, and the second seed
    bench(seeds=2, passes=99, results=str(results))
    assert len(computed) == 2 * once + 1 + 2 * once  # other trainings


def test_wins_are_counted_by_columns(tmp_path: Path, computed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bench(seeds=1, results=str(tmp_path / "results.jsonl"))
    out = capsys.readouterr().out
    assert "supervised_rs is above supervised in 10 of 10 columns" in out
    assert "supervised_rs is above student in 0 of 10 columns" in out
    assert json.loads(out.splitlines()[-1])["peers"]["scratch"] == 10


def test_a_tie_and_a_column_that_only_one_has_are_no_wins() -> None:
    def row(backbone: str, data: str, mean: float) -> dict[str, Any]:
        return {"backbone": backbone, "set": data, "method": "knn", "mean": mean}

    rows = [row("a", "x", 1), row("a", "y", 2), row("a", "z", 3), row("b", "x", 1), row("b", "y", 1)]
    assert count_wins({"rows": rows}, "a", "b") == (1, 2)

"""What must hold at the paper's size, on generated data: small here, whole in `make test-slow` and the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_exclusions, bench_loader_memory


def record(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.slow
def test_a_loading_process_holds_few_bytes_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_loader_memory.bench(shards=48, rows=1000, labeled_shards=4, steps=20, out=str(tmp_path / "bench"))
    found = record(capsys)
    assert found["dense"] > 150, "MB that dense targets of the cached tables would take"
    assert 0 < found["ours"] < 90


@pytest.mark.slow
def test_a_loading_process_holds_under_300_mb_at_48_shards_of_10_000_rows_and_1_000_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_loader_memory.bench(shards=48, rows=10_000, labeled_shards=48, steps=100, out=str(tmp_path / "bench"))
    found = record(capsys)
    assert found["dense"] > 1900
    assert 0 < found["ours"] < 300


def test_the_benchmark_of_exclusions_finds_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_exclusions.bench(lines=5000, shards=50, rows=1000, out=str(tmp_path / "bench"))
    assert record(capsys)["ours"] > 0

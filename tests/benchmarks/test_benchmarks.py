"""One command for all benchmarks: a table of their records; one that fails is named and stops no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as every
from benchmarks.__main__ import NAMES, main, table
from benchmarks.bench_accuracy import _student_as_teacher
from pipeline.core.config import load_config

ROOT = Path(__file__).parents[2]


def test_every_name_is_a_benchmark() -> None:
    for name in NAMES:
        assert (ROOT / "benchmarks" / f"bench_{name}.py").exists(), name


def test_one_that_fails_is_named_and_the_others_are_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, dict[str, Any] | None] = {
        "label": {
            "bench": "label",
            "unit": "img/s up",
            "ours": 1200.5,
            "peers": {"timm": 400, "x": 77.25},
            "floor": 1499,
            "memory_mb": 900,
        },
        "pool": None,
        "select": {"bench": "select", "unit": "s down", "ours": 8.44, "peers": {}, "floor": None},
    }
    monkeypatch.setattr(every, "_run", found.__getitem__)
    assert main(["names=label,pool,select", f"out={tmp_path}"]) == 2
    printed = capsys.readouterr()
    assert "| label | img/s up | 1,200 | timm 400, x 77.25 | 1,499 | 900 |" in printed.out
    assert "| select | s down | 8.44 | – | – | – |" in printed.out
    assert "these failed: pool" in printed.err
    assert [json.loads(line)["bench"] for line in (tmp_path / "records.jsonl").read_text().splitlines()] == [
        "label",
        "select",
    ]


def test_the_last_record_of_a_name_counts() -> None:
    records = [{"bench": "pool", "unit": "ms down", "ours": ours, "peers": {}} for ours in (3.0, 2.0)]
    assert table(records)[2:] == ["| pool | ms down | 2 | – | – | – |"]


def test_a_name_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["names=labels", f"out={tmp_path}"]) == 2
    assert "expected some of label," in capsys.readouterr().err


@pytest.mark.slow
def test_the_students_recipe_can_be_a_teachers() -> None:
    words = _student_as_teacher()
    teacher, student = (getattr(load_config("fashion_mnist", words), name) for name in ("teacher", "student"))
    assert {name: getattr(teacher, name) for name in ("model", "lr", "epochs", "dropout", "augment")} == {
        name: getattr(student, name) for name in ("model", "lr", "epochs", "dropout", "augment")
    }

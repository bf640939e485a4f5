"""Labels and rules that selection refuses, with what is wrong and where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from teacher.executors import Threads
from teacher.selection.copies import write_all_copies
from teacher.selection.label_reader import LabelSource
from teacher.selection.quota_search import select_shards
from teacher.selection.rule import SelectError, SelectRule
from tests.teacher.selection.test_select import Row, write_labels


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(4, 0.5)], r"s\.parquet: label must be between 0 and 3 but got values from 4 to 4"),
        ([(-1, 0.5)], r"s\.parquet: label must be between"),
        ([(0, 1.1)], r"s\.parquet: confidence must be between"),
        ([(0, 0.5), (0, math.nan)], r"s\.parquet: confidence must be between"),
        ([(0, -0.1)], r"s\.parquet: confidence must be between"),
    ],
)
def test_a_value_out_of_range_names_the_file(tmp_path: Path, rows: list[Row], message: str) -> None:
    write_labels(tmp_path, {"good": [(0, 0.5)] * 10, "s": rows})
    with pytest.raises(SelectError, match=message):
        select_shards(LabelSource(str(tmp_path), SelectRule(4, 0.3, 5, 2)), ["good", "s"], Threads(2))


def test_missing_damaged_and_foreign_label_files_are_named(tmp_path: Path) -> None:
    rule, folder = SelectRule(4, 0.3, 5, 2), str(tmp_path)
    with pytest.raises(SelectError, match=r"gone\.parquet: no such label file"):
        select_shards(LabelSource(folder, rule), ["gone"])
    write_labels(tmp_path, {"cut": [(0, 0.5)] * 100})
    content = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(SelectError, match=r"cut\.parquet: damaged or cut short"):
        select_shards(LabelSource(folder, rule), ["cut"])
    write_labels(tmp_path, {"foreign": [(0, 0.5)]}, label=pa.array([0], pa.int64()))
    with pytest.raises(SelectError, match=r"foreign\.parquet: column 'label' must be int32 but is int64"):
        select_shards(LabelSource(folder, rule), ["foreign"])
    with pytest.raises(SelectError, match=r"shard 'cut' is named twice"):
        select_shards(LabelSource(folder, rule), ["cut", "x", "cut"])


def test_labels_that_change_between_two_readings_are_refused(tmp_path: Path) -> None:
    write_labels(tmp_path, {"s": [(0, 0.5)] * 9})

    def change_before_collecting(doing: str, *_: int) -> None:
        if doing == "collect":
            write_labels(tmp_path, {"s": [(0, 0.5)] * 8})

    with pytest.raises(SelectError, match="changed while they were read"):
        select_shards(LabelSource(str(tmp_path), SelectRule(2, 0.3, 5, 2)), ["s"], Threads(1, change_before_collecting))


def test_labels_that_changed_since_the_selection_are_refused(tmp_path: Path) -> None:
    labels, rule = tmp_path / "labels", SelectRule(2, 0.3, 5, 2)
    write_labels(labels, {"s": [(0, 0.5)] * 9})
    selection = select_shards(LabelSource(str(labels), rule), ["s"])
    write_labels(labels, {"s": [(1, 0.5)] * 9})
    with pytest.raises(SelectError, match="not those of the selection"):
        write_all_copies(selection, ["s"], str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_classes", 0),
        ("confidence_threshold", 1.5),
        ("confidence_threshold", math.nan),
        ("per_class", 0),
        ("max_copies", 0),
        ("max_copies", 65_536),
    ],
)
def test_a_rule_that_makes_no_sense_names_its_field(field: str, value: float) -> None:
    good: dict[str, Any] = {"num_classes": 2, "confidence_threshold": 0.3, "per_class": 5, "max_copies": 2}
    with pytest.raises(SelectError, match=f"select.{field} must be between"):
        SelectRule(**{**good, field: value})

"""The results as tables, page and a section of the report: the highest of a column is marked, gaps stay gaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data import storage
from pipeline.core.stage import StageError
from pipeline.pages.transfer_table import describe, method_tables
from pipeline.transfer.cells import Cell
from pipeline.transfer.table import record_of, write_results
from tests.conftest import WriteDigits
from tests.pipeline.report.test_report import report_of, whole_run
from tests.small_run import SmallRun

RIGHT = {  # of 50 + 50 images, by seed
    ("rs", "digits", "linear"): [(45, 45), (40, 50)],
    ("old", "digits", "linear"): [(30, 50)],
    ("rs", "emoji", "linear"): [(10, 20)],
    ("old", "emoji", "linear"): [(10, 20)],
    ("rs", "digits", "knn"): [(50, 50)],
}


def record() -> dict[str, Any]:
    cells = [Cell(*names) for names in RIGHT]
    found = {
        cell.row: [{"right": right, "images": (50, 50), "chosen": {}, "grid": []} for right in RIGHT[names]]
        for names, cell in zip(RIGHT, cells, strict=True)
    }
    return record_of(cells, found, missing=1)


def test_each_column_marks_its_highest_and_equals_share_it() -> None:
    linear, knn = method_tables(record())
    assert linear.header == ["", "digits", "emoji"]
    assert linear.rows[0][1].startswith("90.00 ± ")
    assert linear.rows[0][1].endswith(" (90.00) *")
    assert linear.rows[1] == ["old", "80.00 ± 7.85 (80.00)", "30.00 ± 8.87 (30.00) *"]
    assert linear.rows[0][2].endswith("*")
    assert knn.rows[1] == ["old", "–"]
    assert "highest top-1 of 3 columns: rs 3, old 1" in describe(record())


@pytest.mark.slow
def test_the_page_and_the_report_show_the_tables(tmp_path: Path, write_digits: WriteDigits) -> None:
    config, layout = whole_run(SmallRun(tmp_path, write_digits))
    assert "Transfer to other data sets" not in report_of(config, [layout])
    write_results(layout.transfer, record())
    page = Path(layout.transfer, "transfer.html").read_text()
    for html in (page, report_of(config, [layout])):
        assert "Transfer to other data sets" in html
        assert "80.00 ± 7.85 (80.00)" in html
        assert "1 results are not there yet" in html
    before = {file.name: file.read_bytes() for file in Path(layout.transfer).iterdir()}
    write_results(layout.transfer, record())
    assert {file.name: file.read_bytes() for file in Path(layout.transfer).iterdir()} == before
    results = storage.join(layout.transfer, "results.json")
    storage.write_text(results, json.dumps(record() | {"rows": [{"backbone": "rs"}]}))
    with pytest.raises(StageError, match=r"results.json: damaged.*remove it and run stage=transfer again"):
        report_of(config, [layout])

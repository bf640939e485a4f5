"""stage=compare puts runs side by side: what differs is said, what was not measured on the same images is not compared."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.layout import Layout
from pipeline.core.stage import Fingerprint, open_stage
from pipeline.inference.accuracy import paired_comparison
from pipeline.run import main
from teacher.selection.stage import select
from tests.browser import CHROMIUM, browser
from tests.conftest import WriteDigits
from tests.pipeline.report.test_report import cells, first, whole_run
from tests.small_run import SmallRun


def make_run(
    folder: Path,
    write: WriteDigits,
    student: np.ndarray,
    num_wrong: int = 30,
    threshold: float = 0.3,
    test: str = "cd" * 8,
) -> str:
    run = SmallRun(folder, write)
    config = run.config(select={"confidence_threshold": threshold, "per_class": 8, "max_copies": 4})
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    run.label(config, layout, num_wrong)
    select(config, layout)
    run.model(layout.student, "student")
    run.evaluate(layout, {"teacher": first(300), "student": student}, test)
    return config.run_dir


def compared(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["stage=compare", *words]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def printed_cells(table: str, row: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.strip().startswith(f"{row}  "))
    return re.split(r" {2,}", line.strip())[1:]


def test_runs_are_compared_image_by_image(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    better = first(330)
    better[:10] = False  # loses 10, gains 30
    a = make_run(tmp_path / "a", write_digits, first(310))
    b = make_run(tmp_path / "b", write_digits, better, num_wrong=12, threshold=0.5)
    table = compared(capsys, f"runs=[{a},{b}]")
    page = (Path(a) / "compare.html").read_text()
    found = paired_comparison(first(310), better)
    assert (found.gained, found.lost) == (20, 10)
    low, high = (100 * value for value in found.interval())
    words = f"{low:+.2f} to {high:+.2f}".replace("-", "−")
    for cells_of in (lambda row: printed_cells(table, row), lambda row: cells(page, row)):
        assert cells_of("against a/run, points") == ["–", "+2.50"]
        assert cells_of("95 % interval of that") == ["–", words]
    assert "No clear difference between b/run and a/run" in table
    assert low < 0
    assert printed_cells(table, "right here, wrong in a/run") == ["–", "20"]
    assert printed_cells(table, "select.confidence_threshold") == ["0.3", "0.5"]
    assert "select.per_class" not in table, "the same in both"
    assert printed_cells(table, "labels that differ from a/run's") == ["–", f"{18 / 117:.2%}".replace("%", " %")]
    assert not (Path(b) / "compare.html").exists()


def test_a_clear_difference_is_said_and_the_classes_that_made_it(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = np.arange(400) % 10 != 3  # all of class 3 wrong
    a = make_run(tmp_path / "a", write_digits, first(400))
    b = make_run(tmp_path / "b", write_digits, worse)
    table = compared(capsys, f"run_dir={a}", f"runs={b}")
    assert "b/run is 10.00 points worse than a/run: 95 % interval" in table
    assert printed_cells(table, "digit_3") == ["100.0", "−100.00"]
    assert "no setting differs" in table
    assert printed_cells(table, "labels that differ from a/run's") == ["–", "the same labels"]


def test_other_test_images_are_not_compared(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", write_digits, first(310))
    b = make_run(tmp_path / "b", write_digits, first(330), test="ef" * 8)
    table = compared(capsys, f"runs={tmp_path}/*/run")
    assert "b/run and a/run are not compared: they have no results on the same test images" in table
    assert "95 % interval" not in table
    assert printed_cells(table, "images of data.test") == ["cd" * 8, "ef" * 8]
    assert printed_cells(table, "student, top-1") == ["77.50 ± 2.09 %", "82.50 ± 1.90 %"]
    assert json.loads((Path(b) / "gen-1/evaluation/done.json").read_text())["fingerprint"]["inputs"]["test"] == "ef" * 8


def test_a_run_without_a_student_is_shown_as_far_as_it_is(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_run(tmp_path / "a", write_digits, first(310))
    run = SmallRun(tmp_path / "b", write_digits)
    run.model(Layout(run.config().run_dir).teacher, "teacher")
    table = compared(capsys, f"runs=[{a},{tmp_path}/b/run]")
    assert printed_cells(table, "student, top-1") == ["77.50 ± 2.09 %", "–"]
    assert printed_cells(table, "kept")[1] == "–"


def test_names_that_are_no_runs_are_refused_in_a_sentence(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = whole_run(SmallRun(tmp_path, write_digits))
    a = config.run_dir
    assert "stage=compare needs runs=[DIR,DIR]" in compared(capsys, code=2)
    assert f"runs={tmp_path}/nowhere: no run there" in compared(capsys, f"runs=[{a},{tmp_path}/nowhere]", code=2)
    assert f"runs={tmp_path}/nowhere: no run there" in compared(capsys, f"runs=[{tmp_path}/nowhere,{a}]", code=2)
    assert f"runs={tmp_path}/x*: no run there" in compared(capsys, f"runs={tmp_path}/x*", code=2)
    assert "needs two runs or more" in compared(capsys, f"runs={a}", f"run_dir={a}", code=2)
    assert main(["stage=report", f"run_dir={a}", "runs=[x]"]) == 2
    assert "runs= goes with stage=compare" in capsys.readouterr().err


def test_a_stage_is_compared_as_it_was_made_and_with_defaults_for_what_it_did_not_know(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name, fields in (("a", {"teacher.lr": 0.2}), ("b", {"teacher.lr": 0.2, "teacher.optimizer": "momentum"})):
        config = SmallRun(tmp_path / name, write_digits).config(teacher={"optimizer": "adamw"} if name == "a" else {})
        stage = open_stage(Layout(config.run_dir).teacher, "teacher", Fingerprint(fields, {"labeled": "ab" * 8}))
        stage.commit([], {})
        runs.append(config.run_dir)
    table = compared(capsys, f"runs=[{','.join(runs)}]")
    assert "teacher." not in table


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install the system's package `chromium`")
def test_the_page_can_be_read_narrow_and_wide_light_and_dark(tmp_path: Path, write_digits: WriteDigits) -> None:
    runs = [
        make_run(tmp_path / name, write_digits, first(right)) for name, right in (("a", 310), ("b", 330), ("c", 250))
    ]
    assert main(["stage=compare", f"runs=[{','.join(runs)}]"]) == 0

    async def look() -> None:
        async with browser() as page:
            for width, dark in ((400, False), (400, True), (1600, False), (1600, True)):
                await page.open(Path(runs[0], "compare.html").as_uri(), width, dark=dark)
                assert await page.faults() == [], (width, dark)

    asyncio.run(look())


@pytest.mark.parametrize(("gained", "lost"), [(0.004, 0.002), (0.05, 0.05), (0.2, 0.12)])
def test_the_interval_covers_the_true_difference_in_95_of_100_samples(gained: float, lost: float) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for counts in random.multinomial(400, [gained, lost, 1 - gained - lost], size=2000):
        second = np.repeat([True, False, True], counts)
        low, high = paired_comparison(np.repeat([False, True, True], counts), second).interval()
        covered += low <= gained - lost <= high
    assert covered / 2000 >= 0.94

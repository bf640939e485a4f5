"""The report's timeline of the run, and its section on where the student differs from its teacher."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import storage
from data.shards.split import open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.timing import Clock, Timing, read_timing
from pipeline.report.facts import Predictions
from pipeline.report.sections.changes import confusions
from tests.conftest import WriteDigits
from tests.pipeline.report.test_report import cells, report_of
from tests.small_run import NUM_TEST, SmallRun


def with_effort(folder: str, effort: Timing) -> None:
    values = {"seconds": effort.seconds, "runs": effort.runs, "peak_memory": effort.peak_memory}
    storage.write_text(storage.join(folder, "seconds.json"), json.dumps(values))


def test_a_stage_has_its_time_speed_runs_start_and_memory(run: SmallRun) -> None:
    config = run.config(truth=False)
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    start = 1_764_000_000.0  # 2025-11-24 16:00 UTC
    with_effort(layout.teacher, Timing(50.0, ((start, start + 20), (start + 3600, start + 3630)), 1_500_000_000))
    with_effort(layout.labels, Timing(60.0, ((start + 3700, start + 3760),), 2_250_000_000))
    html = report_of(config, [layout])
    assert cells(html, "teacher") == ["50.0 s", "–", "2", "2025-11-24 16:00", "1.50 GB"]
    assert cells(html, "label") == ["60.0 s", "2", "1", "2025-11-24 17:01", "2.25 GB"]
    assert "Timeline of the stages over 62.7 minutes" in html


def test_a_run_of_an_earlier_version_has_no_timeline_chart(run: SmallRun) -> None:
    config = run.config(truth=False)
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    with_effort(layout.teacher, Timing(50.0))
    html = report_of(config, [layout])
    assert cells(html, "teacher") == ["50.0 s"]
    assert "Timeline of the stages" not in html


def test_the_runs_of_a_stage_are_added_up_and_recorded(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert read_timing(folder) == Timing()
    for _ in range(2):
        clock = Clock()
        time.sleep(0.06)
        clock.add_to(folder)
    effort = read_timing(folder)
    assert 0.1 <= effort.seconds < 600
    (first, end), (second, _) = effort.runs
    assert first <= end <= second
    assert effort.peak_memory is None or effort.peak_memory > 10_000_000


def test_peak_memory_is_that_since_the_stage_began(tmp_path: Path) -> None:
    large = np.ones(60_000_000)  # 480 MB
    del large
    Clock().add_to(str(tmp_path / "small"))
    clock = Clock()
    large = np.ones(60_000_000)
    del large
    clock.add_to(str(tmp_path / "large"))
    small_peak, large_peak = (read_timing(str(tmp_path / name)).peak_memory for name in ("small", "large"))
    if small_peak is None or large_peak is None:
        pytest.skip("this system tells no peak memory")
    assert large_peak - small_peak > 300_000_000


def test_a_damaged_file_of_times_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text("{")
    assert read_timing(str(tmp_path)) == Timing()


def evaluated(run: SmallRun, write: WriteDigits, teacher: np.ndarray, student: np.ndarray) -> tuple[Config, Layout]:
    """Make a run that has its test images."""
    write(run.folder / "test", 0, NUM_TEST)
    pattern = f"{run.folder}/test/*.tar"
    base = run.config(truth=False)
    config = base.model_copy(update={"data": base.data.model_copy(update={"test": [pattern]})})
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    run.model(layout.student, "student", weights=b"other")
    digest = open_split([pattern], layout.indexes).digest()
    run.evaluate(layout, {"teacher": teacher, "student": student}, test=digest)
    return config, layout


def test_images_gained_and_lost_are_shown(run: SmallRun, write_digits: WriteDigits) -> None:
    numbers = np.arange(NUM_TEST)
    config, layout = evaluated(run, write_digits, numbers >= 3, (numbers < 1) | (numbers > 4))
    html = report_of(config, [layout])
    assert (
        "1 test images are gained: the student has them right, the teacher wrong;\n2 are lost: the other way round."
        in html
    )
    section = html[html.index("Where the student differs from the teacher") :].partition("</section>")[0]
    assert len(re.findall('<img src="data:image/png', section)) == 3
    assert section.count("is-right") == 1
    assert section.count("is-wrong") == 2
    assert "is class 0; the teacher says class 1, the student class 0" in section


def test_changed_test_images_are_not_shown(run: SmallRun, write_digits: WriteDigits) -> None:
    numbers = np.arange(NUM_TEST)
    config, layout = evaluated(run, write_digits, numbers >= 3, numbers >= 2)
    for path in (run.folder / "test").glob("*.tar"):
        path.unlink()
    html = report_of(config, [layout])
    assert "No images are shown: the test shards are gone or have changed." in html
    assert "Where the student differs from the teacher" in html


def test_confusions_are_counted_by_true_and_predicted_class(run: SmallRun, write_digits: WriteDigits) -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    sure = np.ones(6, np.float32)
    first = Predictions("t", labels, np.array([0, 1, 1, 0, 0, 2]), sure)
    second = Predictions("t", labels, np.array([1, 1, 1, 0, 2, 2]), sure)
    found = confusions(first, second)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == [(0, 1, 1, 2), (2, 0, 2, 1)]
    numbers = np.arange(NUM_TEST)
    config, layout = evaluated(run, write_digits, numbers % 10 != 3, numbers % 20 != 3)
    html = report_of(config, [layout])
    assert cells(html, "class 3 taken for class 4") == ["40", "20"]
    assert "Confusions that became more frequent" not in html


def dense_confusions(predictions: Predictions, number: int) -> np.ndarray:
    counts = np.zeros((number, number), np.int64)
    np.add.at(counts, (predictions.labels, predictions.predicted), 1)
    np.fill_diagonal(counts, 0)
    return counts


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_sparse_confusions_have_the_nonzero_counts_of_dense_ones(images: list[tuple[int, int, int]]) -> None:
    labels, one, two = np.array(images).T
    first, second = (Predictions("t", labels, predicted, np.ones(len(labels), np.float32)) for predicted in (one, two))
    found = confusions(first, second)
    dense = np.zeros((2, 5, 5), np.int64)
    dense[:, found.truth, found.predicted] = found.first, found.second
    assert (dense == [dense_confusions(each, 5) for each in (first, second)]).all()
    assert ((found.first + found.second) > 0).all()
    assert (np.diff(5 * found.truth + found.predicted) > 0).all(), "rows of the table are in the order of classes"

"""Progress of labeling: the rate of the last two minutes, the ETA, and files that stay small."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from teacher.labeling import progress as progress_module
from teacher.labeling.progress import PROGRESS_NAME, TIMING_NAME, LabelProgress, ProgressDisplay, read_progress
from tests.conftest import Clock

SOME = LabelProgress(
    images_done=50, images_total=1000, shards_done=1, shards_total=10, quarantined=2, workers=3, images_per_s=12.5, eta_s=76,
    seconds={"model": 1.5},
)  # fmt: skip


def test_the_rate_begins_with_the_first_worker_and_forgets_what_is_long_ago(tmp_path: Path, clock: Clock) -> None:
    with ProgressDisplay(str(tmp_path), 10_000, 0) as display:
        assert display.rate(0, workers=0) == 0
        clock.now += 60  # workers start
        assert display.rate(0, workers=1) == 0
        for second in range(1, 101):
            clock.now += 1
            rate = display.rate(10 * second, workers=1)
        assert rate == pytest.approx(10)
        for second in range(1, 301):
            clock.now += 1
            rate = display.rate(1000 + second, workers=1)
        assert rate == pytest.approx(1)


def test_progress_is_written_and_read_by_others(tmp_path: Path, clock: Clock) -> None:
    with ProgressDisplay(str(tmp_path), 1000, 0) as display:
        display.show(SOME)
        shown = read_progress(str(tmp_path))
        assert shown is not None
        assert replace(shown, written_at=0.0) == SOME
        assert SOME.describe() == "12 img/s, 01:16 left, 3 workers, 2 quarantined"
        display.show(replace(SOME, images_done=60))  # too soon to be written, but the last figures are, at the end
    last = read_progress(str(tmp_path))
    assert last is not None
    assert last.images_done == 60


def test_days_of_progress_are_a_few_lines_and_continue_after_a_stop(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "_MAX_LINES", 50)
    for start in (0, 300):
        with ProgressDisplay(str(tmp_path), 10_000, start) as display:
            for number in range(start, start + 300):
                clock.now += 6
                display.show(replace(SOME, images_done=number))
    lines = [json.loads(line)["images_done"] for line in (tmp_path / TIMING_NAME).read_text().splitlines()]
    assert len(lines) <= 51
    assert lines == sorted(lines)
    assert lines[0] < 10
    assert lines[-1] > 590


@pytest.mark.parametrize("content", [None, "", "{", '{"images_done": 1}'])
def test_no_figures_or_damaged_ones_are_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / PROGRESS_NAME).write_text(content)
    assert read_progress(str(tmp_path)) is None


def test_figures_that_cannot_be_written_do_not_stop_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ProgressDisplay(str(tmp_path / "file"), 1000, 0) as display:
        display.show(SOME)

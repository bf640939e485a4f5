"""Progress in a file is whole lines, now and then; on a terminal it is a bar."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from data.progress_bar import ProgressBar
from tests.conftest import Clock

ROOT = Path(__file__).parents[2]
_COUNT = """
from data.progress_bar import ProgressBar
for _ in ProgressBar(range(2000), desc="teacher", unit="step"):
    pass
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """tqdm's clock, moved by hand."""
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def _work(bar: ProgressBar, clock: Clock, steps: int, seconds: float) -> None:
    for _ in range(steps):
        clock.now += seconds
        bar.update()


def test_a_redirected_bar_is_whole_lines_of_count_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar(total=600, desc="teacher", unit="step") as bar:
        bar.set_postfix_str("loss 0.53", refresh=False)
        _work(bar, clock, 600, 0.25)
    log = capsys.readouterr().err
    lines = log.splitlines()
    assert lines[0] == "teacher: 120 of 600 steps (20 %), 4.0 steps/s, 02:00 left, loss 0.53"
    assert lines[-1] == "teacher: 600 of 600 steps (100 %) in 02:30, 4.0 steps/s, loss 0.53"
    assert len(lines) == 5, lines  # each 30 s of 150
    assert "\r" not in log
    assert log.endswith("\n")


def test_short_work_is_one_line_and_delayed_work_none(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in ProgressBar([1, 2, 3], desc="verify", unit="shard"):
        clock.now += 1
    with ProgressBar(total=9, desc="index", unit="shard", delayed=True) as bar:
        _work(bar, clock, 9, 1)
    assert capsys.readouterr().err == "verify: 3 of 3 shards (100 %) in 00:03, 1.0 steps/s\n".replace("steps", "shards")


def test_a_day_of_work_takes_hundreds_of_lines_not_thousands(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(total=86_400, desc="label", unit="image") as bar:
        _work(bar, clock, 86_400, 1)
    assert 250 < len(capsys.readouterr().err.splitlines()) < 350


def test_slow_work_is_seconds_per_piece_and_interrupted_work_says_where_it_is(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar(total=10, desc="select: count", unit="shard", initial=4, delayed=True) as bar:
        _work(bar, clock, 2, 40)
    assert capsys.readouterr().err.splitlines() == [
        "select: count: 5 of 10 shards (50 %), 40.0 s/shard, 03:20 left",
        "select: count: 6 of 10 shards (60 %), 40.0 s/shard, 02:40 left",
        "select: count: 6 of 10 shards (60 %) in 01:20, 40.0 s/shard",
    ]


def test_a_layout_of_ones_own_is_a_line_without_the_bar(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    layout = "{desc} {percentage:.0f} %|{bar}| {elapsed} gone, {remaining} left{postfix}"
    with ProgressBar(total=100, desc="study", unit="s", layout=layout) as bar:
        _work(bar, clock, 40, 1)
        bar.set_postfix_str("3 of 28")
    assert capsys.readouterr().err.splitlines() == [
        "study 30 %, 00:30 gone, 01:10 left",
        "study 40 %, 00:40 gone, 01:00 left, 3 of 28",
    ]


def test_nothing_is_shown_when_asked(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(total=100, desc="teacher", unit="step", shown=False) as bar:
        _work(bar, clock, 100, 9)
        bar.set_postfix_str("loss 1")
    assert capsys.readouterr().err == ""


def test_a_command_writes_lines_to_a_file_and_a_bar_to_a_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, cwd=ROOT, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("teacher: 2,000 of 2,000 steps (100 %) in 00:0")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    subprocess.run([sys.executable, "-c", _COUNT], stderr=theirs, cwd=ROOT, check=True)
    drawn = os.read(ours, 4000).decode()
    os.close(theirs)
    assert "\rteacher: 100%|" in drawn
    assert "2000/2000" in drawn

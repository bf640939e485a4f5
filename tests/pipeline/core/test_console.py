"""What is printed cannot stop a run: another locale, a reader that is gone, a closed terminal, metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import interrupt
from teacher.labeling import prometheus as gauges
from teacher.labeling.progress import LabelProgress

ROOT = Path(__file__).parents[3]
CODE = """
import sys
from pipeline import run
def work(words):
    for _ in range(3000):
        print("läufe → ✓", flush=True)
    open(sys.argv[1], "w").write("done")
run.run = work
sys.exit(run.main(["stage=any"]))
"""


def command(tmp_path: Path) -> list[str]:
    return [sys.executable, "-c", CODE, str(tmp_path / "done")]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_locale_that_does_not_know_a_sign_stops_nothing(tmp_path: Path, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command(tmp_path), capture_output=True, check=False, env=environment, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[0] == "läufe → ✓".encode(encoding, "replace")
    assert (tmp_path / "done").exists()


def test_a_reader_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
    assert (tmp_path / "done").exists()


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP is handled again as it was before the test, which may itself run under nohup."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def raise_here(number: signal.Signals) -> None:
    with interrupt.handled():
        signal.raise_signal(number)


@pytest.mark.usefixtures("hangup")
def test_a_closed_terminal_is_a_signal_like_others() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.raises(interrupt.Interrupted, match="SIGHUP") as stop:
        raise_here(signal.SIGHUP)
    assert stop.value.exit_code == 129


@pytest.mark.usefixtures("hangup")
def test_under_nohup_a_closed_terminal_is_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_here(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


SOME = LabelProgress(1, 2, 0, 1, 0, 1, 1.0, None)


@pytest.mark.parametrize("folder", ["läufe/gen-1/labels", "läufe \u202e日本", 'a "b" % # [1] {2}', "", "runs/mine"])
def test_metrics_take_any_run_dir(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    tags: list[str] = []

    class AsciiOnly:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def set_default_tags(self, given: dict[str, str]) -> None:
            tags.append(given["run"].encode("ascii").decode())

        def set(self, value: float) -> None:
            pass

    monkeypatch.setattr(gauges, "Gauge", AsciiOnly)
    gauges.Gauges(folder).set(SOME)
    assert len(tags) == 7
    assert folder != "runs/mine" or set(tags) == {folder}


@pytest.mark.parametrize("method", ["__init__", "set_default_tags", "set"])
def test_a_gauge_that_fails_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    class Broken:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        set_default_tags = set = lambda *_: None

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no metrics\nhere")

    monkeypatch.setattr(Broken, method, fail)
    monkeypatch.setattr(gauges, "Gauge", Broken)
    shown = gauges.Gauges("runs/mine")
    for _ in range(3):
        shown.set(SOME)
    assert capsys.readouterr().out == "label: no metrics for Prometheus (RuntimeError: no metrics)\n"

"""Loading processes that are lost, stuck, or short of shared memory; and the batches that come all the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.shards.split import Split, open_split
from pipeline.inputs import loader as loading
from pipeline.inputs.batches import TrainBatch, TrainBatches
from pipeline.inputs.loader import LoaderLostError, load_batches, raise_on_lost_loaders, shared_memory_needed
from tests.conftest import WriteDigits
from tests.pipeline.training.test_training import make_job


@pytest.fixture
def labeled(tmp_path: Path, write_digits: WriteDigits) -> Split:
    write_digits(tmp_path / "labeled", 0, 100, per_shard=30)
    return open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch may tell while hypothesis counts
def test_a_loading_process_that_is_lost_is_told_once_and_with_what_to_do(tmp_path: Path, labeled: Split) -> None:
    job = make_job(labeled, tmp_path / "run")
    batches = LostBatches(job.streams, job.config, 10, 0)
    with pytest.raises(LoaderLostError, match=r"a loading process was lost .*teacher\.loader_workers"):
        raise_on_lost_loaders("teacher", lambda: list(load_batches(batches, range(5), 1, pin=False)).clear())
    signal.raise_signal(signal.SIGCHLD)  # upon which torch looks for lost processes


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(), FileNotFoundError("the socket of a batch")])
def test_a_batch_that_a_lost_process_announced_is_told_as_its_loss(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job = make_job(labeled, tmp_path / "run")
    monkeypatch.setattr(loading, "DataLoader", lambda *_, **__: raising(error))
    told = rf"a loading process was lost .*{type(error).__name__}"
    with closing(TrainBatches(job.streams, job.config, 10, 0)) as batches, pytest.raises(LoaderLostError, match=told):
        raise_on_lost_loaders("teacher", lambda: list(load_batches(batches, range(5), 0, pin=False)).clear())


def raising(error: Exception) -> Iterator[TrainBatch]:
    raise error
    yield


def test_loading_processes_begin_with_the_signals_blocked_that_would_end_them_and_this_one_goes_on_without(
    tmp_path: Path, labeled: Split
) -> None:
    job = make_job(labeled, tmp_path / "run")
    with closing(SignalsBlocked(job.streams, job.config, 10, 0)) as batches:
        (batch,) = load_batches(batches, range(1), 1, pin=False)
    assert batch.keys == ["SIGINT", "SIGTERM"]
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


class SignalsBlocked(TrainBatches):
    """Their keys are the signals that the process blocks."""

    def __getitem__(self, step: int) -> TrainBatch:
        blocked = sorted(signal.Signals(number).name for number in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return replace(super().__getitem__(step), keys=blocked)


class LostBatches(TrainBatches):
    """As when memory runs out at step 2."""

    def __getitem__(self, step: int) -> TrainBatch:
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(step)


def test_processes_that_have_more_to_load_are_gone_when_nobody_wants_it(tmp_path: Path, labeled: Split) -> None:
    before = set(multiprocessing.active_children())
    job = make_job(labeled, tmp_path / "run")
    with (
        closing(TrainBatches(job.streams, job.config, 10, 0)) as batches,
        closing(load_batches(batches, range(99), 2, pin=False)) as loaded,
    ):
        next(loaded)
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert not set(multiprocessing.active_children()) - before


class Stuck(TrainBatches):
    """As when a file system does not answer, at step 2."""

    def __getitem__(self, step: int) -> TrainBatch:
        if step == 2:
            time.sleep(1000)
        return super().__getitem__(step)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loading_process_that_hangs_ends_in_a_sentence_and_is_gone(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SILENT_S", 2)
    before = set(multiprocessing.active_children())
    job = make_job(labeled, tmp_path / "run")
    seen: list[TrainBatch] = []
    with (
        closing(Stuck(job.streams, job.config, 10, 0)) as batches,
        pytest.raises(
            LoaderLostError,
            match=r"^teacher: a loading process hangs .*no batch for 2 seconds.*teacher\.loader_workers.*continues",
        ),
    ):
        raise_on_lost_loaders("teacher", lambda: seen.extend(load_batches(batches, range(5), 1, pin=False)))
    assert len(seen) == 2
    assert not set(multiprocessing.active_children()) - before, (
        "it ignores SIGTERM, and the end of this process would wait for it"
    )


def no_room(tensor: torch.Tensor) -> torch.Tensor:
    """In the place of share_memory_: as torch says it."""
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize("augment_on", ["host", "device"])
def test_without_room_in_shared_memory_the_same_batches_come_through_a_pipe_and_it_is_told_once(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], augment_on: str
) -> None:
    job = make_job(labeled, tmp_path / "run", augment_on=augment_on)
    with closing(TrainBatches(job.streams, job.config, 10, 0)) as batches:
        expected = list(load_batches(batches, range(6), 0, pin=False))
    with closing(TrainBatches(job.streams, job.config, 10, 0)) as batches:
        shared = list(load_batches(batches, range(6), 2, pin=False))
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)  # in the forks, too
        piped = list(load_batches(batches, range(6), 2, pin=False, name="student"))
    for ours in (shared, piped):
        for one, two in zip(ours, expected, strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.targets, two.targets)
            assert (one.keys, one.noise) == (two.keys, two.noise)
    out = capsys.readouterr().out
    assert out.count("student: shared memory (/dev/shm") == 1
    assert "--shm-size=1m" in out
    assert "student.loader_workers=2" in out
    piped[0].images += 1  # writable, as noise on the device needs them


def test_what_is_needed_of_shared_memory_counts_all_batches_that_are_loaded_ahead() -> None:
    """The quickstart's: 128 images of 224 px, 10 classes, one process; more than a container's 64 MB."""
    assert shared_memory_needed(128 * (3 * 224 * 224 + 4 * 10), 1) == 5 * (19_267_584 + 5_120)


SMALL = """
import sys
from data.shards.split import open_split
from pathlib import Path
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.loader import load_batches
from tests.pipeline.training.test_training import make_job
job = make_job(open_split(sys.argv[1], sys.argv[2]), Path(sys.argv[3]), image_size=224)
batches = TrainBatches(job.streams, job.config, 10, 0)
print(sum(1 for _ in load_batches(batches, range(12), 2, pin=False, name="teacher")), "batches")
batches.close()
"""


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="no right to mount a small /dev/shm")
def test_a_container_with_little_shared_memory_trains(tmp_path: Path, labeled: Split) -> None:
    """12 batches of 20 images of 224 px are 36 MB, of which 8 fit. Before, the third one never came."""
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    arguments = [f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"), str(tmp_path / "run")]
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", SMALL, *arguments],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "teacher: shared memory (/dev/shm, 9 MB) is too small for the batches in flight (28 MB)" in result.stdout
    assert result.stdout.endswith("12 batches\n")

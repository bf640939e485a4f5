"""Loading processes that are killed, hang, or have too little shared memory."""

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

from data.shards.split import Split
from pipeline.inputs import loader as loading
from pipeline.inputs.batches import TrainBatch, TrainBatches
from pipeline.inputs.loader import LoaderLostError, load_batches, raise_on_lost_loaders
from tests import HANGS_S
from tests.pipeline.training.test_training import make_job


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # torch may report while hypothesis collects garbage
def test_a_lost_loading_process_is_reported_once_with_what_to_do(tmp_path: Path, labeled: Split) -> None:
    job = make_job(labeled, tmp_path / "run")
    batches = LostBatches(job.streams, job.config, 10, 0)
    with pytest.raises(LoaderLostError, match=r"a loading process was lost .*teacher\.loader_workers"):
        raise_on_lost_loaders("teacher", lambda: list(load_batches(batches, range(5), 1, pin=False)).clear())
    signal.raise_signal(signal.SIGCHLD)  # makes torch look for lost processes


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(), FileNotFoundError("the socket of a batch")])
def test_an_announced_batch_of_a_lost_process_is_reported_as_the_loss(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job = make_job(labeled, tmp_path / "run")
    monkeypatch.setattr(loading, "DataLoader", lambda *_, **__: raising(error))
    message = rf"a loading process was lost .*{type(error).__name__}"
    with (
        closing(TrainBatches(job.streams, job.config, 10, 0)) as batches,
        pytest.raises(LoaderLostError, match=message),
    ):
        raise_on_lost_loaders("teacher", lambda: list(load_batches(batches, range(5), 0, pin=False)).clear())


def raising(error: Exception) -> Iterator[TrainBatch]:
    raise error
    yield


def test_signals_are_blocked_in_loading_processes_from_the_start_and_not_in_this_one(
    tmp_path: Path, labeled: Split
) -> None:
    job = make_job(labeled, tmp_path / "run")
    with closing(SignalsBlocked(job.streams, job.config, 10, 0)) as batches:
        (batch,) = load_batches(batches, range(1), 1, pin=False)
    assert batch.images.tolist() == [signal.SIGINT, signal.SIGTERM]
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


class SignalsBlocked(TrainBatches):
    """Batches with the signals blocked in the process instead of images."""

    def __getitem__(self, step: int) -> TrainBatch:
        blocked = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        return replace(super().__getitem__(step), images=torch.tensor(blocked))


class LostBatches(TrainBatches):
    """The process is killed at step 2, as when memory runs out."""

    def __getitem__(self, step: int) -> TrainBatch:
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(step)


def test_loading_processes_with_batches_left_end_with_their_generator(tmp_path: Path, labeled: Split) -> None:
    before = set(multiprocessing.active_children())
    job = make_job(labeled, tmp_path / "run")
    with (
        closing(TrainBatches(job.streams, job.config, 10, 0)) as batches,
        closing(load_batches(batches, range(99), 2, pin=False)) as loaded,
    ):
        next(loaded)
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert not set(multiprocessing.active_children()) - before


class StuckBatches(TrainBatches):
    """The process hangs at step 2, as when a file system does not answer."""

    def __getitem__(self, step: int) -> TrainBatch:
        if step == 2:
            time.sleep(1000)
        return super().__getitem__(step)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_hanging_loading_process_is_reported_and_killed(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SILENT_S", 2)
    before = set(multiprocessing.active_children())
    job = make_job(labeled, tmp_path / "run")
    seen: list[TrainBatch] = []
    with (
        closing(StuckBatches(job.streams, job.config, 10, 0)) as batches,
        pytest.raises(
            LoaderLostError,
            match=r"^teacher: a loading process hangs .*no batch for 2 seconds.*teacher\.loader_workers.*continues",
        ),
    ):
        raise_on_lost_loaders("teacher", lambda: seen.extend(load_batches(batches, range(5), 1, pin=False)))
    assert len(seen) == 2
    assert not set(multiprocessing.active_children()) - before, (
        "it ignores SIGTERM, and the exit of this process would wait for it"
    )


def no_room(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces share_memory_; raises what torch raises."""
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize("augment_on", ["host", "device"])
def test_with_shared_memory_full_the_same_batches_come_through_a_pipe_and_one_warning(
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
            assert one.targets is not None
            assert two.targets is not None
            assert torch.equal(one.targets.dense(), two.targets.dense())
            assert one.noise == two.noise
    out = capsys.readouterr().out
    assert out.count("student: shared memory (/dev/shm") == 1
    assert "too little room for the images in flight: 1 MB" in out
    assert "--shm-size=1m" in out
    assert "student.loader_workers=2" in out
    piped[0].images += 1  # writable, as noise on the device needs them


SMALL = """
import sys
from data.shards.split import open_split
from pathlib import Path
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.loader import load_batches
from tests.pipeline.training.test_training import make_job
job = make_job(open_split(sys.argv[1], sys.argv[2]), Path(sys.argv[3]), image_size=224)
batches = TrainBatches(job.streams, job.config, 10, 0)
print(sum(len(batch.images) for batch in load_batches(batches, range(12), 2, pin=False, name="teacher")), "images")
batches.close()
"""


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no right to mount a small /dev/shm")
def test_a_container_with_little_shared_memory_trains(tmp_path: Path, labeled: Split) -> None:
    """Nine batches of 20 images of 224 px are 28 MB, of which 8 fit: they come in pieces."""
    assert run_with_8_mb(tmp_path, "") == "240 images\n"


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no right to mount a small /dev/shm")
def test_a_container_whose_shared_memory_others_fill_trains(tmp_path: Path, labeled: Split) -> None:
    """Without pipes, a batch would never come."""
    out = run_with_8_mb(tmp_path, "loader.num_pieces = lambda *_: 1")
    assert "teacher: shared memory (/dev/shm, 9 MB) has too little room for the images in flight: 28 MB" in out
    assert out.endswith("240 images\n")


def run_with_8_mb(tmp_path: Path, patch: str) -> str:
    """Standard output of SMALL, with a statement before it, in a mount namespace with 8 MB of shared memory."""
    mount, code = "mount -t tmpfs -o size=8m tmpfs /dev/shm", f"from pipeline.inputs import loader\n{patch}\n{SMALL}"
    arguments = [f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"), str(tmp_path / "run")]
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=HANGS_S, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout

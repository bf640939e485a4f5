"""Small real images for all tests: scikit-learn's digits, and its two photos."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
# A machine that stands still for a minute is no reason for Ray to give its only node up, and with it this process.
os.environ.setdefault("RAY_health_check_failure_threshold", "30")
os.environ.setdefault("RAY_agent_register_timeout_ms", "180000")

from data.images.held_out_hashes import held_out_row, write_hashes
from data.shards.split import Split, open_split
from data.shards.write import Fields, labeled_members, write_shards
from data.storage import remote, retry
from tests.s3_server import BUCKET, SECRET, FaultyS3, s3_server


def wait_for_ray(process: subprocess.Popen[Any], warn: Callable[..., None] = subprocess.Popen.__del__) -> None:
    """Ray waits one second for a process that it has killed, too few on a busy machine; Python would warn in a later test."""
    if getattr(process, "returncode", 0) is None and "/ray/" in str(process.args):
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
    warn(process)


subprocess.Popen.__del__ = wait_for_ray  # type: ignore[method-assign]

# An example's time says nothing on a busy machine. CI draws the same examples each time: what is new is for people to find.
hypothesis.settings.register_profile("busy machine", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("busy machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch  # not at the top: many tests do without

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU")


DIGIT_NAMES = [f"digit_{n}" for n in range(10)]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches this process and those that it starts, also when the tests are a background job of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images (N, 8, 8) uint8 and labels (N,) of handwritten digits, shuffled."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images[order] * 15.9).astype(np.uint8), data.target[order]


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A real photo, (427, 640, 3) uint8."""
    return np.asarray(load_sample_image("china.jpg"))


WriteDigits = Callable[..., list[int]]


def make_writer(digits: tuple[np.ndarray, np.ndarray]) -> WriteDigits:
    """A function that writes digits `start` to `stop` as shards into a folder and returns their labels."""

    def write(folder: Path, start: int, stop: int, labeled: bool = True, per_shard: int = 100) -> list[int]:
        images, labels = digits[0][start:stop], digits[1][start:stop]

        def samples() -> Iterator[tuple[str, Fields]]:
            for number, image in enumerate(images):
                yield f"{number:05d}", labeled_members("png", png(image), int(labels[number]) if labeled else None)

        write_shards(samples(), str(folder), folder.name, per_shard, DIGIT_NAMES if labeled else None)
        if labeled:
            write_hashes(str(folder), (held_out_row(np.repeat(image[..., None], 3, axis=2)) for image in images))
        return [int(label) for label in labels]

    return write


@pytest.fixture
def write_digits(digits: tuple[np.ndarray, np.ndarray]) -> WriteDigits:
    """See make_writer."""
    return make_writer(digits)


@pytest.fixture
def labeled(tmp_path: Path, write_digits: WriteDigits) -> Split:
    """100 labeled digits in four shards."""
    write_digits(tmp_path / "labeled", 0, 100, per_shard=30)
    return open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))


@pytest.fixture(scope="session")
def server() -> Iterator[FaultyS3]:
    with s3_server() as s3:
        yield s3


@pytest.fixture
def s3(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The server, without faults, and short waits."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key-of-the-tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    server.faults.clear()
    server.requests.clear()
    server.most_at_once = 0
    yield server
    server.faults.clear()


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 1.0)
    monkeypatch.setattr(remote, "CONNECT_TIMEOUT_S", 1.0)


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> str:
    """A folder of the test's own."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']').replace(' ', '-')}"


class Clock:
    """Stands in for time.monotonic."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock

"""Training from an object store: the batches and the weights of a training from a disk, with images read ahead of their step."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import storage
from data.errors import DataError
from data.shards.image_reader import ImageReader
from data.shards.read_ahead import Pending
from data.shards.split import Split, open_split
from pipeline.inputs.batches import TrainBatch, TrainBatches
from pipeline.inputs.loader import load_batches
from pipeline.training.checkpoint import load_newest
from pipeline.training.loop import fit
from tests.pipeline.training.test_training import make_job
from tests.s3_server import FaultyS3, put


@pytest.fixture
def remote(labeled: Split, s3: FaultyS3, folder: str, tmp_path: Path) -> Split:
    """The labeled digits in an object store."""
    for path in sorted((tmp_path / "labeled").rglob("*.*")):
        put(f"{folder}/labeled/{path.relative_to(tmp_path / 'labeled')}", path.read_bytes())
    return open_split(f"{folder}/labeled/*.tar", str(tmp_path / "index"))


def same(one: TrainBatch, two: TrainBatch) -> bool:
    return torch.equal(one.images, two.images) and not differences(vars(one.targets), vars(two.targets), "")


@pytest.mark.slow
def test_weights_trained_from_a_store_with_faults_are_those_from_a_disk(
    labeled: Split, remote: Split, s3: FaultyS3, tmp_path: Path
) -> None:
    fit(make_job(labeled, tmp_path / "disk"))
    faults = [s3.add("503", "GET", ".tar", times=3), s3.add("cut", "GET", ".tar", times=2, skip=5, keep=100)]
    fit(make_job(remote, tmp_path / "store"))
    assert [fault.done for fault in faults] == [3, 2]
    store, disk = (load_newest(str(tmp_path / name / "checkpoints")) for name in ("store", "disk"))
    assert store is not None
    assert disk is not None
    assert not [path for path in differences(store, disk, "") if not path.startswith("/timing/")]  # clocks
    assert (tmp_path / "store/metrics.jsonl").read_bytes() == (tmp_path / "disk/metrics.jsonl").read_bytes()


def differences(one: Any, two: Any, where: str) -> list[str]:
    """Paths of the values that differ in two checkpoints."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [where]
    if isinstance(one, np.ndarray):
        return [] if one.dtype == two.dtype and np.array_equal(one, two) else [where]
    if isinstance(one, dict | list | tuple):
        keys = list(one) if isinstance(one, dict) else range(len(one))
        if len(one) != len(two) or (isinstance(one, dict) and one.keys() != two.keys()):
            return [where]
        return [path for key in keys for path in differences(one[key], two[key], f"{where}/{key}")]
    return [] if one == two else [where]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_the_same_whatever_is_expected(
    labeled: Split, remote: Split, tmp_path: Path, num_workers: int
) -> None:
    def batches(split: Split) -> TrainBatches:
        job = make_job(split, tmp_path / "run")
        return TrainBatches(job.streams, job.config, 10, 0)

    with closing(batches(labeled)) as local, closing(batches(remote)) as ours:
        expected = [local[step] for step in range(9)]
        loaded = list(load_batches(ours, range(2, 9), num_workers, pin=False))
        assert all(map(same, loaded, expected[2:]))
        ours.expect([(3, 0, 1), (5, 0, 1)])
        assert all(same(ours[step], expected[step]) for step in (3, 5, 6, 0))
        ours.expect((step, 0, 1) for step in range(1, 9))
        assert all(same(ours[step], expected[step]) for step in (1, 7, 1))  # asked for others after all
        ours.expect((4, number, 3) for number in range(3))
        assert all(same(ours.piece(4, number, 3), local.piece(4, number, 3)) for number in range(3))


def test_images_of_the_next_steps_are_asked_for_before_their_turn_and_none_behind_the_last(
    remote: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = ImageReader.begin

    def count(reader: ImageReader, shard: int, offset: int, size: int) -> Pending:
        begun.append(size)
        return begin(reader, shard, offset, size)

    monkeypatch.setattr(ImageReader, "begin", count)
    job = make_job(remote, tmp_path / "run", batch_size=5)
    with closing(TrainBatches(job.streams, job.config, 10, 0)) as batches:
        batches.expect((step, 0, 1) for step in range(3))
        numbers = [(len(batches[step].images), len(begun)) for step in range(3)]
    assert numbers == [(5, len(begun))] * 3, "at the first step all three steps' images are asked for"
    assert len(begun) <= 15


def test_the_tables_of_a_window_are_asked_for_at_once(remote: Split, s3: FaultyS3, tmp_path: Path) -> None:
    job = make_job(remote, tmp_path / "run")
    s3.requests.clear()
    together = s3.answer_together("/index/", len(remote.shards))
    with closing(TrainBatches(job.streams, job.config, 10, 0)) as batches:
        assert len(np.unique(batches.order(0).take(0, 20).shard)) == len(remote.shards) > 2
        assert len(batches[0].images) == 20
    assert not together.broken
    tables = [request for request in s3.requests if "/index/" in request and request.startswith("GET")]
    assert len(tables) == len(remote.shards), "each once"


def test_an_image_that_is_damaged_is_told_at_its_step_and_the_others_come(
    remote: Split, s3: FaultyS3, tmp_path: Path
) -> None:
    job = make_job(remote, tmp_path / "run")
    with closing(TrainBatches(job.streams, job.config, 10, 0)) as batches:
        order = batches.order(0).take(20, 20)
        shard, key = remote.shards[int(order.shard[7])], batches.keys(1)[7].rpartition(" ")[2].strip("'")
        content = storage.read_bytes(shard.url)
        put(shard.url, content.replace(f"{key}.png".encode(), b"other.png"))
        batches.expect((step, 0, 1) for step in range(4))
        first = batches[0]
        with pytest.raises(DataError, match=rf"labeled-00000\d\.tar: sample \d+ should be '{key}'"):
            batches[1]
        assert not same(batches[2], first)
        assert len(batches[2].images) == len(batches[3].images) == 20

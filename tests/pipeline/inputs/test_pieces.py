"""Large batches come in pieces: the same batches, with few bytes in shared memory and few tables read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.shards.split import Split
from data.training_order import OrderSlice
from pipeline.core.config import load_config
from pipeline.inputs import loader as loading
from pipeline.inputs.batches import TrainBatch, TrainBatches, _cut
from pipeline.inputs.loader import load_batches
from pipeline.inputs.pieces import AHEAD, MAX_SHARED, num_pieces, shared_memory_needed
from pipeline.inputs.streams import labeled_stream
from tests.pipeline.inputs.test_loader import no_room
from tests.pipeline.training.test_training import CONFIG, pseudo_spec

STEPS, WORKERS = 5, 2
IMAGE_BYTES = 3 * 16 * 16  # of CONFIG
FIVE_IMAGES_A_PIECE = shared_memory_needed(5 * IMAGE_BYTES, WORKERS)


def batches_of(labeled: Split, folder: Path, augment_on: str = "host") -> TrainBatches:
    """Of 20 images: 8 labeled, 12 pseudo-labeled with copies."""
    specs = (labeled_stream(labeled, 8), pseudo_spec(folder, labeled, [1, 0, 3, 2]))
    return TrainBatches(specs, CONFIG.model_copy(update={"augment_on": augment_on}), 10, seed=0)


@pytest.mark.parametrize("shares_memory", [True, False])
@pytest.mark.parametrize("augment_on", ["host", "device"])
def test_batches_in_pieces_are_the_same_batches(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch, augment_on: str, shares_memory: bool
) -> None:
    monkeypatch.setattr(loading, "MAX_SHARED", FIVE_IMAGES_A_PIECE)
    if not shares_memory:
        monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    with closing(batches_of(labeled, tmp_path, augment_on)) as batches:
        whole = [batches[step] for step in range(STEPS)]
        joined = list(load_batches(batches, range(STEPS), WORKERS, pin=False, name="student"))
    assert all(batch.positions is None for batch in joined)
    for one, two in zip(joined, whole, strict=True):
        assert torch.equal(one.images, two.images)
        assert one.targets is not None
        assert two.targets is not None
        assert torch.equal(one.targets.dense(), two.targets.dense())
        assert one.noise == two.noise


class LoggedBatches(TrainBatches):
    """Notes the bytes of each piece in a file before it goes to shared memory."""

    log = ""

    def piece(self, step: int, number: int = 0, pieces: int = 1) -> TrainBatch:
        piece = super().piece(step, number, pieces)
        self.note(piece.images.nbytes)
        return piece

    def note(self, count: int) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{count}\n".encode())
        os.close(descriptor)


def bytes_in_flight(batches: LoggedBatches, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After each piece that is loaded or taken; the trainer takes one only when no other can be loaded before."""

    def number_of_lines() -> int:
        return len(Path(batches.log).read_text().splitlines()) if Path(batches.log).exists() else 0

    original, taken = loading._next, 0
    total = STEPS * loading._num_pieces(batches, WORKERS)

    def slow(items: Iterator[Any]) -> Any:
        nonlocal taken
        while number_of_lines() < taken + min(taken + AHEAD * WORKERS, total):
            os.sched_yield()
        item = original(items)
        if isinstance(item, TrainBatch):
            batches.note(-item.images.nbytes)
            taken += 1
        return item

    monkeypatch.setattr(loading, "_next", slow)
    assert len(list(load_batches(batches, range(STEPS), WORKERS, pin=False))) == STEPS
    return list(np.cumsum([int(line) for line in Path(batches.log).read_text().splitlines()]))


def test_bytes_in_flight_are_bounded(tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MAX_SHARED", FIVE_IMAGES_A_PIECE)
    monkeypatch.setattr(LoggedBatches, "log", str(tmp_path / "log"))
    specs = (labeled_stream(labeled, 8), pseudo_spec(tmp_path, labeled, [1, 0, 3, 2]))
    with closing(LoggedBatches(specs, CONFIG, 10, seed=0)) as batches:
        in_flight = bytes_in_flight(batches, monkeypatch)
    assert (
        AHEAD * WORKERS * 5 * IMAGE_BYTES <= max(in_flight) <= FIVE_IMAGES_A_PIECE
    )  # whole batches: four times as much
    assert in_flight[-1] == 0


@pytest.mark.parametrize("name", ["imagenet", "imagenet_paper"])
@pytest.mark.parametrize("processes", [1, 8])
def test_the_shipped_configurations_need_less_than_a_gigabyte_of_shared_memory(name: str, processes: int) -> None:
    config = load_config(name, [])
    for section in (config.teacher, config.student):
        images, image_bytes = section.batch_size // processes, 3 * section.image_size**2
        pieces = num_pieces(images, image_bytes, section.loader_workers, MAX_SHARED)
        needed = shared_memory_needed(-(-images // pieces) * image_bytes, section.loader_workers)
        assert needed < 1_000_000_000
        assert needed > MAX_SHARED / 2 or pieces == 1, "as much is loaded ahead as there is room for"


def test_small_batches_are_loaded_whole_and_images_never_divided() -> None:
    assert num_pieces(256, 3 * 32 * 32, 1, 64_000_000) == 1
    assert num_pieces(256, 3 * 160 * 160, 1, int(0.8 * 64_000_000)) == 2, "a container's 64 MB"
    assert num_pieces(7, 1000, 12, 10) == 7


@given(st.lists(st.lists(st.integers(0, 5), max_size=30), min_size=1, max_size=3), st.integers(1, 6))
def test_pieces_have_each_image_once_and_few_shards(streams: list[list[int]], pieces: int) -> None:
    entries = []
    for shards in streams:
        row = np.arange(len(shards))
        entries.append(OrderSlice(row, np.array(shards, np.int64), row, row))
    cuts = [_cut(entries, number, pieces) for number in range(pieces)]
    positions = np.concatenate([positions for positions, _ in cuts])
    assert sorted(positions) == list(range(sum(map(len, streams))))
    assert max(len(p) for p, _ in cuts) - min(len(p) for p, _ in cuts) <= 1
    whole = np.concatenate([part.row for part in entries])
    for part, parts in cuts:
        assert np.concatenate([each.row for each in parts]).tolist() == whole[part].tolist()
    tables = sum(len(np.unique(part.shard)) for _, parts in cuts for part in parts)
    assert tables <= sum(len(set(shards)) for shards in streams) + pieces - 1

"""Memory of batches is reused; files and images take no more than their budget, and the labels do not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_label import StubPredictor
from benchmarks.bench_label_memory import labeling_memory, make_noise
from data.images.clean_view import EvalView
from data.labels.label_files import read_labels
from data.shards.image_reader import ImageReader, Place
from data.shards.read_ahead import Pending
from data.shards.split import Shard, open_split
from teacher.labeling.batches import BatchReader, ImageMemory, _pieces, ahead
from teacher.labeling.image_budget import ByteBudget, ImageBudget
from teacher.labeling.label_shard import ShardLabeler
from tests.odd_images import encode
from tests.s3_server import FaultyS3, put

MIB = 1 << 20
FILES = 48


@pytest.fixture(scope="module")
def large_files(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """48 PNGs of 1 MB."""
    folder = tmp_path_factory.mktemp("large")
    assert make_noise(str(folder), FILES, 1.0) > 44 * MIB
    return open_split(f"{folder}/large/*.tar", str(folder)).shards[0]


def plain_memory(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def test_memory_is_used_again_only_after_it_was_given_back() -> None:
    memory = ImageMemory((4, 2, 2, 3), num_batches=3, allocate=plain_memory)
    first, second = memory.take(4), memory.take(3)
    assert first.shape == (4, 2, 2, 3)
    assert second.shape == (3, 2, 2, 3)
    assert not np.shares_memory(first, second)
    memory.give_back(second)
    third = memory.take(4)
    assert third.shape == (4, 2, 2, 3)
    assert np.shares_memory(second, third)
    assert not np.shares_memory(first, third)


def test_threads_hold_no_more_than_a_budget_but_a_larger_file_passes_alone() -> None:
    budget = ByteBudget(10)

    def hold(size: int) -> None:
        with budget.holding(size):
            if size > budget.limit:
                assert budget.held == size
            assert budget.held <= max(budget.limit, size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, [3, 4, 25, 1, 9, 10, 2, 2] * 50))
    assert budget.peak == 25
    assert budget.held == 0


def test_a_budget_is_divided_and_two_batches_are_held_in_any_case() -> None:
    usual = ImageBudget.of(2048 * MIB, 256 * 3 * 224**2)
    assert usual.num_batches == 8
    assert usual.total_bytes == 2048 * MIB
    small = ImageBudget.of(64 * MIB, 256 * 3 * 800**2)
    assert small.num_batches == 2
    assert small.total_bytes == 2 * 256 * 800**2 * 3 + 32 * MIB


def test_files_are_read_in_pieces_of_a_size() -> None:
    places = [Place(n, "", 0, size) for n, size in enumerate([4, 4, 0, 4, 11, 1, 9, 2])]
    assert [list(rows) for rows in _pieces(places, 10)] == [[0, 1, 2], [3], [4], [5, 6], [7]]


class StuckView(EvalView):
    """Decodes nothing before `go` is set."""

    go = threading.Event()

    def with_hash(self, content: bytes) -> tuple[np.ndarray, int]:
        self.go.wait()
        return super().with_hash(content)


def test_large_files_wait_outside_while_none_is_decoded(large_files: Shard) -> None:
    """The reader stops at its budget, however many batches it might read ahead."""
    view = StuckView(64, 1.0, "bicubic", "crop", "fast")
    reader = BatchReader(view, 8, 2, lambda: None, 64 * MIB, plain_memory)
    batches = reader.batches(large_files, large_files.index())
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, batches)
        while reader.budget.files.held < 7 * MIB:  # ends when the reader waits for room
            assert not reading.done()
        view.go.set()
        assert len(reading.result()) == FILES / 8 < reader.budget.num_batches
        for batch in reading.result():
            reader.drop(batch)
    assert reader.budget.files.peak <= reader.budget.files.limit == 12 * MIB
    assert reader.budget.files.held == reader.budget.decoding.held == 0


def test_files_of_a_remote_shard_are_asked_for_before_their_turn_those_of_later_batches_too(
    s3: FaultyS3, folder: str, large_files: Shard, tmp_path: Path
) -> None:
    """The store answers nothing before as many requests wait as two batches have files."""
    remote = open_split(put(f"{folder}/x.tar", Path(large_files.url).read_bytes()), str(tmp_path)).shards[0]
    view, batch_size = EvalView(64, 1.0, "bicubic", "crop", "fast"), 2
    s3.requests.clear()
    together = s3.answer_together("X-Amz-Signature", 2 * batch_size)
    found = [images_of(shard, view, batch_size) for shard in (large_files, remote)]
    assert not together.broken
    assert len(found[0]) == FILES // batch_size
    assert all((one == other).all() for one, other in zip(*found, strict=True))
    images = [request for request in s3.requests if "X-Amz-Signature" in request]
    assert len(images) == FILES, "one request for each file, as large files have no neighbours"


@pytest.mark.slow
def test_files_that_are_asked_for_before_their_turn_are_within_the_budget(
    s3: FaultyS3, folder: str, large_files: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = open_split(put(f"{folder}/x.tar", Path(large_files.url).read_bytes()), str(tmp_path)).shards[0]
    begun, begin = list[int](), ImageReader.begin

    def count(reader: ImageReader, shard: int, offset: int, size: int) -> Pending:
        begun.append(size)
        return begin(reader, shard, offset, size)

    monkeypatch.setattr(ImageReader, "begin", count)
    reader = BatchReader(EvalView(64, 1.0, "bicubic", "crop", "fast"), 2, 1, lambda: None, 64 * MIB, plain_memory)
    batches = reader.batches(remote, remote.index())
    reader.drop(next(batches))
    batches.close()
    of_the_batch, of_later_ones = sum(begun[:2]), sum(begun[2:])
    assert of_the_batch < 3 * MIB
    assert 0 < of_later_ones <= reader.budget.ahead_bytes + max(begun), "and one file more"


def images_of(shard: Shard, view: EvalView, batch_size: int) -> list[np.ndarray]:
    """Copies of the batches."""
    reader, found = BatchReader(view, batch_size, 1, lambda: None, 64 * MIB, plain_memory), []
    for batch in ahead(reader.batches(shard, shard.index()), reader.drop):
        batch.wait()
        found.append(batch.images.copy())
        reader.release(batch)
    return found


def test_labels_do_not_depend_on_the_budget(large_files: Shard, tmp_path: Path) -> None:
    found = []
    for megabytes in (1, 4096):
        labeler = ShardLabeler(StubPredictor(), 1000, 10, 1, 3, "", megabytes * MIB)
        labeler.label(large_files, f"{tmp_path}/{megabytes}.parquet")
        found.append((tmp_path / f"{megabytes}.parquet").read_bytes())
        counted = labeler.peak_bytes
        assert counted <= ImageBudget.of(megabytes * MIB, 256 * 3 * 224**2).total_bytes
    assert found[0] == found[1]
    assert read_labels(f"{tmp_path}/1.parquet").num_rows == FILES


def test_a_reader_that_is_left_early_gives_everything_back(large_files: Shard) -> None:
    reader = BatchReader(EvalView(64, 1.0, "bicubic", "crop", "fast"), 8, 2, lambda: None, MIB, plain_memory)
    batches = ahead(reader.batches(large_files, large_files.index()), reader.drop)
    reader.drop(next(batches))
    batches.close()
    assert reader.budget.files.held == 0
    taken = [reader._memory.take(1) for _ in range(reader.budget.num_batches)]  # waits for ever if a batch is lost
    assert len(taken) == 2


def test_a_generator_that_raises_ends_the_iteration_with_its_error() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        raise OSError("gone")

    dropped: list[int] = []
    with pytest.raises(OSError, match="gone"):
        list(ahead(items(), dropped.append))
    assert dropped == []


@pytest.mark.parametrize(
    ("kind", "options", "fast", "pillow"),
    [
        ("JPEG", {}, 4, 15),
        ("JPEG", {"progressive": True}, 4, 15),
        ("PNG", {}, 19, 19),
        ("WEBP", {}, 27, 27),
    ],
)
def test_memory_of_decoding_is_known_from_the_header(
    photo: np.ndarray, kind: str, options: dict[str, bool], fast: int, pillow: int
) -> None:
    content = encode(photo, kind, **options)
    pixels = photo.shape[0] * photo.shape[1]
    assert EvalView(64, 1.0, "bicubic", "crop", "fast").decoding_bytes(content) == fast * pixels
    assert EvalView(64, 1.0, "bicubic", "crop", "pillow").decoding_bytes(content) == pillow * pixels
    assert EvalView(400, 1.0, "bicubic", "crop", "fast").decoding_bytes(content) == (7 if fast == 4 else fast) * pixels
    assert EvalView(64, 1.0, "bicubic", "crop", "fast").decoding_bytes(content[:9]) == 0


@pytest.mark.slow
def test_256_files_of_10_mb_take_no_more_memory_than_the_budget(tmp_path: Path) -> None:
    make_noise(str(tmp_path), 256, 10.0)
    found = labeling_memory(str(tmp_path), 512, 4)
    assert found["counted_mb"] <= 512
    assert found["grown_mb"] <= 512

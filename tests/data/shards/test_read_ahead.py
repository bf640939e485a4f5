"""Images of remote shards are read before their turn: many at once, neighbours together, in bounded memory, with a disk's errors."""

from __future__ import annotations

import io
import logging
import multiprocessing
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import storage
from data.errors import DataError
from data.shards import read_ahead as planning
from data.shards.image_reader import ImageReader, Place, places_in
from data.shards.index import build_index
from data.shards.read_ahead import MAX_PIECE, Pending, read_ahead
from data.storage import ranges
from tests.s3_server import SECRET, FaultyS3, put

NUMBER, SIZE = 60, 300_000  # far from each other: more than the gap that is read
Wanted = tuple[int, Place]


def make_tar(number: int = NUMBER, size: int = SIZE, seed: int = 0) -> bytes:
    """A shard of images of `size` bytes, whose contents differ."""
    generator = random.Random(seed)
    with io.BytesIO() as content:
        with tarfile.open(fileobj=content, mode="w") as tar:
            for name in range(number):
                info = tarfile.TarInfo(f"{name:05d}.jpg")
                info.size = size
                tar.addfile(info, io.BytesIO(generator.randbytes(size)))
        return content.getvalue()


def local_and_remote(tmp_path: Path, folder: str, content: bytes) -> tuple[str, str]:
    (tmp_path / "x.tar").write_bytes(content)
    return f"{tmp_path}/x.tar", put(f"{folder}/x.tar", content)


def as_is(wanted: Wanted) -> Wanted:
    return wanted


def read(url: str, chunks: Sequence[Sequence[Place]]) -> list[bytes]:
    with ImageReader([url]) as reader:
        return [content for _, content in reader.read_ahead([[(0, p) for p in chunk] for chunk in chunks], as_is)]


def shuffled_places(url: str, every: int = 1) -> list[Place]:
    places = places_in(build_index(url))[::every]
    random.Random(1).shuffle(places)
    return places


def image_requests(s3: FaultyS3) -> list[str]:
    return [request for request in s3.requests if request.startswith("GET") and "x.tar" in request]


def test_images_far_apart_are_asked_for_many_at_once(s3: FaultyS3, folder: str, tmp_path: Path) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar())
    places = shuffled_places(local, every=2)
    s3.requests.clear()
    s3.add("slow", "GET", "x.tar", times=1000, seconds=0.5)
    assert read(remote, [places[:10], places[10:]]) == read(local, [places])
    assert len(image_requests(s3)) == len(places)
    assert s3.most_at_once >= 10
    assert all("X-Amz-Algorithm=AWS4-HMAC-SHA256" in request for request in image_requests(s3)), "version 2 is refused"


def test_neighbours_come_in_one_request_and_connections_are_kept(s3: FaultyS3, folder: str, tmp_path: Path) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(400, 1000))
    places = shuffled_places(local)
    s3.requests.clear()
    assert read(remote, [places]) == read(local, [places])
    assert len(image_requests(s3)) == 1
    with ImageReader([remote]) as reader:
        in_order = sorted(places)
        assert reader.images(0, in_order) == read(local, [in_order])


def test_samples_without_an_image_are_not_read(s3: FaultyS3, folder: str, tmp_path: Path) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(3, 1000))
    places = places_in(build_index(local))
    wanted = [places[2], Place(7, "", 1 << 40, 0), places[0], Place(8, "b", 0, 0)]
    for url in (local, remote):
        assert [len(content) for content in read(url, [wanted, [], wanted[1:2]])] == [1000, 0, 1000, 0, 0]


@pytest.mark.parametrize("kind", ["503", "cut", "short", "reset", "stall"])
def test_a_read_ahead_that_fails_is_read_again(
    kind: str, s3: FaultyS3, folder: str, tmp_path: Path, short_timeouts: None
) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(20))
    places = shuffled_places(local, every=2)
    fault = s3.add(kind, "GET", "x.tar", times=5, keep=1000, seconds=60)  # type: ignore[arg-type]
    assert read(remote, [places]) == read(local, [places])
    assert fault.done == 5


def test_a_store_that_keeps_failing_is_told_as_ever(s3: FaultyS3, folder: str, tmp_path: Path) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(4))
    s3.add("503", "GET", "x.tar", times=1000)
    with pytest.raises(storage.StorageError, match=r"x\.tar: read failed: 503 SlowDown.*tried 6 times"):
        read(remote, [shuffled_places(local)])


def test_a_store_that_refuses_signed_urls_is_read_one_by_one_with_one_warning(
    s3: FaultyS3, folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(20))
    places = shuffled_places(local, every=2)
    s3.add("403", "GET", "X-Amz-Signature", times=1000)
    with caplog.at_level(logging.WARNING):
        assert read(remote, [places[:5], places[5:]]) == read(local, [places])
    assert [record.getMessage() for record in caplog.records if "read ahead" in record.getMessage()] == [
        f"{remote}: cannot be read ahead (403 (Forbidden)); its images are read one after the other"
    ]
    assert SECRET not in caplog.text
    assert "Signature=" not in caplog.text


@pytest.mark.slow
def test_a_store_with_too_much_to_do_is_asked_for_one_image_at_a_time_for_a_while(
    s3: FaultyS3, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(120))
    monkeypatch.setattr(planning, "MAX_IMAGES", 20)
    monkeypatch.setattr(ranges, "PAUSE_S", 3600.0)
    places = shuffled_places(local, every=2)
    fault = s3.add("503", "GET", "X-Amz-Signature", times=1000)
    assert read(remote, [places]) == read(local, [places])
    assert ranges.MAX_FAILURES <= fault.done <= ranges.MAX_FAILURES + 20 < len(places)


def test_a_shard_that_was_replaced_is_an_error_that_names_shard_and_sample(
    s3: FaultyS3, folder: str, tmp_path: Path
) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(10))
    places = places_in(build_index(local))
    put(remote, make_tar(10, SIZE + 512))
    with pytest.raises(
        DataError, match=r"x\.tar: sample 0 should be '00000'.*the shard has changed since it was indexed"
    ):
        read(remote, [places])


def test_a_shard_that_is_shorter_or_gone_is_named(s3: FaultyS3, folder: str, tmp_path: Path) -> None:
    content = make_tar(10)
    local, remote = local_and_remote(tmp_path, folder, content)
    places = places_in(build_index(local))
    put(remote, content[: 5 * SIZE])
    with pytest.raises(DataError, match=r"x\.tar: cut short before byte"):
        read(remote, [places])
    storage.remove(remote)
    with pytest.raises(FileNotFoundError, match=r"x\.tar"):
        read(remote, [places])


def test_images_before_a_damaged_one_come_first(s3: FaultyS3, folder: str, tmp_path: Path) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(10))
    places = places_in(build_index(local))
    places[6] = places[6]._replace(key="other")
    with ImageReader([remote]) as reader:
        images = reader.read_ahead([[(0, place) for place in places]], as_is)
        assert [len(next(images)[1]) for _ in range(6)] == [SIZE] * 6
        with pytest.raises(DataError, match="sample 6"):
            next(images)


def read_here(url: str, places: list[Place], expected: list[bytes]) -> None:
    """What a forked process does; raises there when images differ."""
    assert read(url, [places]) == expected


def test_a_forked_process_reads_on_connections_of_its_own(s3: FaultyS3, folder: str, tmp_path: Path) -> None:
    local, remote = local_and_remote(tmp_path, folder, make_tar(20))
    places = shuffled_places(local)
    expected = read(local, [places])
    with ImageReader([remote]) as reader:
        images = reader.read_ahead([[(0, place) for place in places]], as_is)
        before = [next(images)[1] for _ in range(3)]  # others are on their way
        process = multiprocessing.get_context("fork").Process(target=read_here, args=(remote, places, expected))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        assert before + [content for _, content in images] == expected


# the plan alone


class Fakes:
    """Shards of numbered bytes, and the sizes of the pieces that were begun."""

    def __init__(self) -> None:
        self.pieces: list[int] = []

    @property
    def begun(self) -> int:
        return sum(self.pieces)

    def gap(self, shard: int) -> int:
        return 100

    def begin(self, shard: int, offset: int, size: int) -> Pending:
        self.pieces.append(size)
        return FakeRead(size, bytes((shard + n) % 251 for n in range(offset, offset + size)))


class FakeRead:
    def __init__(self, size: int, content: bytes) -> None:
        self.size, self._content, self.cancelled = size, content, False

    def result(self) -> bytes:
        return self._content

    def cancel(self) -> None:
        self.cancelled = True


places = st.builds(lambda at, size: Place(0, "", 512 + at, size), st.integers(0, 3000), st.integers(0, 500))
chunks_of_places = st.lists(st.lists(st.tuples(st.integers(0, 2), places)), max_size=5)


@given(chunks_of_places)
def test_every_image_is_in_its_piece_in_the_order_of_the_chunks(chunks: list[list[Wanted]]) -> None:
    wanted = [image for chunk in chunks for image in chunk]
    found = list(read_ahead(Fakes(), chunks, as_is))
    assert [item for item, _, _ in found] == wanted
    for (shard, place), piece, start in found:
        if place.size:
            begin = place.offset - start
            assert piece[begin : begin + place.size] == bytes((shard + n) % 251 for n in range(place.offset, place.end))


def test_held_bytes_are_bounded_and_used_ones_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_AHEAD", 50_000)
    source, taken = Fakes(), 0
    places = [Place(n, "", 20_000 * n, 5_000) for n in range(1, 100)]
    for _ in read_ahead(source, [[(0, place) for place in places]], as_is):
        assert source.begun - 5_512 * taken <= 50_000 + 5_512
        taken += 1
        assert source.begun >= min(5_512 * (taken + 6), 99 * 5_512), "and no less than three quarters of that"
    assert taken == len(source.pieces) == 99


def test_a_large_image_is_read_although_it_is_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_AHEAD", 1000)
    places = [Place(n, "", 20_000 * n, 5_000) for n in range(1, 4)]
    assert len(list(read_ahead(Fakes(), [[(0, place)] for place in places], as_is))) == 3


def test_pieces_end_at_their_limit() -> None:
    source = Fakes()
    places = [Place(n, "", 512 + n * 100_512, 100_000) for n in range(40)]
    list(read_ahead(source, [[(0, place) for place in places]], as_is))
    assert max(source.pieces) <= MAX_PIECE
    assert len(source.pieces) == 4


def test_chunks_are_asked_for_as_their_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_IMAGES", 4)
    asked: list[int] = []

    def chunks() -> Iterator[list[Wanted]]:
        for number in range(100):
            asked.append(number)
            yield [(0, Place(0, "", 1024 + 10_000 * n, 10)) for n in range(2)]

    images = read_ahead(Fakes(), chunks(), as_is)
    next(images)
    assert asked == [0, 1]


def test_reads_that_nobody_waits_for_are_cancelled() -> None:
    made: list[FakeRead] = []
    source = Fakes()
    begin: Callable[[int, int, int], Pending] = source.begin

    def remember(shard: int, offset: int, size: int) -> Pending:
        read = begin(shard, offset, size)
        assert isinstance(read, FakeRead)
        made.append(read)
        return read

    source.begin = remember  # type: ignore[method-assign]
    images = read_ahead(source, [[(0, Place(0, "", 1024 + 10_000 * n, 10)) for n in range(9)]], as_is)
    next(images)
    images.close()  # type: ignore[attr-defined]
    assert [read.cancelled for read in made] == [True] * 9

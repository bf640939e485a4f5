"""Images are read from the place where they were found: by the header in front of each, in threads and in forked processes."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import storage
from data.errors import DataError
from data.shards.image_reader import ImageReader, Place, places_in
from data.shards.index import build_index
from data.shards.tar_header import MAX_FRONT, is_in_front
from tests.data.shards.test_identity import IMAGES, tar_bytes, write_shard
from tests.data.shards.test_shards import write_raw_tar

# --- the header in front of an image


def test_an_image_of_another_sample_is_an_error_that_names_both(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", range(20))
    places = places_in(build_index(f"{tmp_path}/x.tar"))
    write_shard(tmp_path / "x.tar", range(19, -1, -1))
    with ImageReader([f"{tmp_path}/x.tar"]) as reader:
        message = (
            r"x\.tar: sample 3 should be '03', with \d+ bytes at byte \d+, but there is '16\.png' with \d+ bytes: the shard "
            r"has changed .* stage=label verify=true"
        )
        for read in (lambda: reader.image(0, places[3]), lambda: reader.images(0, [places[3], places[19]])):
            with pytest.raises(DataError, match=message):
                read()
        with pytest.raises(DataError, match="no tar header"):
            reader.image(0, places[3]._replace(offset=places[3].offset + 7))
        with pytest.raises(DataError, match="sample 0 should be '00'"):
            reader.images(0, places)  # in one piece


SEGMENTS = st.text(
    st.characters(codec="utf-8", exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1, max_size=90
)
NAMES = st.lists(
    st.lists(SEGMENTS, min_size=1, max_size=3).filter(lambda parts: "__MACOSX" not in parts[:-1]).map("/".join),
    min_size=2,
    max_size=6,
    unique=True,
)  # a system folder's files are no samples


@settings(deadline=None, max_examples=60)
@given(NAMES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.data())
def test_every_name_that_a_tar_can_hold_is_recognized_and_no_other(
    names: list[str], tar_format: int, data: st.DataObject
) -> None:
    """Names of any length and script, in each of the formats; then the same members in another order."""
    try:
        before = archive_of([f"{name}.png" for name in names], tar_format)
    except ValueError:
        return  # ustar cannot hold all names
    order = data.draw(st.permutations(names))
    after = archive_of([f"{name}.png" for name in order], tar_format)
    storage.write_bytes("memory://test-shard-names/x.tar", before)
    places = places_in(build_index("memory://test-shard-names/x.tar"))
    assert [place.key for place in places] == names
    for place in places:
        content = before[place.offset : place.offset + place.size]
        assert is_in_front(before[max(0, place.offset - MAX_FRONT) : place.offset], place.key, place.size)
        with ImageReader(["memory://test-shard-names/x.tar"]) as reader:
            assert reader.image(0, place) == content == image_of(f"{place.key}.png")
        if is_in_front(after[max(0, place.offset - MAX_FRONT) : place.offset], place.key, place.size):
            assert after[place.offset : place.offset + place.size] == content


def image_of(name: str) -> bytes:
    """700 bytes that belong to a name alone."""
    return (f"{name} ".encode() * 700)[:700]


def archive_of(names: Sequence[str], tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(image_of(name)))
    return buffer.getvalue()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=4 * 512), st.text(max_size=8), st.integers(0, 1 << 40))
def test_no_bytes_in_front_of_an_image_raise(front: bytes, key: str, size: int) -> None:
    assert is_in_front(front, key, size) in (True, False)


def test_damaged_headers_in_front_of_an_image_raise_nothing_but_that_it_is_another(tmp_path: Path) -> None:
    content = archive_of(["x" * 150 + ".png", "ä.png"], tarfile.PAX_FORMAT)
    storage.write_bytes(f"{tmp_path}/x.tar", content)
    places = places_in(build_index(f"{tmp_path}/x.tar"))
    generator = np.random.default_rng(0)
    with ImageReader([f"{tmp_path}/x.tar"]) as reader:
        for _ in range(500):
            damaged = bytearray(content)
            damaged[int(generator.integers(0, places[1].offset))] = int(generator.integers(0, 256))
            (tmp_path / "x.tar").write_bytes(damaged)
            for place in places:
                with suppress(DataError):
                    assert reader.image(0, place) == bytes(damaged)[place.offset : place.offset + place.size]


# --- one reader in threads and in forked processes


@pytest.fixture
def many(tmp_path: Path) -> tuple[list[str], list[tuple[int, Place, bytes]]]:
    """Shards of random images, and each image with its place."""
    random, images = np.random.default_rng(0), []
    urls = [f"{tmp_path}/{number:02d}.tar" for number in range(70)]  # more than are kept open
    for position, url in enumerate(urls):
        contents = [random.bytes(int(size)) for size in random.integers(1, 3000, 8)]
        write_raw_tar(Path(url), [(f"{n}.png", content) for n, content in enumerate(contents)])
        places = places_in(build_index(url))
        images += [(position, place, content) for place, content in zip(places, contents, strict=True)]
    return urls, images


def read_many_times(reader: ImageReader, images: list[tuple[int, Place, bytes]], seed: int) -> bool:
    order = np.random.default_rng(seed).integers(0, len(images), 1500)
    return all(reader.image(images[i][0], images[i][1]) == images[i][2] for i in order)


def _read_in_child(reader: ImageReader, images: list[tuple[int, Place, bytes]], seed: int) -> None:
    os._exit(0 if read_many_times(reader, images, seed) else 1)


def test_forked_processes_read_through_a_reader_that_was_used_before(
    many: tuple[list[str], list[tuple[int, Place, bytes]]],
) -> None:
    urls, images = many
    context = multiprocessing.get_context("fork")
    with ImageReader(urls) as reader:
        assert read_many_times(reader, images[:8], 0)  # opens files, whose positions a fork would share
        children = [context.Process(target=_read_in_child, args=(reader, images[:8], seed)) for seed in range(4)]
        for child in children:
            child.start()
        assert read_many_times(reader, images[:8], 5)
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4


def test_threads_read_through_one_reader_while_files_are_closed(
    many: tuple[list[str], list[tuple[int, Place, bytes]]],
) -> None:
    urls, images = many
    results: list[bool] = []
    with ImageReader(urls) as reader:
        threads = [
            threading.Thread(target=lambda seed=seed: results.append(read_many_times(reader, images, seed)))
            for seed in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * 6


def test_a_reader_keeps_few_files_open_and_closes_all(many: tuple[list[str], list[tuple[int, Place, bytes]]]) -> None:
    def num_open() -> int:
        return sum(os.path.realpath(name) in paths for name in Path("/proc/self/fd").iterdir())

    urls, images = many
    paths = {os.path.realpath(url) for url in urls}
    with ImageReader(urls) as reader:
        assert read_many_times(reader, images, 0)
        assert 0 < num_open() <= 64
    assert num_open() == 0


def test_a_forked_process_opens_files_of_a_store_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections and their positions are the parent's."""
    opened: list[str] = []
    original = storage.open_read

    def counted(url: str) -> BinaryIO:
        opened.append(url)
        return original(url)

    monkeypatch.setattr(storage, "open_read", counted)
    storage.write_bytes("memory://test-fork/x.tar", tar_bytes(range(20)))
    places = places_in(build_index("memory://test-fork/x.tar"))
    opened.clear()
    reader = ImageReader(["memory://test-fork/x.tar"])
    for _ in range(2):
        assert reader.image(0, places[3]) == IMAGES[3]
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a child
    assert reader.image(0, places[4]) == IMAGES[4]
    assert len(opened) == 2

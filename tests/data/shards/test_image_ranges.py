"""Images as ranges of files are the images that `ImageReader` reads, and refused where it refuses them."""

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from data import storage
from data.errors import DataError
from data.shards.image_ranges import FileRange, ImageRanges
from data.shards.image_reader import ImageReader, Place, places_in
from data.shards.split import Split, open_split
from data.shards.write import write_shard
from tests.conftest import WriteDigits


@pytest.fixture
def split(tmp_path: Path, write_digits: WriteDigits) -> Split:
    write_digits(tmp_path / "shards", 0, 60, labeled=False, per_shard=30)
    return open_split(f"{tmp_path}/shards/*.tar", str(tmp_path / "index"))


def as_bytes(part: bytes | FileRange) -> bytes:
    return part.read() if isinstance(part, FileRange) else part


def read(images: ImageRanges, shard: int, places: Sequence[Place]) -> list[bytes]:
    return [as_bytes(image) for image in images.images(shard, places)]


def test_any_places_of_any_shard_give_the_same_images(split: Split) -> None:
    urls, generator = [shard.url for shard in split.shards], np.random.default_rng(0)
    places = [places_in(shard.index()) for shard in split.shards]
    with ImageReader(urls) as reader, closing(ImageRanges(urls)) as images:
        for _ in range(50):
            shard = int(generator.integers(2))
            chosen = sorted(generator.choice(30, generator.integers(1, 30), replace=False))
            wanted = [places[shard][at] for at in chosen]
            assert read(images, shard, wanted) == reader.images(shard, wanted)


def test_an_image_of_another_sample_and_a_shard_cut_short_are_refused(split: Split) -> None:
    url = split.shards[0].url
    places = places_in(split.shards[0].index())
    other = places[3]._replace(key="other")
    with closing(ImageRanges([url])) as images:
        with pytest.raises(DataError, match="sample 3 should be 'other'"):
            images.images(0, [places[2], other, places[4]])
        with Path(url).open("r+b") as file:
            file.truncate(places[5].end - 1)
        with pytest.raises(DataError, match="cut short"):
            images.images(0, places[:6])


def test_shards_in_a_store_are_read_too(split: Split) -> None:
    memory = "memory://views/shard.tar"
    storage.write_bytes(memory, Path(split.shards[0].url).read_bytes())
    places = places_in(split.shards[0].index())
    with closing(ImageRanges([split.shards[0].url, memory])) as images:
        assert read(images, 1, places) == read(images, 0, places)


def test_images_of_one_shard_outlive_those_of_the_next(split: Split) -> None:
    places = [places_in(shard.index()) for shard in split.shards]
    with closing(ImageRanges([shard.url for shard in split.shards])) as images:
        one = images.images(0, places[0])
        before = [as_bytes(image) for image in one]
        images.images(1, places[1])
        assert [as_bytes(image) for image in one] == before


def test_closing_closes_the_shards_that_were_opened(split: Split) -> None:
    images = ImageRanges([shard.url for shard in split.shards])
    found = [images.images(at, places_in(shard.index())[:1])[0] for at, shard in enumerate(split.shards)]
    descriptors = [image.descriptor for image in found if isinstance(image, FileRange)]
    assert len(set(descriptors)) == 2
    assert all(os.fstat(descriptor) for descriptor in descriptors)
    images.close()
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_local_image_is_not_read_but_named_and_sliced_like_bytes(split: Split) -> None:
    place = places_in(split.shards[0].index())[0]
    with closing(ImageRanges([split.shards[0].url])) as images:
        (image,) = images.images(0, [place])
        assert isinstance(image, FileRange)
        content = image.read()
        assert len(image) == len(content) == place.size
        for part in (slice(3, 10), slice(5, None), slice(None, 7), slice(9, 4), slice(0, 10**9)):
            assert image[part].read() == content[part]


def test_every_byte_of_a_large_image_is_asked_for_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reads 128 KiB for one advice, and ignores the rest of it."""
    write_shard(str(tmp_path / "large.tar"), [("a", {"jpg": bytes(300_000)}), ("b", {"jpg": bytes(10)})])
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: advised.append((start, size)))
    shard = open_split(f"{tmp_path}/large.tar", str(tmp_path / "index")).shards[0]
    places = places_in(shard.index())
    with closing(ImageRanges([shard.url])) as images:
        images.images(0, places)
    assert all(size <= 128 << 10 for _, size in advised)
    asked = {byte for start, size in advised for byte in range(start, start + size)}
    assert asked >= {byte for place in places for byte in range(place.start, place.end)}

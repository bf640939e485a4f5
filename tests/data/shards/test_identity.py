"""A shard that changed is noticed: by its listing, by force=true and by training (by each image's header: test_image_reader.py)."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import storage
from data.errors import DataError
from data.shards import split as manifest
from data.shards.image_reader import ImageReader, places_in
from data.shards.split import check_packed, open_split
from data.storage import remote
from pipeline.core.schema import TrainConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import labeled_stream
from tests.conftest import WriteDigits
from tests.data.shards.test_shards import write_raw_tar
from tests.s3_server import FaultyS3

KEYS = [f"{number:02d}" for number in range(20)]


def flat_png(number: int) -> bytes:
    """An 8 × 8 image whose file has the same size for every number: nothing in it is compressed."""
    buffer = io.BytesIO()
    image = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


IMAGES = [flat_png(number) for number in range(20)]


def write_shard(path: Path, order: Sequence[int], labels: Sequence[int] | None = None, later: int = 0) -> None:
    """Image n under the key n, in this order. `later`: seconds by which the file is younger than it would be."""
    members = []
    for number in order:
        members.append((f"{KEYS[number]}.png", IMAGES[number]))
        if labels is not None:
            members.append((f"{KEYS[number]}.cls", str(labels[number]).encode()))
    write_raw_tar(path, members)
    make_younger(path, later)


def make_younger(path: Path, seconds: int) -> None:
    """Another modification time, whatever the clock's resolution."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + seconds * 10**9))


def read_all(url: str, index_folder: str) -> dict[str, bytes]:
    """Image by key, by the index."""
    (shard,) = open_split(url, index_folder).shards
    with ImageReader([url]) as reader:
        return {place.key: reader.image(0, place) for place in places_in(shard.index())}


RIGHT = dict(zip(KEYS, IMAGES, strict=True))


def test_a_shard_of_equal_size_and_another_modification_time_is_indexed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, folder = f"{tmp_path}/x.tar", str(tmp_path / "index")
    write_shard(tmp_path / "x.tar", range(20))
    before = open_split(url, folder)
    assert read_all(url, folder) == RIGHT
    write_shard(tmp_path / "x.tar", range(19, -1, -1), later=10)
    assert Path(url).stat().st_size == before.shards[0].bytes
    assert not caplog.messages
    after = open_split(url, folder)
    assert after.digest() != before.digest()
    (line,) = caplog.messages
    assert re.match(r"index: 1 of 1 shards have another size, modification time or ETag .*x\.tar", line)
    assert read_all(url, folder) == RIGHT
    assert len(caplog.messages) == 1, "it is known now"


def test_a_copy_with_another_modification_time_has_the_same_digest_and_is_read_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", range(20))
    before = open_split(f"{tmp_path}/*.tar", str(tmp_path / "index"))
    make_younger(tmp_path / "b.tar", 10)
    assert open_split(f"{tmp_path}/*.tar", str(tmp_path / "index")) == before
    assert [message[:25] for message in caplog.messages] == ["index: 1 of 2 shards have"]
    monkeypatch.setattr(manifest, "build_index", lambda url: pytest.fail(f"indexed {url} again"))
    assert open_split(f"{tmp_path}/*.tar", str(tmp_path / "index")) == before


def forget_versions(folder: Path) -> None:
    """Make the indexes those of an earlier version of this project."""
    known = json.loads((folder / "shards.json").read_text())
    del known["versions"]
    (folder / "shards.json").write_text(json.dumps(known))
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        metadata = {name: value for name, value in table.schema.metadata.items() if name != b"shard_version"}
        pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("lost", [False, True], ids=["shards.json", "indexes alone"])
def test_an_index_without_a_modification_time_is_kept_with_one_line_in_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    folder = tmp_path / "index"
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", range(20))
    before = open_split(f"{tmp_path}/*.tar", str(folder))
    forget_versions(folder)
    if lost:
        (folder / "shards.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "build_index", lambda url: pytest.fail(f"read {url} unasked"))
        assert open_split(f"{tmp_path}/*.tar", str(folder)) == before
        assert open_split(f"{tmp_path}/a.tar", str(folder)).shards == before.shards[:1]
    (line,) = caplog.messages
    assert "2 shards were indexed by an earlier version" in line
    assert "verify=true" in line
    write_shard(tmp_path / "a.tar", range(19, -1, -1), later=10)
    changed = open_split(f"{tmp_path}/*.tar", str(folder), reindex=True)
    assert changed.shards[0] != before.shards[0]
    assert changed.shards[1] == before.shards[1]
    write_shard(tmp_path / "a.tar", range(20), later=20)
    assert open_split(f"{tmp_path}/*.tar", str(folder)) == before, "it has a modification time now"


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"[]",
        b"",
        b"{}",
        b'{"shards"',
        b'{"shards": {"x": [1]}}',
        b'{"shards": {"x": null}}',
        b"\xff\xfe",
        b'{"shards": []}',
    ],
)
def test_a_damaged_list_of_shards_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    write_shard(tmp_path / "x.tar", range(20))
    before = open_split(f"{tmp_path}/x.tar", str(tmp_path / "index"))
    (tmp_path / "index/shards.json").write_bytes(content)
    monkeypatch.setattr(manifest, "build_index", lambda url: pytest.fail(f"indexed {url} again"))
    assert open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")) == before
    assert json.loads((tmp_path / "index/shards.json").read_text())["shards"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 500])
def test_a_damaged_index_that_nothing_else_knows_is_made_again(tmp_path: Path, content: bytes) -> None:
    write_shard(tmp_path / "x.tar", range(20))
    before = open_split(f"{tmp_path}/x.tar", str(tmp_path / "index"))
    (tmp_path / "index/shards.json").unlink()
    Path(before.shards[0].index_url).write_bytes(content)
    assert open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")) == before
    assert before.shards[0].index().num_rows == 20


def test_a_run_that_cannot_be_written_to_opens_with_shards_that_were_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(url: str, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), url)

    write_shard(tmp_path / "x.tar", range(20))
    before = open_split(f"{tmp_path}/x.tar", str(tmp_path / "index"))
    make_younger(tmp_path / "x.tar", 10)
    monkeypatch.setattr(storage, "writing", refuse)
    assert open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")) == before
    assert "cannot be written" in caplog.messages[-1]
    write_shard(tmp_path / "x.tar", range(19, -1, -1), later=20)
    with pytest.raises(OSError, match="Read-only"):
        open_split(f"{tmp_path}/x.tar", str(tmp_path / "index"))


def test_shards_are_told_by_one_listing_of_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_shard(tmp_path / f"{number}.tar", [number])
    before = open_split(f"{tmp_path}/*.tar", str(tmp_path / "index"))
    listed: list[str] = []
    original = storage.list_files

    def counted(url: str) -> dict[str, storage.FileInfo]:
        listed.append(url)
        return original(url)

    monkeypatch.setattr(storage, "list_files", counted)
    monkeypatch.setattr(storage, "file_info", lambda url: pytest.fail(f"asked for {url} alone"))
    assert open_split(f"{tmp_path}/*.tar", str(tmp_path / "index")) == before
    assert listed == [str(tmp_path)]


def tar_bytes(order: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in order:
            info = tarfile.TarInfo(f"{KEYS[number]}.png")
            info.size = len(IMAGES[number])
            tar.addfile(info, io.BytesIO(IMAGES[number]))
    return buffer.getvalue()


def test_an_object_of_equal_size_and_another_tag_is_indexed_again_and_a_copy_is_not(
    s3: FaultyS3, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, index = f"{folder}/x.tar", str(tmp_path / "index")
    storage.write_bytes(url, tar_bytes(range(20)))
    before = open_split(url, index)
    assert storage.file_info(url) == storage.list_files(folder)["x.tar"]
    storage.write_bytes(url, tar_bytes(range(20)))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "build_index", lambda url: pytest.fail(f"read {url}: its ETag is the same"))
        assert open_split(url, index) == before
    storage.write_bytes(url, tar_bytes(range(19, -1, -1)))
    assert open_split(url, index).digest() != before.digest()
    assert read_all(url, index) == RIGHT


def test_an_object_in_another_kind_of_store_is_told_by_its_time(tmp_path: Path) -> None:
    url, index = "memory://test-shard-identity/x.tar", str(tmp_path / "index")
    storage.write_bytes(url, tar_bytes(range(20)))
    before = open_split(url, index)
    assert storage.file_info(url) == storage.list_files("memory://test-shard-identity")["x.tar"]
    storage.write_bytes(url, tar_bytes(range(19, -1, -1)))
    assert open_split(url, index).digest() != before.digest()


@pytest.mark.parametrize(
    ("found", "version"),
    [
        ({"ETag": '"abc"', "LastModified": "later"}, "abc"),
        ({"etag": "abc", "updated": "later"}, "abc"),
        ({"etag": None, "mtime": 12}, "12"),
        ({"created": 1.5}, "1.500000"),
        ({}, ""),
    ],
)
def test_a_version_is_the_first_of_what_a_store_tells(found: dict[str, Any], version: str) -> None:
    assert remote.file_info_of(found | {"size": 7}) == (7, version)


class _TaggedFile(BaseHTTPRequestHandler):
    """One file, in ranges, with a tag that may be weak."""

    content, tag = b"", ""

    def do_GET(self) -> None:
        if not self.path.endswith(".tar"):
            self.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2])) if match else (0, len(self.content) - 1)
        part = self.content[first : last + 1]
        self.send_response(206 if match else 200)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(part)))
        if self.tag:
            self.send_header("ETag", self.tag)
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _TaggedFile) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/x.tar"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("tags", [('"one"', '"two"'), ('W/"one"', 'W/"two"')])
def test_a_file_on_a_web_server_is_told_by_its_tag(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: tuple[str, str]
) -> None:
    monkeypatch.setattr(_TaggedFile, "content", tar_bytes(range(20)))
    monkeypatch.setattr(_TaggedFile, "tag", tags[0])
    before = open_split(web, str(tmp_path / "index"))
    monkeypatch.setattr(_TaggedFile, "content", tar_bytes(range(19, -1, -1)))
    assert open_split(web, str(tmp_path / "index")) == before, (
        "nothing tells it, but for the headers in front of the images"
    )
    with ImageReader([web]) as reader, pytest.raises(DataError, match="sample 0 should be '00'"):
        reader.image(0, places_in(before.shards[0].index())[0])
    monkeypatch.setattr(_TaggedFile, "tag", tags[1])
    assert open_split(web, str(tmp_path / "index")).digest() != before.digest()
    assert read_all(web, str(tmp_path / "index")) == RIGHT


# --- who reads images


def test_no_stage_reads_bytes_of_a_shard_without_looking_whose_they_are() -> None:
    root = Path(__file__).parents[3]
    for package in ("data", "pipeline", "teacher", "student"):
        for path in (root / package).rglob("*.py"):
            if path.parent.name != "storage" and path.name not in (
                "image_reader.py",
                "items.py",
            ):  # items: files that are sent as they are
                assert not re.search(r"(?<!labeler\.)\breader\.read\(|read_bytes\b[^)]*\boffset", path.read_text()), (
                    path
                )


def test_training_stops_at_a_labeled_shard_that_changed_under_it(tmp_path: Path) -> None:
    labels = [number % 10 for number in range(20)]
    write_shard(tmp_path / "x.tar", range(20), labels)
    stream = labeled_stream(open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")), 20)
    config = TrainConfig(model="resnetrs26", image_size=16, loader_workers=0)
    assert len(TrainBatches([stream], config, 10, seed=0)[0].images) == 20
    write_shard(tmp_path / "x.tar", range(19, -1, -1), labels)
    with pytest.raises(DataError, match=r"x\.tar: sample \d+ should be '\d\d'.*changed since it was indexed"):
        TrainBatches([stream], config, 10, seed=0)[0]
    open_split(f"{tmp_path}/x.tar", str(tmp_path / "index"), reindex=True)
    with pytest.raises(DataError, match="not the index that this stage began with"):
        TrainBatches([stream], config, 10, seed=0)[0]


def test_a_packed_shard_with_other_labels_is_found_by_its_headers(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "labeled", 0, 40)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    check_packed(split)
    swap_labels(tmp_path / "labeled/labeled-000000.tar")
    assert open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index")) == split
    with pytest.raises(DataError, match=r"labeled-000000\.tar: other samples or labels than when it was packed"):
        check_packed(split)


def swap_labels(path: Path) -> None:
    """Every class d becomes 9 − d, in place."""
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".cls"):
                content[member.offset_data] = ord("0") + 9 - int(chr(content[member.offset_data]))
    path.write_bytes(content)

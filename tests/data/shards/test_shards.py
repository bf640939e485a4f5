"""Shards, manifests and indexes: deterministic, checked, and honest about damage."""

import hashlib
import io
import json
import shutil
import tarfile
import threading
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import storage
from data.errors import DataError
from data.shards import split as manifest
from data.shards.image_reader import ImageReader, check_labeled
from data.shards.index import build_index
from data.shards.split import Manifest, open_split
from data.shards.write import write_shards
from data.tables import write_table
from tests.conftest import WriteDigits


def write_raw_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def problems(path: Path) -> list[str]:
    return build_index(str(path)).column("problem").to_pylist()


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, write_digits: WriteDigits) -> None:
    for name in ("a", "b"):
        write_digits(tmp_path / name / "labeled", 0, 250)
    files = [
        {f.name: f.read_bytes() for f in sorted((tmp_path / name / "labeled").glob("*.tar"))} for name in ("a", "b")
    ]
    assert files[0] == files[1]
    assert list(files[0]) == [f"labeled-{n:06d}.tar" for n in range(3)]


def test_the_manifest_tells_counts_bytes_and_digests(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "labeled", 0, 250)
    recorded = Manifest.model_validate_json((tmp_path / "labeled/manifest.json").read_bytes())
    assert [shard.num_samples for shard in recorded.shards] == [100, 100, 50]
    for shard in recorded.shards:
        content = (tmp_path / "labeled" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_the_index_leads_to_every_image_and_label(tmp_path: Path, write_digits: WriteDigits) -> None:
    labels = write_digits(tmp_path / "labeled", 0, 150)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    found = []
    with ImageReader([shard.url for shard in split.shards]) as reader:
        for position, shard in enumerate(split.shards):
            for row in shard.index().to_pylist():
                assert reader.read(position, row["offset"], row["size"]).startswith(b"\x89PNG")
                found.append(row["label"])
    assert found == labels
    assert split.class_names is not None
    assert split.class_names[3] == "digit_3"


def test_foreign_shards_are_indexed_once_and_the_index_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw_tar(
        tmp_path / "foreign.tar", [("x/a.JPG", b"1"), ("x/a.json", b"{}"), ("b.v2.png", b"22"), ("b.cls", b"7")]
    )
    split = open_split(f"{tmp_path}/foreign.tar", str(tmp_path / "index"))
    rows = split.shards[0].index().to_pylist()
    assert [(row["key"], row["extension"], row["size"], row["label"]) for row in rows] == [
        ("x/a", "jpg", 1, None),
        ("b", "png", 2, 7),
    ]
    monkeypatch.setattr(manifest, "build_index", lambda url: pytest.fail(f"indexed {url} again"))
    assert open_split(f"{tmp_path}/foreign.tar", str(tmp_path / "index")) == split


def test_known_foreign_shards_are_opened_without_reading_their_indexes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write_raw_tar(tmp_path / f"foreign-{number}.tar", [("a.jpg", b"1"), ("a.jpg", b"2")])
    before = open_split(f"{tmp_path}/foreign-*.tar", str(tmp_path / "index"))
    for module in ("index", "foreign_shards"):
        monkeypatch.setattr(f"data.shards.{module}.read_table", lambda *_, **__: pytest.fail("an index was read"))
    assert open_split(f"{tmp_path}/foreign-*.tar", str(tmp_path / "index")) == before


def test_a_lost_index_of_a_foreign_shard_is_made_again(tmp_path: Path) -> None:
    write_raw_tar(tmp_path / "foreign.tar", [("a.jpg", b"1")])
    before = open_split(f"{tmp_path}/foreign.tar", str(tmp_path / "index"))
    Path(before.shards[0].index_url).unlink()
    after = open_split(f"{tmp_path}/foreign.tar", str(tmp_path / "index"))
    assert after == before
    assert after.shards[0].index().num_rows == 1


def test_a_foreign_shard_that_changed_is_indexed_again(tmp_path: Path) -> None:
    write_raw_tar(tmp_path / "foreign.tar", [("a.jpg", b"1")])
    before = open_split(f"{tmp_path}/foreign.tar", str(tmp_path / "index"))
    write_raw_tar(tmp_path / "foreign.tar", [(f"{n}.jpg", b"1") for n in range(30)])
    after = open_split(f"{tmp_path}/foreign.tar", str(tmp_path / "index"))
    assert (before.num_samples, after.num_samples) == (1, 30)


def test_what_is_wrong_with_a_sample_is_in_its_row(tmp_path: Path) -> None:
    members = [("a.cls", b"1"), ("b.jpg", b""), ("c.jpg", b"x"), ("c.cls", b"one"), ("d.png", b"x"), ("d.png", b"y")]
    write_raw_tar(tmp_path / "odd.tar", members)
    assert problems(tmp_path / "odd.tar") == [
        "no image member (jpg, jpeg, png, webp)",
        "image member is empty",
        "",  # what is no class index is no label, and no fault of the image
        "",
        "",  # a duplicate key is a sample of its own
    ]


@pytest.mark.parametrize("cut", [512 * 2, 512 * 2 + 100, 512 * 3 + 100, 512 * 4])
def test_a_tar_that_ends_too_early_keeps_its_samples_and_says_so(tmp_path: Path, cut: int) -> None:
    write_raw_tar(tmp_path / "cut.tar", [("a.jpg", b"x" * 512), ("b.jpg", b"y" * 512)])
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:cut])
    found = problems(tmp_path / "cut.tar")
    assert found[0] == ""
    assert found[-1].startswith("truncated or damaged tar")
    assert problems_of(whole, tmp_path) == ["", ""]


def problems_of(content: bytes, folder: Path) -> list[str]:
    (folder / "whole.tar").write_bytes(content)
    return problems(folder / "whole.tar")


def test_a_packed_shard_that_is_missing_or_cut_short_is_an_error_that_names_it(
    tmp_path: Path, write_digits: WriteDigits
) -> None:
    write_digits(tmp_path / "labeled", 0, 150)
    shard = tmp_path / "labeled/labeled-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(DataError, match=r"labeled-000001\.tar: .* bytes, but its manifest says"):
        open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    with pytest.raises(DataError, match=r"labeled-000009\.tar: no such shard"):
        open_split(f"{tmp_path}/labeled/labeled-000009.tar", str(tmp_path / "index"))


def test_a_shard_that_the_manifest_beside_it_does_not_list_is_refused(
    tmp_path: Path, write_digits: WriteDigits
) -> None:
    write_digits(tmp_path / "unlabeled", 0, 50, labeled=False)
    write_raw_tar(tmp_path / "unlabeled/more.tar", [("a.jpg", b"1")])
    with pytest.raises(DataError, match=r"more\.tar: not in \S+unlabeled/manifest\.json.*a folder of its own"):
        open_split(f"{tmp_path}/unlabeled/*.tar", str(tmp_path / "index"))


def test_foreign_shards_in_a_folder_of_their_own_join_packed_ones(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "unlabeled", 0, 50, labeled=False)
    write_raw_tar(tmp_path / "more/more.tar", [("a.jpg", b"1")])
    split = open_split([f"{tmp_path}/unlabeled/*.tar", f"{tmp_path}/more/*.tar"], str(tmp_path / "index"))
    assert split.num_samples == 51


def test_two_shards_with_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_raw_tar(tmp_path / folder / "x.tar", [("a.jpg", b"1")])
    with pytest.raises(DataError, match="same file name"):
        open_split(f"{tmp_path}/*/x.tar", str(tmp_path / "index"))


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "ä", "x" * 97])
def test_keys_that_would_not_read_back_are_not_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        write_shards([(key, {"png": b"1"})], str(tmp_path / "out"), "x", 10)


def test_a_duplicate_key_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' appears twice"):
        write_shards([("a", {"png": b"1"})] * 2, str(tmp_path / "out"), "x", 10)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"1"), ("a.cls", b"10")], "label 10 is out of range; expected 0 to 9"),
        ([("a.jpg", b"1")], "no .cls member"),
        ([("a.jpg", b"1"), ("a.cls", b"cat\n")], r"\.cls holds 'cat'; expected a class index \(0, 1, …\)"),
        ([("a.jpg", b"1"), ("a.cls", b"-1")], r"\.cls holds '-1'; expected a class index"),
        ([("a.jpg", b"1"), ("a.cls", b"3.0")], r"\.cls holds '3\.0'; expected a class index"),
        ([("a.jpg", b"1"), ("a.cls", b"")], r"\.cls holds ''; expected a class index"),
        ([("a.jpg", b"1"), ("a.cls", b"9999999999")], r"\.cls holds '9999999999'; expected a class index"),
        ([("a.cls", b"1")], "no image member"),
    ],
)
def test_labeled_shards_must_be_right(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_raw_tar(tmp_path / "x.tar", members)
    split = open_split(f"{tmp_path}/x.tar", str(tmp_path / "index"))
    with pytest.raises(DataError, match=rf"x\.tar, sample 0 \(key 'a'\): {message}"):
        check_labeled(split, 10)


def test_a_damaged_index_is_found(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "labeled", 0, 50)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    table = split.shards[0].index()
    write_table(split.shards[0].index_url, table.slice(1))
    with pytest.raises(DataError, match="damaged index"):
        split.shards[0].index()


@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_shards_open_with_webdataset_itself(tmp_path: Path, write_digits: WriteDigits) -> None:
    import webdataset

    labels = write_digits(tmp_path / "labeled", 0, 60)
    shards = storage.expand(f"{tmp_path}/labeled/*.tar")
    read = [int(sample["cls"]) for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    assert read == labels


@pytest.mark.parametrize(
    "content",
    [
        {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": 1}]},
        {"name": "An app", "icons": [], "manifest_version": 3},
        {"shards": [{"filename": "a.tar"}]},
        [{"file": "a.tar"}],
        {},
    ],
)
def test_another_programs_manifest_is_not_used_and_its_shards_are_indexed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: object
) -> None:
    write_raw_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    for _ in range(2):
        assert open_split(f"{tmp_path}/a.tar", str(tmp_path / "kept")).num_samples == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/manifest.json is another program's and is not used; the shards beside it are indexed"
    ]
    assert json.loads((tmp_path / "manifest.json").read_text()) == content


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"shards": 3}'])
def test_a_manifest_of_ours_that_is_damaged_is_named_and_nobody_is_told_to_delete_it(
    tmp_path: Path, write_digits: WriteDigits, content: bytes
) -> None:
    write_digits(tmp_path / "labeled", 0, 20)
    (tmp_path / "labeled/manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: damaged.*restore it, or pack these shards again") as caught:
        open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    assert "delete" not in str(caught.value)


def test_no_flipped_bit_makes_a_manifest_of_ours_another_programs(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "labeled", 0, 20)
    shutil.rmtree(tmp_path / "labeled/index")  # where it tells by itself
    path = tmp_path / "labeled/manifest.json"
    content = path.read_bytes()
    for bit in range(0, len(content) * 8, 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with suppress(DataError):
            assert manifest._read_manifest(str(tmp_path / "labeled")) is not None


def test_a_manifest_that_may_not_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    """HTTP 403, as stores answer without the permission to list."""

    class Refusing(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403 if self.path.endswith("manifest.json") else 404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/shards"
        with pytest.raises(storage.StorageError, match=r"manifest\.json: refused \(403"):
            manifest._read_manifest(url)
        server.shutdown()

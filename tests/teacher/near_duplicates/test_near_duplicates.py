"""Copies of held-out images are found among the unlabeled ones, once, and get no copies in a selection."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data import fashion_mnist, storage
from data.errors import DataError
from data.images.decode import Pixels, decode
from data.images.held_out_hashes import HeldOutHashes, held_out_row, is_outdated, read_held_out_hashes
from data.images.similarity import SIDE, chroma, image_hash, mirrored, normalized, thumbnail
from data.labels.label_files import LabeledShard, read_labels
from data.packing import pack_folder
from data.tables import write_table
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import done_record
from teacher.near_duplicates.search import Matches, NearDuplicateSearch, ShardResult
from teacher.near_duplicates.stage import SearchResult, find_near_duplicates, read_listing
from teacher.near_duplicates.thumbnails import Thumbnails
from teacher.selection.stage import select
from tests.copies import COPIES, EDITS, flipped, jpeg, photos, write_held_out, write_labeled_shards
from tests.s3_server import FaultyS3


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOutHashes:
    return read_held_out_hashes([write_held_out(tmp_path_factory.mktemp("held_out"), photos("china.jpg"))])


def matches(search: NearDuplicateSearch, images: list[Pixels]) -> Matches:
    """What a search says of images that are all there."""
    hashes = np.array([image_hash(image) for image in images], np.uint64)
    proposed = search.propose(hashes)
    pictures = thumbnails([images[row] for row in proposed])
    found = search.confirm(hashes[proposed], pictures, np.ones(len(proposed), bool))
    return replace(found, row=proposed[found.row])


def thumbnails(images: list[Pixels]) -> Thumbnails:
    grey = np.array([thumbnail(image) for image in images]).reshape(-1, SIDE, SIDE)
    colours = np.array([chroma(image) for image in images], np.int8).reshape(-1, 2, SIDE // 2, SIDE // 2)
    return Thumbnails(grey, colours, np.ones(len(images), bool))


@pytest.mark.parametrize("kind", [*COPIES, *EDITS])
def test_copies_of_held_out_photos_are_all_found_with_the_photo_that_they_copy(
    held_out: HeldOutHashes, kind: str
) -> None:
    copies = [decode((COPIES | EDITS)[kind](photo)) for photo in photos("china.jpg")]
    found = matches(NearDuplicateSearch(held_out, 0.99), copies)
    assert found.row.tolist() == found.image.tolist() == list(range(len(copies)))
    assert found.flipped.tolist() == ["flipped" in kind] * len(copies)


def test_other_photos_are_not_found(held_out: HeldOutHashes) -> None:
    others = [*photos("flower.jpg"), *map(flipped, photos("flower.jpg"))]
    assert not len(matches(NearDuplicateSearch(held_out, 0.99), others).row)


def test_other_photos_that_are_proposed_are_rejected_by_their_thumbnails(held_out: HeldOutHashes) -> None:
    others = [*photos("flower.jpg"), *photos("china.jpg")[:1]]
    everything = NearDuplicateSearch(held_out, 0.99, max_distance=64)
    hashes = np.repeat(held_out.hashes[:1], len(others))  # all proposed for the first held-out photo
    assert len(everything.propose(hashes)) == len(others)
    assert everything.confirm(hashes, thumbnails(others), np.ones(len(others), bool)).row.tolist() == [len(others) - 1]


def test_of_several_held_out_images_the_most_alike_is_named(held_out: HeldOutHashes) -> None:
    search = NearDuplicateSearch(held_out, max_distance=64, min_correlation=-1)
    found = matches(search, photos("china.jpg")[::-1])
    assert found.image.tolist() == list(range(len(found.row)))[::-1]
    np.testing.assert_allclose(found.correlation, 1, atol=1e-5)


def test_a_thumbnail_is_the_mean_of_areas_of_the_whole_image_in_grey() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (4 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
    grey = image @ np.array([0.299, 0.587, 0.114])
    expected = grey.reshape(SIDE, 4, SIDE, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(thumbnail(image), expected, atol=2)


def test_the_product_of_normalized_thumbnails_is_their_correlation() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
    vectors = normalized(pictures)
    expected = np.corrcoef(pictures.reshape(3, -1))
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-5)
    assert (mirrored(mirrored(pictures)) == pictures).all()
    flat = normalized(np.stack([np.zeros((SIDE, SIDE), np.uint8), np.full((SIDE, SIDE), 9, np.uint8), pictures[0]]))
    np.testing.assert_allclose(flat @ flat.T, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-5)


class Corpus:
    """Held-out photos in two files, and labels of 10 others, of the `COPIES` of one photo and of a second one's copy."""

    def __init__(self, folder: Path) -> None:
        self.layout, self.shards = Layout(str(folder / "run")), folder / "unlabeled"
        china = photos("china.jpg")
        files = [write_held_out(folder / "validation", china[:7]), write_held_out(folder / "test", china[7:])]
        self.images = [jpeg(photo) for photo in photos("flower.jpg")]
        self.images += [make(china[9]) for make in COPIES.values()] + [COPIES["quality 50"](china[3])]
        write_labeled_shards(self.shards, self.layout, self.images)
        self.words = [
            f"run_dir={folder}/run",
            f"data.unlabeled=[{self.shards}/*.tar]",
            f"data.held_out_hashes=[{','.join(files)}]",
        ]

    def config(self, *words: str) -> Config:
        return load_config(None, [*self.words, "select.per_class=null", *words])

    def folder(self) -> str:
        (only,) = Path(self.layout.near_duplicates).iterdir()
        return str(only)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def test_selection_leaves_copies_out_and_says_where_they_are_listed(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = select(corpus.config(), corpus.layout)["summary"]
    assert summary["reasons"]["held_out_duplicate"] == 8
    assert summary["kept"] == 10
    rows = read_labels(f"{corpus.folder()}/listing.parquet").to_pylist()
    assert [(row["shard"], row["ordinal"]) for row in rows] == [
        *(("unlabeled-000000", ordinal) for ordinal in range(10, 15)),
        *(("unlabeled-000001", ordinal) for ordinal in range(3)),
    ]
    assert [row["__key__"] for row in rows] == [f"{number:05d}" for number in range(10, 18)]
    assert [row["held_out_file"].rsplit("/")[-2] for row in rows] == ["test"] * 7 + ["validation"]
    assert [row["held_out_row"] for row in rows] == [2] * 7 + [3]
    assert [row["flipped"] for row in rows] == ["flipped" in kind for kind in COPIES] + [False]
    assert min(row["correlation"] for row in rows) > 0.99
    printed = capsys.readouterr().out
    assert "select: 8 of 18 unlabeled images are near-duplicates of held-out ones and left out" in printed
    assert f"{corpus.layout.run_dir}/gen-1/near_duplicates/{Path(corpus.folder()).name}/listing.parquet" in printed


def test_another_selection_touches_no_image(corpus: Corpus) -> None:
    select(corpus.config(), corpus.layout)
    listing = Path(f"{corpus.folder()}/listing.parquet")
    before = listing.stat().st_mtime_ns
    for shard in corpus.shards.glob("*.tar"):
        shard.unlink()
    summary = select(corpus.config("select.confidence_threshold=0.5"), corpus.layout)["summary"]
    assert (summary["kept"], summary["reasons"]["held_out_duplicate"]) == (10, 8)
    assert listing.stat().st_mtime_ns == before


def test_where_the_shards_are_not_there_equal_hashes_count_and_it_says_so(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = [image_hash(decode(image)) for image in corpus.images]
    known = {*held_out_row(photos("china.jpg")[9])[:2], *held_out_row(photos("china.jpg")[3])[:2]}
    equal = sum(value in known for value in hashes)
    assert 0 < equal < 8
    for shard in corpus.shards.glob("*.tar"):
        shard.rename(shard.with_suffix(".gone"))
    summary = select(corpus.config(), corpus.layout)["summary"]
    assert summary["reasons"]["held_out_duplicate"] == equal
    assert set(read_labels(f"{corpus.folder()}/listing.parquet").column("correlation").to_pylist()) == {None}
    assert "8 images that might be near-duplicates could not be read" in capsys.readouterr().out
    for shard in corpus.shards.glob("*.gone"):
        shard.rename(shard.with_suffix(".tar"))
    assert select(corpus.config(), corpus.layout, force=True)["summary"]["reasons"]["held_out_duplicate"] == 8


@pytest.mark.parametrize("pattern", ["*.tar", "unlabeled-{000000..000001}.tar"], ids=["glob", "range"])
@pytest.mark.parametrize(("kind", "message"), [("503", "tried 6 times"), ("403", "refused")])
def test_an_outage_is_not_taken_for_shards_that_are_not_there(
    corpus: Corpus, s3: FaultyS3, folder: str, pattern: str, kind: Any, message: str
) -> None:
    for shard in corpus.shards.glob("*.tar"):
        storage.write_bytes(f"{folder}/{shard.name}", shard.read_bytes())
    config = corpus.config(f"data.unlabeled=['{folder}/{pattern}']")
    s3.add(kind, times=100_000)
    with pytest.raises(storage.StorageError, match=message):
        select(config, corpus.layout)
    assert not any(Path(corpus.layout.run_dir).glob("**/selections/**/done.json"))
    assert not any(Path(corpus.layout.near_duplicates).glob("*/done.json"))
    s3.faults.clear()
    summary = select(config, corpus.layout)["summary"]
    assert (summary["near_duplicates"]["not_seen"], summary["reasons"]["held_out_duplicate"]) == (0, 8)


@pytest.mark.parametrize("url", ["s3://no-bucket/x-*.tar", "s3://no-bucket/unlabeled-{000000..000001}.tar"])
def test_a_bucket_that_is_gone_is_no_outage(corpus: Corpus, s3: FaultyS3, url: str) -> None:
    assert (
        select(corpus.config(f"data.unlabeled=['{url}']"), corpus.layout)["summary"]["near_duplicates"]["not_seen"] == 8
    )


def test_a_shard_that_has_changed_since_is_not_looked_at(corpus: Corpus) -> None:
    with (corpus.shards / "unlabeled-000000.tar").open("ab") as file:
        file.write(b"more")
    assert select(corpus.config(), corpus.layout)["summary"]["near_duplicates"]["not_seen"] == 5


def test_an_image_that_cannot_be_decoded_any_more_is_judged_by_its_hash(corpus: Corpus) -> None:
    row = read_labels(f"{corpus.layout.labels}/unlabeled-000000.parquet").to_pylist()[10]  # the same pixels, once
    with (corpus.shards / "unlabeled-000000.tar").open("r+b") as file:
        file.seek(row["offset"])
        file.write(bytes(row["size"]))
    assert row["image_hash"] == image_hash(photos("china.jpg")[9])
    summary = select(corpus.config(), corpus.layout)["summary"]
    assert (summary["near_duplicates"]["not_seen"], summary["reasons"]["held_out_duplicate"]) == (1, 8)


def test_other_labels_are_searched_anew_beside_the_old_listing(corpus: Corpus) -> None:
    select(corpus.config(), corpus.layout)
    corpus.images.append(corpus.images[-1])
    shutil.rmtree(corpus.shards)
    write_labeled_shards(corpus.shards, corpus.layout, corpus.images)
    assert select(corpus.config(), corpus.layout)["summary"]["reasons"]["held_out_duplicate"] == 9
    assert len(list(Path(corpus.layout.near_duplicates).iterdir())) == 2


def test_the_listing_does_not_depend_on_how_many_threads_search(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, contents = corpus.config(), []
    labels = done_record(corpus.layout.labels)
    assert labels is not None
    for threads in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        find_near_duplicates(config, corpus.layout, labels, force=True)
        contents.append(Path(f"{corpus.layout.near_duplicates}/").glob("*/listing.parquet").__next__().read_bytes())
    assert contents[0] == contents[1]


def test_a_search_that_was_stopped_goes_on_where_it_was(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    whole = NearDuplicateSearch.search_shard

    def stopped(
        self: NearDuplicateSearch, labels: str, shard: str, url: str | None, entry: LabeledShard
    ) -> ShardResult:
        if shard.endswith("1") and not searched.count("stopped"):
            searched.append("stopped")
            raise KeyboardInterrupt
        searched.append(shard)
        return whole(self, labels, shard, url, entry)

    monkeypatch.setattr("teacher.near_duplicates.stage._SHARDS_PER_PART", 1)
    monkeypatch.setattr(NearDuplicateSearch, "search_shard", stopped)
    config, shown = corpus.config(), []
    labels = done_record(corpus.layout.labels)
    assert labels is not None
    with pytest.raises(KeyboardInterrupt):
        find_near_duplicates(config, corpus.layout, labels)
    again = find_near_duplicates(config, corpus.layout, labels, progress=lambda *now: shown.append(now))
    assert searched == ["unlabeled-000000", "stopped", "unlabeled-000001"]
    assert shown == [("near-duplicates", 2, 2)]
    assert again is not None
    listing = Path(again.folder, "listing.parquet").read_bytes()
    assert not Path(again.folder, "parts").exists()
    monkeypatch.undo()
    anew = find_near_duplicates(config, corpus.layout, labels, force=True)
    assert anew is not None
    assert anew.record["summary"] == again.record["summary"]
    assert Path(anew.folder, "listing.parquet").read_bytes() == listing


def test_without_held_out_files_nothing_is_searched(corpus: Corpus) -> None:
    summary = select(corpus.config("data.held_out_hashes=[]"), corpus.layout)["summary"]
    assert (summary["kept"], "near_duplicates" in summary) == (18, False)
    assert not Path(corpus.layout.near_duplicates).exists()


def test_an_empty_listing_excludes_nothing(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "run"))
    write_labeled_shards(tmp_path / "unlabeled", layout, [jpeg(photo) for photo in photos("flower.jpg")])
    url = write_held_out(tmp_path / "test", photos("china.jpg"))
    config = load_config(None, [f"data.held_out_hashes=[{url}]", f"data.unlabeled=[{tmp_path}/unlabeled/*.tar]"])
    assert select(config, layout)["summary"]["near_duplicates"]["near_duplicates"] == 0
    (folder,) = Path(layout.near_duplicates).iterdir()
    assert read_listing(SearchResult(str(folder), {})) == {}


def write_old_hashes(folder: Path) -> str:
    """As the version before wrote them."""
    write_table(f"{folder}/hashes.parquet", pa.table({"image_hash": pa.array([1, 2], pa.uint64())}))
    return f"{folder}/hashes.parquet"


def test_hashes_of_an_earlier_version_are_refused_with_what_to_delete(corpus: Corpus, tmp_path: Path) -> None:
    url = write_old_hashes(tmp_path / "old")
    message = (
        r"old/hashes\.parquet: expected the columns image_hash, .*thumbnail.*another out=, or remove the split's folder"
    )
    with pytest.raises(DataError, match=message):
        select(corpus.config(f"data.held_out_hashes=[{url}]"), corpus.layout)


def test_packing_again_says_what_to_delete_and_then_writes_hashes_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, photo in enumerate(photos("china.jpg")):
        folder = tmp_path / "photos" / f"class_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(jpeg(photo))
    out = tmp_path / "out"
    pack_folder.pack(str(tmp_path / "photos"), str(out), validation=0)
    rows = read_labels(f"{out}/labeled/hashes.parquet")
    keys = read_labels(f"{out}/labeled/sources.parquet").to_pylist()
    first = Path(keys[0]["path"]).read_bytes()
    assert tuple(rows.slice(0, 1).to_pylist()[0].values()) == held_out_row(decode(first))
    shard = (out / "labeled/labeled-000000.tar").read_bytes()
    write_old_hashes(out / "labeled")
    pack_folder.pack(str(tmp_path / "photos"), str(out), validation=0)
    assert f"remove the folder {out}/labeled" in capsys.readouterr().out
    shutil.rmtree(out / "labeled")
    pack_folder.pack(str(tmp_path / "photos"), str(out), validation=0)
    assert not is_outdated(str(out / "labeled"))
    assert (out / "labeled/labeled-000000.tar").read_bytes() == shard


def test_fashion_mnist_of_an_earlier_version_says_what_to_delete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "split.json").write_text('{"labeled_per_class": 50, "seed": 0}\n')
    write_old_hashes(tmp_path / "test")
    fashion_mnist.prepare(str(tmp_path))
    assert f"remove {tmp_path}/split.json" in capsys.readouterr().out
    write_held_out(tmp_path / "test", photos("china.jpg"))
    fashion_mnist.prepare(str(tmp_path))
    assert "remove" not in capsys.readouterr().out

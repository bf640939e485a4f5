"""Labels joined to their images as an archive that is never stored: any range of it is the same range of the whole."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import storage
from data.errors import DataError
from data.labels import joined_tar as joined
from data.labels.joined_tar import Images, JoinedTar, Provenance, key_prefix
from data.labels.label_files import COPIES_COLUMN, label_table, write_labels
from data.labels.overlay import Overlay, RowFilter
from data.labels.top_k import top_k_of
from data.shards.image_ranges import ImageRanges
from data.shards.image_reader import ImageReader
from data.shards.split import open_split
from data.tables import write_table
from tests.conftest import DIGIT_NAMES, WriteDigits
from tests.data.shards.test_image_ranges import as_bytes

Labeled = tuple[Overlay, np.ndarray, np.ndarray]  # probabilities (200, 10), copies (200,) of both shards


@pytest.fixture
def labeled(tmp_path: Path, write_digits: WriteDigits) -> Labeled:
    """Two shards of 100 digits with random probabilities; a third of the images is selected, some of them twice."""
    write_digits(tmp_path / "unlabeled", 0, 200, labeled=False)
    split = open_split(str(tmp_path / "unlabeled/*.tar"), str(tmp_path / "index"))
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(10) * 0.2, 200).astype(np.float32)
    copies = generator.choice([0, 0, 0, 0, 1, 2], 200).astype(np.uint16)
    digests = {}
    for number, shard in enumerate(split.shards):
        rows = slice(number * 100, number * 100 + 100)
        table = label_table(shard.index(), np.arange(100), top_k_of(probabilities[rows], 5), np.zeros(100, np.uint64))
        entry = write_labels(str(tmp_path / f"labels/{shard.name}.parquet"), shard, table, [], "teacher")
        write_table(
            chosen := str(tmp_path / f"selection/{shard.name}.parquet"), pa.table({COPIES_COLUMN: copies[rows]})
        )
        digests[shard.name] = entry.sha256 + hashlib.sha256(Path(chosen).read_bytes()).hexdigest()
    provenance = Provenance(1, tuple(DIGIT_NAMES))
    overlay = Overlay(split.shards, str(tmp_path / "labels"), str(tmp_path / "selection"), provenance, digests)
    return overlay, probabilities, copies


def whole(overlay: Overlay, position: int, keep: RowFilter) -> tuple[JoinedTar, bytes]:
    archive = JoinedTar(overlay.entries(overlay.rows(position, keep)))
    with ImageReader([shard.url for shard in overlay.shards]) as reader:
        return archive, b"".join(read(archive, reader))


def read(archive: JoinedTar, source: Images, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Bytes of the archive, in pieces."""
    return (b"".join(map(as_bytes, parts)) for parts in archive.parts(source, start, stop))


def samples(content: bytes) -> dict[str, dict[str, bytes]]:
    """Members by key and field, as a tar reader has them."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            key, _, field = member.name.partition(".")
            stream = tar.extractfile(member)
            assert stream is not None
            found.setdefault(key, {})[field] = stream.read()
    return found


def test_the_archive_has_every_selected_image_once_with_its_own_bytes_and_label(labeled: Labeled) -> None:
    overlay, probabilities, copies = labeled
    archive, content = whole(overlay, 1, RowFilter())
    assert len(content) == archive.size
    found = samples(content)
    selected = np.flatnonzero(copies[100:] > 0)
    assert list(found) == [f"unlabeled-000001-{ordinal:07d}" for ordinal in selected]
    index = overlay.shards[1].index().to_pylist()
    for ordinal, members in zip(selected, found.values(), strict=True):
        row, probs = index[ordinal], probabilities[100 + ordinal]
        assert members["png"] == storage.read_bytes(overlay.shards[1].url, row["offset"], row["size"])
        said = json.loads(members["json"])
        assert int(members["cls"]) == said["label"] == probs.argmax()
        assert np.float32(said["confidence"]) == probs.max()
        assert said["class_name"] == DIGIT_NAMES[probs.argmax()]
        assert said["copies"] == copies[100 + ordinal]
        assert said["source"] == {"shard": "unlabeled-000001", "ordinal": ordinal, "key": row["key"]}


def test_filters_leave_out_by_selection_confidence_and_class(labeled: Labeled) -> None:
    overlay, probabilities, _ = labeled
    everything = samples(whole(overlay, 0, RowFilter(selected=False))[1])
    assert len(everything) == 100
    keep = RowFilter(selected=False, min_confidence=0.6, classes=frozenset({3, 7}))
    expected = np.isin(probabilities[:100].argmax(1), [3, 7]) & (probabilities[:100].max(1) >= np.float32(0.6))
    assert 0 < expected.sum() < 100
    found = samples(whole(overlay, 0, keep)[1])
    assert [int(key[-7:]) for key in found] == np.flatnonzero(expected).tolist()


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_range_is_that_of_the_whole(labeled: Labeled, data: st.DataObject) -> None:
    overlay, _, _ = labeled
    archive, content = whole(overlay, 0, RowFilter(selected=False))
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, len(content) + 5))
    with ImageReader([shard.url for shard in overlay.shards]) as reader:
        assert b"".join(read(archive, reader, start, stop)) == content[start:stop]
    with closing(ImageRanges([shard.url for shard in overlay.shards])) as images:
        assert b"".join(read(archive, images, start, stop)) == content[start:stop]


def test_pieces_have_at_most_so_many_bytes_or_one_sample(labeled: Labeled, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, _, _ = labeled
    archive, content = whole(overlay, 0, RowFilter(selected=False))
    with ImageReader([shard.url for shard in overlay.shards]) as reader:
        for most, number in ((8000, 50), (1, 100)):
            monkeypatch.setattr(joined, "_CHUNK_BYTES", most)
            *pieces, end = read(archive, reader)
            assert b"".join([*pieces, end]) == content
            assert len(pieces) >= number
            assert all(len(piece) <= most or len(samples(piece)) == 1 for piece in pieces)


def test_an_archive_without_samples_is_an_empty_tar(labeled: Labeled) -> None:
    overlay, _, _ = labeled
    archive, content = whole(overlay, 0, RowFilter(min_confidence=1.0))
    assert len(content) == archive.size == 10240
    assert samples(content) == {}


def test_the_identity_changes_with_labels_and_filter(labeled: Labeled) -> None:
    overlay, _, _ = labeled
    other = Overlay(
        overlay.shards, overlay.labels_dir, overlay.selection_dir, overlay.provenance, {"unlabeled-000000": "abd"}
    )
    identities = {
        overlay.identity(0, RowFilter()),
        overlay.identity(0, RowFilter(min_confidence=0.5)),
        overlay.identity(0, RowFilter(classes=frozenset({1}))),
        overlay.identity(1, RowFilter()),
        other.identity(0, RowFilter()),
    }
    assert len(identities) == 5
    assert overlay.identity(0, RowFilter()) == overlay.identity(0, RowFilter())


def test_copies_of_other_labels_are_refused(labeled: Labeled, tmp_path: Path) -> None:
    overlay, _, _ = labeled
    url = tmp_path / "selection/unlabeled-000000.parquet"
    write_table(str(url), pa.table({COPIES_COLUMN: [1, 2]}))
    with pytest.raises(DataError, match=r"unlabeled-000000\.parquet: .*not the file that was committed.*stage=select"):
        overlay.rows(0, RowFilter())
    name, digest = overlay.shards[0].name, hashlib.sha256(url.read_bytes()).hexdigest()
    believed = replace(overlay, digests={name: overlay.digests[name][:64] + digest})
    with pytest.raises(DataError, match="100 labels, but 2 copies"):
        believed.rows(0, RowFilter())


def test_names_that_may_not_be_in_a_key_stay_apart() -> None:
    prefixes = [key_prefix(name) for name in ("a.b", "a_b", "a b", "x" * 90, "x" * 91)]
    assert len(set(prefixes)) == 5
    assert prefixes[1] == "a_b"
    assert all(set(prefix) <= set("abx_-0123456789abcdef") and len(prefix) <= 80 for prefix in prefixes)

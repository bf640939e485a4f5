"""Labels of a shard: every sample once, as a label or in quarantine, the same bytes each time."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from data.errors import DataError
from data.labels.label_files import (
    LabeledShard,
    describe_label_file,
    read_labels,
    read_labels_manifest,
    read_quarantined,
)
from data.labels.top_k import dense_probabilities, stored_top_k, top_k_of
from data.shards.split import Shard, open_split
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from teacher.labeling.label_shard import ShardLabeler
from tests.conftest import WriteDigits, png


class Linear(nn.Module):
    """A fixed random linear classifier on pixels."""

    def __init__(self, side: int, num_classes: int = 10) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_classes, 3 * side * side, generator=generator) / 30)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


PREPROCESSING = Preprocessing(8, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize="pad")


def predictor(batch_size: int = 32, views: int = 1) -> Predictor:
    return Predictor(Linear(8), PREPROCESSING, "cpu", batch_size, temperature=2.0, views=views)


def label_shard(shard: Shard, url: str, model: Predictor, top_k: int, decode_threads: int) -> LabeledShard:
    return ShardLabeler(model, 10, top_k, 1, decode_threads, "test").label(shard, url)


def only_shard(folder: Path) -> Shard:
    return open_split(f"{folder}/*.tar", str(folder.parent / "index")).shards[0]


def test_each_sample_gets_the_teachers_probabilities_in_order(
    tmp_path: Path, write_digits: WriteDigits, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    write_digits(tmp_path / "unlabeled", 0, 90, labeled=False)
    label_shard(only_shard(tmp_path / "unlabeled"), str(tmp_path / "out.parquet"), predictor(), 10, 2)
    table = read_labels(str(tmp_path / "out.parquet"))
    images = torch.from_numpy(np.repeat(digits[0][:90, None], 3, axis=1))
    expected = predictor(batch_size=90).probabilities(images)
    assert table.column("ordinal").to_pylist() == list(range(90))
    assert table.column("label").to_pylist() == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose(table.column("confidence").to_numpy(), expected.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(dense_probabilities(stored_top_k(table), 10), expected, atol=1e-3)


def test_temperature_changes_confidence_and_not_the_label() -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    soft, sharp = predictor(), predictor()
    sharp.temperature = 0.5
    assert (soft.probabilities(images).argmax(1) == sharp.probabilities(images).argmax(1)).all()
    assert (soft.probabilities(images).max(1) < sharp.probabilities(images).max(1)).all()


def test_only_the_top_k_and_the_rest_are_kept(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "unlabeled", 0, 40, labeled=False)
    for top_k in (3, 10):
        label_shard(only_shard(tmp_path / "unlabeled"), str(tmp_path / f"{top_k}.parquet"), predictor(), top_k, 2)
    few, full = (read_labels(str(tmp_path / f"{k}.parquet")) for k in (3, 10))
    all_probabilities, from_few = (
        dense_probabilities(stored_top_k(full), 10),
        dense_probabilities(stored_top_k(few), 10),
    )
    kept = np.argsort(-all_probabilities, axis=1)[:, :3]
    np.testing.assert_allclose(
        np.take_along_axis(from_few, kept, 1), np.take_along_axis(all_probabilities, kept, 1), atol=2e-3
    )
    np.testing.assert_allclose(from_few.sum(axis=1), 1, atol=1e-6)
    assert few.column("rest").to_numpy().mean() > full.column("rest").to_numpy().mean()


def test_an_images_label_does_not_depend_on_what_came_with_it(tmp_path: Path, write_digits: WriteDigits) -> None:
    for name, stop in (("few", 33), ("many", 100)):
        write_digits(tmp_path / name / "unlabeled", 0, stop, labeled=False)
        label_shard(only_shard(tmp_path / name / "unlabeled"), str(tmp_path / f"{name}.parquet"), predictor(), 10, 2)
    few, many = (read_labels(str(tmp_path / f"{name}.parquet"), ["label", "confidence"]) for name in ("few", "many"))
    assert few.equals(many.slice(0, 33))


def test_the_same_shard_gives_the_same_bytes_for_any_number_of_decoding_threads(
    tmp_path: Path, write_digits: WriteDigits
) -> None:
    write_digits(tmp_path / "unlabeled", 0, 80, labeled=False)
    for threads in (1, 4):
        label_shard(only_shard(tmp_path / "unlabeled"), str(tmp_path / f"{threads}.parquet"), predictor(), 10, threads)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "4.parquet").read_bytes()


def test_what_selection_reads_again_and_again_needs_no_decompression_and_no_dictionary_of_floats(
    tmp_path: Path, write_digits: WriteDigits
) -> None:
    write_digits(tmp_path / "unlabeled", 0, 40, labeled=False)
    label_shard(only_shard(tmp_path / "unlabeled"), str(tmp_path / "out.parquet"), predictor(), 10, 2)
    group = pq.read_metadata(tmp_path / "out.parquet").row_group(0)
    chunks = {chunk.path_in_schema: chunk for chunk in map(group.column, range(group.num_columns))}
    assert {name for name, chunk in chunks.items() if chunk.compression == "UNCOMPRESSED"} == {
        "ordinal", "label", "confidence", "image_hash",
    }  # fmt: skip
    assert not any(chunks[name].has_dictionary_page for name in ("confidence", "rest", "image_hash"))
    assert all("DELTA_BINARY_PACKED" in chunks[name].encodings for name in ("ordinal", "offset", "size"))


def test_what_cannot_be_used_is_quarantined_with_key_offset_and_reason(
    tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    good = png(digits[0][0])
    members = [
        ("a.png", good),
        ("b.png", b"no image"),
        ("c.txt", b"x"),
        ("d.png", good[:60]),
        ("e.png", b""),
        ("f.png", good),
    ]
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/x.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = (tmp_path / "shards/x.tar").read_bytes()
    (tmp_path / "shards/x.tar").write_bytes(whole[: whole.index(b"f.png") + 512 + 30])
    shard = only_shard(tmp_path / "shards")
    result = label_shard(shard, str(tmp_path / "out.parquet"), predictor(), 10, 2)
    table = read_labels(str(tmp_path / "out.parquet"))
    quarantined = read_quarantined(table, f"{tmp_path}/out.parquet")
    assert table.column("__key__").to_pylist() == ["a"]
    assert [(row.ordinal, row.key) for row in quarantined] == [
        (1, "b"),
        (2, "c"),
        (3, "d"),
        (4, "e"),
        (5, "f"),
        (6, ""),
    ]
    reasons = dict(zip("bcdef_", (row.reason for row in quarantined), strict=True))
    assert "not a JPEG, PNG or WebP" in reasons["b"]
    assert "no image member" in reasons["c"]
    assert "empty" in reasons["e"]
    assert "cut off" in reasons["f"]
    assert "truncated" in reasons["_"]
    assert shard.num_samples == result.rows + result.quarantined == 7


def test_an_empty_shard_has_no_labels_and_no_quarantine(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/empty.tar", "w"):
        pass
    result = label_shard(only_shard(tmp_path / "shards"), str(tmp_path / "out.parquet"), predictor(), 5, 2)
    assert (result.rows, result.quarantined) == (0, 0)


def test_a_label_file_describes_itself_and_a_damaged_one_does_not(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "unlabeled", 0, 30, labeled=False)
    url = tmp_path / "unlabeled-000000.parquet"
    result = label_shard(only_shard(tmp_path / "unlabeled"), str(url), predictor(), 10, 2)
    assert describe_label_file(str(url)) == result
    url.write_bytes(url.read_bytes()[:-100])
    assert describe_label_file(str(url)) is None


def test_a_damaged_manifest_of_labels_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: damaged .* remove it and run stage=label"):
        read_labels_manifest(str(tmp_path))


@pytest.mark.parametrize("views", [2, 10])
def test_views_average_mirrored_and_shifted_images(views: int) -> None:
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    preprocessing = replace(PREPROCESSING, image_size=16)
    one, several = (Predictor(Linear(16), preprocessing, "cpu", 8, views=n) for n in (1, views))
    both = (one.probabilities(images) + one.probabilities(images.flip(3))) / 2
    if views == 2:
        np.testing.assert_allclose(several.probabilities(images), both, atol=1e-6)
    else:
        assert np.abs(several.probabilities(images) - both).max() > 1e-3
    np.testing.assert_allclose(several.probabilities(images).sum(axis=1), 1, atol=1e-5)


def test_of_equal_probabilities_the_lower_class_comes_first() -> None:
    probabilities = np.array([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25], [0, 0, 1, 0]], np.float32)
    for top_k in (1, 2, 4):
        found = top_k_of(probabilities, top_k)
        assert found.index.tolist() == np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k].tolist()
        np.testing.assert_array_equal(found.prob, np.take_along_axis(probabilities, found.index, 1))
        np.testing.assert_allclose(found.rest, 1 - found.prob.sum(axis=1), atol=1e-7)

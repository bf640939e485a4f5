"""Pictures that differ in colour alone are no copies of each other; of grey pictures, and of files without colours, grey decides."""

from pathlib import Path

import numpy as np
import pytest

from data.images.decode import Pixels, decode
from data.images.held_out_hashes import hash_table, held_out_row, is_outdated, read_held_out_hashes, write_hashes
from data.images.similarity import chroma, image_hash, mirrored, normalized, thumbnail
from data.labels.label_files import read_labels
from data.tables import write_table
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from teacher.near_duplicates.search import NearDuplicateSearch
from teacher.selection.stage import select
from tests.colour_drawings import thing
from tests.copies import (
    COPIES,
    disc,
    flag,
    flipped,
    in_grey,
    jpeg,
    photos,
    square,
    write_held_out,
    write_labeled_shards,
)
from tests.teacher.near_duplicates.test_near_duplicates import thumbnails

PAIRS: dict[str, tuple[Pixels, Pixels]] = {
    "a red and a blue circle": (disc("red"), disc("blue")),
    "an orange and a purple circle": (disc("orange"), disc("purple")),
    "a yellow and a black square": (square("yellow"), square("black")),
    "a brown and a grey circle": (disc("saddlebrown"), disc("grey")),
    "two umbrellas": (thing("umbrella", "red"), thing("umbrella", "green")),
    "the flags of Italy and France": (flag("green", "white", "red"), flag("blue", "white", "red")),
    "the flags of Ireland and Italy": (flag("green", "white", "orange"), flag("green", "white", "red")),
}


def without_colours(folder: Path, images: list[Pixels]) -> str:
    """A hashes.parquet as the version before wrote it."""
    table = hash_table(map(held_out_row, images))
    write_table(f"{folder}/hashes.parquet", table.drop_columns("chroma"))
    return f"{folder}/hashes.parquet"


def are_copies(tmp_path: Path, held_out: Pixels, unlabeled: Pixels) -> bool:
    """Whether the second, when hashes propose it, is taken for a copy of the first, in a split that has images with colours."""
    known = read_held_out_hashes([write_held_out(tmp_path, [held_out, photos("china.jpg")[0]])])
    return (
        len(NearDuplicateSearch(known, 0.99).confirm(known.hashes[:1], thumbnails([unlabeled]), np.ones(1, bool)).row)
        == 1
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_pictures_of_other_colours_are_no_copies(tmp_path: Path, pair: str) -> None:
    one, other = PAIRS[pair]
    assert not are_copies(tmp_path / "one", one, other)
    assert not are_copies(tmp_path / "other", other, one)


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("picture", [disc("red"), square("yellow"), flag("green", "white", "red"), thing("key", "red")])
def test_copies_of_drawings_are_found(tmp_path: Path, picture: Pixels, kind: str) -> None:
    assert are_copies(tmp_path, picture, decode(COPIES[kind](picture)))


def test_a_grey_copy_is_found_from_both_sides(tmp_path: Path) -> None:
    for number, photo in enumerate(photos("china.jpg")):
        assert are_copies(tmp_path / f"{number}", photo, in_grey(photo))
        assert are_copies(tmp_path / f"{number}-grey", in_grey(photo), photo)


def test_chroma_is_the_mean_of_blue_and_red_less_grey() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 16, 3), dtype=np.uint8)
    red, green, blue = image.reshape(8, 4, 8, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    expected = [
        128 - 0.168736 * red - 0.331264 * green + 0.5 * blue,
        128 + 0.5 * red - 0.418688 * green - 0.081312 * blue,
    ]
    np.testing.assert_allclose(chroma(image), np.array(expected) - 128, atol=0.51)
    assert (chroma(flipped(image)) == mirrored(chroma(image))).all()
    assert not chroma(in_grey(image)).any()
    assert chroma(np.tile(np.array([0, 0, 255], np.uint8), (8, 8, 1)))[0].min() == 127


def test_grey_images_correlate_to_the_bit_as_their_grey_values() -> None:
    images = [in_grey(photo) for photo in (*photos("china.jpg"), *photos("flower.jpg"))]
    vectors = normalized(np.array([thumbnail(image) for image in images]))
    rows, others = (side.ravel() for side in np.indices((len(images), len(images))))
    found = thumbnails(images).correlations(rows, thumbnails(images), others, -1)
    assert (found == np.einsum("ij,ij->i", vectors[rows], vectors[others])).all()


def test_with_colours_nothing_becomes_a_copy_that_was_none_in_grey() -> None:
    images = [*photos("china.jpg"), *photos("flower.jpg"), *(picture for pair in PAIRS.values() for picture in pair)]
    vectors = normalized(np.array([thumbnail(image) for image in images]))
    rows, others = (side.ravel() for side in np.indices((len(images), len(images))))
    found = thumbnails(images).correlations(rows, thumbnails(images), others, -1)
    assert (found <= np.einsum("ij,ij->i", vectors[rows], vectors[others])).all()


def test_hashes_of_grey_images_are_written_as_before(tmp_path: Path) -> None:
    images = [in_grey(photo) for photo in photos("china.jpg")]
    write_held_out(tmp_path / "new", images)
    without_colours(tmp_path / "old", images)
    assert (tmp_path / "new/hashes.parquet").read_bytes() == (tmp_path / "old/hashes.parquet").read_bytes()


def test_files_with_and_without_colours_are_read_together(tmp_path: Path) -> None:
    china = photos("china.jpg")
    urls = [
        without_colours(tmp_path / "old", china[:2]),
        write_held_out(tmp_path / "new", [*china[2:4], in_grey(china[4])]),
    ]
    known = read_held_out_hashes(urls)
    assert known.has_chroma.tolist() == [False] * 2 + [True] * 3
    assert known.chroma.any(axis=(1, 2, 3)).tolist() == [False] * 2 + [True] * 2 + [False]
    assert not any(map(is_outdated, (str(tmp_path / "old"), str(tmp_path / "new"))))


class Cars:
    """Held-out red and green cars on white; unlabeled ones in these colours, in blue and violet, and flowers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.layout = folder, Layout(str(folder / "run"))
        self.held_out = [thing("car", "red"), thing("car", "green")]
        self.images = [
            *(thing("car", colour) for colour in ("red", "green", "blue", "darkviolet")),
            *photos("flower.jpg"),
        ]
        write_labeled_shards(folder / "unlabeled", self.layout, [jpeg(image) for image in self.images])

    def config(self, hashes: str) -> Config:
        words = f"run_dir={self.folder}/run", f"data.unlabeled=[{self.folder}/unlabeled/*.tar]"
        return load_config(None, [*words, f"data.held_out_hashes=[{hashes}]", "select.per_class=null"])


@pytest.fixture
def cars(tmp_path: Path) -> Cars:
    return Cars(tmp_path)


def test_a_car_of_another_colour_is_selected(cars: Cars, capsys: pytest.CaptureFixture[str]) -> None:
    summary = select(cars.config(write_held_out(cars.folder / "test", cars.held_out)), cars.layout)["summary"]
    assert (summary["kept"], summary["reasons"]["held_out_duplicate"]) == (12, 2)
    (listing,) = Path(cars.layout.near_duplicates).glob("*/listing.parquet")
    rows = read_labels(str(listing)).to_pylist()
    assert [(row["ordinal"], row["held_out_row"]) for row in rows] == [(0, 0), (1, 1)]
    assert "in grey" not in capsys.readouterr().out


def test_where_hashes_have_no_colours_grey_decides_and_it_says_so_once(
    cars: Cars, capsys: pytest.CaptureFixture[str]
) -> None:
    old = cars.config(without_colours(cars.folder / "old", cars.held_out))
    summary = select(old, cars.layout)["summary"]
    assert summary["reasons"]["held_out_duplicate"] == 4
    assert summary["near_duplicates"]["compared_in_grey"] == 4
    assert capsys.readouterr().out.count("select: 4 of them have colours and were compared in grey") == 1


def test_grey_images_are_not_said_to_be_compared_in_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(str(tmp_path / "run"))
    grey = [in_grey(photo) for photo in photos("china.jpg")]
    write_labeled_shards(tmp_path / "unlabeled", layout, [jpeg(image) for image in [*grey[:3], *photos("flower.jpg")]])
    write_hashes(str(tmp_path / "test"), map(held_out_row, grey))
    words = f"data.unlabeled=[{tmp_path}/unlabeled/*.tar]", f"data.held_out_hashes=[{tmp_path}/test/hashes.parquet]"
    found = select(load_config(None, [*words, "select.per_class=null"]), layout)["summary"]["near_duplicates"]
    assert found["near_duplicates"] == 3
    assert "compared_in_grey" not in found
    assert "in grey" not in capsys.readouterr().out


def test_colours_do_not_change_what_hashes_propose(cars: Cars) -> None:
    known = read_held_out_hashes([write_held_out(cars.folder / "test", cars.held_out)])
    asked = np.array([image_hash(image) for image in cars.images], np.uint64)
    assert NearDuplicateSearch(known, 0.99).propose(asked).tolist() == [0, 1, 2, 3]

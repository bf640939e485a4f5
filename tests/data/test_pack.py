"""Folders of images become shards; nothing is lost without a word."""

from pathlib import Path

import numpy as np
import pytest

from data import fashion_mnist, fashion_mnist_files, pack
from data.errors import DataError
from data.labels.label_files import read_labels
from data.packing import pack_folder
from data.shards.image_reader import ImageReader, check_labeled
from data.shards.split import open_split
from tests.conftest import png


@pytest.fixture
def photos(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> Path:
    """Class folders `one` and `two` with 20 and 10 images, one broken image, and a note."""
    for number, image in enumerate(digits[0][:30]):
        folder = tmp_path / "photos" / ("one" if number < 20 else "two")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(image))
    (tmp_path / "photos/one/broken.png").write_bytes(b"not an image")
    (tmp_path / "photos/two/notes.txt").write_text("a note")
    return tmp_path / "photos"


def test_class_folders_become_labeled_and_validation_shards_with_hashes(photos: Path, tmp_path: Path) -> None:
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0.2, samples_per_shard=10)
    splits = {
        name: open_split(f"{tmp_path}/out/{name}/*.tar", f"{tmp_path}/index") for name in ("labeled", "validation")
    }
    assert {name: split.num_samples for name, split in splits.items()} == {"labeled": 24, "validation": 6}
    assert len(splits["labeled"].shards) == 3
    for split in splits.values():
        assert split.class_names == ("one", "two")
        check_labeled(split, 2)
    labels = [label for shard in splits["validation"].shards for label in shard.index().column("label").to_pylist()]
    assert sorted(labels) == [0] * 4 + [1] * 2
    assert read_labels(f"{tmp_path}/out/validation/hashes.parquet").num_rows > 0


def test_a_classes_only_image_is_for_training(photos: Path, tmp_path: Path) -> None:
    (photos / "three").mkdir()
    (photos / "two/29.png").rename(photos / "three/29.png")
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0.2)
    labels = {
        name: [label for shard in split.shards for label in shard.index().column("label").to_pylist()]
        for name in ("labeled", "validation")
        if (split := open_split(f"{tmp_path}/out/{name}/*.tar", f"{tmp_path}/index"))
    }
    three = 1  # of one, three, two
    assert labels["labeled"].count(three) == 1
    assert three not in labels["validation"]


def test_image_bytes_stay_as_they_are_and_their_source_is_recorded(photos: Path, tmp_path: Path) -> None:
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0)
    split = open_split(f"{tmp_path}/out/labeled/*.tar", f"{tmp_path}/index")
    sources = dict(zip(*read_labels(f"{tmp_path}/out/labeled/sources.parquet").to_pydict().values(), strict=True))
    with ImageReader([split.shards[0].url]) as reader:
        for row in split.shards[0].index().to_pylist():
            assert reader.read(0, row["offset"], row["size"]) == Path(sources[row["key"]]).read_bytes()


def test_all_names_of_jpegs_are_packed_under_one(photos: Path, tmp_path: Path) -> None:
    for number, suffix in enumerate(("jfif", "jpe", "JPG", "JFIF", "jpeg", "PNG")):
        (photos / "one" / f"{number}.png").rename(photos / "one" / f"{number}.{suffix}")
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0)
    index = open_split(f"{tmp_path}/out/labeled/*.tar", f"{tmp_path}/index").shards[0].index()
    extensions = index.column("extension").to_pylist()
    assert {name: extensions.count(name) for name in set(extensions)} == {"jpg": 4, "jpeg": 1, "png": 25}


def test_what_is_left_out_is_listed_with_the_reason(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0)
    rejected = (tmp_path / "out/labeled/rejected.txt").read_text().splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in rejected] == ["broken.png", "notes.txt"]
    assert f"left out: 2 ({tmp_path}/out/labeled/rejected.txt says which and why)" in capsys.readouterr().out


def test_a_folder_without_images_does_not_become_a_class(photos: Path, tmp_path: Path) -> None:
    (photos / "empty").mkdir()
    (photos / "empty/readme.txt").write_text("to come")
    with pytest.raises(
        DataError, match=r"no images in empty \(.*readme\.txt: not an image file .*every folder is a class"
    ):
        pack_folder.pack(str(photos), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_packing_that_was_killed_continues_and_other_settings_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0.2)
    whole = {f.relative_to(tmp_path): f.read_bytes() for f in (tmp_path / "out").rglob("*.*")}
    (tmp_path / "out/validation/manifest.json").unlink()
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0.2)
    assert {f.relative_to(tmp_path): f.read_bytes() for f in (tmp_path / "out").rglob("*.*")} == whole
    assert "labeled: packed already" in capsys.readouterr().out
    with pytest.raises(DataError, match="packed with other settings"):
        pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0.2, seed=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images=nowhere", "out=x"], "no such folder"),
        (["images=.", "out=x", "validaton=0"], "did you mean 'validation'"),
        (["images=."], "out=… is required"),
        (["images=.", "out=x", "seed=one"], "seed=one: expected int"),
        (["images=.", "out=x", "seed=1", "seed=2"], "seed is given twice"),
    ],
)
def test_wrong_arguments_get_a_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_demos_splits_are_disjoint_balanced_and_complete() -> None:
    labels = np.repeat(np.arange(10), 6000).astype(np.uint8)
    splits = fashion_mnist.split_indices(labels, labeled_per_class=50, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {
        "labeled": 500, "validation": 500, "development": 5000, "unlabeled": 54_000,
    }  # fmt: skip
    assert len(np.unique(np.concatenate(list(splits.values())))) == 60_000
    assert np.bincount(labels[splits["labeled"]]).tolist() == [50] * 10
    other = fashion_mnist.split_indices(labels, labeled_per_class=50, seed=1)
    assert set(splits["labeled"]) != set(other["labeled"])


def test_fashion_mnist_that_cannot_be_had_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object) -> bytes:
        raise OSError("no network here")

    monkeypatch.setattr(fashion_mnist_files, "_DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist_files, "_download", refuse)
    monkeypatch.setattr(fashion_mnist_files, "unpacked_debian", refuse)
    with pytest.raises(DataError) as caught:
        fashion_mnist_files.find_files()
    message = str(caught.value)
    for place in (str(tmp_path / "none"), *fashion_mnist_files._MIRRORS, "apt-get download dataset-fashion-mnist"):
        assert place in message
    assert "Install the Debian package" in message

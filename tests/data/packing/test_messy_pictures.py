"""Pictures as people have them, drawn, go through the packing: what is a picture is packed once, what is none is said."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.surprise import read_truth, write_problem
from data.images.decode import DecodeError, decode
from data.labels.label_files import read_labels
from data.pack import main as pack
from data.shards.image_reader import ImageReader
from data.shards.samples import printable
from data.shards.split import Split, open_split


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messy")
    write_problem(str(folder / "pictures"), seed=4, labeled=4, test=10, unlabeled=120, size=16)
    damaged = sorted(path for path in (folder / "pictures/unlabeled/a").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    return folder


def decoded(split: Split) -> list[np.ndarray]:
    with ImageReader([shard.url for shard in split.shards]) as reader:
        return [
            decode(reader.read(position, row["offset"], row["size"]))
            for position, shard in enumerate(split.shards)
            for row in shard.index().to_pylist()
        ]


def sources(folder: Path) -> list[str]:
    return [str(path) for path in read_labels(str(folder / "sources.parquet")).column("path").to_pylist()]


def is_whole(path: Path) -> bool:
    try:
        decode(path.read_bytes())
    except DecodeError:
        return False
    return True


def test_unlabeled_pictures_are_packed_once_and_the_rest_is_listed(folder: Path) -> None:
    pictures, out = folder / "pictures", folder / "packed"
    assert pack([f"images={pictures}/unlabeled", f"out={out}", "labeled=false", "processes=1"]) == 0
    drawn = [pictures / path for path in read_truth(pictures) if path.startswith("unlabeled/")]
    whole = [path for path in drawn if is_whole(path)]
    assert len(whole) < len(drawn) == 120
    assert sorted(sources(out / "unlabeled")) == sorted(printable(str(path)) for path in whole)
    by_name = {printable(str(path)): decode(path.read_bytes()) for path in whole}
    for path, image in zip(sources(out / "unlabeled"), decoded(open_split(f"{out}/unlabeled/*.tar", "")), strict=True):
        assert (image == by_name[path]).all()
    rejected = (out / "unlabeled/rejected.txt").read_text()
    assert all(printable(str(path)) in rejected for path in {*drawn} - {*whole})
    assert "notes.txt" in rejected


def test_labels_are_the_sorted_names_of_the_class_folders(folder: Path) -> None:
    pictures, out = folder / "pictures", folder / "packed-labeled"
    assert pack([f"images={pictures}/train", f"out={out}", "validation=0", "processes=1"]) == 0
    truth = {printable(str(pictures / path)): name for path, name in read_truth(pictures).items()}
    names = sorted({truth[path] for path in sources(out / "labeled")})
    split = open_split(f"{out}/labeled/*.tar", "")
    labels = [row["label"] for shard in split.shards for row in shard.index().to_pylist()]
    assert labels == [names.index(truth[path]) for path in sources(out / "labeled")]
    assert len(labels) == 4 * len(names)

"""Recipes of small data sets: the same shards again, no thing in two splits, errors that say what to install."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.recipes import digits, packages, stamps
from data.recipes.mnist import read_images
from data.recipes.packages import from_debian, from_npm
from data.recipes.split_writing import SHARES, LabeledImage, is_written, on_white, split_things, write_splits
from data.shards.split import open_split


def things(number: int, views: int, classes: int = 2) -> list[LabeledImage]:
    """`views` images of each of `number` things of each class."""
    blank = np.zeros((4, 4, 3), np.uint8)
    return [
        LabeledImage(f"{thing}", label, blank)
        for label in range(classes)
        for thing in range(number)
        for _ in range(views)
    ]


def test_images_of_one_thing_are_in_one_split_and_classes_are_shared_alike() -> None:
    images = things(20, views=3)
    parts = split_things(images, 2, seed=0)
    assert sorted(number for part in parts.values() for number in part) == list(range(len(images)))
    found = {name: {(images[n].label, images[n].thing) for n in part} for name, part in parts.items()}
    assert (
        not found["labeled"] & found["validation"]
        | found["labeled"] & found["test"]
        | found["validation"] & found["test"]
    )
    assert {name: Counter(label for label, _ in group) for name, group in found.items()} == {
        "labeled": {0: 12, 1: 12}, "validation": {0: 4, 1: 4}, "test": {0: 4, 1: 4},
    }  # fmt: skip
    assert parts == split_things(images, 2, seed=0)
    assert parts != split_things(images, 2, seed=1)


def test_a_class_with_too_few_things_is_refused() -> None:
    with pytest.raises(DataError, match="class 1 has 4 things; 5 or more are needed"):
        split_things([*things(9, 1, classes=1), *[image._replace(label=1) for image in things(4, 2, classes=1)]], 2, 0)


def test_digits_are_written_once_with_labels_and_a_licence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits"
    assert digits.main([f"out={out}"]) == 0
    assert "CC BY 4.0" in capsys.readouterr().out
    splits = {name: open_split(f"{out}/{name}/*.tar", "") for name in SHARES}
    assert [split.num_samples for split in splits.values()] == [1078, 360, 359]
    assert splits["test"].class_names == tuple("0123456789")
    before = {file: file.read_bytes() for file in out.rglob("*.tar")}
    assert digits.main([f"out={out}"]) == 0
    assert "written already" in capsys.readouterr().out
    assert digits.main([f"out={tmp_path}/again"]) == 0
    assert {tmp_path / "again" / f.relative_to(out): b for f, b in before.items()} == {
        file: file.read_bytes() for file in (tmp_path / "again").rglob("*.tar")
    }
    assert digits.main([f"out={out}", "seed=1"]) == 2
    assert "another split was begun there" in capsys.readouterr().err


def test_an_interrupted_writing_continues_to_the_same_splits(tmp_path: Path) -> None:
    images = [image._replace(pixels=np.full((4, 4), n, np.uint8)) for n, image in enumerate(things(20, 1))]
    for folder in ("whole", "cut"):
        assert not is_written(str(tmp_path / folder), {"seed": 0})
    write_splits(str(tmp_path / "whole"), images, ["a", "b"], 0)
    write_splits(str(tmp_path / "cut"), images, ["a", "b"], 0)
    (tmp_path / "cut/test/manifest.json").unlink()  # as if killed before the last split's end
    assert not is_written(str(tmp_path / "cut"), {"seed": 0})
    write_splits(str(tmp_path / "cut"), images, ["a", "b"], 0)
    assert is_written(str(tmp_path / "cut"), {"seed": 0})
    whole, cut = (
        {str(f.relative_to(tmp_path / d)): f.read_bytes() for f in (tmp_path / d).rglob("*.tar")}
        for d in ("whole", "cut")
    )
    assert whole == cut


def test_lines_of_pixels_become_images_with_labels() -> None:
    line = ",".join([*(str(n % 256) for n in range(784)), "7"])
    (image,) = read_images(f"{line}\n".encode())
    assert image.label == 7
    assert image.pixels.shape == (28, 28)
    assert image.pixels[1, 0] == 28


def test_transparency_is_white_and_a_picture_is_shrunk_to_fit_and_never_grown() -> None:
    picture = Image.new("RGBA", (200, 100), (255, 0, 0, 255))
    assert on_white(picture, 64)[32, 32].tolist() == [255, 0, 0]
    assert on_white(picture, 64)[2, 32].tolist() == [255, 255, 255]
    assert on_white(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 64).min() == 255
    assert (on_white(Image.new("RGB", (8, 8)), 64) == 0).sum() == 8 * 8 * 3


def test_stamps_are_read_by_folder_and_variants_are_one_thing(tmp_path: Path) -> None:
    for folder, number in (("animals", 12), ("food", 13), ("medical", 3)):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for n in range(number):
            Image.new("RGBA", (20, 10), (n, 0, 0, 255)).save(tmp_path / folder / "deep" / f"x{chr(97 + n)}.png")
    images, names = stamps.read_stamps(tmp_path)
    assert names == ["animals", "food"]
    assert Counter(image.label for image in images) == {0: 12, 1: 13}
    paths = [Path(f"animals/{name}.png") for name in ("frog", "frog-1", "frog_mirror", "frog_2_flip")]
    assert {stamps.thing_of(path) for path in paths} == {"animals/frog"}
    assert stamps.thing_of(Path("symbols/5.png")) == "symbols/5"


@pytest.mark.parametrize("fetch", [
    lambda folder: from_npm("emoji", "1", "", folder, bool),
    lambda folder: from_debian("stamps", folder / "none", folder),
])  # fmt: skip
def test_a_missing_package_tool_is_one_sentence(fetch: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"^(npm|apt-get): .*; install .* and give this command again$"):
        fetch(tmp_path)  # type: ignore[operator]


def test_an_archive_of_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "emoji-1.tgz").write_bytes(b"other")
    monkeypatch.setattr(packages, "_run", lambda command, folder: None)
    with pytest.raises(DataError, match=r"emoji-1\.tgz is not the published file"):
        from_npm("emoji", "1", "0" * 64, tmp_path, bool)

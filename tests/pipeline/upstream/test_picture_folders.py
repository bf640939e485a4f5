"""Folders of pictures in the place of shards: packed once, found again, and refused when they change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.packing.folders import ImageFile
from data.packing.sidecars import read_sources
from data.settings import UsageError
from data.shards.split import open_split
from pipeline.core.schema import Config, DataConfig
from pipeline.core.stage import StageError
from pipeline.evaluation.truth import read_truth
from pipeline.run import main
from pipeline.upstream.picture_folders import describe_packed, pack_folders
from tests.picture_folder import CLASSES, picture, write, write_classes, write_messy

PER_CLASS = 10


def config(folder: Path, **data: Any) -> Config:
    return Config.model_validate({"run_dir": str(folder / "run"), "data": data})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_classes(tmp_path / "train", PER_CLASS)
    write_classes(tmp_path / "test", 2, first=100)
    for number in range(5):
        write(tmp_path / "unlabeled" / "a" / f"{number}.png", picture(200 + number))
    return tmp_path


def all_four(photos: Path, **data: Any) -> Config:
    return config(photos, **{name: str(photos / folder) for name, folder in FOLDERS.items()}, **data)


FOLDERS = {"labeled": "train", "test": "test", "unlabeled": "unlabeled"}


def sources(data: DataConfig, name: str) -> list[str]:
    return list(read_sources(getattr(data, name)[0].rpartition("/")[0]))


def test_folders_become_shards_and_a_share_of_the_labeled_ones_is_held_out(photos: Path) -> None:
    data = pack_folders(all_four(photos))
    splits = {name: open_split(getattr(data, name), "") for name in ("labeled", "validation", "test", "unlabeled")}
    assert {name: split.num_samples for name, split in splits.items()} == {
        "labeled": 27, "validation": 3, "test": 6, "unlabeled": 5
    }  # fmt: skip
    assert splits["labeled"].class_names == splits["test"].class_names == tuple(sorted(CLASSES))
    assert [Path(url).is_file() for url in data.held_out_hashes] == [True, True]
    assert sources(data, "unlabeled")[0].startswith(str(photos / "unlabeled"))
    assert [line.split()[:2] for line in describe_packed(str(photos / "run"))] == [
        ["data.labeled", "27"], ["data.test", "6"], ["data.unlabeled", "5"]
    ]  # fmt: skip


def test_nothing_is_packed_again(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pack_folders(all_four(photos))
    assert "3 classes, 30 images" in capsys.readouterr().out

    def read(image: ImageFile, *_: Any) -> bytes:
        raise AssertionError(image)

    monkeypatch.setattr(ImageFile, "read", read)
    assert pack_folders(all_four(photos)) == first
    assert capsys.readouterr().out == ""


def test_a_changed_folder_is_refused_by_the_names_of_its_files(photos: Path) -> None:
    pack_folders(all_four(photos))
    write(photos / "train" / "cup" / "late.png", picture(7))
    with pytest.raises(
        DataError, match=r"^data\.labeled=\S+/train: other files .*late\.png \(is new\).*another run_dir="
    ):
        pack_folders(all_four(photos))


def test_another_share_or_group_is_refused(photos: Path) -> None:
    pack_folders(all_four(photos))
    with pytest.raises(DataError, match=r"packed with other settings .*give another run_dir="):
        pack_folders(all_four(photos, validation_share=0.5))


def test_a_folder_that_is_gone_after_it_was_packed_is_not_missed(photos: Path) -> None:
    data = pack_folders(all_four(photos))
    for folder in FOLDERS.values():
        shutil.rmtree(photos / folder)
    assert pack_folders(all_four(photos)) == data


def test_a_validation_folder_takes_no_share(photos: Path) -> None:
    write_classes(photos / "val", 2, first=300)
    data = pack_folders(all_four(photos, validation=str(photos / "val")))
    assert [open_split(getattr(data, name), "").num_samples for name in ("labeled", "validation")] == [30, 6]


@pytest.mark.parametrize("group", [r"^(.*)_view\d", r"^.*/object \d+"])
def test_a_group_is_never_in_two_splits(photos: Path, group: str) -> None:
    data = pack_folders(all_four(photos, group=group, validation_share=0.3))
    objects = [{path.rpartition("_view")[0] for path in sources(data, name)} for name in ("labeled", "validation")]
    assert all(objects)
    assert not objects[0] & objects[1]


def test_a_group_that_matches_nothing_is_refused(photos: Path) -> None:
    with pytest.raises(DataError, match=r"data\.group=_wiev: found in none of the 30 names"):
        pack_folders(all_four(photos, group="_wiev"))


def test_splits_as_classes_are_refused_with_the_field_of_each(photos: Path) -> None:
    with pytest.raises(
        DataError, match=r"are splits, not classes.* data\.labeled=\S+/train data\.unlabeled=\S+/unlabeled"
    ):
        pack_folders(Config.model_validate({"run_dir": str(photos.parent / "run"), "data": {"labeled": str(photos)}}))


def test_a_folder_of_shards_is_refused_with_the_pattern(photos: Path) -> None:
    write(photos / "shards" / "a.tar", b"")
    with pytest.raises(UsageError, match=r"a folder of shards; give 'data\.unlabeled=\S+/shards/\*\.tar'"):
        pack_folders(config(photos, unlabeled=f"{photos}/shards/"))


def test_a_run_directory_inside_the_pictures_is_refused(photos: Path) -> None:
    inside = Config.model_validate({"run_dir": f"{photos}/unlabeled/run", "data": {"unlabeled": f"{photos}/unlabeled"}})
    with pytest.raises(DataError, match=r"^data\.unlabeled.* lies inside .*give a run_dir= outside"):
        pack_folders(inside)


@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
def test_every_file_is_packed_or_listed(tmp_path: Path, name: str) -> None:
    messy = write_messy(tmp_path / "photos" / "a")
    write_classes(tmp_path / "photos", 3)
    data = pack_folders(config(tmp_path, **{name: str(tmp_path / "photos"), "validation_share": 0}))
    folder = Path(getattr(data, name)[0]).parent
    packed = {path.partition("/photos/a/")[2] for path in read_sources(str(folder))} - {""}
    listed = {
        line.partition("/photos/a/")[2].partition(":")[0] for line in (folder / "rejected.txt").read_text().splitlines()
    }
    assert packed == {file for file, is_good in messy.items() if is_good}
    assert listed == {file for file, is_good in messy.items() if not is_good}


def test_generations_auto_goes_with_a_held_out_share() -> None:
    assert Config.model_validate({"generations": "auto", "data": {"labeled": "photos/train"}}).data.holds_out
    with pytest.raises(ValueError, match="generations=auto"):
        Config.model_validate({"generations": "auto", "data": {"labeled": "photos/train", "validation_share": 0}})
    with pytest.raises(ValueError, match="generations=auto"):
        Config.model_validate({"generations": "auto", "data": {"labeled": "shards/*.tar"}})


def truth_of(photos: Path, text: str) -> dict[str, list[int]]:
    write(photos / "truth.csv", text.encode())
    data = pack_folders(all_four(photos, truth=str(photos / "truth.csv")))
    paths = sources(data, "unlabeled")
    ((_, (ordinals, labels)),) = read_truth(data, sorted(CLASSES)).items()
    return {Path(paths[ordinal]).name: label for ordinal, label in zip(ordinals, labels, strict=True)}


def test_a_csv_says_the_classes_of_unlabeled_pictures_by_path(photos: Path) -> None:
    text = "path,class\ntrain/cup/0.png,cup\nunlabeled/a/0.png,cup\nunlabeled/a/3.png,e\u0301te\u0301\na/4.png,\n"
    assert truth_of(photos, text) == {"0.png": 1, "3.png": 2}


def test_the_folders_of_unlabeled_pictures_say_their_classes(photos: Path) -> None:
    write(photos / "unlabeled" / "cup" / "x" / "7.png", picture(300))
    write(photos / "unlabeled" / "été" / "8.png", picture(301))
    data = pack_folders(all_four(photos, truth=f"{photos}/unlabeled/"))
    ((_, (ordinals, labels)),) = read_truth(data, sorted(CLASSES)).items()
    paths = sources(data, "unlabeled")
    assert {Path(paths[ordinal]).name: label for ordinal, label in zip(ordinals, labels, strict=True)} == {
        "7.png": 1, "8.png": 2
    }  # fmt: skip
    with pytest.raises(
        StageError, match="no unlabeled image lies in a folder there that has the name of one of the 3 classes"
    ):
        read_truth(data.model_copy(update={"truth": str(photos / "train")}), sorted(CLASSES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na/0.png,cup\n", "columns path and class"),
        ("path,class\na/0.png,cups\n", "line 2: 'cups' is none of the 3 classes .*did you mean 'cup'"),
        ("path,class\na/0.png,cup\na/0.png,cup\n", "line 3: a/0.png is there twice"),
        ("path,class\nb/0.png,cup\n", "none of its 1 paths, such as 'b/0.png', is an unlabeled image"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(photos: Path, text: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        truth_of(photos, text)


def test_a_path_of_two_pictures_is_refused(photos: Path) -> None:
    write(photos / "unlabeled" / "b" / "0.png", picture(300))
    with pytest.raises(StageError, match=r"0\.png names .*0\.png and .*0\.png; give paths that name one image"):
        truth_of(photos, "path,class\n0.png,cup\n")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("teacher.model=resnetrs51", "model 'resnetrs51'"),
        ("data.exclude=nowhere.txt", "nowhere.txt"),
        ("data.unlabeled=nowhere", "data.unlabeled=nowhere: no such folder of images"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_packed(
    photos: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    words = [f"data.{name}={photos / folder}" for name, folder in FOLDERS.items()]
    assert main(["stage=all", f"run_dir={photos / 'run'}", "device=cpu", *words, word]) == 2
    assert message in capsys.readouterr().err
    assert not (photos / "run" / "packed").exists()


def test_with_labels_from_a_new_folder_is_packed_into_the_own_run_alone(photos: Path) -> None:
    source = pack_folders(config(photos, labeled=str(photos / "train"), unlabeled=str(photos / "unlabeled")))

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (photos / "run").rglob("*") if path.is_file()}

    packed = files()
    own = all_four(photos).model_copy(update={"run_dir": str(photos / "second"), "labels_from": str(photos / "run")})
    data = pack_folders(own)
    assert (data.labeled, data.validation, data.unlabeled) == (source.labeled, source.validation, source.unlabeled)
    assert data.test == [f"{photos}/second/packed/test/labeled/*.tar"]
    assert files() == packed

"""What is packed of a real folder, with all that lies in real folders, and what packing says of it."""

import itertools
import os
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import pack
from data.errors import DataError
from data.images.decode import Pixels
from data.packing import folders, pack_folder
from data.packing.folders import natural_order, scan
from data.shards.split import Manifest, open_split
from tests.conftest import png
from tests.data.packing.conftest import Digits, write


def sources(out: Path, split: str) -> set[str]:
    return set(pq.read_table(out / split / "sources.parquet").column("path").to_pylist())


def rejected(out: Path, root: Path, split: str = "labeled") -> dict[str, str]:
    lines = (out / split / "rejected.txt").read_text().splitlines()
    return {os.path.relpath(path, root): reason for path, _, reason in (line.partition(": ") for line in lines)}


def classes(out: Path) -> list[str] | None:
    return Manifest.model_validate_json((out / "labeled/manifest.json").read_bytes()).class_names


def test_hidden_and_system_folders_are_no_classes_and_are_listed(photos: Path, tmp_path: Path) -> None:
    image = (photos / "one/0.png").read_bytes()
    for name in (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", ".thumbnails", "lost+found"):
        write(photos / name / "a.png", image)
        write(photos / "one" / name / "a.png", image)
    for name in (".DS_Store", "one/Thumbs.db", "one/._0.png", "desktop.ini"):
        write(photos / name)
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0)
    assert classes(tmp_path / "out") == ["one", "two"]
    found = rejected(tmp_path / "out", photos)
    assert len(found) == 2 * 6 + 4
    assert found["__MACOSX"] == found["one/@eaDir"] == "a hidden or system folder"
    assert found[".DS_Store"] == found["one/Thumbs.db"] == found["one/._0.png"] == "a hidden or system file"
    assert len(sources(tmp_path / "out", "labeled")) == 20


def test_links_and_what_cannot_be_read_are_listed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = write(tmp_path / "elsewhere/link.png", (photos / "one/0.png").read_bytes())
    (photos / "one/file.png").symlink_to(elsewhere)  # a file's link is a file
    (photos / "one/folder").symlink_to(elsewhere.parent)
    (photos / "one/dead.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "one/loop.png").symlink_to(photos / "one/loop.png")
    os.mkfifo(photos / "two/pipe.png")
    write(photos / "two/locked.png")
    (photos / "two/closed").mkdir()
    readable, scandir = os.access, os.scandir
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked.png" and readable(path, mode))

    def refuse(path: Path | int) -> object:  # root may read all: no permission bits help here
        if not isinstance(path, int) and Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0)
    assert rejected(tmp_path / "out", photos) == {
        "one/folder": "a link to a folder; these are not followed",
        "one/dead.png": "a dead link",
        "one/loop.png": "a dead link",
        "two/pipe.png": "not a regular file",
        "two/locked.png": "cannot be read (no permission)",
        "two/closed": "a folder that cannot be read (Permission denied)",
    }
    assert f"{photos}/one/file.png" in sources(tmp_path / "out", "labeled")


def test_a_disk_that_fails_names_the_file_and_the_same_command_continues(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, opened = [f"images={photos}", f"out={tmp_path}/out", "validation=0", "samples_per_shard=5"], Path.open

    def fail(path: Path, *words: Any, **options: Any) -> object:
        if path.name == "7.png":
            raise OSError(5, "Input/output error")  # as a read raises it: without a name
        return opened(path, *words, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", fail)
        assert pack.main(words) == 2
    assert f"{photos}/one/7.png: Input/output error" in capsys.readouterr().err
    assert pack.main(words) == 0
    assert len(sources(tmp_path / "out", "labeled")) == 20


def test_a_class_folder_that_is_a_link_is_refused(photos: Path, tmp_path: Path) -> None:
    (photos / "two").rename(tmp_path / "elsewhere")
    (photos / "two").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="two: a link to a folder, and these are not followed"):
        pack_folder.pack(str(photos), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_class_whose_images_are_none_is_refused_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    write(photos / "three/page.jpg", b"<html>404</html>")
    with pytest.raises(
        DataError, match=r"class 'three': none of its images .* can be decoded \(.*page\.jpg: not a JPEG"
    ):
        pack_folder.pack(str(photos), str(tmp_path / "out"))
    assert not (tmp_path / "out/labeled").exists()
    write(photos / "three/whole.png", (photos / "one/0.png").read_bytes())
    pack_folder.pack(str(photos), str(tmp_path / "other"), validation=0)
    assert classes(tmp_path / "other") == ["one", "three", "two"]


def test_other_names_of_jpeg_are_packed_as_jpg(photos: Path, tmp_path: Path, photo: Pixels) -> None:
    from tests.copies import jpeg

    for number, extension in enumerate(("jfif", "JPE", "JPG", "Jpeg")):
        write(photos / f"one/{number}.{extension}", jpeg(photo[number : number + 64, :64]))
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0)
    split = open_split(f"{tmp_path}/out/labeled/*.tar", f"{tmp_path}/index")
    found = split.shards[0].index().column("extension").to_pylist()
    assert sorted(found) == ["jpeg"] + ["jpg"] * 3 + ["png"] * 20


@pytest.mark.parametrize("out", ["", "shards", "one"])
def test_an_output_inside_the_images_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(photos.parent)
    with pytest.raises(DataError, match="lies inside images="):
        pack_folder.pack(str(photos), f"photos/{out}")


def test_shards_in_the_folder_of_the_images_are_refused(tmp_path: Path, photos: Path) -> None:
    photos.rename(tmp_path / "labeled")
    with pytest.raises(DataError, match=r"labeled lies inside images="):
        pack_folder.pack(str(tmp_path / "labeled"), str(tmp_path))


def test_splits_for_classes_are_refused_with_the_commands_to_type(photos: Path, tmp_path: Path) -> None:
    photos.rename(tmp_path / "train")
    (tmp_path / "all photos").mkdir()
    (tmp_path / "train").rename(tmp_path / "all photos/train")
    for name in ("val", "test", "unlabeled"):
        write(tmp_path / f"all photos/{name}/one/a.png", (tmp_path / "all photos/train/one/0.png").read_bytes())
    with pytest.raises(DataError) as caught:
        pack_folder.pack(f"{tmp_path}/all photos", "shards")
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        f"python -m data.pack 'images={tmp_path}/all photos/{name}' {words}"
        for name, words in (
            ("test", "out=shards/test validation=0"),
            ("train", "out=shards validation=0"),
            ("unlabeled", "out=shards labeled=false"),
            ("val", "out=shards/val validation=0"),
        )
    ]
    pack_folder.pack(f"{tmp_path}/all photos", str(tmp_path / "out"), labeled=False)


def latin1(folder: Path, name: bytes) -> Path:
    return folder / os.fsdecode(name)


def test_a_file_name_that_is_not_utf_8_is_packed_and_recorded_printably(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(latin1(photos / "one", b"caf\xe9.png"), b"no image")
    write(latin1(photos / "one", b"\xff.txt"))
    write(latin1(photos / "two", b"copy\xe9.png"), (photos / "two/12.png").read_bytes())
    words = [f"images={photos}", f"out={tmp_path}/out", "validation=0"]
    assert pack.main(words) == 0
    assert f"{photos}/two/copy\\xe9.png" in sources(tmp_path / "out", "labeled")
    assert set(rejected(tmp_path / "out", photos)) == {"one/\\xff.txt", "one/caf\\xe9.png"}
    assert "two/12.png = two/copy\\xe9.png" in capsys.readouterr().out
    assert pack.main(words) == 0  # and the same command finds it done
    assert pack.main([words[0], f"out={tmp_path}/unlabeled", "labeled=false"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"caf\xe9", r"'caf\\udce9' has a name that is not UTF-8"),
        (b"a\nb", r"'a\\nb' has a line break or another control character"),
        ("a\u2028b".encode(), r"'a\\u2028b' has a line break"),
        (b"a\x7fb", r"'a\\x7fb' has a line break or another control"),
    ],
)
def test_a_class_name_that_cannot_be_written_is_refused_before_anything_is(
    photos: Path, tmp_path: Path, name: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "two").rename(latin1(photos, name))
    assert pack.main([f"images={photos}", f"out={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert message.replace("\\\\", "\\") in error
    assert not (tmp_path / "out").exists()


def test_class_names_are_kept_in_one_unicode_form_and_sorted_by_it(photos: Path, tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    (photos / "one").rename(photos / decomposed)
    (photos / "two").rename(photos / "zoo")
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0)
    assert classes(tmp_path / "out") == ["zoo", composed]  # é comes after z, as e does not
    split = open_split(f"{tmp_path}/out/labeled/*.tar", f"{tmp_path}/index")
    paths = pq.read_table(tmp_path / "out/labeled/sources.parquet").column("path").to_pylist()
    for path, label in zip(paths, split.shards[0].index().column("label").to_pylist(), strict=True):
        assert ("/zoo/" in path) == (label == 0)
    write(photos / composed / "a.png", b"x")
    with pytest.raises(DataError, match=r"are one name, in two ways to write its accents"):
        pack_folder.pack(str(photos), str(tmp_path / "other"))


def test_natural_order_is_timms() -> None:
    from timm.utils.misc import natural_key

    names = ["10", "2", "1", "B", "a", "img12b", "img2", "Zoo 9", "zoo 10", "x"]
    assert natural_order(names) == sorted(names, key=natural_key)


@given(st.lists(st.text(max_size=6), unique=True, max_size=8))
def test_any_names_have_a_natural_order(names: list[str]) -> None:
    assert sorted(natural_order(names)) == sorted(names)


def test_the_summary_says_classes_splits_what_was_left_out_and_the_lines_to_use(
    tmp_path: Path, digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "photos", tmp_path / "shards"
    for number, image in enumerate(digits[0][:31]):
        name = "10" if number < 20 else "2" if number < 30 else "1"
        write(root / name / f"{number}.png", png(image))
    write(root / "10/copy (1).png", (root / "10/0.png").read_bytes())
    write(root / "2/of another class.png", (root / "10/1.png").read_bytes())
    write(root / "2/broken.png")
    write(root / "2/notes.txt")
    pack_folder.pack(str(root), str(out), validation=0.2)
    text = capsys.readouterr().out
    for line in (
        "3 classes, 33 images: 1 ('1') to 21 ('10') in a class",
        "  no validation image of 1 class (1): their only images, or groups, are for training",
        f"left out: 2 ({out}/labeled/rejected.txt and {out}/validation/rejected.txt say which and why)",
        "  1 × not an image file (jpg, jpeg, png, webp)",
        "  1 × cannot be decoded",
        "byte-identical: 2 groups of 4 images in all, each kept in one split: 10/0.png = 10/copy (1).png, "
        "10/1.png = 2/of another class.png",
        "  1 group in more than one class, so that some labels are wrong: 10/1.png = 2/of another class.png",
        f'    labeled: ["{out}/labeled/*.tar"]',
        f'    validation: ["{out}/validation/*.tar"]',
        f'    held_out_hashes: ["{out}/validation/hashes.parquet"]',
    ):
        assert line in text.splitlines()
    assert "class 1 is '10'. timm's reader of folders sorts numbers by value and ignores case: there it is '2'" in text
    assert "  labeled    " in text
    pack_folder.pack(str(root), str(out), validation=0.2)
    again = capsys.readouterr().out
    assert again == f"{out}/labeled: packed already\n{out}/validation: packed already\n{text}"


def test_an_image_of_each_class_leaves_nothing_to_hold_out_and_packing_says_so(
    tmp_path: Path, digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, image in enumerate(digits[0][:3]):
        write(tmp_path / f"photos/{number}/a.png", png(image))
    pack_folder.pack(str(tmp_path / "photos"), str(tmp_path / "out"), validation=0.1)
    text = capsys.readouterr().out
    assert "validation none, though validation=0.1: no class has two images" in text
    assert "validation:" not in text
    assert "test:" not in text


def test_one_class_alone_gets_a_question(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "two").rename(tmp_path / "elsewhere")
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0)
    text = capsys.readouterr().out
    assert "one class alone teaches nothing; is images= the folder that holds the class folders?" in text
    assert f'    test: ["{tmp_path}/out/labeled/*.tar"]' in text


@settings(max_examples=12, deadline=None)
@given(
    copies=st.lists(st.tuples(st.integers(0, 19), st.sampled_from(["one", "two"])), max_size=8), seed=st.integers(0, 9)
)
def test_no_bytes_are_ever_in_both_splits(
    tmp_path_factory: pytest.TempPathFactory, digits: Digits, copies: list[tuple[int, str]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("copies")
    contents = [png(image) for image in digits[0][:20]]
    for number, content in enumerate(contents):
        write(folder / "photos" / ("one" if number < 10 else "two") / f"{number}.png", content)
    for number, (position, name) in enumerate(copies):
        write(folder / "photos" / name / f"{position} ({number}).png", contents[position])
    pack_folder.pack(str(folder / "photos"), str(folder / "out"), validation=0.3, seed=seed)
    held, train = (
        {Path(path).read_bytes() for path in sources(folder / "out", split)} for split in ("validation", "labeled")
    )
    assert not held & train
    assert len(held | train) == 20


def test_views_of_one_object_are_kept_in_one_split(tmp_path: Path, digits: Digits) -> None:
    for number, image in enumerate(digits[0][:80]):
        name = f"{'cup' if number < 40 else 'plate'}/{number // 4}_view{number % 4}.png"
        write(tmp_path / "photos" / name, png(image))
    words = [f"images={tmp_path}/photos", f"out={tmp_path}/out", "validation=0.2", r"group=^(.*)_view\d+"]
    assert pack.main(words) == 0
    objects = [
        {path.rpartition("_")[0] for path in sources(tmp_path / "out", split)} for split in ("labeled", "validation")
    ]
    assert not objects[0] & objects[1]
    assert [len(part) for part in objects] == [16, 4]
    assert pack.main([*words[:-1], "group="]) == 2


def test_on_a_slow_disk_many_files_are_inspected_at_once_and_found_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(400):
        write(tmp_path / "ab"[number % 2] / f"{number:03d}.{'txt' if number % 7 == 0 else 'png'}")
    expected = list(folders.scan(tmp_path))
    together, calls, stat = threading.Barrier(4), itertools.count(), os.stat

    def wait_for_others(path: Any, **options: Any) -> os.stat_result:
        if threading.current_thread() is not threading.main_thread() and next(calls) < together.parties:
            together.wait(60)
        return stat(path, **options)

    monkeypatch.setattr(folders, "_SLOW_S", 0.0)
    monkeypatch.setattr(os, "stat", wait_for_others)
    assert list(folders.scan(tmp_path)) == expected
    assert next(calls) > together.parties


def test_what_is_found_does_not_depend_on_the_order_of_a_listing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(photos / "one/deep/er/a.png")
    before, scandir = list(scan(photos)), os.scandir

    class Reversed:
        def __init__(self, path: Path) -> None:
            with scandir(path) as scan:
                self._entries = sorted(scan, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self._entries

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert list(scan(photos)) == before

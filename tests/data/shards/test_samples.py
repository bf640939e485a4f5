"""Members of a tar become samples: no image is lost without a row or a count, and the right one of several is taken."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.findings import Findings, findings_of
from data.shards.image_reader import check_labeled
from data.shards.index import build_index
from data.shards.samples import Sample, image_extension, image_format, iterate_samples, mark_parted
from data.shards.split import open_split
from data.tables import write_table

Member = tuple[str, bytes]
APPLE_DOUBLE = b"\0\5\26\7\0\2\0\0Mac OS X        "
JPEG_START = b"\xff\xd8\xff\xe0"


def samples(names: list[str] | list[Member]) -> list[Sample]:
    found = list(iterate_samples(io.BytesIO(tar(names))))
    mark_parted(found)
    return found


def tar(names: list[str] | list[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in names:
            name, content = (entry, b"3") if isinstance(entry, str) else entry
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def usable(found: list[Sample]) -> list[tuple[str, str]]:
    return [(sample.key, sample.image_field) for sample in found if not sample.problem]


def index(path: Path, names: list[str] | list[Member]) -> tuple[list[str], Findings]:
    path.write_bytes(tar(names))
    table = build_index(str(path))
    return table.column("problem").to_pylist(), findings_of(table)


def test_dates_in_names_are_no_samples_but_a_row_for_each_image() -> None:
    found = samples([f"2024.05.{day:02d}.jpg" for day in range(1, 29)])
    assert [sample.key for sample in found] == [f"2024.05.{day:02d}" for day in range(1, 29)]
    assert {sample.problem for sample in found} == {
        "28 images have the key '2024' and none is 2024.jpg, as the first dot of a name ends its key; rename the files, or pack their "
        "folder with data.pack"
    }


@pytest.mark.parametrize(
    "names", [["1.depth.png", "1.jpg"], ["1.jpg", "1.depth.png"], ["1.jpg", "1.png", "1.cls"], ["1.png", "1.jpg"]]
)
def test_the_image_is_the_member_whose_field_is_an_extension(names: list[str]) -> None:
    (found,) = samples(names)
    assert (found.image_field, found.extension, found.problem) == ("jpg", "jpg", "")
    assert found.ignored == tuple(name[2:] for name in names if name.endswith("png"))


def test_a_single_image_with_a_dot_in_its_name_is_the_samples() -> None:
    (found,) = samples(["b.v2.png", "b.cls"])
    assert (found.key, found.extension, found.label, found.ignored) == ("b", "png", 3, ())


@pytest.mark.parametrize("name", ["1.jfif", "1.JPE", "1.JPG", "1.Jpeg", "1.PNG", "1.WebP"])
def test_any_name_of_a_format_is_an_image(name: str) -> None:
    (found,) = samples([name, "1.Cls"])
    assert (found.problem, found.label) == ("", 3)
    assert found.extension == {"jfif": "jpg", "jpe": "jpg"}.get(name[2:].lower(), name[2:].lower())
    assert image_extension(name) == found.extension


SYSTEM_FILES = [
    "._{n}.cls",
    "._{n}.jpg",
    "__MACOSX/._{n}.jpg",
    "__MACOSX/x/{n}.txt",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".nfs{n}",
]


@pytest.mark.parametrize("name", SYSTEM_FILES)
@pytest.mark.parametrize("folder", ["", "a/b/"])
def test_files_of_operating_systems_part_no_samples(name: str, folder: str) -> None:
    members = [
        member
        for n in range(20)
        for field in ("cls", "jpg")
        for member in ((folder + name.format(n=n), APPLE_DOUBLE), (f"{folder}{n}.{field}", b"3"))
    ]
    found = samples(members)
    assert [(s.key, s.label, s.problem) for s in found] == [(f"{folder}{n}", 3, "") for n in range(20)]


def test_an_image_under_such_a_name_is_a_row() -> None:
    found = samples([("1.cls", b"3"), ("._1.jpg", JPEG_START), ("1.jpg", b"x")])
    assert [(s.key, s.problem) for s in found] == [
        ("._1.jpg", "an image under the name of a system file; rename it"), ("1", ""),
    ]  # fmt: skip


def test_parts_of_a_sample_that_lie_apart_name_key_and_remedy() -> None:
    found = samples([f"{n}.{field}" for field in ("cls", "jpg", "json") for n in range(15)])
    assert usable(found) == [(str(n), "jpg") for n in range(15)]
    parted = [sample for sample in found if sample.problem]
    assert len(parted) == 30
    assert (
        parted[3].problem
        == "the key '3' comes back: members of a sample must be adjacent (make the tar with --sort=name)"
    )


def test_a_depth_map_far_from_its_image_is_not_labeled() -> None:
    for fields in (("jpg", "depth.png"), ("depth.png", "jpg")):
        found = samples([f"{n}.{field}" for field in fields for n in range(3)])
        assert usable(found) == [(str(n), "jpg") for n in range(3)]
        assert all("comes back" in sample.problem for sample in found if sample.image_field != "jpg")


def test_a_key_that_comes_back_with_an_image_of_its_own_is_a_sample() -> None:
    assert usable(samples(["a.jpg", "b.jpg", "a.jpg", "a.JPG"])) == [
        ("a", "jpg"),
        ("b", "jpg"),
        ("a", "jpg"),
        ("a", "jpg"),
    ]
    assert usable(samples(["a.v1.jpg", "b.jpg", "a.v2.jpg"])) == [("a", "v1.jpg"), ("b", "jpg"), ("a", "v2.jpg")]


def test_a_label_that_lies_apart_is_named_in_a_labeled_shard(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar(["1.jpg", "2.jpg", "1.cls", "2.cls"]))
    with pytest.raises(
        DataError, match=r"x\.tar, sample 2 \(key '1'\): the key '1' comes back: members of a sample must be adj"
    ):
        check_labeled(open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")), 10)


def test_maps_beside_images_are_counted_and_no_fault(tmp_path: Path) -> None:
    names = [f"{n}.{field}" for n in range(40) for field in ("cls", "depth.png", "jpg", "mask.png")]
    problems, findings = index(tmp_path / "x.tar", names)
    assert problems == [""] * 40
    assert findings == Findings(ignored=80, ignored_fields="depth.png, mask.png")
    check_labeled(open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")), 10)


@pytest.mark.parametrize(
    "more",
    [
        [f"2024.05.{day:02d}.jpg" for day in range(1, 29)],  # beside 2024.jpg: other fields than a sensor's
        ["2024.v2.jpg", "2024.v3.jpg"],  # beside one of 41 samples
        ["2024.png"],
    ],
)
def test_images_that_only_share_a_key_are_strays(tmp_path: Path, more: list[str]) -> None:
    names = [f"{n}.{field}" for n in range(40) for field in ("cls", "jpg")] + ["2024.cls", "2024.jpg", *more]
    problems, findings = index(tmp_path / "x.tar", names)
    assert problems == [""] * 41
    assert (findings.ignored, findings.stray) == (len(more), len(more))
    with pytest.raises(
        DataError, match=rf"x\.tar: {len(more)} images lie beside the image of a sample \(.*rename the files"
    ):
        check_labeled(open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")), 10)


def test_too_many_names_are_no_kinds_of_images_however_small_the_shard(tmp_path: Path) -> None:
    bands = [f"1.b{band:02d}.png" for band in range(16)]
    assert index(tmp_path / "x.tar", ["1.jpg", *bands])[1].stray == 0
    assert index(tmp_path / "x.tar", ["1.jpg", *bands, "1.b16.png"])[1].stray == 17


def test_an_index_of_an_earlier_version_tells_its_problems_and_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar(["1.jpg", "2.cls"])[:2051])
    before = open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")).shards[0]
    assert before.findings.damage == "truncated or damaged tar: no end-of-archive marker, at byte 2048"
    table = before.index().replace_schema_metadata({"odd_keys": "0", "odd_key": "", "shard_bytes": str(before.bytes)})
    write_table(before.index_url, table)
    known = {before.url: [before.bytes, 3, before.index_sha256, 0, ""]}
    (tmp_path / "index/shards.json").write_text(json.dumps({"schema_version": 1, "shards": known}))
    for _ in range(2):
        (after,) = open_split(f"{tmp_path}/x.tar", str(tmp_path / "index")).shards
        assert after == before
    assert not (after.index().schema.metadata or {}).get(b"rule"), "it was not made again"


names = st.tuples(
    st.sampled_from(["", "a/", "a/b/", "__MACOSX/"]),
    st.sampled_from(["1", "2", "3", "._1", "", ".DS_Store"]),
    st.sampled_from(
        ["jpg", "JPG", "jpeg", "png", "webp", "jfif", "depth.png", "05.01.jpg", "05.02.jpg", "cls", "Cls", "json", ""]
    ),
).map(lambda parts: f"{parts[0]}{parts[1]}.{parts[2]}")


@given(st.lists(st.tuples(names, st.sampled_from([b"3", JPEG_START, APPLE_DOUBLE])), max_size=30))
def test_every_image_member_is_a_row_or_counted(members: list[Member]) -> None:
    """But for AppleDouble files, which have the names of images."""
    found = samples(members)
    images = [
        name for name, content in members if image_extension(name) and (content == JPEG_START or not is_system(name))
    ]
    rows = [sample for sample in found if sample.size]
    assert len(rows) + sum(len(sample.ignored) for sample in found) == len(images)
    assert len({sample.offset for sample in rows}) == len(rows)


def is_system(name: str) -> bool:
    return name.startswith("__MACOSX/") or name.rpartition("/")[2].startswith("._")


@given(
    st.lists(
        st.tuples(st.text("abc", min_size=1, max_size=3), st.sampled_from([["jpg"], ["cls", "jpg"], ["png"]])),
        max_size=12,
    )
)
def test_of_ordinary_shards_rows_are_as_they_always_were(entries: list[tuple[str, list[str]]]) -> None:
    """One image a sample, its members side by side: the rule before this one gave the same index."""
    members = [f"{key}{n}.{field}" for n, (key, fields) in enumerate(entries) for field in fields]
    found = samples(members)
    assert [(s.key, s.extension, s.label, s.problem) for s in found] == [
        (f"{key}{n}", fields[-1], 3 if "cls" in fields else None, "") for n, (key, fields) in enumerate(entries)
    ]
    assert all(not sample.ignored and sample.size == 1 for sample in found)


def test_a_file_is_known_by_its_first_bytes_and_an_avi_is_no_webp() -> None:
    webp, avi = (b"RIFF\x10\x00\x00\x00" + kind for kind in (b"WEBPVP8 ", b"AVI LIST"))
    assert [image_format(content) for content in (webp, avi, b"\x89PNG\r\n", b"\xff\xd8\xff\xe0", b"GIF8", b"")] == [
        "webp", None, "png", "jpg", None, None,
    ]  # fmt: skip

"""Exports and servers of others: a manifest names files of its own folder alone, and no member, header or table takes all memory."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import base_names
from data.base_names import is_base_name, read_limited, read_pointer
from data.errors import DataError
from data.labels.overlay import RowFilter
from data.labels.pseudo_labels import PseudoLabels
from data.labels.sources import COLUMNS, archive_members
from data.labels.sources import archives as labels_of_archives
from data.labels.sources.archives import exported
from data.labels.sources.server import _below
from data.shards.tar import archive, end_of_archive, member_header
from tests.conftest import png
from tests.label_server import label_server

IMAGE = png(np.zeros((8, 8), np.uint8))
SAID = {"label": 3, "class_name": "d", "confidence": 0.5, "top_k": [[3, 0.5]], "rest": 0.5, "copies": 1}
PATHS = [
    "../../x.tar",
    "/etc/x.tar",
    "a/../x.tar",
    "..\\x.tar",
    "a\0b.tar",
    "a\nb.tar",
    "sub/x.tar",
    "./x.tar",
    "//x.tar",
]


def members(key: str = "a", said: Any = None, **other: bytes) -> list[tuple[str, bytes]]:
    found = {"png": IMAGE, "json": json.dumps(SAID if said is None else said).encode()} | other
    return [(f"{key}.{field}", content) for field, content in sorted(found.items())]


def table(label: Sequence[Any] = (3,)) -> pa.Table:
    size = len(label)
    columns: dict[str, Any] = {name: [None] * size for name in COLUMNS} | {
        "__key__": ["a"] * size, "label": label, "confidence": pa.array([0.5] * size, pa.float32()), "copies": [1] * size,
    }  # fmt: skip
    return pa.table(columns)


def write(folder: Path, tar: bytes, rows: pa.Table | None = None, **changes: Any) -> Path:
    """An export of one shard; `changes` are of its manifest's record."""
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    (folder / "a.tar").write_bytes(tar)
    pq.write_table(table() if rows is None else rows, folder / "labels/a.parquet")
    record = {
        "name": "a.tar",
        "bytes": len(tar),
        "num_samples": 1,
        "index_sha256": "",
        "sha256": hashlib.sha256(tar).hexdigest(),
    }
    manifest = {"class_names": list("abcdefghij"), "shards": [record | changes]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def labels_in(folder: Path) -> list[int]:
    return [label for _, label in PseudoLabels(str(folder)).dataset(lambda image: 0)]


def test_a_whole_export_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, b"".join(archive(members(other=b"x" * 5000))))
    assert labels_in(folder) == [3]
    assert PseudoLabels(str(folder)).table().num_rows == 1


@pytest.mark.parametrize("name", PATHS)
def test_a_manifest_that_names_a_path_is_refused_and_nothing_is_read(tmp_path: Path, name: str) -> None:
    secret = write(tmp_path / "secret", b"".join(archive(members())))
    (tmp_path / "x.tar").write_bytes((secret / "a.tar").read_bytes())
    folder = write(tmp_path / "exports/v1", b"".join(archive(members())), name=name)
    with pytest.raises(DataError, match=r"manifest\.json: it names .* expected the name of a file beside it"):
        PseudoLabels(str(folder))


@pytest.mark.parametrize("pointer", ["../secret", "/etc", "..", ".", "", "v1/..", "v1\nv2", "x" * 2000])
def test_a_pointer_names_a_folder_beside_it(tmp_path: Path, pointer: str) -> None:
    write(tmp_path / "secret", b"".join(archive(members())))
    write(tmp_path / "exports/v1", b"".join(archive(members())))
    latest = tmp_path / "exports/latest"
    latest.write_text("v1\n")
    assert labels_in(latest.parent) == [3]
    latest.write_text(pointer)
    with pytest.raises(DataError, match="latest: "):
        PseudoLabels(str(latest.parent))
    latest.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="latest: expected a name in UTF-8"):
        read_pointer(str(latest))


@pytest.mark.parametrize("url", ["../../x.tar", "/x.tar", "shards/../../x.tar", "shards/..%2f..%2fx.tar", "shards/%2e%2e/x.tar",
                                 "shards/a%00.tar", "shards/a%5cb.tar", "file:///etc/x.tar", "//evil.example/x.tar",
                                 "https://evil.example/x.tar", "http://user@labels.example/v1/x.tar", "?x", ""])  # fmt: skip
def test_a_server_names_files_below_its_manifest(url: str) -> None:
    address = "http://labels.example/v1/manifest.json"
    assert _below(address, "shards/a%20b.tar?classes=3") == "http://labels.example/v1/shards/a%20b.tar?classes=3"
    if url in ("?x", ""):  # the manifest itself: in the folder, and no tar
        assert _below(address, url).startswith(address)
        return
    with pytest.raises(DataError, match=r"manifest\.json: it names"):
        _below(address, url)


@given(
    st.lists(st.sampled_from(["..", ".", "/", "\\", "%2e", "%2f", "%5c", "a", "?", "#", "\0", "\t", ":"]), max_size=8)
)
def test_no_name_leads_out_of_the_folder(parts: list[str]) -> None:
    name = "".join(parts)
    home = Path("/srv/export")
    if is_base_name(name):
        assert (home / name).parent == home
        assert (home / name).name == name
    record = {"name": f"{name}.tar", "bytes": 1, "num_samples": 1, "index_sha256": "", "sha256": ""}
    content = json.dumps({"shards": [record]}).encode()
    for folder in (str(home), "http://labels.example/v1"):
        try:
            found = exported(folder, f"{folder}/manifest.json", content, RowFilter())
        except DataError:
            continue
        url = found.archives[0].url
        assert url.rpartition("/")[0] == folder
        if folder.startswith("http"):
            assert urljoin(url, url) == url, "no part of it is resolved"
            assert not {"%2f", "%5c", "%2e"} & set(re.findall("%[0-9a-f]{2}", url.lower().replace("%25", "")))


def test_names_are_quoted_in_addresses(tmp_path: Path) -> None:
    with label_server(write(tmp_path, b"".join(archive(members())))) as web:
        content = json.dumps(json.loads((tmp_path / "manifest.json").read_text()) | {"shards": []}).encode()
        assert exported(web.address, web.address, content, RowFilter()).archives == ()
    record = {"name": "a b%2f#?.tar", "bytes": 1, "num_samples": 1, "index_sha256": "", "sha256": ""}
    (found,) = exported("http://h/v1", "u", json.dumps({"shards": [record]}).encode(), RowFilter()).archives
    assert (found.url, found.labels_url) == (
        "http://h/v1/a%20b%252f%23%3F.tar",
        "http://h/v1/labels/a%20b%252f%23%3F.parquet",
    )


def oversized(field: str, size: int) -> bytes:
    """An archive whose member says that it has `size` bytes, and has few."""
    tar = bytearray()
    for name, content in members():
        tar += member_header(name, size if name.endswith(field) else len(content)) + content
        tar += bytes(-len(tar) % 512)
    return bytes(tar) + end_of_archive(len(tar))


@pytest.mark.parametrize(
    ("field", "size"), [("png", 3 << 30), ("png", (256 << 20) + 1), ("json", 3 << 30), ("json", (1 << 20) + 1)]
)
def test_a_member_that_says_it_is_huge_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, size: int
) -> None:
    read: list[int] = []
    folder = write(tmp_path, oversized(field, size))
    original = labels_of_archives._Hashing.read

    def counted(self: Any, length: int) -> bytes:
        read.append(length)
        return original(self, length)

    monkeypatch.setattr(labels_of_archives._Hashing, "read", counted)
    with pytest.raises(DataError, match=rf"a\.tar: 'a\.{field}' has {size:,} bytes; expected .* at most"):
        labels_in(folder)
    assert max(read) <= 1 << 20


def extended(kind: bytes, content: bytes, number: int = 1, size: int | None = None) -> bytes:
    """An archive that begins with extended headers."""
    tar = bytearray()
    for _ in range(number):
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, len(content) if size is None else size
        tar += info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    for name, body in members():
        tar += member_header(name, len(body)) + body + bytes(-len(body) % 512)
    return bytes(tar) + end_of_archive(len(tar))


@pytest.mark.parametrize(
    "kind",
    [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK],
)
@pytest.mark.parametrize(
    ("content", "number", "size"),
    [(b"1" * ((1 << 20) + 1), 1, None), (b"11 path=abc\n", 3000, None), (b"", 1, 3 << 30), (b"", 1, -512)],
    ids=["digits", "chained", "3 GB", "negative"],
)
def test_extended_headers_are_bounded(
    tmp_path: Path, kind: bytes, content: bytes, number: int, size: int | None
) -> None:
    with pytest.raises(DataError, match=r"a\.tar"):
        labels_in(write(tmp_path, extended(kind, content, number, size)))


def test_a_long_name_in_a_pax_header_is_read(tmp_path: Path) -> None:
    key = "k" * 200
    assert labels_in(write(tmp_path, b"".join(archive(members(key))))) == [3]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"label": "3"}, "label: "), ({"label": -1}, "label: "), ({"label": 10}, "label 10, but there are 10 classes"),
        ({"label": True}, "label: "), ({"label": 3.5}, "label: "), ({"label": None}, "label: "), ({"copies": -1}, "copies: "),
        ({"copies": 1 << 40}, "copies: "), ({"confidence": "x"}, "confidence: "), ({"confidence": float("nan")}, "confidence: "),
        ({"confidence": 1e300}, "confidence: "),
    ],
)  # fmt: skip
def test_a_label_that_is_none_is_refused(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.tar, key 'a': .*{message}"):
        labels_in(write(tmp_path, b"".join(archive(members(said=SAID | said)))))


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"[" * 100_000, b'"x"', b"\xff", b"1" * 9000])
def test_a_json_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.tar, key 'a': damaged \.json"):
        labels_in(write(tmp_path, b"".join(archive(members(json=content)))))


def test_samples_of_another_form_are_refused(tmp_path: Path) -> None:
    forms: Mapping[str, list[tuple[str, bytes]]] = {
        "several": members(jpg=IMAGE), "expected an image and": [("a.png", IMAGE)], "expected one": [*members(), ("a.json", b"{}")],
    }  # fmt: skip
    for message, some in forms.items():
        with pytest.raises(DataError, match=message):
            labels_in(write(tmp_path, b"".join(archive(some))))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"'a\.png' is a link"):
        labels_in(write(tmp_path, buffer.getvalue()))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table(["3"]), "column label: string; expected labels"),
        (table([None]), "column label: null; expected labels"),
        (table([3, 3]), "2 labels, and 1 samples by the manifest"),
        (table([10]), "label 10, but there are 10 classes"),
        (table().drop_columns(["copies"]), "damaged or cut short .it has no column 'copies'"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, rows: pa.Table, message: str) -> None:
    folder = write(tmp_path, b"".join(archive(members())), rows)
    with pytest.raises(DataError, match=rf"labels/a\.parquet: {message}"):
        PseudoLabels(str(folder)).table()


def test_files_that_are_far_too_large_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, b"".join(archive(members())))
    with label_server(folder) as web:
        for url in (str(folder / "manifest.json"), f"{web.address}/manifest.json"):
            assert read_limited(url, 10_000)
            with pytest.raises(DataError, match=r"manifest\.json: .* bytes; expected 10 at most"):
                read_limited(url, 10)
        monkeypatch.setattr(labels_of_archives, "_TABLE_BYTES", 100)
        with pytest.raises(DataError, match=r"a\.parquet: .* bytes; expected 100 at most"):
            PseudoLabels(web.address).table()
        monkeypatch.setattr(labels_of_archives, "_MANIFEST_BYTES", 100)
        for source in (str(folder), web.address):
            with pytest.raises(DataError, match=r"manifest\.json: .* bytes; expected 100 at most"):
                PseudoLabels(source)


def test_any_damage_is_a_damaged_archive_or_no_damage(tmp_path: Path) -> None:
    """Random bytes of an archive changed, cut, or doubled: samples, or a DataError."""
    source, whole = random.Random(0), b"".join(archive([*members("a"), *members("b")]))
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            place = source.choice((source.randrange(1536), source.randrange(len(whole))))
            damaged[place] = source.choice(
                (source.randrange(256), 0, ord("x"), ord("g"), ord("L"), ord("S"), 0x80, 0xFF)
            )
        damaged[148:156] = b"%06o\0 " % (
            sum(damaged[:148]) + 256 + sum(damaged[156:512])
        )  # a right checksum: it is looked at
        cut = bytes(damaged[: source.choice((len(whole), source.randrange(len(whole))))])
        with suppress(DataError):
            for sample in archive_members.archived_samples(io.BytesIO(cut), "x.tar"):
                labels_of_archives._labeled(sample, 10, "x.tar")


def test_names_have_a_length() -> None:
    assert is_base_name("x" * 255)
    assert not is_base_name("x" * 256)
    assert not is_base_name("é" * 128)
    with pytest.raises(DataError, match="…"):
        base_names.check_base_name("/" * 10_000, "manifest.json")

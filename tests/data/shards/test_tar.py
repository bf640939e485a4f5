"""Archives made of bytes that follow from names and sizes are those that Python's tarfile writes."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards.tar import archive, member_header, member_headers

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1, max_size=100)


def by_tarfile(members: list[tuple[str, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@given(st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=8))
def test_an_archive_has_the_bytes_that_tarfile_writes(members: list[tuple[str, bytes]]) -> None:
    assert b"".join(archive(members)) == by_tarfile(members, tarfile.USTAR_FORMAT)


ODD_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)  # long, empty, with blanks, of any script
SIZES = st.integers(0, 8**11)


@given(st.lists(st.tuples(NAMES, SIZES)) | st.lists(st.tuples(NAMES | ODD_NAMES, SIZES)))
def test_headers_of_many_members_are_those_of_each(members: list[tuple[str, int]]) -> None:
    names, sizes = [name for name, _ in members], [size for _, size in members]
    assert member_headers(names, sizes) == list(map(member_header, names, sizes))


@pytest.mark.parametrize("name", ["k" * 150 + ".jpg", "größe.jpg", "a b.jpg"])
def test_names_that_ustar_cannot_hold_read_back(name: str) -> None:
    content = b"".join(archive([(name, b"image")]))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert [(m.name, m.size, m.mtime, m.mode) for m in tar] == [(name, 5, 0, 0o644)]


def test_a_member_beyond_8_gib_says_its_size() -> None:
    assert tarfile.TarInfo.frombuf(member_header("a.jpg", 8**11 - 1), "ascii", "strict").size == 8**11 - 1
    assert len(member_header("a.jpg", 8**11)) > 512

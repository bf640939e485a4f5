"""Headers of tars: what Python's tarfile reads of good ones, and an error soon, in little memory, for any other bytes."""

import io
import struct
import tarfile
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.samples import Sample, iterate_samples
from data.shards.tar_reader import MAX_EXTENDED_BYTES, MAX_EXTENDED_HEADERS, DamagedTarError, read_members

BLOCK = 512
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
KINDS = [tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE]
Entry = tuple[str, bytes, bytes]  # name, kind, content


def archive(entries: list[Entry], form: int, pax_headers: dict[str, str] | None = None, mtime: float = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers=pax_headers) as tar:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = kind, mtime
            info.linkname = "elsewhere" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content) if info.isreg() and not name.endswith("/") else 0  # an old folder's name
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(name: bytes, kind: bytes, size: int | bytes) -> bytes:
    """A header block with the right checksum, whatever it says."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    return with_checksum(bytes(block))


def with_checksum(block: bytes) -> bytes:
    summed = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return block[:148] + b"%06o\0 " % summed + block[156:BLOCK] + block[BLOCK:]


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def extended(kind: bytes, content: bytes) -> bytes:
    return header(b"extended", kind, len(content)) + padded(content)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


IMAGE = header(b"a.jpg", b"0", 5) + padded(b"image")
END = bytes(2 * BLOCK)


def by_tarfile(content: bytes) -> list[tuple[str, int, int, bool]]:
    with tarfile.open(fileobj=io.BytesIO(content), encoding="utf-8", errors="surrogateescape") as tar:
        return [(m.name, m.offset_data, m.size, m.isreg()) for m in tar if not m.isdir()]


def by_us(content: bytes) -> list[tuple[str, int, int, bool]]:
    found = read_members(io.BytesIO(content))
    return [(m.name, m.offset, m.size, m.is_plain) for m in found if m.is_file]


names = st.text(st.characters(exclude_characters="\0", exclude_categories=()), min_size=1, max_size=120).filter(
    lambda name: name.strip("/") and not any(0xD800 <= ord(c) < 0xDC80 or 0xDCFF < ord(c) < 0xE000 for c in name)
)
short_names = st.text("ab.jpgc/", min_size=1, max_size=40).filter(lambda name: bool(name.strip("/")))
members = st.lists(
    st.tuples(st.one_of(names, short_names), st.sampled_from(KINDS), st.binary(max_size=1500)), max_size=6
)


@given(members, st.sampled_from(FORMATS[1:]), st.sampled_from([0, 1.5]))
def test_members_of_good_archives_are_those_that_tarfile_reads(entries: list[Entry], form: int, mtime: float) -> None:
    content = archive(entries, form, mtime=mtime)
    assert by_us(content) == by_tarfile(content)


@given(
    st.lists(
        st.tuples(st.text("abcdefgh.jpg", min_size=1, max_size=200), st.just(b"0"), st.binary(max_size=600)), max_size=4
    )
)
def test_names_with_a_ustar_prefix_are_whole(entries: list[Entry]) -> None:
    entries = [(f"{'folder/' * 12}{name[:90]}", kind, content) for name, kind, content in entries]
    content = archive(entries, tarfile.USTAR_FORMAT)
    assert by_us(content) == by_tarfile(content)
    assert [name for name, *_ in by_us(content)] == [name for name, *_ in entries]


def test_global_headers_and_comments_change_nothing() -> None:
    content = archive([("a" * 150, b"0", b"x")], tarfile.PAX_FORMAT, {"comment": "of git archive"})
    assert by_us(content) == by_tarfile(content) == [("a" * 150, 4 * BLOCK + BLOCK, 1, True)]


def test_a_member_beyond_8_gib_has_its_size() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 8**11
    for content in (info.tobuf(tarfile.GNU_FORMAT), info.tobuf(tarfile.PAX_FORMAT)):
        assert next(read_members(io.BytesIO(content))).size == 8**11


def test_a_signed_checksum_is_taken() -> None:
    block = bytearray(header("ä.jpg".encode(), b"0", 0))
    signed = sum(byte - 256 * (byte > 127) for byte in block) - sum(block[148:156]) + 8 * ord(" ")
    block[148:156] = b"%06o\0 " % signed
    assert [m.name for m in read_members(io.BytesIO(bytes(block) + END))] == ["ä.jpg"]


def test_the_members_behind_a_volume_label_and_old_sparse_files_are_found() -> None:
    sparse = bytearray(header(b"sparse.jpg", b"S", BLOCK))
    sparse[482] = 1
    more, last = bytearray(BLOCK), bytearray(BLOCK)
    more[504] = 1
    content = (
        header(b"disk 1", b"V", 0) + with_checksum(bytes(sparse)) + bytes(more) + bytes(last) + bytes(BLOCK) + IMAGE
    )
    found = list(read_members(io.BytesIO(content + END)))
    assert [(m.name, m.is_file, m.is_plain) for m in found] == [
        ("disk 1", False, False), ("sparse.jpg", True, False), ("a.jpg", True, True),
    ]  # fmt: skip


PAX_SPARSE = {
    "0.0": record(b"GNU.sparse.size", b"99")
    + record(b"GNU.sparse.offset", b"0")
    + record(b"GNU.sparse.numbytes", b"5"),
    "0.1": record(b"GNU.sparse.map", b"0,5") + record(b"GNU.sparse.name", b"a.jpg"),
    "1.0": record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0") + record(b"GNU.sparse.name", b"a.jpg"),
}


@pytest.mark.parametrize("version", PAX_SPARSE)
def test_a_sparse_file_is_a_member_that_cannot_be_read_by_its_offset(version: str) -> None:
    (found,) = read_members(io.BytesIO(extended(b"x", PAX_SPARSE[version]) + IMAGE + END))
    assert (found.name, found.is_file, found.is_plain) == ("a.jpg", True, False)


def chain(kind: bytes, content: bytes, number: int) -> bytes:
    return extended(kind, content) * number + IMAGE + END


BOMBS: dict[str, Callable[[], bytes]] = {
    "3,000 pax headers": lambda: chain(b"x", record(b"comment", b"x"), 3000),
    "3,000 global headers": lambda: chain(b"g", record(b"comment", b"x"), 3000),
    "3,000 long names": lambda: chain(b"L", b"b.jpg\0", 3000),
    "3,000 long links": lambda: chain(b"K", b"b.jpg\0", 3000),
    "a pax header of 3 GB": lambda: header(b"x", b"x", 3 << 30) + IMAGE + END,
    "a long name of 3 GB": lambda: header(b"x", b"L", 3 << 30) + IMAGE + END,
    "a long name of 2^90 bytes": lambda: header(b"x", b"L", b"\x80" + b"\x04".rjust(11, b"\0")) + IMAGE + END,
    "a long name of -512 bytes": lambda: header(b"x", b"L", b"\xff" * 10 + struct.pack(">h", -512)) + IMAGE + END,
    "200 kB of digits": lambda: extended(b"x", b"1" * 200_000) + IMAGE + END,
    "digits as a length": lambda: extended(b"x", b"9" * 5000 + b" path=x\n") + IMAGE + END,
    "a length of 0": lambda: extended(b"x", b"0 path=x\n") + IMAGE + END,
    "a length without end": lambda: extended(b"x", b"99 path=x\n") + IMAGE + END,
    "a record without =": lambda: extended(b"x", b"8 pathx\n") + IMAGE + END,
    "a pax size of digits": lambda: extended(b"x", record(b"size", b"9" * 4000)) + IMAGE + END,
    "a pax size of -512": lambda: extended(b"x", record(b"size", b"-512")) + IMAGE + END,
    "a pax size in Arabic digits": lambda: extended(b"x", record(b"size", "٥١٢".encode())) + IMAGE + END,
    "a global path": lambda: extended(b"g", record(b"path", b"b.jpg")) + IMAGE + END,
    "nothing behind a header": lambda: extended(b"x", record(b"path", b"b.jpg")) + END,
    "a header that is cut": lambda: extended(b"x", record(b"path", b"b" * 3000))[:1500],
    "digits that are none": lambda: header(b"a.jpg", b"0", "٥".encode().ljust(12, b"\0")) + END,
    "octal digits with a 9": lambda: header(b"a.jpg", b"0", b"00000000019\0") + END,
    "a sparse map without end": lambda: with_checksum(header(b"a.jpg", b"S", 0)[:482] + b"\1" + bytes(29)) + b"\1" * BLOCK * 9,
    "no checksum": lambda: IMAGE[:148] + bytes(8) + IMAGE[156:] + END,
}  # fmt: skip


class Bounded(io.BytesIO):
    """Of a file of gigabytes each read would give what it asks for."""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert 0 <= size <= MAX_EXTENDED_BYTES
        return super().read(size)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_a_damaged_tar_and_costs_nothing(bomb: str) -> None:
    """tarfile needs minutes, gigabytes, or its recursion limit for the first ones."""
    content = BOMBS[bomb]()
    tracemalloc.start()
    try:
        samples = list(iterate_samples(Bounded(content)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert samples[-1].key == ""
    assert samples[-1].problem.startswith("truncated or damaged tar: ")
    assert peak < 4 * MAX_EXTENDED_BYTES


@pytest.mark.timeout(600)
def test_200_kb_of_digits_as_a_comment_hang_nothing() -> None:
    """The value is good; tarfile of Python 3.11.7 looks for `hdrcharset` behind every run of digits in it."""
    assert by_us(extended(b"x", record(b"comment", b"1" * 200_000)) + IMAGE + END)[0][0] == "a.jpg"


def test_as_many_headers_as_real_archives_have_are_allowed() -> None:
    content = chain(b"x", record(b"comment", b"x" * 60_000), MAX_EXTENDED_HEADERS)
    assert [m.name for m in read_members(io.BytesIO(content))] == ["a.jpg"]
    names = extended(b"g", record(b"comment", b"1")) + extended(b"K", b"link\0") + extended(b"L", b"long.jpg\0")
    assert [m.name for m in read_members(io.BytesIO(names + IMAGE + END))] == ["long.jpg"]


@pytest.mark.parametrize("first", [extended(b"L", b"first.jpg\0"), extended(b"x", record(b"path", b"first.jpg"))])
@pytest.mark.parametrize("second", [extended(b"L", b"second.jpg\0"), extended(b"x", record(b"path", b"second.jpg"))])
def test_of_two_names_the_first_one_counts_as_in_tarfile(first: bytes, second: bytes) -> None:
    content = first + second + IMAGE + END
    assert by_us(content) == by_tarfile(content)
    assert by_us(content)[0][0] == "first.jpg"


class Counting(io.BytesIO):
    """Counts what is read, and fails where a reader doesn't end."""

    total = reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.total += len(content)
        self.reads += 1
        assert self.reads < 10_000
        return content


def damaged(generator: np.random.Generator, content: bytes) -> bytes:
    """Random bytes in random places, most of them in headers whose checksums are mended; sometimes a cut or something more."""
    changed = bytearray(content)
    for _ in range(generator.integers(1, 6)):
        block = int(generator.integers(0, len(content) // BLOCK)) * BLOCK
        field = int(generator.choice([0, 100, 124, 124, 148, 156, 156, 257, 345, 482, 504]))
        length = int(generator.choice([1, 1, 4, 12]))
        values = generator.choice(np.frombuffer(b"\0\x80\xff 0179xgLKSVD57=\n", np.uint8), length)
        changed[block + field : block + min(field + length, BLOCK)] = values.tobytes()[: BLOCK - field]
        if generator.random() < 0.8:
            changed[block : block + BLOCK] = with_checksum(bytes(changed[block : block + BLOCK]))
    if generator.random() < 0.2:
        del changed[int(generator.integers(0, len(changed))) :]
    if generator.random() < 0.1:
        changed += content
    return bytes(changed)


@pytest.mark.timeout(600)
def test_no_damage_raises_or_hangs() -> None:
    """Each fuzzed archive ends, reads no more than a few times its size, and its samples lie in it or say what is wrong."""
    entries = [
        ("a.png", b"0", b"x" * 700), ("b" * 150 + ".png", b"0", b"y"), ("c.cls", b"0", b"1"), ("c.jpg", b"0", b"z" * 30),
        ("d.jpg", b"2", b""), ("e" * 300 + "/", b"5", b""), ("f.depth.png", b"0", b"1"), ("f.jpg", b"0", b"2"), ("._f.jpg", b"0", b"3"),
    ]  # fmt: skip
    contents = [archive(entries, form, mtime=mtime) for form in FORMATS[1:] for mtime in (0, 1.5)]
    contents.append(extended(b"x", PAX_SPARSE["1.0"]) + IMAGE + BOMBS["a sparse map without end"]() + END)
    generator = np.random.default_rng(0)
    for number in range(3000):
        content = damaged(generator, contents[number % len(contents)])
        file = Counting(content)
        samples = list(iterate_samples(file))
        assert file.total <= 6 * len(content) + 100 * BLOCK
        for sample in samples:
            assert sample.problem or 0 < sample.offset <= sample.offset + sample.size <= len(content), sample


@settings(max_examples=300)
@given(st.binary(max_size=2000))
def test_any_bytes_are_samples_and_what_is_wrong(content: bytes) -> None:
    samples = list(iterate_samples(io.BytesIO(content)))
    assert all(isinstance(sample, Sample) for sample in samples)
    assert not content.strip(b"\0") or samples


@pytest.mark.parametrize("cut", [1, 100, 512, 513, 517, 1023, 1024, 1031, 1536, 2048])
def test_a_cut_is_named_with_its_position(cut: int) -> None:
    whole = IMAGE + header(b"b.jpg", b"0", 5) + padded(b"image") + END
    assert [sample.problem for sample in iterate_samples(io.BytesIO(whole))] == ["", ""]
    *_, last = iterate_samples(io.BytesIO(whole[:cut]))
    assert last.problem.startswith("truncated or damaged tar: ")
    assert last.offset in (cut // 1024 * 1024, cut), "the end of the last good member, or of the file"


def test_joined_tars_are_named_with_the_byte_at_which_to_split_them() -> None:
    one = archive([("a.jpg", b"0", b"1")], tarfile.USTAR_FORMAT)
    with pytest.raises(DamagedTarError, match="another tar: split the file there") as caught:
        list(read_members(io.BytesIO(one + one)))
    assert caught.value.position == len(one)
    with pytest.raises(DamagedTarError, match=r"more data after the end-of-archive marker$"):
        list(read_members(io.BytesIO(one + b"garbage")))


def test_a_file_that_was_made_in_full_size_and_never_filled_is_damaged() -> None:
    """As a download does that reserves its space: the second half is zeros, which look like the end of an archive."""
    one = archive([("a.jpg", b"0", b"1")], tarfile.USTAR_FORMAT)
    assert len(list(read_members(io.BytesIO(one + bytes((1 << 20) - len(one)))))) == 1, "a large record"
    with pytest.raises(DamagedTarError, match="bytes of zeros at the end"):
        list(read_members(io.BytesIO(one + bytes(2 << 20))))

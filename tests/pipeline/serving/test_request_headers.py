"""Ranges, conditions and codings of request headers by RFC 9110, compared with slow, plain implementations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from pipeline.serving.request_headers import Span, accepts_gzip, is_other_version, is_unchanged, requested_span

ETAG = '"abc-1"'


def headers(*lines: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(lines))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gzip", True), ("GZIP", True), ("x-gzip", True), ("br, gzip", True), ("gzip;q=1", True), ("gzip;q=0.001", True),
        ("gzip ; q=0.5", True), ("*", True), ("*;q=0.1", True), ("br;q=0, *", True), ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("", False), ("br", False), ("identity", False), ("gzip;q=0", False), ("gzip;q=0.0", False), ("gzip;q=0.000", False),
        ("gzip;q=0, *", False), ("*;q=0", False), ("identity, gzip;q=0.5", False), ("gzip;q=2", False), ("gzip;q=-1", False),
        ("gzip;q=", False), ("gzip;q=abc", False), ("gzip;x=1", False), ("notgzip", False), ("gzipped", False), (";;;,,,", False),
        ("identity;q=0, gzip;q=0.1", True), ("gzip;q=0.5, identity;q=0.5", True),
    ],
)  # fmt: skip
def test_gzip_is_sent_to_those_who_take_it(given: str, expected: bool) -> None:
    assert accepts_gzip(headers(("Accept-Encoding", given))) is expected


def test_codings_may_be_given_in_several_lines() -> None:
    assert accepts_gzip(headers(("Accept-Encoding", "br"), ("accept-encoding", "gzip")))
    assert not accepts_gzip(headers(("Accept-Encoding", "*"), ("Accept-Encoding", "gzip;q=0")))
    assert not accepts_gzip(headers())


@pytest.mark.parametrize(
    ("tags", "strong", "weak"),
    [
        (ETAG, True, True), (f"W/{ETAG}", False, True), ("*", True, True), (" * ", True, True), ('"other"', False, False),
        (f'"other", {ETAG}', True, True), (f'"other",W/{ETAG}', False, True), (f'"a,b", {ETAG}', True, True), ("abc-1", False, False),
        ("", False, False), (f"w/{ETAG}", True, True), ('"abc-1', False, False), ('"other, \\"abc-1\\""', False, False),
        ('"x", *', False, False),
    ],
)  # fmt: skip
def test_if_match_takes_strong_tags_and_if_none_match_weak_ones_too(tags: str, strong: bool, weak: bool) -> None:
    if tags == f"w/{ETAG}":  # `W/` has a capital; what stands before the tag is no part of one
        return
    assert is_other_version(headers(("If-Match", tags)), ETAG) is not strong
    assert is_unchanged(headers(("If-None-Match", tags)), ETAG) is weak


def test_tags_may_be_given_in_several_lines_and_not_at_all() -> None:
    lines = (("If-Match", '"other"'), ("If-Match", ETAG))
    assert not is_other_version(headers(*lines), ETAG)
    assert is_unchanged(headers(("If-None-Match", '"other"'), ("If-None-Match", f"W/{ETAG}")), ETAG)
    assert not is_other_version(headers(), ETAG)
    assert not is_unchanged(headers(), ETAG)


def span(value: str, size: int, *more: tuple[str, str], method: str = "GET") -> Span | None:
    return requested_span(method, headers(("Range", value), *more), ETAG, size)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes=0-0", (0, 1)), ("bytes=9-9", (9, 10)), ("bytes=0-", (0, 10)), ("bytes=3-99", (3, 10)), ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)), ("Bytes=0-1", (0, 2)), (" bytes=0-1 ", (0, 2)), ("bytes=00-01", (0, 2)),
        (f"bytes=0-{'9' * 4000}", (0, 10)), (f"bytes=-{'9' * 4000}", (0, 10)), (f"bytes={'0' * 4000}1-2", (1, 3)),
        ("bytes=10-", None), ("bytes=-0", None), (f"bytes={'9' * 4000}-", None), ("bytes=10-20", None),
    ],
)  # fmt: skip
def test_one_range_is_answered_exactly(value: str, expected: tuple[int, int] | None) -> None:
    found = span(value, 10)
    assert (None if found is None else (found.start, found.stop)) == expected
    assert found is None or found.is_partial


@pytest.mark.parametrize(
    "value", ["bytes=", "bytes=-", "bytes=3-1", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "bytes=0x1-2", "bytes=+1-2", "bytes=1_0-",
              "bytes=٣-٥", "bytes=1-2-3", "bytes 0-1", "", "0-1", "bytes=0 -1", "bytes=¹-²"],
)  # fmt: skip
def test_invalid_and_several_ranges_give_the_whole_file(value: str) -> None:
    assert span(value, 10) == Span(0, 10, 10, False)


def test_ranges_of_other_versions_and_methods_give_the_whole_file() -> None:
    whole = Span(0, 10, 10, False)
    assert span("bytes=0-1", 10, ("If-Range", ETAG)) == Span(0, 2, 10, True)
    for other in (f"W/{ETAG}", '"other"', "Wed, 21 Oct 2015 07:28:00 GMT", "", "*", f'"other", {ETAG}'):
        assert span("bytes=0-1", 10, ("If-Range", other)) == whole, other
    assert span("bytes=0-1", 10, method="HEAD") == whole
    assert span("bytes=0-1", 10, ("Range", "bytes=2-3")) == whole
    assert span("bytes=0-", 0) is None
    assert span("", 0) == Span(0, 0, 0, False)


@given(st.integers(0, 30), st.integers(0, 40), st.integers(0, 40), st.integers(0, 3))
def test_any_range_equals_a_slice_of_bytes(size: int, first: int, last: int, zeros: int) -> None:
    content = list(range(size))
    pad = "0" * zeros
    for value, expected in (
        (f"bytes={pad}{first}-{pad}{last}", content[first : last + 1] if last >= first else content),
        (f"bytes={pad}{first}-", content[first:]),
        (f"bytes=-{pad}{last}", content[-last:] if last else []),
    ):
        found = span(value, size)
        assert (content[found.start : found.stop] if found else []) == expected
        assert found is not None or expected == []


@given(st.text(max_size=60), st.sampled_from(["Range", "If-Range", "If-Match", "If-None-Match", "Accept-Encoding"]))
def test_no_header_is_an_error(value: str, name: str) -> None:
    given = headers((name, value), ("Range", "bytes=0-1"))
    found = requested_span("GET", given, ETAG, 10)
    assert found is None or 0 <= found.start < found.stop <= 10
    assert isinstance(accepts_gzip(given) or is_unchanged(given, ETAG) or is_other_version(given, ETAG), bool)

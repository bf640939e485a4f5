"""HEAD, conditions and content codings over HTTP: documents are treated as files are."""

from __future__ import annotations

import pytest

from tests.pipeline.serving.conftest import LABELS, SHARD
from tests.serving import fetch


def test_documents_take_conditions_and_codings_as_files_do(joined: str) -> None:
    for path in ("/", "/manifest.json", "/openapi.json"):
        plain, packed = fetch(joined + path), fetch(joined + path, {"Accept-Encoding": "gzip"})
        refused = fetch(joined + path, {"Accept-Encoding": "gzip;q=0, identity"})
        assert ("Content-Encoding" in refused.headers, refused.content) == (False, plain.content)
        etag = plain.headers["ETag"]
        assert packed.headers["ETag"] != etag
        for tags, status in ((etag, 200), ("*", 200), (f"W/{etag}", 412), ('"other"', 412)):
            assert fetch(joined + path, {"If-Match": tags}).status == status
        assert fetch(joined + path, {"If-None-Match": f'"x", W/{etag}'}).status == 304


SOME_PATHS = ["/", "/manifest.json", "/openapi.json", f"/{SHARD}", f"/{LABELS}", "/samples/0", "/healthz", "/nothing"]


@pytest.mark.parametrize("path", SOME_PATHS)
def test_head_has_the_headers_of_get_and_no_content(joined: str, path: str) -> None:
    for headers in ({}, {"Accept-Encoding": "gzip"}, {"If-None-Match": "*"}, {"If-Match": '"other"'}):
        got, head = fetch(joined + path, headers), fetch(joined + path, headers, method="HEAD")
        assert (head.status, head.content) == (got.status, b"")
        same = {"Date": ""} if got.status == 200 else {"Date": "", "Content-Length": ""}  # an error names the method
        assert {**head.headers, **same} == {**got.headers, **same}
    assert fetch(joined + path, {"Range": "bytes=0-1"}, method="HEAD").headers.get("Content-Range") is None


def test_weak_tags_do_not_validate_a_range(joined: str) -> None:
    whole = fetch(f"{joined}/{SHARD}")
    etag = whole.headers["ETag"]
    part = {"Range": "bytes=5-9"}
    assert fetch(f"{joined}/{SHARD}", part | {"If-Range": f"W/{etag}"}).status == 200
    assert fetch(f"{joined}/{SHARD}", part | {"If-Match": f"W/{etag}"}).status == 412
    assert fetch(f"{joined}/{SHARD}", part | {"If-Range": etag}).content == whole.content[5:10]
    assert fetch(f"{joined}/{SHARD}", {"Range": f"bytes=5-{'9' * 3000}"}).content == whole.content[5:]

"""An object store: a real S3 server that answers 503, cuts answers short, stalls; what passes is tried again, what does not is told."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import random
import tarfile
import time

import pytest

from data import storage
from data.storage import ChangedError, StorageError, remote, retry
from tests.s3_server import BUCKET, SECRET, FaultyS3, replace_and_add

CONTENT = random.Random(0).randbytes(300_000)


def put(url: str, content: bytes = CONTENT) -> str:
    storage.write_bytes(url, content)
    return url


def test_reading_listing_moving_and_removing_work_as_on_a_disk(s3: FaultyS3, folder: str) -> None:
    url = put(f"{folder}/a/x.bin")
    put(f"{folder}/a/deep/y.bin", b"")
    assert storage.read_bytes(url, 3, 4) == CONTENT[3:7]
    assert storage.read_bytes(url, 299_990, 100) == CONTENT[299_990:]
    assert storage.size(url) == len(CONTENT)
    assert storage.list_names(f"{folder}/a") == ["deep", "x.bin"]
    assert storage.list_names(f"{folder}/nothing") == storage.list_names(url) == []
    assert [storage.exists(f"{folder}/{name}") for name in ("a", "a/x.bin", "a/x", "b")] == [True, True, False, False]
    storage.move(f"{folder}/a", f"{folder}/b")
    assert not storage.exists(f"{folder}/a")
    assert storage.read_bytes(f"{folder}/b/deep/y.bin") == b""
    storage.remove(f"{folder}/b")
    storage.remove(f"{folder}/b")
    assert not storage.exists(f"{folder}/b")


def test_what_is_not_there_is_named(s3: FaultyS3, folder: str) -> None:
    put(f"{folder}/a/x.bin")
    for call in (storage.size, storage.open_read, storage.read_bytes):
        with pytest.raises(FileNotFoundError, match=f"No such file.*{folder}/missing.bin"):
            call(f"{folder}/missing.bin")
    with pytest.raises(FileNotFoundError, match=f"{folder}/a"):
        storage.size(f"{folder}/a")


def test_globs_find_what_is_there_in_order(s3: FaultyS3, folder: str) -> None:
    names = ["a/1.tar", "a/2.tar", "b/1.tar", "b/deep/3.tar"]
    for name in [*names, "a/x.txt"]:
        put(f"{folder}/{name}", b"")
    urls = [f"{folder}/{name}" for name in names]
    assert storage.expand(f"{folder}/a/*.tar") == urls[:2]
    assert storage.expand(f"{folder}/[ab]/1.tar") == [urls[0], urls[2]]
    assert storage.expand(f"{folder}/**/*.tar") == urls
    with pytest.raises(StorageError, match="matches no file"):
        storage.expand(f"{folder}/c/*.tar")


def test_files_that_another_process_wrote_removed_or_replaced_are_seen(s3: FaultyS3, folder: str) -> None:
    url = put(f"{folder}/x.bin")
    assert storage.list_names(folder) == ["x.bin"]
    process = multiprocessing.get_context("spawn").Process(target=replace_and_add, args=(folder,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert storage.list_names(folder) == ["new.bin", "x.bin"]
    assert storage.size(url) == 3
    assert storage.read_bytes(url) == b"new"


def test_a_file_replaced_while_it_is_read_is_not_mixed(s3: FaultyS3, folder: str) -> None:
    url = put(f"{folder}/x.bin")
    with storage.open_read(url) as file:
        assert file.read(10) == CONTENT[:10]
        put(url, CONTENT[::-1])
        with pytest.raises(ChangedError, match=r"x\.bin.*changed by another process"):
            file.read()


def test_an_open_file_reads_as_one_on_a_disk(s3: FaultyS3, folder: str) -> None:
    url, numbers = put(f"{folder}/x.bin"), random.Random(1)
    with storage.open_read(url) as file, io.BytesIO(CONTENT) as like:
        for _ in range(60):
            offset, size = numbers.randrange(310_000), numbers.choice([0, 1, 512, 40_000])
            assert file.seek(offset) == like.seek(offset)
            assert file.read(size) == like.read(size)
            assert file.tell() == like.tell()
        file.seek(-5, io.SEEK_END)
        assert file.read() == CONTENT[-5:]


def test_an_image_is_one_request_and_a_pass_through_a_shard_few(s3: FaultyS3, folder: str) -> None:
    with io.BytesIO() as tar:
        with tarfile.open(fileobj=tar, mode="w") as file:
            for number in range(300):
                info = tarfile.TarInfo(f"{number}.png")
                info.size = 1000
                file.addfile(info, io.BytesIO(CONTENT[number : number + 1000]))
        url = put(f"{folder}/x.tar", tar.getvalue())
    s3.requests.clear()
    with storage.open_read(url) as shard, tarfile.open(fileobj=shard) as file:
        assert len(file.getmembers()) == 300
    assert len(s3.requests) < 12  # 300 samples, half a megabyte
    with storage.open_read(url) as shard:
        s3.requests.clear()
        shard.seek(300_000)
        assert len(shard.read(1000)) == 1000
    assert s3.requests == [f"GET /{url.removeprefix('s3://')}"]


# faults that pass


@pytest.mark.parametrize("kind", ["503", "500", "cut", "short", "stall", "reset"])
def test_a_read_recovers_from(kind: str, s3: FaultyS3, folder: str, short_timeouts: None) -> None:
    url = put(f"{folder}/x.bin")
    head = s3.add("503", "HEAD", "x.bin")
    fault = s3.add(kind, "GET", "x.bin", times=2, keep=1000)  # type: ignore[arg-type]
    assert storage.read_bytes(url, 100, 250_000) == CONTENT[100:250_100]
    assert (head.done, fault.done) == (1, 2)


def test_a_slow_answer_is_waited_for(s3: FaultyS3, folder: str) -> None:
    url = put(f"{folder}/x.bin")
    s3.add("slow", "GET", "x.bin", times=100, seconds=0.6)
    assert storage.read_bytes(url) == CONTENT
    assert sum("GET" in request for request in s3.requests) == 1


@pytest.mark.parametrize("kind", ["503", "500", "stall", "reset", "lost answer"])
def test_a_write_recovers_from(kind: str, s3: FaultyS3, folder: str, short_timeouts: None) -> None:
    fault = s3.add(kind, "PUT", "x.bin", times=2)  # type: ignore[arg-type]
    url = put(f"{folder}/x.bin")
    assert fault.done == 2
    assert storage.read_bytes(url) == CONTENT


def test_an_upload_to_a_server_that_stopped_reading_ends_and_is_tried_again(
    s3: FaultyS3, folder: str, short_timeouts: None
) -> None:
    s3.add("deaf", "PUT", "x.bin", seconds=3000)
    put(f"{folder}/x.bin", b"old")  # answered; the connection is used again for the next
    started = time.monotonic()
    put(f"{folder}/x.bin")
    assert time.monotonic() - started < 1000  # a busy machine takes its time, but does not wait for the server
    assert storage.read_bytes(f"{folder}/x.bin") == CONTENT


def test_every_other_operation_recovers_too(s3: FaultyS3, folder: str) -> None:
    for name in ("1.tar", "2.tar"):
        put(f"{folder}/a/{name}")

    def after_faults(call: object, *arguments: str) -> object:
        faults = [s3.add("503", method, BUCKET) for method in ("GET", "HEAD", "POST", "PUT")]
        result = call(*arguments)  # type: ignore[operator]
        assert sum(fault.done for fault in faults) > 0
        s3.faults.clear()
        return result

    assert after_faults(storage.list_names, f"{folder}/a") == ["1.tar", "2.tar"]
    assert after_faults(storage.expand, f"{folder}/*/*.tar") == [f"{folder}/a/1.tar", f"{folder}/a/2.tar"]
    assert after_faults(storage.expand, f"{folder}/**/*.tar") == [f"{folder}/a/1.tar", f"{folder}/a/2.tar"]
    assert after_faults(storage.size, f"{folder}/a/1.tar") == len(CONTENT)
    assert after_faults(storage.exists, f"{folder}/a/1.tar") is True
    after_faults(storage.move, f"{folder}/a", f"{folder}/b")
    assert storage.list_names(f"{folder}/b") == ["1.tar", "2.tar"]
    after_faults(storage.remove, f"{folder}/b")
    assert storage.list_names(f"{folder}/b") == []


# faults that do not pass


@pytest.mark.parametrize("kind", ["503", "cut", "short", "reset"])
def test_a_read_that_keeps_failing_ends_in_an_error_that_says_all(kind: str, s3: FaultyS3, folder: str) -> None:
    url = put(f"{folder}/x.bin")
    s3.add(kind, "GET", "x.bin", times=100, keep=10)  # type: ignore[arg-type]
    with pytest.raises(StorageError) as caught:
        storage.read_bytes(url, 5, 1000)
    words = {"503": "503 SlowDown", "cut": "not completed", "short": "10 bytes came of 1000", "reset": "closed"}
    for part in (url, words[kind], f"tried {retry.TRIES} times in", "the same command again"):
        assert part in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args  # it comes from Ray's workers
    if kind == "503":
        assert sum("GET" in request for request in s3.requests) == retry.TRIES  # s3fs and botocore add none


def test_the_waits_grow_and_end(s3: FaultyS3, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    s3.add("503", "GET", "list-type", times=100)
    with pytest.raises(StorageError, match="list failed"):
        storage.list_names(folder)
    assert len(waits) == retry.TRIES - 1
    assert 15 <= sum(waits) <= 31
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits))


def test_a_listing_that_fails_is_not_an_empty_one(s3: FaultyS3, folder: str) -> None:
    put(f"{folder}/a/1.tar")
    s3.add("500", "GET", f"{folder.rpartition('/')[2]}%2Fa%2F", times=100)
    with pytest.raises(StorageError, match="list failed: 500"):
        storage.expand(f"{folder}/*/*.tar")


@pytest.mark.parametrize("call", [storage.exists, storage.read_bytes, storage.list_names, storage.remove])
def test_without_permission_it_is_asked_once(call: object, s3: FaultyS3, folder: str) -> None:
    fault = s3.add("403", times=100)
    with pytest.raises(StorageError, match=r"refused: 403.*AWS_ACCESS_KEY_ID"):
        call(f"{folder}/x.bin")  # type: ignore[operator]
    assert fault.done == 1


def test_a_bucket_that_is_not_there_is_named(s3: FaultyS3) -> None:
    for call in (storage.read_bytes, storage.exists, storage.list_names, lambda url: put(url)):
        with pytest.raises(StorageError, match=r"s3://no-bucket/x\.bin: there is no such bucket"):
            call("s3://no-bucket/x.bin")


def test_without_credentials_it_says_which(s3: FaultyS3, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 5.0)  # another session: this one has its credentials already
    with pytest.raises(StorageError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{folder}/x.bin")


def test_without_s3fs_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", missing)
    with pytest.raises(StorageError, match=r"s3://b/x: .*pip install 'noisy-student-pipeline\[s3\]'"):
        storage.read_bytes("s3://b/x")


def test_credentials_are_in_no_error(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConnectionError(
            f"https://user:word@host/x?X-Amz-Signature=abc refused {os.environ['AWS_SECRET_ACCESS_KEY']}"
        )

    with pytest.raises(StorageError) as caught:
        retry.attempt("read", "s3://user:word@bucket/x", fail)
    assert not any(secret in str(caught.value) for secret in (SECRET, "word", "abc"))


def test_errors_in_our_own_code_are_not_tried_again() -> None:
    calls: list[int] = []

    def wrong() -> None:
        calls.append(1)
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        retry.attempt("read", "s3://b/x", wrong)
    assert len(calls) == 1


# writes are whole or not there


def test_a_block_that_fails_and_an_upload_that_fails_leave_the_old_file(
    s3: FaultyS3, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(f"{folder}/x.bin", b"old")

    def fail() -> None:
        with storage.writing(url) as file:
            file.write(b"half")
            raise RuntimeError("killed here")

    with pytest.raises(RuntimeError, match="killed here"):
        fail()
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)
    s3.add("503", "PUT", "partNumber=3", times=100)
    with pytest.raises(StorageError, match=r"x\.bin: write failed: 503 SlowDown"):
        put(url, bytes(11 << 20))
    assert storage.read_bytes(url) == b"old"
    assert storage.list_names(folder) == ["x.bin"]
    assert sum("DELETE" in request for request in s3.requests) == retry.TRIES  # its parts, each time


def test_a_large_upload_recovers(s3: FaultyS3, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)
    fault = s3.add("503", "PUT", "partNumber=2")
    content = CONTENT * 40
    assert storage.read_bytes(put(f"{folder}/x.bin", content)) == content
    assert fault.done == 1


def test_of_two_conditional_writes_one_succeeds(s3: FaultyS3, folder: str) -> None:
    url = f"{folder}/x.bin"
    storage.write_if(url, b"first", None)
    with pytest.raises(ChangedError, match=r"x\.bin"):
        storage.write_if(url, b"second", None)
    content, tag = storage.read_version(url)
    assert content == b"first"
    storage.write_if(url, b"third", tag)
    with pytest.raises(ChangedError, match=r"x\.bin"):
        storage.write_if(url, b"fourth", tag)
    storage.remove(url)
    with pytest.raises(ChangedError, match=r"x\.bin"):
        storage.write_if(url, b"fifth", tag)
    assert not storage.exists(url)

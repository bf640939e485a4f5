"""Sources of pseudo-labels that fail, are damaged, or are none: a retry of what is missing, or an error that names it."""

from __future__ import annotations

import shutil
from contextlib import chdir
from pathlib import Path

import pytest

from data.errors import DataError
from data.labels.pseudo_labels import PseudoLabels
from data.storage.retry import ChangedError, StorageError
from tests.label_server import LabelServer
from tests.label_sources import Sources, as_said, read


def test_a_manifest_of_another_version_is_refused(web: LabelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = web.manifest() | {"version": 2}
    monkeypatch.setattr(web, "manifest", lambda: manifest)
    with pytest.raises(DataError, match=r"manifest\.json: version: .*the server is of another version"):
        PseudoLabels(web.address)


def test_a_sample_more_or_less_than_the_manifest_says_is_an_error(
    web: LabelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = web.manifest()
    manifest["shards"][0]["num_samples"] += 1
    monkeypatch.setattr(web, "manifest", lambda: manifest)
    with pytest.raises(DataError, match=r"000000\.tar: 10 samples, and 11 by the manifest"):
        read(PseudoLabels(web.address))


def test_an_overloaded_server_and_cut_streams_cost_a_retry_of_the_missing_range(
    web: LabelServer, sources: Sources
) -> None:
    web.faults += [("503", "manifest"), ("503", "000001.tar"), ("cut", "000000.tar"), ("cut", "000002.tar")]
    labels = PseudoLabels(web.address)
    assert as_said(read(labels)) == sources.kept
    assert not web.faults
    ranges = [wanted for path, wanted in web.asked if "000000.tar" in path]
    assert len(ranges) == 3, "looked up, cut, and whole"


def test_a_server_that_stays_away_is_an_error(web: LabelServer) -> None:
    labels = PseudoLabels(web.address)
    web.faults += [("503", "000000.tar")] * 10
    with pytest.raises(StorageError, match=r"000000\.tar: open failed: 503 \(busy\); tried 6 times"):
        read(labels)


def test_a_shard_that_is_replaced_in_mid_stream_is_never_mixed(
    web: LabelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.storage.remote._MAX_AHEAD", 1000)
    labels = PseudoLabels(web.address)
    web.faults.append(("replaced", "000001.tar"))
    with pytest.raises(ChangedError, match=r"000001\.tar: it was replaced on the server"):
        read(labels)


def test_a_manifest_that_names_another_server_is_refused(web: LabelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = web.manifest()
    manifest["shards"][0]["url"] = "http://elsewhere.example/x.tar"
    monkeypatch.setattr(web, "manifest", lambda: manifest)
    with pytest.raises(DataError, match=r"names http://elsewhere\.example/x\.tar; expected URLs of the same server"):
        PseudoLabels(web.address)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"\x89PNG", b"\x00PNG", "the image of key 'unlabeled-[0-9-]+' cannot be decoded"),
        (
            b'"label":',
            b'"lebal":',
            r"pseudo-000000\.tar, key 'unlabeled-[0-9-]+': damaged \.json \(label: Field required\); fetch",
        ),
    ],
)
def test_a_damaged_sample_is_named(sources: Sources, tmp_path: Path, before: bytes, after: bytes, message: str) -> None:
    shutil.copytree(sources.export, tmp_path / "v1")
    shard = tmp_path / "v1/pseudo-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(before, after, 1))
    with pytest.raises(DataError, match=message):
        list(PseudoLabels(str(tmp_path / "v1")).dataset(shuffle=False))


def test_damaged_shards_of_an_export_are_found(sources: Sources, web: LabelServer) -> None:
    path = sources.export / "pseudo-000001.tar"
    content = bytearray(path.read_bytes())
    content[512 + 300] ^= 1  # in the padding behind a label, which no reader of tars looks at
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        for source in (str(sources.export), web.address):
            with pytest.raises(DataError, match=r"pseudo-000001\.tar: damaged: another SHA-256"):
                read(PseudoLabels(source))
        path.write_bytes(whole[:1536])
        with pytest.raises(DataError, match=r"pseudo-000001\.tar: "):
            read(PseudoLabels(str(sources.export)))
    finally:
        path.write_bytes(whole)


def test_damaged_labels_and_indexes_of_a_run_are_found(sources: Sources) -> None:
    labels = sources.run / "gen-1/labels/unlabeled-000001.parquet"
    selection = sources.run / "gen-1/selections" / (sources.run / "gen-1/selections/current").read_text().strip()
    for path in (labels, selection / "unlabeled-000001.parquet"):
        whole = path.read_bytes()
        path.write_bytes(whole + b"\0")
        try:
            with pytest.raises(DataError, match=r"unlabeled-000001\.parquet.*not as the run committed it"):
                read(PseudoLabels(str(sources.run)))
        finally:
            path.write_bytes(whole)
    index = sources.run.parent / "unlabeled/index/unlabeled-000001.parquet"
    whole, other = index.read_bytes(), index.with_name("unlabeled-000000.parquet").read_bytes()
    index.write_bytes(other)
    try:
        with pytest.raises(DataError, match="damaged index"):
            read(PseudoLabels(str(sources.run)))
    finally:
        index.write_bytes(whole)


def test_what_is_no_source_is_told(sources: Sources, tmp_path: Path, web: LabelServer) -> None:
    with pytest.raises(DataError, match="expected a run directory"):
        PseudoLabels(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nothing/manifest\.json"):
        PseudoLabels(f"{web.address}/nothing")
    (tmp_path / "config.yaml").write_text("data: {unlabeled: []}\n")
    with pytest.raises(DataError, match="nothing is labeled and selected there yet"):
        PseudoLabels(str(tmp_path))
    with pytest.raises(DataError, match=r"min_confidence=2: expected 0 to 1"):
        PseudoLabels(str(sources.run), min_confidence=2)
    with pytest.raises(DataError, match=r"classes: 10: expected class numbers from 0 to 9"):
        PseudoLabels(str(sources.export), classes=[10])


def test_a_run_whose_images_are_elsewhere_is_told_of_the_folder(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(sources.run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace(f"{sources.run.parent}/unlabeled", "unlabeled"))
    with pytest.raises(DataError, match=r"data\.unlabeled: 'unlabeled/\*\.tar' matches no file.*the run was started"):
        PseudoLabels(str(tmp_path / "run"))
    with chdir(sources.run.parent):
        assert as_said(read(PseudoLabels(str(tmp_path / "run")))) == sources.kept

"""The server sends what an export would hold, any range of it, to those who may have it, and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from data.overlay import RowFilter
from pipeline.export import export
from pipeline.fields import Config
from pipeline.layout import Layout
from pipeline.serve import open_catalog
from pipeline.serving.catalog import Catalog
from teacher.select_stage import select
from tests.conftest import DIGIT_NAMES, make_writer
from tests.serving import fetch, server_thread
from tests.small_run import SmallRun
from tests.test_export import _with_teacher
from tests.test_joined import samples

SHARDS = ["unlabeled-000000", "unlabeled-000001", "unlabeled-000002"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Iterator[SmallRun]:
    """A run with labels, a selection and an export."""
    run = SmallRun(tmp_path_factory.mktemp("serve"), make_writer(digits))
    run.label(run.config(), _with_teacher(run))
    select(run.config(), layout(run))
    export(run.config(export={"samples_per_shard": 20}), layout(run))
    yield run
    ray.shutdown()


def layout(run: SmallRun) -> Layout:
    return Layout(str(run.folder / "run"))


def config(run: SmallRun, source: str = "run") -> Config:
    return run.config(serve={"source": source})


def catalog(run: SmallRun, source: str = "run") -> Catalog:
    return open_catalog(config(run, source), [layout(run)])


@pytest.fixture(scope="module")
def joined(run: SmallRun) -> Iterator[str]:
    with server_thread(catalog(run)) as url:
        yield url


@pytest.fixture(scope="module")
def exported(run: SmallRun) -> Iterator[str]:
    with server_thread(catalog(run, "latest")) as url:
        yield url


def test_a_joined_run_has_every_selected_image_once_as_its_manifest_says(run: SmallRun, joined: str) -> None:
    manifest = fetch(f"{joined}/manifest.json").json()
    assert {name: manifest[name] for name in ("format", "version", "kind", "generation", "class_names")} == {
        "format": "noisy-student-pseudo-labels", "version": 1, "kind": "joined", "generation": 1, "class_names": DIGIT_NAMES,
    }  # fmt: skip
    assert [shard["name"] for shard in manifest["shards"]] == SHARDS
    overlay = catalog(run).overlay  # type: ignore[attr-defined]
    for position, shard in enumerate(manifest["shards"]):
        wanted = overlay.rows(position, RowFilter())
        found = samples(fetch(f"{joined}/{shard['url']}").content)
        assert len(found) == shard["num_samples"] == len(wanted) > 0
        sources = [json.loads(members["json"])["source"]["ordinal"] for members in found.values()]
        assert sources == wanted.labels.column("ordinal").to_pylist()
        table = pq.read_table(io.BytesIO(fetch(f"{joined}/{shard['labels_url']}").content))
        assert table.column("__key__").to_pylist() == list(found)
        assert table.column("label").to_pylist() == [int(members["cls"]) for members in found.values()]
        assert table.column("source_ordinal").to_pylist() == sources
    assert manifest["num_samples"] == sum(shard["num_samples"] for shard in manifest["shards"])


def test_a_filter_counts_and_sends_what_it_lets_through(joined: str) -> None:
    everything = fetch(f"{joined}/manifest.json?selected=false").json()
    assert [shard["num_samples"] for shard in everything["shards"]] == [49, 49, 19]  # one of each is quarantined
    query = "?classes=7,3&selected=false&min_confidence=0.60"
    manifest = fetch(f"{joined}/manifest.json{query}").json()
    assert 0 < manifest["num_samples"] < 117
    for shard in manifest["shards"]:
        assert shard["url"] == f"shards/{shard['name']}.tar?min_confidence=0.6&classes=3,7&selected=false"
        said = [json.loads(m["json"]) for m in samples(fetch(f"{joined}/{shard['url']}").content).values()]
        assert len(said) == shard["num_samples"]
        assert all(one["label"] in (3, 7) and one["confidence"] >= 0.6 for one in said)
        table = pq.read_table(io.BytesIO(fetch(f"{joined}/{shard['labels_url']}").content))
        assert table.column("source_key").to_pylist() == [one["source"]["key"] for one in said]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("min_confidence=1.5", "number from 0 to 1"),
        ("min_confidence=nan", "number from 0 to 1"),
        ("classes=", "class numbers from 0 to 9"),
        ("classes=3,10", "class numbers from 0 to 9"),
        ("classes=3&classes=4", "given twice"),
        ("selected=yes", "true or false"),
        ("min_confidense=0.5", "did you mean 'min_confidence'"),
    ],
)
@pytest.mark.parametrize("path", ["manifest.json", f"shards/{SHARDS[0]}.tar", f"labels/{SHARDS[0]}.parquet"])
def test_a_parameter_that_is_none_is_refused_with_what_was_expected(
    joined: str, path: str, query: str, expected: str
) -> None:
    answer = fetch(f"{joined}/{path}?{query}")
    assert answer.status == 400
    assert expected in answer.json()["error"]


def test_an_export_is_sent_as_it_lies_there_and_not_filtered(run: SmallRun, exported: str) -> None:
    folder = run.folder / "run/exports/v1"
    manifest = fetch(f"{exported}/manifest.json").json()
    assert manifest["kind"] == "export"
    assert len(manifest["shards"]) > 1
    for shard in manifest["shards"]:
        content = fetch(f"{exported}/{shard['url']}").content
        assert content == (folder / f"{shard['name']}.tar").read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
        labels = fetch(f"{exported}/{shard['labels_url']}").content
        assert labels == (folder / f"labels/{shard['name']}.parquet").read_bytes()
        assert pq.read_table(io.BytesIO(labels)).num_rows == shard["num_samples"]
        refused = fetch(f"{exported}/{shard['url']}?min_confidence=0.5")
        assert (refused.status, "without a filter" in refused.json()["error"]) == (400, True)
    for name in (
        "wids.json",
        "_info.json",
        "sizes.json",
        "classes.txt",
        "README.md",
        "SHA256SUMS",
        "pseudo-000000.tar",
    ):
        assert fetch(f"{exported}/{name}").content == (folder / name).read_bytes()
    for name in ("done.json", "started.json", "labels", "index/pseudo-000000.parquet"):
        assert fetch(f"{exported}/{name}").status == 404

"""Whatever bit of a label file or a selection's file flips: every stage that reads it says so, or reads what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import DataError
from data.labels.exclusions import ExcludedKeys
from data.labels.label_files import (
    describe_label_file,
    label_table,
    open_label_file,
    read_copies,
    read_labels,
    read_labels_manifest,
    read_quarantined,
    write_labels,
)
from data.labels.overlay import RowFilter
from data.labels.pseudo_labels import PseudoLabels
from data.labels.top_k import top_k_of
from data.shards.split import Shard, open_split
from data.tables import open_table, read_table, to_parquet, write_table
from data.training_order import OrderSlice
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.export.tables import write_label_file
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import Stream, labeled_stream
from pipeline.report.facts import read_facts
from pipeline.report.survey import Limits, survey_labels
from pipeline.upstream.stage_inputs import open_overlay
from student.streams import pseudo_labeled_stream
from teacher.diff import changes, side
from teacher.selection.label_reader import Exclusions, LabelSource
from teacher.selection.reuse import every_row, reuse_images
from teacher.selection.rule import SelectRule
from teacher.selection.stage import select
from tests.conftest import WriteDigits, make_writer
from tests.small_run import SmallRun

NUM_BITS = 300  # of each file, for those who read it alone
FEW_BITS = 50  # for those who read whole runs
QUICK = ("whole, without its manifest", "columns", "one column, without its manifest", "select", "student", "copies")
NAME = "unlabeled-000001"
_KEYS = ExcludedKeys({"no such key"})  # so that keys are read, too
Readers = dict[str, Callable[[], Any]]


@dataclass
class Run:
    """A run whose labels are selected, and what reads them."""

    config: Config
    layout: Layout
    labels: Path  # one file
    copies: Path
    readers: Readers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Run:
    small = SmallRun(tmp_path_factory.mktemp("flipped"), make_writer(digits))
    config = small.config(truth=False, student={"batch_size": 8, "image_size": 8, "model": "resnetrs50"})
    layout = Layout(config.run_dir)
    small.model(layout.teacher, "teacher")
    small.label(config, layout)
    select(config, layout)
    folder = layout.current_selection()
    assert folder is not None
    files = Path(layout.labels) / f"{NAME}.parquet", Path(folder) / f"{NAME}.parquet"
    return Run(config, layout, *files, readers_of(config, layout, folder, str(small.folder / "out")))


def readers_of(config: Config, layout: Layout, selection: str, out: str) -> Readers:
    """Every way in which a stage reads the labels and copies of shard NAME, or of all."""
    entries = read_labels_manifest(layout.labels)
    url, entry = f"{layout.labels}/{NAME}.parquet", entries[NAME]
    overlay, _, _ = open_overlay(config, layout)
    position = [shard.name for shard in overlay.shards].index(NAME)
    corpus = open_split(config.data.unlabeled, layout.indexes)
    stream = pseudo_labeled_stream(config, layout, corpus, selection, 8)
    rule = SelectRule(10, confidence_threshold=0.3, per_class=8, max_copies=4)
    this = side({"1": layout}, "1")
    facts = read_facts(config, [layout])

    def selected() -> list[Any]:
        source = LabelSource(layout.labels, rule, Exclusions(keys=_KEYS), entries)
        return [
            [getattr(batch, name).tolist() for name in ("label", "confidence", "ordinal", "image_hash", "eligible")]
            for batch in source.read(NAME, needs_hashes=True)
        ]

    def trained() -> list[Any]:
        batches = TrainBatches([stream], config.student, 10, 0)
        return [*described_rows(batches._streams[0], position), batches.keys(0)]

    def exported() -> bytes:
        record = write_label_file(overlay, position, RowFilter(), "columns", out)
        return Path(out, record.name).read_bytes()

    return {
        "whole": lambda: contents(read_labels(url, entry=entry)),
        "whole, without its manifest": lambda: contents(read_labels(url)),
        "columns": lambda: contents(read_labels(url, ["label", "confidence"], entry)),
        "one column, without its manifest": lambda: contents(read_labels(url, ["rest"])),
        "quarantined": lambda: read_quarantined(read_labels(url, ["ordinal"], entry), url),
        "select": selected,
        "student": trained,
        "export": exported,
        "serve's counts": lambda: overlay.wanted(position, RowFilter(min_confidence=0.5)).tolist(),
        "PseudoLabels": lambda: PseudoLabels(config.run_dir).table().to_pylist(),
        "report": lambda: described(survey_labels(facts.generations[0], {}, 0, Limits.of(None, 10))),
        "diff": lambda: described(changes(this, this)),
        "copies": lambda: read_copies(f"{selection}/{NAME}.parquet").tolist(),
    }


def described_rows(stream: Stream, shard: int) -> list[Any]:
    """Places and targets of a shard's rows, as training sees them."""
    rows, number = stream.rows(shard), stream.spec.num_rows[shard]
    zeros = np.zeros(number, np.int64)
    targets = stream.targets(OrderSlice(zeros, zeros + shard, np.arange(number), zeros))
    assert targets is not None
    return [*map(rows.place, range(number)), targets.dense().tolist()]


def contents(table: pa.Table) -> list[Any]:
    return [table.to_pylist(), table.schema.metadata]


def described(value: Any) -> str:
    with np.printoptions(threshold=10**9):
        return repr(value)


def flips(content: bytes, number: int, seed: int) -> Iterator[bytes]:
    """The content with one bit flipped, `number` times: half of them in the last 4 KiB, where the footer is."""
    random = np.random.default_rng(seed)
    footer = max(0, len(content) - 4096)
    for step in range(number):
        bit = int(random.integers(footer * 8 * (step % 2), len(content) * 8))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def differences(path: Path, readers: Readers, contents: Iterable[bytes]) -> dict[str, int]:
    """How often each reader was silent and gave something else, or raised without naming the file. Raises what is no ValueError."""
    before, wrong = path.read_bytes(), dict.fromkeys(readers, 0)
    expected = {name: reader() for name, reader in readers.items()}
    try:
        for content in contents:
            path.write_bytes(content)
            for name, reader in readers.items():
                try:
                    wrong[name] += reader() != expected[name]
                except ValueError as error:
                    wrong[name] += path.name not in str(error)
    finally:
        path.write_bytes(before)
    return wrong


def test_a_flipped_bit_of_a_label_file_is_found_or_changes_nothing(run: Run) -> None:
    quick = {name: run.readers[name] for name in QUICK}
    for readers, number in ((quick, NUM_BITS), (run.readers, FEW_BITS)):
        found = differences(run.labels, readers, flips(run.labels.read_bytes(), number, 0))
        assert found == dict.fromkeys(readers, 0)


@pytest.mark.slow
def test_a_flipped_bit_of_a_selections_file_is_found_or_changes_nothing(run: Run) -> None:
    names = ("student", "export", "serve's counts", "PseudoLabels", "report", "diff", "copies")
    for chosen, number in ((("copies", "serve's counts"), NUM_BITS), (names, FEW_BITS)):
        readers = {name: run.readers[name] for name in chosen}
        found = differences(run.copies, readers, flips(run.copies.read_bytes(), number, 1))
        assert found == dict.fromkeys(readers, 0)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_each_bit_of_a_file_is_found_or_changes_nothing_for_those_who_read_some_columns(run: Run) -> None:
    names = ("whole, without its manifest", "columns", "one column, without its manifest", "select")
    readers = {name: run.readers[name] for name in names}
    content = run.labels.read_bytes()

    def each() -> Iterator[bytes]:
        for bit in range(len(content) * 8):
            yield b"".join([content[: bit // 8], bytes([content[bit // 8] ^ 1 << bit % 8]), content[bit // 8 + 1 :]])

    assert differences(run.labels, readers, each()) == dict.fromkeys(readers, 0)


def test_what_is_sealed_reads_as_any_parquet(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3], "b": ["x", None, "y"]}).replace_schema_metadata({"said": "so"})
    path = tmp_path / "table.parquet"
    write_table(str(path), table)
    assert pq.read_table(path).equals(table, check_metadata=True)
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    assert duckdb.sql(f"select * from '{path}'").fetchall() == [(1, "x"), (2, None), (3, "y")]
    assert polars.read_parquet(path).to_dict(as_series=False) == table.to_pydict()
    assert polars.scan_parquet(path).select("b").collect().to_dict(as_series=False) == {"b": ["x", None, "y"]}


@pytest.mark.parametrize("rows", [0, 1, 3, 100_000])
def test_any_number_of_rows_and_a_long_footer_come_back(tmp_path: Path, rows: int) -> None:
    table = pa.table({f"column {number}": np.arange(rows) + number for number in range(40)})
    table = table.replace_schema_metadata({"long": "x" * (rows % 7 * 10_000)})
    path = str(tmp_path / "table.parquet")
    write_table(path, table)
    assert read_table(path, "").equals(table, check_metadata=True)
    with open_table(path, "") as file:
        assert (file.is_sealed, file.num_rows) == (True, rows)
        assert file.read(["column 7", "column 3"]).equals(table.select(["column 7", "column 3"]))


def as_before(path: Path) -> bytes:
    """A label file as earlier versions wrote it: the same rows and metadata, without checksums and seal."""
    table = pq.read_table(path)
    pq.write_table(table, path, compression="zstd")
    return path.read_bytes()


def test_label_files_of_earlier_versions_are_read_and_checked_by_their_digest(
    tmp_path: Path, write_digits: WriteDigits
) -> None:
    small = SmallRun(tmp_path, write_digits)
    config = small.config(truth=False, student={"batch_size": 8, "image_size": 8})
    layout = Layout(config.run_dir)
    small.model(layout.teacher, "teacher")
    small.label(config, layout)
    path = Path(layout.labels) / f"{NAME}.parquet"
    before = read_labels(str(path)).to_pylist()
    content, manifest = as_before(path), Path(layout.labels) / "manifest.json"
    entry = describe_label_file(str(path))
    assert entry is not None
    written = json.loads(manifest.read_text())
    written["shards"] = [vars(entry) if shard["name"] == NAME else shard for shard in written["shards"]]
    manifest.write_text(json.dumps(written))
    select(config, layout)
    folder = layout.current_selection()
    assert folder is not None
    readers = readers_of(config, layout, folder, str(tmp_path / "out"))
    assert [row["label"] for row in before] == [row["label"] for row in readers["whole"]()[0]]
    for name in ("whole, without its manifest", "one column, without its manifest", "copies"):
        readers.pop(name)  # nothing to check it by
    with open_table(str(path), "") as file:
        assert not file.is_sealed
    assert differences(path, readers, flips(content, 20, 2)) == dict.fromkeys(readers, 0)


def test_a_file_of_an_earlier_version_whose_content_is_known_is_not_fetched_again(
    tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SmallRun(tmp_path, write_digits)
    config = small.config(truth=False, student={"batch_size": 8, "image_size": 8})
    layout = Layout(config.run_dir)
    small.model(layout.teacher, "teacher")
    small.label(config, layout)
    path = Path(layout.labels) / f"{NAME}.parquet"
    content = as_before(path)
    entry = describe_label_file(str(path))
    monkeypatch.setattr("data.storage.read_bytes", None)
    with open_label_file(str(path), entry, content) as file:
        assert file.num_rows == pq.read_metadata(path).num_rows


def rewritten(path: Path, **source: Any) -> None:
    """A whole label file that says that it is of something else."""
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    metadata[b"source"] = json.dumps(json.loads(metadata[b"source"]) | source).encode()
    path.write_bytes(to_parquet(table.replace_schema_metadata(metadata)))


def columns_of_labels(run: Run) -> Readers:
    return {name: reader for name, reader in run.readers.items() if "without" not in name and name != "copies"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"made_by": "another teacher"}, r"another teacher or configuration \(another teacher\) .* says \([0-9a-f]{16}\)"),
        ({"index_sha256": "beef"}, "index beef, but the manifest beside it says .* index [0-9a-f]{16}"),
        ({"bytes": 7}, "of a shard with 7 bytes"),
    ],
    ids=["teacher", "index", "bytes"],
)  # fmt: skip
def test_labels_of_another_teacher_or_shard_under_a_files_name_are_refused_and_both_are_named(
    run: Run, source: dict[str, Any], message: str
) -> None:
    before = run.labels.read_bytes()
    rewritten(run.labels, **source)
    try:
        for name in ("whole", "columns", "select", "report", "diff", "serve's counts"):
            with pytest.raises(ValueError, match=rf"{NAME}\.parquet: .*{message}.*stage=label verify=true"):
                run.readers[name]()
        for name, reader in columns_of_labels(run).items():
            with pytest.raises(ValueError, match=NAME):
                print(name, reader())
    finally:
        run.labels.write_bytes(before)


def test_the_labels_of_another_shard_of_the_same_run_are_refused(run: Run) -> None:
    before = run.labels.read_bytes()
    run.labels.write_bytes(run.labels.with_name("unlabeled-000000.parquet").read_bytes())
    try:
        for reader in columns_of_labels(run).values():
            with pytest.raises(ValueError, match=NAME):
                reader()
    finally:
        run.labels.write_bytes(before)


def test_a_plain_parquet_file_under_a_label_files_name_is_no_label_file(run: Run) -> None:
    before = run.labels.read_bytes()
    pq.write_table(pa.table({"label": [1], "confidence": pa.array([0.5], pa.float32())}), run.labels)
    try:
        assert describe_label_file(str(run.labels)) is None
        for reader in columns_of_labels(run).values():
            with pytest.raises(ValueError, match=NAME):
                reader()
    finally:
        run.labels.write_bytes(before)


def test_keeping_images_reads_what_was_committed_before(run: Run, tmp_path: Path) -> None:
    folder = run.layout.current_selection()
    assert folder is not None
    second = Layout(run.config.run_dir, 2)
    entries = read_labels_manifest(run.layout.labels)
    for path in Path(run.layout.labels).glob("*"):
        target = Path(second.labels) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())

    def kept() -> str:
        source = LabelSource(second.labels, every_row(10), Exclusions(), entries)
        return described(reuse_images(second, source, folder, str(tmp_path)))

    for path in (run.labels, run.copies):
        contents = [*flips(path.read_bytes(), 60, 3)]
        assert differences(path, {"keep": kept}, contents) == {"keep": 0}


def test_a_flipped_bit_of_an_index_is_found_by_training(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "labeled", 0, 30)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    config = Config.model_validate({"run_dir": "x", "teacher": {"image_size": 8}}).teacher

    def trained() -> list[Any]:
        return described_rows(TrainBatches([labeled_stream(split, 4)], config, 10, 0)._streams[0], 0)

    path = Path(split.shards[0].index_url)
    readers: Readers = {"train": trained, "index": lambda: split.shards[0].index().to_pylist()}
    assert differences(path, readers, [*flips(path.read_bytes(), NUM_BITS, 4)]) == dict.fromkeys(readers, 0)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DataError, match=rf"{path.name}: damaged .*column 'key': expected string, but it is missing"):
        split.shards[0].index()


def test_a_worker_does_not_take_a_damaged_file_for_one_that_is_finished(tmp_path: Path) -> None:
    """Nobody knows the digest yet: the file describes itself."""
    index = pa.table({"key": [f"{n}" for n in range(20)], "offset": np.arange(20) * 512, "size": np.arange(20)})
    top_k = top_k_of(np.random.default_rng(0).dirichlet(np.ones(5), 20).astype(np.float32), 3)
    path = tmp_path / "s.parquet"
    shard = Shard("s.tar", 1, 20, "", "abc")
    entry = write_labels(str(path), shard, label_table(index, np.arange(20), top_k, np.zeros(20, np.uint64)), [], "x")
    assert describe_label_file(str(path)) == entry
    for content in flips(path.read_bytes(), NUM_BITS, 5):
        path.write_bytes(content)
        found = describe_label_file(str(path))
        assert found is None or replace(found, sha256=entry.sha256) == entry

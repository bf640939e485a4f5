"""stage=label labels each image once, whatever happened before; verify=true finds every defect of labels."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch

from data import storage
from data.labels.label_files import (
    LABELS_MANIFEST,
    VALIDATION_NAME,
    describe_label_file,
    read_labels,
    read_labels_manifest,
)
from data.shards.split import Split, open_split
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageError, require_done
from pipeline.models.registry import build_model
from teacher.labeling import finished_shards as journal_module
from teacher.labeling.stage import label
from teacher.labeling.verify import verify_labels
from teacher.train import train_teacher
from tests.conftest import make_writer
from tests.digits_run import Digits, label_and_selection_bytes

MODEL = {"width": 0.125, "blocks": [1, 1, 1, 1]}
NUM_SHARDS, PER_SHARD = 4, 30


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Iterator[Path]:
    """Shards and a finished run of teacher and label; the teacher's weights are random."""
    folder = tmp_path_factory.mktemp("finished")
    make_writer(digits)(folder / "unlabeled", 0, NUM_SHARDS * PER_SHARD, labeled=False, per_shard=PER_SHARD)
    torch.manual_seed(0)
    torch.save(build_model("resnetrs26", 10, MODEL).state_dict(), folder / "elsewhere.pth")
    start_ray(None)
    config, layout = configure(folder, folder / "run")
    train_teacher(config, layout)
    label(config, layout)
    yield folder
    ray.shutdown()


def configure(folder: Path, run_dir: Path, *words: str) -> tuple[Config, Layout]:
    fixed = [
        f"run_dir={run_dir}", f"data.unlabeled=[{folder}/unlabeled/*.tar]", "data.num_classes=10", "teacher.model=resnetrs26",
        "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}", f"teacher.weights={folder}/elsewhere.pth",
        "teacher.image_size=32", "label.batch_size=16", "label.threads=1", "label.workers=2",
    ]  # fmt: skip
    return load_config(None, [*fixed, *words]), Layout(str(run_dir))


Run = tuple[Config, Layout, Path]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A copy of the finished run to damage, and its labels folder."""
    shutil.copytree(finished / "run", tmp_path / "run")
    config, layout = configure(finished, tmp_path / "run")
    return config, layout, Path(layout.labels)


def name(number: int) -> str:
    return f"unlabeled-{number:06d}"


def flip_a_byte(path: Path, position: int | None = None) -> None:
    """Flip a byte in the middle, or at `position`."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_a_whole_run_verifies(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    verify_labels(*run[:2])
    assert f"{NUM_SHARDS} shards verified: {NUM_SHARDS * PER_SHARD} labels and 0 quarantined" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "missing"), (cut, "damaged"), (flip_a_byte, "damaged")],
    ids=["gone", "cut", "flip"],
)
def test_verify_names_the_shard_whose_file_is_wrong(run: Run, damage: Callable[[Path], None], message: str) -> None:
    config, layout, folder = run
    damage(folder / f"{name(2)}.parquet")
    with pytest.raises(StageError, match=rf"1 of {NUM_SHARDS} shards .*\n  {name(2)}: .*{message}"):
        verify_labels(config, layout)
    assert not (folder / f"{name(2)}.parquet").exists()


def rewrite(folder: Path, change: Callable[[list[int]], list[int]], **metadata: bytes) -> None:
    """Change the rows or metadata of a label file and its manifest entry alike: only a check of every sample finds it."""
    path = folder / f"{name(1)}.parquet"
    table = pq.read_table(path)
    table = table.take(change(list(range(table.num_rows))))
    pq.write_table(table, path, compression="zstd")
    described = describe_label_file(str(path))
    assert described is not None
    if metadata:
        changed = {name.encode(): content for name, content in metadata.items()}
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **changed}), path, compression="zstd")
        size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        described = replace(described, bytes=size, sha256=digest)
    manifest = storage.read_text(str(folder / LABELS_MANIFEST))
    old = next(entry for entry in read_labels_manifest(str(folder)).values() if entry.name == name(1))
    for field in ("rows", "bytes", "sha256"):
        before, after = (
            f'"{field}": {value!r}'.replace("'", '"') for value in (getattr(old, field), getattr(described, field))
        )
        head, tail = manifest.split(f'"{name(1)}"')
        manifest = head + f'"{name(1)}"' + tail.replace(before, after, 1)
    storage.write_text(str(folder / LABELS_MANIFEST), manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "30 samples, but 29 labels"),
        (lambda rows: [*rows[:-1], 3], "not in the shard's order"),
        (lambda rows: [*rows[:4], 3, *rows[5:]], "sample 3 is not the shard's, or occurs twice"),
        (lambda rows: rows[::-1], "not in the shard's order"),
    ],
    ids=["one lost", "one twice at the end", "one twice", "reversed"],
)
def test_verify_counts_every_sample_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[int]], list[int]], message: str
) -> None:
    config, layout, folder = run
    rewrite(folder, change)
    monkeypatch.setattr(
        "teacher.labeling.verify._check_outputs", lambda *_: None
    )  # the manifest has been tampered with, too
    with pytest.raises(StageError, match=rf"{name(1)}: .*{message}"):
        verify_labels(config, layout)


@pytest.mark.parametrize("record", [b"[", b'[{"ordinal": 3}]', b"{}"], ids=["cut", "fields", "kind"])
def test_verify_names_a_label_file_whose_record_of_quarantined_samples_is_damaged(
    run: Run, monkeypatch: pytest.MonkeyPatch, record: bytes
) -> None:
    """Earlier versions wrote files whose footer has no checksum."""
    config, layout, folder = run
    rewrite(folder, lambda rows: rows, quarantine=record)
    monkeypatch.setattr("teacher.labeling.verify._check_outputs", lambda *_: None)
    with pytest.raises(StageError, match=rf"1 of {NUM_SHARDS} .*\n  {name(1)}: .*record of quarantined samples"):
        verify_labels(config, layout)
    assert not (folder / f"{name(1)}.parquet").exists()


def test_verify_refuses_labels_of_another_configuration(run: Run) -> None:
    config, layout, _ = run
    other = config.model_copy(update={"label": config.label.model_copy(update={"top_k": 3})})
    with pytest.raises(StageError, match=r"label\.top_k: 10 there, 3 now"):
        verify_labels(other, layout)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("unlabeled-*.parquet")}


def test_only_lost_damaged_and_cut_label_files_are_made_again_and_are_the_same_bytes(run: Run, finished: Path) -> None:
    config, layout, folder = run
    before = times(folder)
    (folder / f"{name(0)}.parquet").unlink()
    cut(folder / f"{name(1)}.parquet")
    flip_a_byte(folder / f"{name(2)}.parquet")
    with pytest.raises(StageError):
        verify_labels(config, layout)
    label(config, layout)
    verify_labels(config, layout)
    assert [before[key] == value for key, value in sorted(times(folder).items())] == [False, False, False, True]
    assert label_and_selection_bytes(folder.parents[1]) == label_and_selection_bytes(finished / "run") | {
        f"gen-1/labels/damaged/{path.name}": path.read_bytes() for path in (folder / "damaged").iterdir()
    }


@pytest.mark.slow
def test_an_accuracy_that_is_expected_from_now_on_is_checked_though_the_run_was_begun_without(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(config: Config, *others: object) -> None:
        checked.append(config.teacher.expected_top1)

    def stop(*others: object) -> None:
        raise KeyboardInterrupt

    checked: list[float | None] = []
    monkeypatch.setattr("teacher.labeling.stage.check_teacher", check)
    monkeypatch.setattr("teacher.labeling.stage._commit", stop)
    config, layout, folder = run
    storage.write_text(str(folder / VALIDATION_NAME), "what the teacher said of validation images")
    (folder / f"{name(0)}.parquet").unlink()
    for expected in (None, None, 0.9):
        teacher = config.teacher.model_copy(update={"expected_top1": expected})
        with pytest.raises(KeyboardInterrupt):
            label(config.model_copy(update={"teacher": teacher}), layout)
    assert checked == [None, 0.9], "where nothing is expected, one look is enough"


def made_by_of(folder: Path) -> str:
    """The value `made_by` of the label files of a finished stage."""
    recorded = require_done(str(folder), "label")["fingerprint"]
    return Fingerprint(recorded["config"], recorded["inputs"]).digest()


@pytest.mark.slow
def test_new_shards_of_a_grown_corpus_are_labeled_and_old_labels_kept(run: Run, finished: Path, digits: Digits) -> None:
    _, layout, folder = run
    more = Path(layout.run_dir).parent / "more"
    make_writer(digits)(more, 200, 220, labeled=False)
    config, _ = configure(finished, Path(layout.run_dir), f"data.unlabeled=[{finished}/unlabeled/*.tar,{more}/*.tar]")
    before = times(folder)
    record = label(config, layout)
    assert record["summary"]["labels"] == NUM_SHARDS * PER_SHARD + 20
    assert times(folder) == before
    assert read_labels(str(folder / "more-000000.parquet")).num_rows == 20
    verify_labels(config, layout)


def test_continuing_opens_no_label_file_that_the_journal_knows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config, layout, folder = run
    corpus = open_split(config.data.unlabeled, layout.indexes)
    made_by = made_by_of(folder)
    whole = journal_module.Journal.open(str(folder), corpus, made_by)
    whole.write()
    (folder / LABELS_MANIFEST).unlink()
    monkeypatch.setattr("data.labels.label_footers.read_footer", lambda *_: pytest.fail("read a footer"))
    assert journal_module.Journal.open(str(folder), corpus, made_by).shards == whole.shards
    changed = Split(tuple(replace(shard, index_sha256="other") for shard in corpus.shards))
    assert journal_module.Journal.open(str(folder), changed, made_by).shards == {}


def test_without_a_journal_footers_tell_which_shards_have_labels_and_files_are_read_once_the_stage_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout, folder = run
    corpus, made_by = open_split(config.data.unlabeled, layout.indexes), made_by_of(folder)
    entries = read_labels_manifest(str(folder))
    (folder / LABELS_MANIFEST).unlink()
    flip_a_byte(folder / f"{name(2)}.parquet", 100)  # in a page
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", lambda *_: pytest.fail("read a whole file"))
        patch.setattr(journal_module, "read_if_usable", lambda *_: None)
        journal = journal_module.Journal.open(str(folder), corpus, made_by)
    assert journal.shards == {key: replace(entry, sha256="") for key, entry in entries.items()}
    journal.write()
    assert journal_module.Journal.open(str(folder), corpus, made_by).shards == journal.shards, "not in the journal"
    monkeypatch.setattr(journal_module, "_EVERY_S", -1.0)
    journal.read_unread()
    del entries[name(2)]
    assert journal.shards == entries, "the rows of one are damaged, which its footer cannot tell"
    again = journal_module.Journal.open(str(folder), corpus, made_by).shards
    assert {key: entry for key, entry in again.items() if entry.sha256} == entries, (
        "a stop meanwhile loses half a minute"
    )
    assert f"{name(2)}.parquet is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"teacher_check": null, "shards": [{"name": "x"}]}'])
def test_a_journal_that_is_damaged_or_of_another_version_is_done_without(run: Run, content: str) -> None:
    config, layout, folder = run
    corpus = open_split(config.data.unlabeled, layout.indexes)
    (folder / journal_module.JOURNAL_NAME).write_text(content)
    assert len(journal_module.Journal.open(str(folder), corpus, made_by_of(folder)).shards) == NUM_SHARDS


def test_a_label_file_of_another_teacher_is_not_taken_for_this_ones(run: Run) -> None:
    """A worker that outlives its driver may commit a file after force=true started over."""
    config, layout, folder = run
    corpus = open_split(config.data.unlabeled, layout.indexes)
    made_by = made_by_of(folder)
    (folder / LABELS_MANIFEST).unlink()
    assert len(journal_module.Journal.open(str(folder), corpus, made_by).shards) == NUM_SHARDS
    path, stray = folder / f"{name(2)}.parquet", "another teacher's"
    table = pq.read_table(path)
    metadata = {
        **table.schema.metadata,
        b"source": table.schema.metadata[b"source"].replace(made_by.encode(), stray.encode()),
    }
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert name(2) not in journal_module.Journal.open(str(folder), corpus, made_by).shards


@pytest.mark.slow
def test_five_workers_give_the_same_bytes_as_two(finished: Path, tmp_path: Path) -> None:
    cpus = ray.cluster_resources()["CPU"]
    config, layout = configure(finished, tmp_path / "run", "label.workers=5", f"label.cpus_per_worker={cpus / 5}")
    shutil.copytree(finished / "run/gen-1/teacher", tmp_path / "run/gen-1/teacher")
    label(config, layout)
    assert label_and_selection_bytes(tmp_path / "run") == label_and_selection_bytes(finished / "run")
    assert not Path(layout.labels, "journal.json").exists()


@pytest.mark.slow
def test_what_a_killed_worker_had_begun_to_write_is_gone_when_the_others_are_done(run: Run, finished: Path) -> None:
    config, layout, folder = run
    (folder / f"{name(0)}.parquet").unlink()
    (folder / "done.json").unlink()

    def die_on_another_node(*args: object) -> None:
        (folder / ".tmp-0123abcd-of-a-worker").write_text("half")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher.labeling.stage._print_times", die_on_another_node)
        label(config, layout)
    assert label_and_selection_bytes(folder.parents[1]) == label_and_selection_bytes(finished / "run")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("refused_by", ["the teacher", "the device", "a name"])
def test_a_refusal_leaves_finished_labels_finished(
    run: Run,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    digits: Digits,
    force: bool,
    refused_by: str,
) -> None:
    """Add a shard, so that the finished stage would run again."""
    _, layout, folder = run
    make_writer(digits)(tmp_path / "more", 0, 10, labeled=False, per_shard=10)
    patterns = f"data.unlabeled=['{finished}/unlabeled/*.tar','{tmp_path}/more/*.tar']"
    config, _ = configure(finished, tmp_path / "run", patterns)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def refuse(*_: object) -> None:
        raise StageError("no")

    names = {"the teacher": "check_teacher", "the device": "require_device", "a name": "check_shards"}
    monkeypatch.setattr(f"teacher.labeling.stage.{names[refused_by]}", refuse)
    with pytest.raises(StageError, match=r"^no$"):
        label(config, layout, force)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not folder.with_name("labels.old-1").exists()

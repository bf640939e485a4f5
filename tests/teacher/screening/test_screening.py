"""The images of a self-supervised training: all of both splits but those that cannot or must not be used, found once and listed."""

from __future__ import annotations

import csv
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from data.errors import DataError
from data.images.decode import DecodeError, decode
from data.labels.exclusions import NOTHING_EXCLUDED
from data.shards.split import Split, open_split
from data.shards.write import Fields, write_shards
from data.storage.failpoint import VARIABLE
from pipeline.core import ray_runtime
from pipeline.core.config import load_config
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import Config, ViewsConfig
from pipeline.core.stage import StageError
from pipeline.inputs.batches import TrainBatches
from teacher.executors import Executor, RayTasks, Threads, processes
from teacher.near_duplicates.search import NearDuplicateSearch
from teacher.screening import stream as screening
from teacher.screening.screen import Screener
from teacher.screening.stream import LEFT_OUT_NAME, PretrainStream, pretrain_inputs, pretrain_stream
from tests import bad_corpus
from tests.copies import COPIES, jpeg, photos, write_held_out
from tests.fragile import CRASHES
from tests.pipeline.training.test_training import CONFIG
from tests.teacher.labeling.test_bad_input import LEDGER
from tests.teacher.near_duplicates.test_near_duplicates import Corpus

BROKEN = jpeg(photos("flower.jpg")[0])[:700]


class Images:
    """Twelve labeled and twenty unlabeled photos in shards of five, of equal names in both splits.

    Unusable: a broken image in each split, an excluded key in the second shards, and two copies of held-out photos.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        flowers, china = [jpeg(photo) for photo in photos("flower.jpg")], photos("china.jpg")
        held_out = write_held_out(folder / "test", china[:3])
        self.write("labeled", [*flowers, BROKEN, COPIES["flipped"](china[1])])
        quality = [jpeg(photo, 70) for photo in photos("flower.jpg")]
        self.write("unlabeled", [*quality, *quality[:8], COPIES["half the size"](china[2]), BROKEN])
        (folder / "exclude.txt").write_text("images-000001/00007\n")
        self.words = [
            f"data.held_out_hashes=[{held_out}]",
            f"data.exclude={folder}/exclude.txt",
            "label.max_quarantined=0.5",
        ]

    def write(self, split: str, images: list[bytes]) -> None:
        samples: list[tuple[str, Fields]] = [(f"{number:05d}", {"jpg": image}) for number, image in enumerate(images)]
        write_shards(samples, f"{self.folder}/{split}", "images", 5)

    def split(self, name: str) -> Split:
        return open_split(f"{self.folder}/{name}/*.tar", f"{self.folder}/index")

    def config(self, *words: str) -> Config:
        return load_config(None, [f"run_dir={self.folder}/run", *self.words, *words])

    def stream(self, name: str = "run", *words: str) -> PretrainStream:
        splits = self.split("labeled"), self.split("unlabeled")
        return pretrain_stream(self.config(*words), *splits, str(self.folder / name), images_per_step=8)

    def left_out(self, name: str = "run") -> list[dict[str, Any]]:
        return list(pq.read_table(self.folder / name / LEFT_OUT_NAME).to_pylist())


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path)


def test_images_that_cannot_be_used_are_listed_with_the_reason(
    images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = images.stream().summary
    assert summary == {"images": 32, "used": 26, "undecodable": 2, "excluded": 2, "held_out_copies": 2}
    rows = images.left_out()
    places = [(row["split"], row["shard"], row["ordinal"], row["key"], row["kind"]) for row in rows]
    assert places == [
        ("labeled", "images-000001", 2, "00007", "excluded"),
        ("labeled", "images-000002", 0, "00010", "undecodable"),
        ("labeled", "images-000002", 1, "00011", "held_out_copy"),
        ("unlabeled", "images-000001", 2, "00007", "excluded"),
        ("unlabeled", "images-000003", 3, "00018", "held_out_copy"),
        ("unlabeled", "images-000003", 4, "00019", "undecodable"),
    ]
    with pytest.raises(DecodeError) as error:
        decode(BROKEN)
    assert [row["reason"] for row in rows if row["kind"] == "undecodable"] == [str(error.value)] * 2
    held_out = f"{images.folder}/test/hashes.parquet"
    copies = [row["reason"] for row in rows if row["kind"] == "held_out_copy"]
    assert copies == [f"near-duplicate of row {row} of {held_out}" for row in (1, 2)]
    printed = capsys.readouterr().out
    assert printed == (
        "pretrain: 26 of 32 labeled and unlabeled images; left out: 2 cannot be decoded, 2 in data.exclude, 2 near-duplicates of "
        f"held-out images, listed in {images.folder}/run/{LEFT_OUT_NAME}\n"
    )
    assert not (images.folder / "run/left_out").exists(), "parts of the screening"


def test_every_other_image_of_both_splits_is_seen_once_an_epoch(images: Images) -> None:
    spec = images.stream().spec
    assert spec.num_images == 26
    config = CONFIG.model_copy(update={"augment": ViewsConfig(), "image_size": 16})
    with closing(TrainBatches((spec,), config, 0, seed=0)) as batches:
        epochs = [batches.order(0).take(26 * epoch, 26) for epoch in range(2)]
        steps = [batches[step] for step in range(7)]
    unusable = {(row["split"], row["shard"], row["ordinal"]) for row in images.left_out()}
    expected = [
        (position, row)
        for position, (split, shard) in enumerate(
            (name, shard) for name in ("labeled", "unlabeled") for shard in images.split(name).shards
        )
        for row in range(shard.num_samples)
        if (split, shard.name, row) not in unusable
    ]
    for epoch in epochs:
        assert sorted(zip(epoch.shard.tolist(), epoch.row.tolist(), strict=True)) == expected
    assert [batch.images.shape for batch in steps] == [(8, 2, 3, 16, 16)] * 7
    mixed = Counter(int(shard) < 3 for shard in epochs[0].shard[:13])
    assert min(mixed.values()) > 1, "one order over both splits, not one after the other"


def test_the_stream_is_the_same_when_the_stage_continues(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    first = images.stream()
    content = (images.folder / "run" / LEFT_OUT_NAME).read_bytes()
    monkeypatch.setattr(Screener, "screen", None)  # nothing is screened again
    assert images.stream() == first
    assert (images.folder / "run" / LEFT_OUT_NAME).read_bytes() == content


def test_an_interrupted_screening_continues_with_the_shards_that_are_left(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    screened: list[str] = []
    original = Screener.screen

    def screen(self: Screener, split: str, shard: Any, *others: Any) -> Any:
        if len(screened) == 4:
            raise KeyboardInterrupt
        screened.append(f"{split}/{shard.name}")
        return original(self, split, shard)

    with monkeypatch.context() as patch:
        patch.setattr(Screener, "screen", screen)
        with pytest.raises(KeyboardInterrupt):
            images.stream("cut")
    assert not (images.folder / "cut" / LEFT_OUT_NAME).exists()
    done = set(screened)
    screened.clear()

    def note(self: Screener, split: str, shard: Any, *others: Any) -> Any:
        screened.append(f"{split}/{shard.name}")
        return original(self, split, shard)

    monkeypatch.setattr(Screener, "screen", note)
    continued = images.stream("cut")
    assert len(screened) == 3
    assert not done & set(screened)
    assert continued == images.stream("whole")
    assert (images.folder / "cut" / LEFT_OUT_NAME).read_bytes() == (
        images.folder / "whole" / LEFT_OUT_NAME
    ).read_bytes()


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    start_ray(None)
    yield
    ray.shutdown()


@pytest.mark.parametrize("kind", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
def test_any_workers_find_the_same(images: Images, kind: str, monkeypatch: pytest.MonkeyPatch, ray_here: None) -> None:
    expected = images.stream("here")

    @contextmanager
    def executor(address: str | None, number: int) -> Iterator[tuple[Executor, int, int]]:
        if kind == "ray":
            yield RayTasks(2), 1, 1 << 27
        else:
            with processes(2) as started:
                yield started, 1, 1 << 27

    monkeypatch.setattr(screening, "_executor", executor)
    assert images.stream(kind) == expected
    assert images.left_out(kind) == images.left_out("here")


def test_processes_screen_large_sets_and_threads_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a GiB; the tasks of a cluster have 128 MiB each, however many there are."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with screening._executor(None, 49_999) as (executor, threads, memory):
        assert (type(executor), executor.num_workers, threads, memory) == (Threads, 1, 2, 1 << 30)
    with screening._executor(None, 50_000) as (executor, threads, memory):
        assert (executor.num_workers, threads, memory) == (2, 1, 1 << 29)
        assert not isinstance(executor, Threads)
    monkeypatch.setattr(ray_runtime, "start_ray", lambda address: None)
    monkeypatch.setattr(ray_runtime, "num_cpus", lambda: 5000)
    with screening._executor("cluster:6379", 10) as (executor, threads, memory):
        assert (executor.num_workers, threads, memory) == (5000, 1, 1 << 27)


def screen_elsewhere(images: Images, failpoint: str = "") -> int:
    """Screen in another process, into `cut`, which a failpoint or an image may end; its exit status."""
    command = [sys.executable, "-m", "tests.fragile", "screen", str(images.folder), "cut"]
    words = [f"run_dir={images.folder}/run", *images.words]
    return subprocess.run([*command, *words], env=os.environ | {VARIABLE: failpoint}, check=False).returncode


@pytest.mark.slow  # each process loads torch
def test_killed_anywhere_it_continues_to_the_same_bytes(images: Images) -> None:
    images.stream("whole")
    steps = ["before-write/images-000000.begun", "after-write/images-000001.parquet", "after-rename/images-000002.parquet:2",
             f"after-write/{LEFT_OUT_NAME}"]  # fmt: skip
    for step in steps:
        assert screen_elsewhere(images, step) == -signal.SIGKILL
        assert not (images.folder / "cut" / LEFT_OUT_NAME).exists()
    assert screen_elsewhere(images, f"after-rename/{LEFT_OUT_NAME}") == -signal.SIGKILL
    assert screen_elsewhere(images) == 0
    whole, cut = ((images.folder / name / LEFT_OUT_NAME).read_bytes() for name in ("whole", "cut"))
    assert cut == whole
    assert not (images.folder / "cut/left_out").exists()


@pytest.mark.slow  # each process loads torch
def test_an_image_that_ends_the_process_is_listed_by_the_next_command(images: Images) -> None:
    shutil.rmtree(images.folder / "unlabeled")
    images.write("unlabeled", [jpeg(photos("flower.jpg")[0]), jpeg(photos("flower.jpg")[1]) + CRASHES])
    assert screen_elsewhere(images) == -signal.SIGSEGV
    assert screen_elsewhere(images) == 0
    (row,) = [row for row in images.left_out("cut") if row["split"] == "unlabeled"]
    assert (row["ordinal"], row["kind"]) == (1, "undecodable")
    assert row["reason"] == "decoding it ended the process (SIGSEGV)"


def test_what_cannot_be_decoded_is_what_labeling_quarantines(tmp_path: Path) -> None:
    """Of a corpus of everything that goes wrong, see its ledger."""
    bad_corpus.write_corpus(str(tmp_path / "corpus"))
    split = open_split(f"{tmp_path}/corpus/*.tar", str(tmp_path / "index"))
    screener = Screener(NOTHING_EXCLUDED, None, 0.99, threads=2, memory_bytes=1 << 30)
    found = [row for shard in split.shards for row in screener.screen("unlabeled", shard).to_pylist()]
    with LEDGER.open(newline="") as file:
        expected = list(csv.DictReader(file))
    assert [(row["shard"], row["ordinal"], row["key"], row["offset"]) for row in found] == [
        (row["shard"], int(row["ordinal"]), row["key"], int(row["offset"])) for row in expected
    ]
    assert {row["kind"] for row in found} == {"undecodable"}
    for row, wanted in zip(found, expected, strict=True):
        assert fnmatch.fnmatchcase(row["reason"], wanted["reason"]), row


def test_copies_are_those_that_the_search_over_labels_finds(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    held_out = screening._held_out(corpus.config())
    split = open_split(f"{corpus.shards}/*.tar", corpus.layout.indexes)
    screener = Screener(NOTHING_EXCLUDED, held_out, 0.99, threads=2, memory_bytes=1 << 30)
    search = NearDuplicateSearch(held_out, 0.99)
    for shard in split.shards:
        by_labels = search.search_shard(corpus.layout.labels, shard.name, shard.url)
        found = screener.screen("unlabeled", shard)
        assert found.column("ordinal").to_pylist() == by_labels.table.column("ordinal").to_pylist()
        assert by_labels.table.num_rows


def test_too_many_broken_images_stop_the_stage_and_name_some(images: Images) -> None:
    with pytest.raises(StageError) as error:
        images.stream("run", "label.max_quarantined=0.05")
    message = str(error.value)
    assert "2 of 32 images cannot be decoded, more than label.max_quarantined=0.05" in message
    assert f"{images.folder}/run/{LEFT_OUT_NAME} names each" in message
    assert "images-000002, key '00010': OSError: image file is truncated" in message
    assert len(images.left_out()) == 6, "listed"
    assert images.stream("run", "label.max_quarantined=0.1").spec.num_images == 26, "no image is screened again"


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    images = Images(tmp_path)
    whole = (tmp_path / "unlabeled/images-000000.tar").read_bytes()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StageError, match="1 of 1 shards are cut short or damaged"):
        pretrain_stream(images.config(), None, images.split("foreign"), str(tmp_path / "run"), 8)


def test_a_single_split_is_enough_and_two_images(tmp_path: Path) -> None:
    images = Images(tmp_path)
    alone = pretrain_stream(images.config(), images.split("labeled"), None, str(tmp_path / "one"), 8)
    assert alone.spec.num_images == 9
    images.write("few", [BROKEN, jpeg(photos("flower.jpg")[0])])
    config = images.config("label.max_quarantined=1")
    with pytest.raises(DataError, match=f"1 of 2 images are left to train on, and 2 are needed; .*{LEFT_OUT_NAME}"):
        pretrain_stream(config, images.split("few"), None, str(tmp_path / "two"), 8)
    with pytest.raises(StageError, match=r"data\.labeled and data\.unlabeled are empty"):
        pretrain_inputs(config, None, None)


def test_the_fingerprint_follows_images_excluded_keys_and_held_out_images(images: Images) -> None:
    splits = images.split("labeled"), images.split("unlabeled")
    before = pretrain_inputs(images.config(), *splits)
    assert set(before) == {"labeled", "unlabeled", "exclude", "held_out"}
    assert pretrain_inputs(images.config(), splits[0], None) == before | {"unlabeled": "none"}
    (images.folder / "exclude.txt").write_text("other\n")
    write_held_out(images.folder / "test", photos("china.jpg")[:4])
    after = pretrain_inputs(images.config(), *splits)
    assert {name for name in before if before[name] != after[name]} == {"exclude", "held_out"}
    plain = load_config(None, [f"run_dir={images.folder}/run"])
    assert set(pretrain_inputs(plain, *splits)) == {"labeled", "unlabeled"}

"""Shards that changed after a run was made, through the commands that users give: noticed everywhere; good labels stay in place."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from data.errors import DataError
from data.labels.overlay import RowFilter
from data.labels.pseudo_labels import PseudoLabels
from data.shards.write import write_shards
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.stage import StageError, StageRefusedError
from pipeline.models.registry import build_model
from pipeline.run import run
from pipeline.serving.catalog import OutdatedError
from pipeline.serving.server import open_catalog
from tests.conftest import make_writer
from tests.data.shards.test_identity import IMAGES, KEYS, forget_versions, make_younger, swap_labels, write_shard
from tests.digits_run import Digits

pytestmark = pytest.mark.slow  # whole commands, most of which start Ray

REVERSED = range(19, -1, -1)
MODEL = ["teacher.model=resnetrs26", "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}", "teacher.image_size=16"]
MADE = ["label.workers=1", "label.threads=1", "select.confidence_threshold=0", "select.per_class=null", "threads=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with twenty images of one size in a shard from elsewhere, twenty in a packed one, and a run that labeled each."""
    folder = tmp_path_factory.mktemp("made")
    write_shard(folder / "foreign/photos.tar", range(20))
    pack(folder / "packed", range(20))
    torch.manual_seed(0)
    model = build_model("resnetrs26", 10, {"width": 0.125, "blocks": [1, 1, 1, 1]})
    torch.save(model.state_dict(), folder / "elsewhere.pth")
    for name in ("foreign", "packed"):
        weights = [f"teacher.weights={folder}/elsewhere.pth", "data.num_classes=10"]
        run([*words(folder, folder / f"run-{name}", name), *weights, *MODEL, *MADE, "stage=teacher,label"])
    yield folder
    ray.shutdown()


def pack(folder: Path, order: Sequence[int]) -> None:
    write_shards([(KEYS[number], {"png": IMAGES[number]}) for number in order], str(folder), "packed", 20)


def words(folder: Path, run_dir: Path, corpus: str) -> list[str]:
    return [f"run_dir={run_dir}", f"data.unlabeled=[{folder}/{corpus}/*.tar]"]


class Copy:
    """A copy of a run, and its only shard, which is put back at the end."""

    def __init__(self, folder: Path, copy: Path, corpus: str) -> None:
        shutil.copytree(folder / f"run-{corpus}", copy)
        self.run_dir, self.labels = copy, copy / "gen-1/labels"
        self.words = words(folder, copy, corpus)
        (self.shard,) = (folder / corpus).glob("*.tar")
        self.label_file = self.labels / f"{self.shard.stem}.parquet"

    def do(self, *more: str) -> None:
        run([*self.words, *more])


@pytest.fixture
def copy(made: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Copy]:
    corpus = getattr(request, "param", "foreign")
    copy = Copy(made, tmp_path / "run", corpus)
    content, times = copy.shard.read_bytes(), copy.shard.stat()
    yield copy
    copy.shard.write_bytes(content)
    os.utime(copy.shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def right_images(run_dir: Path) -> int:
    """How many keys of a run's pseudo-labels come with the image of that key."""
    labels = PseudoLabels(str(run_dir))
    source = dict(zip(*(labels.table().column(name).to_pylist() for name in ("__key__", "source_key")), strict=True))
    found = {source[item["key"]]: np.asarray(item["image"]) for item in labels.dataset(as_dict=True)}
    assert sorted(found) == KEYS
    return sum(
        np.array_equal(found[key], np.asarray(Image.open(io.BytesIO(image)).convert("RGB")))
        for key, image in zip(KEYS, IMAGES, strict=True)
    )


def reverse(copy: Copy, keep_time: bool) -> None:
    """The same twenty images in reverse order: a shard of equal size."""
    before = copy.shard.stat()
    write_shard(copy.shard, REVERSED)
    after = copy.shard.stat()
    assert after.st_size == before.st_size
    os.utime(copy.shard, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if keep_time else 10**10)))


def test_twenty_images_in_reverse_order_are_found_by_every_command(copy: Copy) -> None:
    assert right_images(copy.run_dir) == 20
    label_file = copy.label_file.read_bytes()
    reverse(copy, keep_time=False)
    with pytest.raises(DataError, match=r"data\.unlabeled has changed since it was labeled; run stage=label"):
        PseudoLabels(str(copy.run_dir))
    with pytest.raises(StageError, match=r"data\.unlabeled has changed since it was labeled"):
        copy.do("stage=export")
    with pytest.raises(StageError, match=r"none of its 1 shards .* have changed since"):
        copy.do("stage=label", "verify=true")
    assert copy.label_file.read_bytes() == label_file, "they are good labels of a shard that can be restored"
    copy.do("stage=label")
    copy.do("stage=label", "verify=true")
    assert right_images(copy.run_dir) == 20
    copy.do("stage=export")
    assert right_images(copy.run_dir / "exports/v1") == 20


def test_with_the_old_modification_time_the_headers_of_the_images_tell(copy: Copy) -> None:
    reverse(copy, keep_time=True)
    message = r"photos\.tar: sample 0 should be '00', with \d+ bytes at byte 512, but there is '19\.png'"
    with pytest.raises(DataError, match=message):
        right_images(copy.run_dir)
    with pytest.raises(DataError, match=message):
        copy.do("stage=export")
    with pytest.raises(StageError, match="have changed since"):
        copy.do("stage=label", "verify=true")
    with pytest.raises(DataError, match="has changed since it was labeled"):
        PseudoLabels(str(copy.run_dir))


def test_a_run_of_an_earlier_version_is_kept_as_it_is_until_it_is_verified(
    copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    forget_versions(copy.run_dir / "index")
    before = copy.label_file.stat().st_mtime_ns
    copy.do("stage=label")
    assert right_images(copy.run_dir) == 20
    assert sum("indexed by an earlier version" in message for message in caplog.messages) == 1
    copy.do("stage=label", "verify=true")
    assert copy.label_file.stat().st_mtime_ns == before
    reverse(copy, keep_time=False)
    with pytest.raises(DataError, match="has changed since it was labeled"):
        PseudoLabels(str(copy.run_dir))


def test_a_shard_that_was_only_copied_loses_nothing(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    before = copy.label_file.stat().st_mtime_ns
    make_younger(copy.shard, 10)
    copy.do("stage=label")
    copy.do("stage=label", "verify=true")
    assert copy.label_file.stat().st_mtime_ns == before
    assert right_images(copy.run_dir) == 20
    said = capsys.readouterr().out
    assert "label: done" in said
    assert "1 shards were not packed here and have no recorded SHA-256" in said


@pytest.mark.parametrize("copy", ["packed"], indirect=True)
def test_a_packed_shard_in_reverse_order_gives_no_image_with_another_ones_label(copy: Copy, tmp_path: Path) -> None:
    assert right_images(copy.run_dir) == 20
    pack(tmp_path / "reversed", REVERSED)
    copy.shard.write_bytes((tmp_path / "reversed/packed-000000.tar").read_bytes())
    message = r"packed-000000\.tar: sample 0 should be '00', with \d+ bytes at byte 512, but there is '19\.png'"
    with pytest.raises(DataError, match=message):
        right_images(copy.run_dir)
    with pytest.raises(DataError, match=message):
        copy.do("stage=export")
    with pytest.raises(StageError, match=r"bytes are not those that were packed \(other SHA-256\)"):
        copy.do("stage=label", "verify=true")
    with pytest.raises(DataError, match="other samples or labels than when it was packed"):
        copy.do("stage=label", "force=true")


def test_a_server_hands_out_nothing_of_a_shard_that_was_replaced(copy: Copy) -> None:
    config = load_config(None, copy.words)
    catalog = open_catalog(config, [Layout(str(copy.run_dir))])
    item = catalog.shard("photos", RowFilter())
    assert item is not None
    item.check()
    body = item.load()
    assert sum(len(part) for parts in body.read(0, body.size) for part in parts) == body.size
    reverse(copy, keep_time=True)
    with pytest.raises(DataError, match="sample 0 should be '00'"):
        list(body.read(0, body.size))
    for sample in catalog.samples(RowFilter()):
        with pytest.raises(DataError, match=r"should be '\d\d'"):
            sample.read()
    make_younger(copy.shard, 10)
    with pytest.raises(OutdatedError, match="rewritten since the server started"):
        item.check()
    write_shard(copy.shard, range(20), later=20)
    again = open_catalog(config, [Layout(str(copy.run_dir))]).shard("photos", RowFilter())
    assert again is not None
    assert again.etag != item.etag


@pytest.mark.parametrize("copy", ["packed"], indirect=True)
def test_other_bytes_of_a_packed_shard_are_found_by_its_digest(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    copy.do("stage=label", "verify=true")
    assert "1 packed shards compared with their recorded SHA-256" in capsys.readouterr().out
    content = bytearray(copy.shard.read_bytes())
    content[600] ^= 1  # within the first image
    copy.shard.write_bytes(content)
    copy.do("stage=label")  # nothing tells it but reading all bytes
    with pytest.raises(StageError, match=r"bytes are not those that were packed \(other SHA-256\): restore \S+\.tar"):
        copy.do("stage=label", "verify=true")
    assert copy.label_file.exists()


@pytest.mark.parametrize("name", ["other", "photos"])
def test_another_corpus_is_refused_and_no_label_file_is_moved(copy: Copy, tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / f"typo/{name}.tar", range(5))
    with pytest.raises(StageError, match=r"data\.unlabeled: none of its 1 shards .*[Nn]othing was (checked or )?moved"):
        copy.do("stage=label", "verify=true", f"data.unlabeled=[{tmp_path}/typo/*.tar]")
    assert copy.label_file.exists()
    assert not (copy.labels / "damaged").exists()
    copy.do("stage=label", "verify=true")


def test_what_was_moved_away_is_not_lost_to_the_next_that_is(copy: Copy) -> None:
    good = copy.label_file.read_bytes()
    for number, name in enumerate(("photos.parquet", "photos.2.parquet", "photos.3.parquet")):
        content = bytearray(good)
        content[100 + number] ^= 1
        copy.label_file.write_bytes(content)
        with pytest.raises(StageError, match="label file is damaged"):
            copy.do("stage=label", "verify=true")
        assert (copy.labels / "damaged" / name).read_bytes() == content
        copy.label_file.write_bytes(good)  # as stage=label does
    assert len(list((copy.labels / "damaged").iterdir())) == 3


def test_only_a_label_file_that_is_wrong_itself_is_moved(copy: Copy, tmp_path: Path) -> None:
    """Of two shards one has changed, and a third is missing: their labels stay."""
    for name in ("one", "two"):
        write_shard(tmp_path / f"more/{name}.tar", range(5))
    corpus = [f"data.unlabeled=[{copy.shard},{tmp_path}/more/*.tar]"]
    copy.do(*corpus, "stage=label")
    write_shard(tmp_path / "more/one.tar", range(4, -1, -1), later=10)
    (tmp_path / "more/two.tar").unlink()
    with pytest.raises(
        StageError, match=r"(?s)2 of 2 shards.*two: has labels, but.*one: the shard has changed since it was labeled"
    ):
        copy.do(*corpus, "stage=label", "verify=true")
    assert {path.name for path in copy.labels.glob("*.parquet")} >= {"photos.parquet", "one.parquet", "two.parquet"}
    assert not (copy.labels / "damaged").exists()


# --- labeled shards


TRAINED = [
    *MODEL,
    "teacher.epochs=2",
    "teacher.warmup_epochs=0",
    "teacher.batch_size=10",
    "teacher.loader_workers=0",
    "threads=1",
]
LABELS = [number % 10 for number in range(20)]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "gen-1/teacher/weights/model.safetensors").read_bytes()


@pytest.mark.parametrize("keep_time", [False, True])
def test_swapped_labels_are_refused_and_force_trains_on_them(tmp_path: Path, keep_time: bool) -> None:
    shard, run_dir = tmp_path / "labeled.tar", tmp_path / "run"
    write_shard(shard, range(20), LABELS)
    command = [f"run_dir={run_dir}", f"data.labeled=[{shard}]", "data.num_classes=10", *TRAINED]
    run([*command, "stage=teacher"])
    old, before = weights(run_dir), shard.stat()
    swap_labels(shard)
    assert shard.stat().st_size == before.st_size
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if keep_time else 10**10)))
    if not keep_time:
        with pytest.raises(StageRefusedError, match="labeled: changed upstream"):
            run([*command, "stage=teacher"])
    run([*command, "stage=teacher", "force=true"])
    assert weights(run_dir) != old
    (index,) = (run_dir / "index").glob("*.parquet")
    assert pq.read_table(index).column("label").to_pylist() == [9 - label for label in LABELS]


def test_verify_tells_which_models_were_trained_on_other_shards(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after an earlier version, which took the swapped shard for the old one."""
    shard, run_dir = tmp_path / "labeled.tar", tmp_path / "trained"
    write_shard(shard, range(20), LABELS)
    command = [f"run_dir={run_dir}", f"data.labeled=[{shard}]", copy.words[1], "data.num_classes=10", *TRAINED, *MADE]
    run([*command, "stage=teacher,label"])
    run([*command, "stage=label", "verify=true"])
    assert "data.labeled: 1 shards were not packed here and have no recorded SHA-256" in capsys.readouterr().out
    before = shard.stat()
    swap_labels(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StageError, match=r"data\.labeled: \S+/teacher was made from other shards"):
        run([*command, "stage=label", "verify=true"])
    shard.unlink()
    run([*command, "stage=label", "verify=true"])
    assert "data.labeled: not checked: " in capsys.readouterr().out


def test_force_refuses_a_packed_shard_with_other_labels(tmp_path: Path, digits: Digits) -> None:
    make_writer(digits)(tmp_path / "labeled", 0, 20)
    command = [f"run_dir={tmp_path}/run", f"data.labeled=[{tmp_path}/labeled/*.tar]", *TRAINED]
    run([*command, "stage=teacher"])
    swap_labels(tmp_path / "labeled/labeled-000000.tar")
    with pytest.raises(DataError, match=r"labeled-000000\.tar: other samples or labels than when it was packed"):
        run([*command, "stage=teacher", "force=true"])
    assert (tmp_path / "run/gen-1/teacher/done.json").exists(), "nothing was moved aside"

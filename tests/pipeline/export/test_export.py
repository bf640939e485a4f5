"""An export has every selected image once, with its bytes and label, after crashes too; versions never change."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from omegaconf import OmegaConf

from data import storage
from data.labels.label_files import VALIDATION_NAME
from data.shards.image_reader import check_labeled
from data.shards.split import open_split
from data.tables import write_table
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageError, open_stage
from pipeline.export.stage import export
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from teacher.diff import diff
from teacher.selection.stage import select
from tests.conftest import DIGIT_NAMES, WriteDigits
from tests.small_run import NUM_UNLABELED, PER_SHARD, REASON, SmallRun
from tests.teacher.test_diff import rows

Identity = tuple[str, int]  # shard, ordinal


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits) -> SmallRun:
    run = SmallRun(tmp_path, write_digits)
    run.label(run.config(), with_teacher(run))
    select(run.config(), Layout(str(tmp_path / "run")))
    return run


def with_teacher(run: SmallRun) -> Layout:
    layout = Layout(str(run.folder / "run"))
    stage = open_stage(layout.teacher, "teacher", Fingerprint({}, {}))
    arguments = {"width": 0.125, "blocks": [1, 1, 1, 1]}
    info = WeightsInfo(model="resnetrs26", model_args=arguments, num_classes=10, image_size=16, crop_pct=1,
                       interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1), validation_top1=0.625)  # fmt: skip
    save_weights(stage.path("weights"), build_model("resnetrs26", 10, arguments, 0, 0).state_dict(), info)
    summary = {"calibration_error_before": 0.2, "calibration_error_after": 0.1, "validation_images": 80}
    stage.commit(["weights/model.safetensors", "weights/config.json"], summary)
    return layout


def exported(run: SmallRun, force: bool = False, exclude: str | None = None, **fields: Any) -> Path:
    """Run `stage=export` with these fields; return the folder of its version."""
    config = configured(run, exclude, **fields)
    export(config, Layout(config.run_dir), force)
    out = run.folder / "run/exports"
    return out / (out / "latest").read_text().strip()


def configured(run: SmallRun, exclude: str | None = None, **fields: Any) -> Config:
    config = run.config(export=fields)
    return config.model_copy(update={"data": config.data.model_copy(update={"exclude": exclude})})


def samples(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of every sample, in order."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found: dict[str, dict[str, bytes]] = {}
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                key, _, field = member.name.partition(".")
                found.setdefault(key, {})[field] = stream.read()
        yield from found.items()


def said(members: dict[str, bytes]) -> dict[str, Any]:
    return dict(json.loads(members["json"]))


def identities(folder: Path) -> list[Identity]:
    sources = [said(members)["source"] for _, members in samples(folder)]
    return [(source["shard"], source["ordinal"]) for source in sources]


def copies_of(run: SmallRun) -> dict[Identity, int]:
    layout = Layout(str(run.folder / "run"))
    return {key: copies for key, (_, copies) in rows(layout, layout.current_selection()).items()}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "seconds.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_selected_image_is_there_once_with_its_own_bytes_and_label(run: SmallRun) -> None:
    folder = exported(run, samples_per_shard=20)
    layout = Layout(str(run.folder / "run"))
    labels = rows(layout, layout.current_selection())
    assert identities(folder) == sorted(key for key, (_, copies) in labels.items() if copies)
    assert len({key for key, _ in samples(folder)}) == len(identities(folder))
    indexes = {
        path.stem: pq.read_table(path).to_pylist() for path in (run.folder / "unlabeled/index").glob("*.parquet")
    }
    for _, members in samples(folder):
        source = said(members)["source"]
        row = indexes[source["shard"]][source["ordinal"]]
        assert members["png"] == storage.read_bytes(
            str(run.folder / f"unlabeled/{source['shard']}.tar"), row["offset"], row["size"]
        )
        label, copies = labels[source["shard"], source["ordinal"]]
        assert (int(members["cls"]), said(members)["label"], said(members)["copies"]) == (label, label, copies)
        assert said(members)["class_name"] == DIGIT_NAMES[label]


def test_shards_have_at_most_so_many_samples_and_so_many_bytes(run: SmallRun) -> None:
    few = exported(run, samples_per_shard=7)
    counts = json.loads((few / "sizes.json").read_text())
    assert set(list(counts.values())[:-1]) == {7}
    assert sum(counts.values()) == len(identities(few))
    small = exported(run, bytes_per_shard=2000)
    images = [pq.read_table(path).column("size").to_pylist() for path in sorted((small / "index").glob("*.parquet"))]
    assert all(sum(sizes) <= 2000 for sizes in images)
    assert all(sum(sizes) + after[0] > 2000 for sizes, after in pairwise(images))
    assert identities(small) == identities(few)


def test_repeats_written_writes_every_copy(run: SmallRun) -> None:
    copies = copies_of(run)
    assert max(copies.values()) > 1
    folder = exported(run, repeats="written")
    assert Counter(identities(folder)) == {key: number for key, number in copies.items() if number}
    keys = [key for key, _ in samples(folder)]
    assert len(set(keys)) == len(keys)


def test_a_shuffled_export_has_the_same_samples_in_another_order_of_the_seed(run: SmallRun) -> None:
    plain, mixed = exported(run), exported(run, shuffle_shards=3)
    assert sorted(samples(plain)) == sorted(samples(mixed))
    order = [shard for shard, _ in identities(mixed)]
    assert sum(one != two for one, two in pairwise(order)) > 10, "shards are mixed"
    again = exported(run, shuffle_shards=3, force=True)
    assert contents(again).keys() == contents(mixed).keys()
    assert identities(again) == identities(mixed)


def test_selected_false_exports_all_labels_except_excluded_keys(run: SmallRun) -> None:
    assert len(identities(exported(run, selected=False))) == len(copies_of(run))
    (run.folder / "exclude.txt").write_text("unlabeled-000001/00055\n")
    select(configured(run, exclude=str(run.folder / "exclude.txt")), Layout(str(run.folder / "run")))
    found = identities(exported(run, selected=False, exclude=str(run.folder / "exclude.txt")))
    assert set(copies_of(run)) - set(found) == {("unlabeled-000001", 5)}


def test_the_same_command_writes_nothing_and_another_setting_is_another_version(run: SmallRun) -> None:
    first = exported(run)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert exported(run) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    second = exported(run, samples_per_shard=9)
    assert (first.name, second.name) == ("v1", "v2")
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert exported(run) == first, "latest names it again"


def test_a_file_that_was_lost_or_cut_short_is_made_again_and_no_other(run: SmallRun) -> None:
    folder = exported(run, samples_per_shard=20)
    whole = contents(folder)
    untouched = (folder / "pseudo-000001.tar").stat().st_mtime_ns
    os.truncate(folder / "pseudo-000000.tar", 5000)
    (folder / "pseudo-000002.tar").unlink()
    exported(run, samples_per_shard=20)
    assert contents(folder) == whole
    assert (folder / "pseudo-000001.tar").stat().st_mtime_ns == untouched


def test_a_table_beside_a_shard_that_was_lost_or_cut_short_is_made_again_with_it(run: SmallRun) -> None:
    folder = exported(run, samples_per_shard=20)
    whole = contents(folder)
    untouched = (folder / "pseudo-000001.tar").stat().st_mtime_ns
    (folder / "labels/pseudo-000000.parquet").unlink()
    os.truncate(folder / "index/pseudo-000002.parquet", 100)
    exported(run, samples_per_shard=20)
    assert contents(folder) == whole
    assert (folder / "pseudo-000001.tar").stat().st_mtime_ns == untouched


STEPS = [
    "before-rename/pseudo-000002.tar",
    "after-rename/pseudo-000001.tar.json",
    "before-rename/manifest.json",
    "before-done/export",
]


@pytest.mark.slow
def test_killed_at_any_step_it_ends_with_the_same_bytes(run: SmallRun) -> None:
    whole = contents(exported(run, samples_per_shard=20))
    out = [str(run.folder / str(number)) for number in range(len(STEPS))]
    configs = [configured(run, samples_per_shard=20, out=folder).model_dump_json() for folder in out]
    command = [
        sys.executable,
        "-m",
        "tests.killed_export",
        *(word for pair in zip(STEPS, configs, strict=True) for word in pair),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for folder in out:
        assert contents(Path(folder) / "v1") == whole


def test_labels_without_images_as_parquet_csv_and_a_tar_per_shard(run: SmallRun) -> None:
    kept = {key: copies for key, copies in copies_of(run).items() if copies}
    parquet = exported(run, format="parquet")
    found = [row for path in sorted(parquet.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert {(row["shard"], row["ordinal"]): row["copies"] for row in found} == kept
    folder = exported(run, format="csv")
    lines = [line for path in sorted(folder.glob("*.csv")) for line in csv.DictReader(path.read_text().splitlines())]
    assert {(line["shard"], int(line["ordinal"])): int(line["copies"]) for line in lines} == kept
    assert [line["class_name"] for line in lines] == [row["class_name"] for row in found]
    columns = exported(run, format="columns")
    keys = pq.read_table(run.folder / "unlabeled/index/unlabeled-000000.parquet").column("key").to_pylist()
    with tarfile.open(columns / "unlabeled-000000.tar") as tar:
        assert [name for name in tar.getnames() if name.endswith(".json")] == [f"{key}.json" for key in keys]
    everything = list(samples(columns))
    assert sum("cls" in members for _, members in everything) == len(kept)
    assert {said(m)["reason"] for _, m in everything if "cls" not in m} == {"not selected", REASON}


def test_labels_of_packed_folders_have_the_paths_of_the_pictures(run: SmallRun) -> None:
    paths = [f"photos/{number}.png" for number in range(NUM_UNLABELED)]
    keys = [f"{number:09d}" for number in range(NUM_UNLABELED)]
    write_table(str(run.folder / "unlabeled/sources.parquet"), pa.table({"key": keys, "path": paths}))
    parquet, texts = exported(run, format="parquet"), exported(run, format="csv")
    found = [row for path in sorted(parquet.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    lines = [line for path in sorted(texts.glob("*.csv")) for line in csv.DictReader(path.read_text().splitlines())]
    expected = [f"photos/{PER_SHARD * int(row['shard'][-6:]) + row['ordinal']}.png" for row in found]
    assert [row["path"] for row in found] == [line["path"] for line in lines] == expected
    assert len({row["shard"] for row in found}) > 1


def test_manifests_and_tables_agree_with_the_shards(run: SmallRun) -> None:
    folder = exported(run, samples_per_shard=20)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    number = len(identities(folder))
    assert json.loads((folder / "_info.json").read_text())["splits"]["train"]["num_samples"] == number
    assert sum(shard["nsamples"] for shard in json.loads((folder / "wids.json").read_text())["shardlist"]) == number
    assert (folder / "classes.txt").read_text().split() == DIGIT_NAMES
    table = pq.read_table(folder / "labels/pseudo-000000.parquet").to_pylist()
    content = (folder / "pseudo-000000.tar").read_bytes()
    for row, (key, members) in zip(table, samples(folder), strict=False):
        assert row["__key__"] == key
        assert content[row["offset"] : row["offset"] + row["size"]] == members["png"]
        assert np.float32(said(members)["confidence"]) == np.float32(row["confidence"])


def test_an_export_is_a_labeled_split_of_this_pipeline(run: SmallRun) -> None:
    folder = exported(run, samples_per_shard=20)
    split = open_split(str(folder / "*.tar"), str(run.folder / "index"))
    check_labeled(split, 10)
    assert split.num_samples == len(identities(folder))
    assert split.class_names == tuple(DIGIT_NAMES)


def test_the_card_says_what_the_labels_are(run: SmallRun) -> None:
    text = (exported(run) / "README.md").read_text()
    fields = OmegaConf.create(text.split("---")[1])
    assert fields.configs[0].data_files[0].path == "pseudo-*.tar"
    assert fields.size_categories == ["n<1K"]
    assert "62.50% on 80 validation images" in text
    assert "| 3 | digit_3 |" in text
    assert f"Could not be decoded: {3}" in text


@pytest.mark.parametrize(
    ("confidence", "expected"), [(0.5, None), (0.99, "of 80 validation images above the threshold, 75.0%")]
)
def test_the_card_says_how_many_validation_images_are_right_if_any_is_above_the_threshold(
    run: SmallRun, confidence: float, expected: str | None
) -> None:
    label = np.arange(80) % 10
    columns = {"label": label, "predicted": np.where(np.arange(80) < 60, label, (label + 1) % 10)}
    table = pa.table({name: pa.array(values, pa.int32()) for name, values in columns.items()})
    confidences = pa.array(np.full(80, confidence, np.float32))
    config, layout = configured(run), Layout(str(run.folder / "run"))
    write_table(f"{layout.labels}/{VALIDATION_NAME}", table.append_column("confidence", confidences))
    select_fields = config.select.model_copy(update={"confidence_threshold": 0.9})
    config = config.model_copy(update={"select": select_fields})
    select(config, layout)
    export(config, layout)
    card = (run.folder / "run/exports/v1/README.md").read_text()
    assert (expected or "Where the labels come from") in card
    assert ("validation images above" in card) == (expected is not None)


def test_two_exports_are_compared_by_their_selections(run: SmallRun) -> None:
    first, layout = exported(run), Layout(str(run.folder / "run"))
    before = copies_of(run)
    fewer = configured(run).model_copy(update={"select": configured(run).select.model_copy(update={"per_class": 3})})
    select(fewer, layout)
    export(fewer, layout)
    result = diff(fewer, [layout], first.name, "v2")
    kept = result["kept"]
    assert kept["both"] + kept["only_before"] == sum(copies > 0 for copies in before.values())
    assert kept["both"] + kept["only_after"] == len(identities(first.with_name("v2")))
    assert kept["only_before"] > 0
    with pytest.raises(StageError, match="v7: stage export is not done"):
        diff(fewer, [layout], "v7", "v2")


def test_an_empty_selection_is_an_error(run: SmallRun) -> None:
    layout = Layout(str(run.folder / "run"))
    nothing = configured(run).model_copy(
        update={"select": configured(run).select.model_copy(update={"confidence_threshold": 1.0})}
    )
    with pytest.raises(StageError, match=r"none of the .* labels is selected"):
        select(nothing, layout)
    with pytest.raises(StageError, match="stage=select"):
        export(nothing, layout)

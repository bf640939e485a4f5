"""A corpus of all known defects of foreign shards: every image is labeled or in the golden ledger, in bounded memory."""

import csv
import fnmatch
import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.images.decode import decode
from data.images.resize import eval_transform
from data.labels.label_files import read_labels
from data.shards.image_reader import ImageReader
from data.shards.index import build_index
from data.shards.samples import MAX_IMAGE_BYTES
from data.shards.split import open_split
from data.training_order import Order
from pipeline.models.registry import build_model
from pipeline.run import main
from tests import HANGS_S, bad_corpus

LEDGER = Path(__file__).with_name("bad_corpus_ledger.csv")
MODEL = {"width": 0.125, "blocks": [1, 1, 1, 1]}
MEGABYTE = 1 << 20
DAMAGED = ["cut-at-member", "cut-in-header", "cut-in-image", "gzip", "joined", "negative-size", "no-tar", "zero-bytes"]
pytestmark = pytest.mark.timeout(900)  # what hangs on a damaged header also fills the memory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    bad_corpus.write_corpus(str(folder))
    return folder


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    error: str


def command(*words: str) -> Outcome:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        code = main(words)
    return Outcome(code, out.getvalue(), error.getvalue())


Labeled = tuple[Path, Outcome, Outcome]


@pytest.fixture(scope="module")
def labeled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Labeled:
    """Run directory, a command with the default limits, and one with limits that allow everything."""
    folder = tmp_path_factory.mktemp("labeled")
    torch.manual_seed(0)
    torch.save(build_model("resnetrs26", 3, MODEL).state_dict(), folder / "random.pth")
    words = [
        f"run_dir={folder}/run", f"data.unlabeled=[{corpus}/*.tar]", "data.num_classes=3",
        "teacher.model=resnetrs26", "teacher.image_size=96", "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}",
        f"teacher.weights={folder}/random.pth", "label.batch_size=8", "label.threads=1", "threads=1",
        "select.confidence_threshold=0",
    ]  # fmt: skip
    allowed = ["label.max_quarantined=1", f"label.max_damaged_shards={len(DAMAGED)}"]
    assert command("stage=teacher", *words).code == 0
    stopped = command("stage=label", *words, allowed[1])
    shutil.copy(folder / "run/gen-1/labels/quarantine.parquet", folder / "stopped.parquet")
    return folder / "run", stopped, command("stage=label", *words, *allowed)


def label_files(labeled: Labeled) -> dict[str, Path]:
    files = (labeled[0] / "gen-1/labels").glob("*.parquet")
    return {file.stem: file for file in sorted(files) if file.stem not in ("quarantine", "validation")}


def manifest(labeled: Labeled) -> dict[str, Any]:
    return dict(json.loads((labeled[0] / "gen-1/labels/manifest.json").read_text()))


def rows_of(labeled: Labeled, shard: str) -> dict[str, dict[str, Any]]:
    return {row["__key__"]: row for row in read_labels(str(label_files(labeled)[shard])).to_pylist()}


def test_a_run_that_is_mostly_bad_stops_and_says_what_to_do(labeled: Labeled) -> None:
    _, stopped, _ = labeled
    assert stopped.code == 2
    assert "images could not be used, more than label.max_quarantined=0.01" in stopped.error
    assert "Traceback" not in stopped.error


def test_what_the_indexes_know_is_named_before_an_image_is_decoded(labeled: Labeled) -> None:
    named = pq.read_table(labeled[0].parent / "stopped.parquet").to_pylist()
    everything = pq.read_table(labeled[0] / "gen-1/labels/quarantine.parquet").to_pylist()
    assert [row for row in everything if row in named] == named
    assert {row["shard"] for row in named} == {"damaged-images", "keys", *DAMAGED}


def test_what_cannot_be_labeled_is_exactly_what_the_ledger_names(labeled: Labeled) -> None:
    """Match a reason against the ledger, which has `*` for Pillow's own words."""
    run_dir, _, result = labeled
    assert result.code == 0, result.error
    found = pq.read_table(run_dir / "gen-1/labels/quarantine.parquet").to_pylist()
    with LEDGER.open(newline="") as file:
        expected = list(csv.DictReader(file))
    assert [(row["shard"], row["ordinal"], row["key"], row["offset"]) for row in found] == [
        (row["shard"], int(row["ordinal"]), row["key"], int(row["offset"])) for row in expected
    ]
    for row, wanted in zip(found, expected, strict=True):
        assert fnmatch.fnmatchcase(row["reason"], wanted["reason"]), row


def test_every_sample_is_a_label_or_in_the_ledger(labeled: Labeled, corpus: Path) -> None:
    for entry in manifest(labeled)["shards"]:
        assert entry["rows"] + entry["quarantined"] == build_index(f"{corpus}/{entry['name']}.tar").num_rows


def test_every_label_file_has_the_same_columns_even_that_of_a_shard_without_a_label(labeled: Labeled) -> None:
    schemas = {name: pq.read_schema(file).remove_metadata() for name, file in label_files(labeled).items()}
    assert read_labels(str(label_files(labeled)["all-bad"])).num_rows == 0
    assert [name for name, schema in schemas.items() if schema != schemas["odd-images"]] == []


def test_all_that_can_be_decoded_is_labeled(labeled: Labeled) -> None:
    assert list(rows_of(labeled, "odd-images")) == list(bad_corpus.decodable())


@pytest.mark.parametrize("key", bad_corpus.decodable())
def test_an_odd_image_has_the_pixels_of_its_plain_twin(corpus: Path, key: str) -> None:
    url = f"{corpus}/odd-images.tar"
    row = next(row for row in build_index(url).to_pylist() if row["key"] == key)
    with ImageReader([url]) as reader:
        pixels = decode(reader.read(0, row["offset"], row["size"]))
    expected = bad_corpus.decodable()[key][2]
    assert pixels.shape == expected.shape
    difference = np.abs(pixels.astype(int) - expected).mean()
    assert difference < 4 if row["extension"] in ("jpg", "jpeg") else difference == 0


def test_a_photo_turned_in_eight_ways_has_one_label(labeled: Labeled) -> None:
    rows = rows_of(labeled, "odd-images")
    turned = [rows[f"exif-{orientation}"] for orientation in range(1, 9)]
    assert len({row["label"] for row in turned}) == 1
    assert np.ptp([row["confidence"] for row in turned]) < 0.01
    assert max((row["image_hash"] ^ turned[0]["image_hash"]).bit_count() for row in turned) <= 4


def test_odd_keys_are_labeled_and_reported_in_one_line(labeled: Labeled) -> None:
    _, _, result = labeled
    keys = read_labels(str(label_files(labeled)["keys"])).column("__key__").to_pylist()
    assert keys == ["twice", r"latin-\xe9", "twice", "twice", "a/b", "plain"]
    assert manifest(labeled)["odd_keys"] == {"damaged-images": 1, "keys": 4, "long-keys-gnu": 2, "long-keys-pax": 2}
    (line,) = [line for line in result.out.splitlines() if "keys that" in line]
    assert line.startswith("label: 9 samples in 4 shards have keys that occur twice there")
    assert "'folder/in' in damaged-images.tar" in line


@pytest.mark.parametrize("shard", ["long-keys-gnu", "long-keys-pax"])
def test_keys_of_200_characters_come_back_whole(labeled: Labeled, shard: str) -> None:
    assert list(rows_of(labeled, shard)) == [f"{bad_corpus.LONG_KEY}{n}" for n in range(2)]
    assert len(bad_corpus.LONG_KEY) == 200


def test_selection_and_the_order_of_training_cope_with_shards_without_labels(labeled: Labeled) -> None:
    run_dir, _, _ = labeled
    name = (run_dir / "gen-1/selections/current").read_text().strip()
    columns = {
        shard: read_labels(f"{run_dir}/gen-1/selections/{name}/{shard}.parquet").column("copies").to_numpy()
        for shard in label_files(labeled)
    }
    rows = {entry["name"]: entry["rows"] for entry in manifest(labeled)["shards"]}
    assert {shard: len(copies) for shard, copies in columns.items()} == rows
    order = Order(list(columns.values()), 0, "unlabeled")
    seen = order.take(0, order.num_entries)
    empty = [position for position, shard in enumerate(columns) if rows[shard] == 0]
    assert len(empty) == 6
    assert not np.isin(seen.shard, empty).any()


LABEL_ALL = """
import json, sys, torch
from data.shards.split import open_split
from pipeline.core.timing import peak_memory
from pipeline.models.registry import build_model
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from teacher.labeling.label_shard import ShardLabeler

torch.set_num_threads(1)
model = build_model("resnetrs26", 3, {"width": 0.125, "blocks": [1, 1, 1, 1]})
preprocessing = Preprocessing(96, 0.875, "bicubic", (0.5,) * 3, (0.25,) * 3)
predictor = Predictor(model, preprocessing, "cpu", 8, decoder="fast")
labeler = ShardLabeler(predictor, 3, 10, 1, 1, "test")
predictor.probabilities(torch.zeros(8, 3, 96, 96, dtype=torch.uint8))
peaks = [peak_memory()]
for pattern in sys.argv[2:]:
    for shard in open_split(pattern, sys.argv[1]).shards:
        labeler.label(shard, f"{sys.argv[1]}/{shard.name}.parquet")
    peaks.append(peak_memory())
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_no_image_costs_more_memory_than_the_largest_allowed_one(corpus: Path, tmp_path: Path) -> None:
    """A bomb (144 megapixels) and a strip (20,000 × 1) take almost no memory; 64 megapixels, the limit, under 1.3 GB."""
    (tmp_path / "largest.tar").write_bytes(bad_corpus.largest())
    command = [sys.executable, "-c", LABEL_ALL, str(tmp_path), f"{corpus}/*.tar", f"{tmp_path}/largest.tar"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, check=False)
    assert result.returncode == 0, result.stderr
    start, after_corpus, after_largest = (num_bytes >> 20 for num_bytes in json.loads(result.stdout))
    assert after_corpus - start < 200
    assert after_largest - start < 1300


def test_the_middle_of_a_strip_is_seen_as_in_a_photo_that_is_only_wide() -> None:
    """A strip is cropped before it is resized; the view is the same."""
    strip = np.tile(np.asarray(bad_corpus.photo())[:20], (1, 300, 1))
    whole = eval_transform(strip, 224, 0.875)
    middle = (strip.shape[1] - 600) // 2
    cut = eval_transform(np.ascontiguousarray(strip[:, middle : middle + 600]), 224, 0.875)
    assert strip.shape[1] * 256**2 // 20 > 64 * MEGABYTE  # else there is nothing to test
    assert np.abs(whole.astype(int) - cut).max() <= 2


def test_a_member_too_large_for_any_image_is_refused_unread(tmp_path: Path) -> None:
    name = tmp_path / "huge.tar"
    size = MAX_IMAGE_BYTES + 1
    with name.open("wb") as file:
        file.write(bad_corpus.header("huge.png", size=size).tobuf())
        file.truncate(file.tell() + -(-size // 512) * 512 + 1024)  # a hole: no disk space
    (problem,) = build_index(str(name)).column("problem").to_pylist()
    assert problem == f"image member of {size} bytes, more than the {MAX_IMAGE_BYTES} allowed"


def test_no_damage_to_a_header_raises_or_hangs(tmp_path: Path) -> None:
    """Wrong sizes with a right checksum, which tarfile accepts; at a negative one it reads the same header forever."""
    entries = [("a.png", b"x" * 700), ("b" * 150 + ".png", b"y"), ("c.cls", b"1")]
    for tar_format in (bad_corpus.tarfile.PAX_FORMAT, bad_corpus.tarfile.GNU_FORMAT):
        content = bad_corpus.tar(entries, tar_format, pax_headers={"comment": "x"})
        generator = np.random.default_rng(0)
        for _ in range(300):
            field = generator.choice(np.frombuffer(b"\0\x80\xff 0179x", np.uint8), 12).tobytes()
            (tmp_path / "x.tar").write_bytes(bad_corpus.damaged_header(content, field))
            assert build_index(str(tmp_path / "x.tar")).num_rows > 0


def test_a_kept_index_without_a_count_of_odd_keys_is_made_again(corpus: Path, tmp_path: Path) -> None:
    before = open_split(f"{corpus}/keys.tar", str(tmp_path)).shards[0]
    table = pq.read_table(before.index_url)
    pq.write_table(table.replace_schema_metadata({"shard_bytes": str(before.bytes)}), before.index_url)
    assert open_split(f"{corpus}/keys.tar", str(tmp_path)).shards[0] == before
    assert before.odd_keys == 4

"""An image that crashes or hangs the decoder is quarantined; the other images of its shard are labeled."""

import os
import signal
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from data.errors import DataError
from data.images.clean_view import EvalView
from data.images.decode import DecodeError, Pixels
from data.labels.label_files import read_labels, read_quarantined
from data.shards.split import Shard, open_split
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from teacher.labeling.batches import Meter
from teacher.labeling.crash_isolation import OpenImages, crashing_images, open_shard
from teacher.labeling.label_shard import ShardLabeler
from tests.conftest import WriteDigits

CRASHES, HANGS, CANNOT = 3, 5, 7  # ordinals


@dataclass(frozen=True)
class Fragile(EvalView):
    """Decode all images except three, recognized by their bytes."""

    crashes: bytes = b""
    hangs: bytes = b""
    cannot: bytes = b""

    def with_hash(self, content: bytes) -> tuple[Pixels, int]:
        if content == self.crashes:
            os.kill(os.getpid(), signal.SIGSEGV)
        if content == self.hangs:
            threading.Event().wait()
        if content == self.cannot:
            raise DecodeError("no image")
        return super().with_hash(content)


@pytest.fixture
def shard(tmp_path: Path, write_digits: WriteDigits) -> Shard:
    write_digits(tmp_path / "unlabeled", 0, 12, labeled=False)
    return open_split(f"{tmp_path}/unlabeled/*.tar", str(tmp_path / "index")).shards[0]


def of(shard: Shard) -> tuple[str, int, OpenImages]:
    return shard.url, shard.num_samples, partial(open_shard, shard)


def content(shard: Shard, ordinal: int) -> bytes:
    offset, size = (shard.index().column(name)[ordinal].as_py() for name in ("offset", "size"))
    return Path(shard.url).read_bytes()[offset : offset + size]


@pytest.mark.slow
def test_images_that_end_or_hang_a_process_are_found_and_others_are_not(shard: Shard) -> None:
    view = Fragile(32, 1.0, "bicubic", "pad", "fast", *(content(shard, n) for n in (CRASHES, HANGS, CANNOT)))
    assert crashing_images(*of(shard), view, 2.0, Meter()) == {
        CRASHES: "decoding it ended the process (SIGSEGV)",
        HANGS: "decoding it takes more than 2 s",
    }


@pytest.mark.slow
def test_a_process_that_cannot_start_is_no_image_at_fault(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher.labeling.crash_isolation._decode", os._exit)
    with pytest.raises(RuntimeError, match="ended between two images"):
        crashing_images(*of(shard), EvalView(32, 1.0, "bicubic", "pad"), 2.0, Meter())


def test_an_image_that_cannot_be_read_is_an_error_and_no_image_at_fault(shard: Shard) -> None:
    os.truncate(shard.url, shard.index().column("offset")[11].as_py() + 1)
    with pytest.raises(DataError, match="cut short"):
        crashing_images(*of(shard), EvalView(32, 1.0, "bicubic", "pad"), 2.0, Meter())


def test_their_shard_is_labeled_without_them(shard: Shard, tmp_path: Path) -> None:
    preprocessing = Preprocessing(8, 0.875, "bicubic", (0.5,) * 3, (0.25,) * 3, resize="pad")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    labeler = ShardLabeler(Predictor(model, preprocessing, "cpu", 4), 4, 2, 1, 1, "test")
    result = labeler.label(shard, f"{tmp_path}/labels.parquet", {CRASHES: "it crashes", 11: "it hangs"})
    assert (result.rows, result.quarantined) == (10, 2)
    table = read_labels(f"{tmp_path}/labels.parquet")
    assert table.column("ordinal").to_pylist() == [n for n in range(12) if n not in (CRASHES, 11)]
    assert [(row.ordinal, row.reason) for row in read_quarantined(table, "")] == [
        (CRASHES, "it crashes"),
        (11, "it hangs"),
    ]

"""Nothing that a store says in an outage is taken for "there is no such file"."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from data import storage
from data.labels.overlay import RowFilter
from data.labels.sources.run import open_run
from data.shards.split import open_split
from data.storage import StorageError
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.lock import read_holder
from pipeline.core.stage import done_record, is_begun
from pipeline.core.timing import Clock, read_timing
from pipeline.models.weights import ModelError, load_info
from pipeline.planning.status import print_status
from pipeline.training.progress import read_training_progress
from teacher.labeling.progress import read_progress
from tests.s3_server import FaultyS3, put

READERS: dict[str, Callable[[str], Any]] = {
    "effort": read_timing,
    "training progress": read_training_progress,
    "labeling progress": read_progress,
    "holder": read_holder,
    "done": done_record,
    "begun": is_begun,
    "config": lambda folder: load_config(None, [f"run_dir={folder}"]),
    "status": lambda folder: print_status(
        load_config(None, []).model_copy(update={"run_dir": folder}), [Layout(folder)]
    ),
    "selection": lambda folder: Layout(folder).current_selection(),
    "index": lambda folder: open_split([f"{folder}/x.tar"], f"{folder}/index"),
    "labels": lambda folder: open_run(folder, RowFilter()),
}


@pytest.mark.parametrize("kind", ["503", "403"])
@pytest.mark.parametrize("name", READERS)
def test_an_outage_is_told_as_one(s3: FaultyS3, folder: str, name: str, kind: Any) -> None:
    s3.add(kind, times=100_000)
    with pytest.raises(StorageError, match=r"tried 6 times" if kind == "503" else "refused: 403"):
        READERS[name](folder)


def test_weights_that_nobody_can_see_are_not_called_none(s3: FaultyS3, folder: str) -> None:
    fault = s3.add("503", times=100_000)
    with pytest.raises(StorageError, match="tried 6 times"):
        load_info(folder)
    fault.times = 0
    with pytest.raises(ModelError, match="not a weights folder"):
        load_info(folder)


def test_time_that_was_spent_is_not_forgotten_in_an_outage(s3: FaultyS3, folder: str) -> None:
    put(f"{folder}/seconds.json", json.dumps({"seconds": 1000.0, "runs": []}).encode())
    fault = s3.add("503", "GET", "seconds.json", times=100_000)
    with pytest.raises(StorageError, match="tried 6 times"):
        Clock().add_to(folder)
    fault.times = 0
    Clock().add_to(folder)
    assert read_timing(folder).seconds >= 1000.0


def test_a_missing_file_and_a_missing_bucket_are_no_outage(s3: FaultyS3, folder: str) -> None:
    assert storage.read_text_if_there(f"{folder}/x") is None
    assert read_timing(folder).seconds == 0
    with pytest.raises(storage.MissingError, match="no such bucket"):
        storage.expand("s3://no-bucket/*.tar")

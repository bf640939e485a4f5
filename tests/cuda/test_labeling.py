"""Labeling and evaluation on a GPU: `pytest -m cuda`. On a CPU the same code runs in float32, so that it is known to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.shards.split import Split
from pipeline.inference.predictor import Predictor, predict_split
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.fold_batch_norm import fold_batch_norm
from pipeline.models.registry import build_model
from teacher.labeling.label_shard import ShardLabeler
from tests.cuda.setting import MODEL, NUM_CLASSES, NUM_IMAGES, SIDE, config_for, on_each_device, write_colours

pytestmark = on_each_device


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return write_colours(tmp_path)


def predictor_for(device: str, views: int = 1) -> Predictor:
    """Random weights: on a GPU in bf16."""
    torch.manual_seed(0)
    model = fold_batch_norm(build_model(MODEL["model"], NUM_CLASSES, MODEL["model_args"]), (3, SIDE, SIDE))  # type: ignore[arg-type]
    view = Preprocessing.of_training(config_for(device))
    return Predictor(model, view, device, 16, views=views, decoder="fast", channels_last=True)


@pytest.mark.parametrize("views", [1, 2])
def test_two_shards_at_a_time_get_the_labels_that_one_gets(
    split: Split, tmp_path: Path, device: str, views: int
) -> None:
    """Batches in flight share no memory: the labels do not depend on what else is labeled."""
    from concurrent.futures import ThreadPoolExecutor

    def label(folder: str, at_once: int) -> list[Any]:
        (tmp_path / folder).mkdir()
        labeler = ShardLabeler(predictor_for(device, views), NUM_CLASSES, NUM_CLASSES, 2, 2, "test")
        urls = [str(tmp_path / folder / f"{shard.name}.parquet") for shard in split.shards]
        with ThreadPoolExecutor(at_once) as pool:
            rows = [found.rows for found in pool.map(labeler.label, split.shards, urls)]
        assert rows == [NUM_IMAGES // 2] * 2
        return [pq.read_table(url) for url in urls]

    for alone, together in zip(label("alone", 1), label("together", 2), strict=True):
        assert alone.column("__key__").equals(together.column("__key__"))
        one, other = (table.column("confidence").to_numpy() for table in (alone, together))
        np.testing.assert_allclose(one, other, atol=1e-6 if device == "cpu" else 5e-3)


def test_the_device_predicts_what_the_cpu_does(split: Split, device: str) -> None:
    logits, labels = predict_split(split, predictor_for(device))
    expected, of_cpu = predict_split(split, predictor_for("cpu"))
    assert np.array_equal(labels, of_cpu)
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())

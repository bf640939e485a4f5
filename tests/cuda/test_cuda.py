"""Training, labeling and evaluation on a GPU: `pytest -m cuda`. On a CPU the same code runs in float32, so that it is known to run."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data.shards.split import Split, open_split
from data.shards.write import Fields, labeled_members, write_shards
from pipeline.core.schema import TrainConfig
from pipeline.inference.predictor import Predictor, predict_split
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inputs.streams import labeled_stream
from pipeline.models.fold_batch_norm import fold_batch_norm
from pipeline.models.registry import build_model
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.state import load_trained
from teacher.labeling.label_shard import ShardLabeler

NUM_CLASSES, SIDE, NUM_IMAGES = 4, 32, 64
MODEL = {"model": "resnetrs26", "model_args": {"width": 0.25, "blocks": [1, 1, 1, 1]}, "image_size": SIDE}

pytestmark = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
            ],
        ),
    ],
)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """64 images of one of four colours with noise, in two shards."""
    generator = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [180, 180, 40]])

    def sample(number: int) -> tuple[str, Fields]:
        label = number % NUM_CLASSES
        pixels = np.clip(colours[label] + generator.normal(0, 25, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        return f"{number:04d}", labeled_members("jpg", buffer.getvalue(), label)

    names = [f"colour {number}" for number in range(NUM_CLASSES)]
    write_shards(map(sample, range(NUM_IMAGES)), str(tmp_path / "shards"), "colours", NUM_IMAGES // 2, names)
    return open_split(str(tmp_path / "shards/*.tar"), str(tmp_path / "index"))


def config_for(device: str, **fields: Any) -> TrainConfig:
    """A short training: on a GPU in bf16."""
    return TrainConfig.model_validate({
        **MODEL, "batch_size": 16, "epochs": 10, "warmup_epochs": 0, "lr": 0.4, "dropout": 0.0, "bn_momentum": 0.1, "ema_decay": 0.9,
        "label_smoothing": 0.0, "precision": "bf16" if device == "cuda" else "fp32", "log_every_steps": 5, "loader_workers": 0,
        "channels_last": True, "augment": {"num_ops": 1, "magnitude": 3, "hflip": 0.5},
    } | fields)  # fmt: skip


def job_for(split: Split, config: TrainConfig, device: str, folder: Path) -> TrainJob:
    return TrainJob(
        name="teacher",
        folder=str(folder),
        config=config,
        streams=(labeled_stream(split, config.batch_size),),
        num_classes=NUM_CLASSES,
        num_labeled=split.num_samples,
        seed=0,
        threads=1,
        device=device,
        validation=split,
    )


def metrics_of(job: TrainJob) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (Path(job.folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="host"),
        pytest.param({"augment_on": "device"}, id="noise on the device"),
        pytest.param({"accumulate_steps": 4, "mixup": 0.2}, id="micro-batches"),
        pytest.param({"checkpoint_activations": True}, id="activations computed twice"),
        pytest.param({"loader_workers": 2}, id="loading processes"),
    ],
)
def test_a_training_learns(split: Split, tmp_path: Path, device: str, fields: dict[str, Any]) -> None:
    job = job_for(split, config_for(device, **fields), device, tmp_path / "run")
    fit(job)
    metrics = metrics_of(job)
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    assert metrics[-1]["validation_top1"] > 0.6  # chance: 0.25


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_training_is_one_graph_compiled_once(split: Split, tmp_path: Path, device: str) -> None:
    if device == "cpu":
        pytest.skip("its compiler takes minutes on a CPU; tests/pipeline/training counts graphs without it")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    job = job_for(split, config_for(device, compile=True), device, tmp_path / "run")
    fit(job)
    counters = torch._dynamo.utils.counters
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] <= 2  # training, and evaluation of the average
    assert metrics_of(job)[-1]["validation_top1"] > 0.6


def test_a_training_that_was_stopped_ends_as_one_that_was_not(split: Split, tmp_path: Path, device: str) -> None:
    """To rounding: a GPU adds in no fixed order."""
    config = config_for(device, lr=0.05)
    whole, parted = (job_for(split, config, device, tmp_path / name) for name in ("whole", "parted"))
    fit(whole)
    answers = iter([False] * 12 + [True])
    fit(parted, lambda: next(answers, False))
    fit(parted)
    ours, theirs = load_trained(parted)[0], load_trained(whole)[0]
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].cpu().float(), tensor.cpu().float(), rtol=0.05, atol=0.02, msg=name)


def predictor_for(device: str, views: int = 1) -> Predictor:
    """Random weights: on a GPU in bf16."""
    torch.manual_seed(0)
    model = fold_batch_norm(build_model(MODEL["model"], NUM_CLASSES, MODEL["model_args"]), SIDE)  # type: ignore[arg-type]
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

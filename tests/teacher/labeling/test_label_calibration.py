"""Labels of several views or teachers have a temperature fitted on what labels; earlier labels stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

from data.shards.split import open_split
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import Config
from pipeline.core.stage import require_done
from pipeline.inference import predictor
from pipeline.inference.ensemble import load_labeling_predictor, tempered
from teacher.labeling import label_calibration
from teacher.labeling.label_calibration import calibrate_labels
from teacher.labeling.stage import label
from teacher.labeling.teacher_check import _label
from teacher.labeling.verify import verify_labels
from teacher.train import train_teacher
from tests.conftest import make_writer
from tests.digits_run import Digits

IMAGES, PER_SHARD = 120, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Iterator[Path]:
    """Validation images, and the same again as unlabeled ones."""
    folder = tmp_path_factory.mktemp("calibration")
    write = make_writer(digits)
    write(folder / "labeled", 200, 600)
    write(folder / "validation", 0, IMAGES, per_shard=PER_SHARD)
    write(folder / "unlabeled", 0, IMAGES, labeled=False, per_shard=PER_SHARD)
    start_ray(None)
    train_teacher(*configure(folder))
    yield folder
    ray.shutdown()


def configure(folder: Path, *words: str) -> tuple[Config, Layout]:
    data = [f"data.{name}=[{folder}/{name}/*.tar]" for name in ("labeled", "validation", "unlabeled")]
    model = ["teacher.model=resnetrs26", "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}", "teacher.image_size=32",
             "teacher.epochs=8", "teacher.warmup_epochs=1", "teacher.batch_size=50", "teacher.ema_decay=0.9",
             "teacher.bn_momentum=0.1", "teacher.loader_workers=0", "teacher.augment.num_ops=0"]  # fmt: skip
    labeling = ["label.batch_size=32", "label.threads=1", "label.views=3"]
    config = load_config(None, [f"run_dir={folder}/run", *data, *model, *labeling, *words])
    return config, Layout(config.run_dir)


def manifest(layout: Layout) -> dict[str, Any]:
    return dict(json.loads(Path(layout.labels, "manifest.json").read_text()))


def confidences(layout: Layout) -> np.ndarray:
    shards = sorted(Path(layout.labels).glob("unlabeled-*.parquet"))
    return np.concatenate([pq.read_table(shard).column("confidence").to_numpy() for shard in shards])


def test_the_mean_of_several_is_made_surer_without_changing_a_label() -> None:
    generator = np.random.default_rng(0)
    views = generator.normal(size=(1, 4000, 8), scale=1.5) + generator.normal(size=(4, 4000, 8), scale=1.5)
    together = 2 * views.mean(axis=0)  # the views know more together than each of them
    labels = (together + generator.gumbel(size=together.shape)).argmax(axis=1)
    mean = torch.softmax(torch.from_numpy(views), dim=2).mean(dim=0).float().numpy()
    found = calibrate_labels(mean, labels)
    assert found.error_after < found.error_before / 2
    expected = tempered(torch.from_numpy(mean), found.temperature).numpy()
    np.testing.assert_array_equal(found.confidence, expected.max(axis=1))
    np.testing.assert_array_equal(expected.argmax(axis=1), mean.argmax(axis=1))


@pytest.mark.slow
def test_labels_have_the_confidence_that_the_same_images_have_in_validation(folder: Path) -> None:
    """So precision measured on validation images holds for labels; and the manifest says how they were calibrated."""
    config, layout = configure(folder)
    label(config, layout)
    check = manifest(layout)["teacher_check"]
    assert 0.3 < check["labels_temperature"] < 1, "a mean is less sure than it is right"
    assert {"labels_calibration_error_before", "labels_calibration_error_after"} <= check.keys()
    expected = pq.read_table(f"{layout.labels}/validation.parquet").column("confidence").to_numpy()
    np.testing.assert_allclose(confidences(layout), expected, rtol=2e-3)  # another batch size, and the fast decoder
    assert require_done(layout.labels, "label")["summary"]["labels_temperature"] == check["labels_temperature"]
    verify_labels(config, layout)


@pytest.mark.slow
def test_with_too_many_scores_to_hold_confidences_come_from_a_second_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layout = configure(folder)
    monkeypatch.setattr(predictor, "HELD_SCORES", 10 * IMAGES // 3)
    split = open_split(f"{folder}/validation/*.tar", layout.indexes)
    table, fitted = _label(config, layout, split, None, calibrates=True)
    sure = load_labeling_predictor([layout.teacher], config.label, "cpu", fitted["labels_temperature"])
    expected = predictor.predict_sampled(split, sure.view, sure.batch_size, sure.probabilities)
    np.testing.assert_array_equal(table.column("confidence").to_numpy(), expected.highest)
    np.testing.assert_array_equal(table.column("predicted").to_numpy(), expected.predicted)


@pytest.mark.slow
def test_labels_of_an_earlier_version_are_done_and_new_shards_follow_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = configure(folder)
    one = config.model_copy(
        update={"data": config.data.model_copy(update={"unlabeled": [f"{folder}/unlabeled/unlabeled-000000.tar"]})}
    )
    with monkeypatch.context() as earlier:
        earlier.setattr(label_calibration, "can_calibrate", lambda config: False)
        label(one, layout, force=True)
    before = Path(layout.labels, "unlabeled-000000.parquet").read_bytes()
    capsys.readouterr()
    label(one, layout)
    assert "label: done" in capsys.readouterr().out
    label(config, layout)
    assert "only the temperature of the teacher on one view" in capsys.readouterr().out
    assert Path(layout.labels, "unlabeled-000000.parquet").read_bytes() == before
    assert "labels_temperature" not in manifest(layout)["teacher_check"]
    expected = pq.read_table(f"{layout.labels}/validation.parquet").column("confidence").to_numpy()
    np.testing.assert_allclose(confidences(layout), expected, rtol=2e-3)
    verify_labels(config, layout)

"""teacher.ensemble: labels are the mean of several teachers with the same classes and the same view."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.images.decode import Pixels
from pipeline.core.config import load_config
from pipeline.core.schema import Config, LabelConfig
from pipeline.core.stage import StageError
from pipeline.inference.ensemble import Ensemble, ensemble_digest, load_labeling_predictor
from pipeline.inference.stage_weights import load_predictor
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from teacher.labeling.stage import fingerprint

MODEL = {"width": 0.125, "blocks": [1, 1, 1, 1]}
INFO = WeightsInfo(
    model="resnetrs26", model_args=MODEL, num_classes=4, class_names=list("abcd"), image_size=32, crop_pct=1.0,
    interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3,
)  # fmt: skip


def teacher(folder: Path, seed: int, **info: object) -> str:
    torch.manual_seed(seed)
    made = INFO.model_copy(update=info)
    save_weights(str(folder / f"{seed}/weights"), build_model("resnetrs26", made.num_classes, MODEL).state_dict(), made)
    return str(folder / f"{seed}")


def images() -> torch.Tensor:
    pixels: Pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
    return torch.from_numpy(pixels)


def test_the_mean_of_all_teachers_each_with_its_own_temperature_and_normalization(tmp_path: Path) -> None:
    folders = [teacher(tmp_path, 0), teacher(tmp_path, 1, temperature=0.01, mean=(0.1,) * 3), teacher(tmp_path, 2)]
    config = LabelConfig(batch_size=4, views=2)
    both = load_labeling_predictor(folders, config, "cpu")
    assert isinstance(both, Ensemble)
    alone = [load_predictor(folder, "cpu", 4, 2, fast=True).probabilities(images()) for folder in folders]
    assert not np.allclose(alone[0], alone[1], atol=0.01)
    assert both.probabilities(images()) == pytest.approx(np.mean(alone, axis=0), abs=1e-6)
    assert both.probabilities(images()).dtype == np.float32


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"class_names": list("abdc")}, r"class 2 is 'c' for the teacher and 'd' in teacher\.ensemble: .*/1"),
        ({"class_names": list("abc"), "num_classes": 3}, r"the teacher has 4 classes, teacher\.ensemble: .*/1 3"),
        ({"class_names": None, "num_classes": 3}, r"/1 has num_classes 3, the teacher 4"),
        ({"image_size": 64}, r"/1 has image_size 64, the teacher 32"),
        ({"resize": "pad"}, r"/1 has resize 'pad', the teacher 'crop'"),
    ],
)
def test_other_classes_or_another_view_are_refused(tmp_path: Path, info: dict[str, object], message: str) -> None:
    with pytest.raises(StageError, match=message):
        load_labeling_predictor([teacher(tmp_path, 0), teacher(tmp_path, 1, **info)], LabelConfig(), "cpu")


def test_labels_depend_on_the_weights_of_every_teacher(tmp_path: Path) -> None:
    def config(*folders: str) -> Config:
        return load_config(None, [f"run_dir={tmp_path}/run", f"teacher.ensemble=[{','.join(folders)}]"])

    one, two = teacher(tmp_path, 1), teacher(tmp_path, 2)
    assert "ensemble" not in fingerprint(config(), "digest").inputs
    assert fingerprint(config(one), "digest") != fingerprint(config(two), "digest")
    assert fingerprint(config(f"{one}/weights"), "digest") == fingerprint(config(one), "digest"), "the same weights"
    assert ensemble_digest([one, two]) != ensemble_digest([one])

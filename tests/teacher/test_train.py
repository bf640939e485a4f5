"""The teacher stage: weights trained elsewhere, and the teacher check before labeling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch

from data.labels.label_files import read_labels
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, StageRefusedError
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inference.stage_weights import load_predictor, read_info
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo
from teacher.labeling.teacher_check import check_teacher
from teacher.train import train_teacher
from tests.conftest import WriteDigits

MODEL = {"width": 0.125, "blocks": [1, 1, 1, 1]}
MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config(tmp_path: Path, write_digits: WriteDigits) -> MakeConfig:
    """A configuration with a teacher trained elsewhere (random weights, here) and a validation set."""
    write_digits(tmp_path / "validation", 0, 60)
    torch.manual_seed(0)
    torch.save(build_model("resnetrs26", 10, MODEL).state_dict(), tmp_path / "elsewhere.pth")

    def make(*words: str) -> Config:
        fixed = [
            f"run_dir={tmp_path}/run", f"data.validation=[{tmp_path}/validation/*.tar]", "teacher.model=resnetrs26",
            "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}", f"teacher.weights={tmp_path}/elsewhere.pth",
            "teacher.image_size=32",
        ]  # fmt: skip
        return load_config(None, [*fixed, *words])

    return make


def layout(config: Config) -> Layout:
    return Layout(config.run_dir)


def test_weights_from_elsewhere_skip_training_and_are_calibrated(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    record = train_teacher(config, layout(config))
    info = read_info(layout(config).teacher)
    assert record["summary"]["trained_elsewhere"].endswith("elsewhere.pth")
    assert info.validation_top1 == record["summary"]["validation_top1"]
    assert info.class_names is not None
    assert info.class_names[3] == "digit_3"
    assert not (tmp_path / "run/gen-1/teacher/checkpoints").exists()
    state = torch.load(tmp_path / "elsewhere.pth", weights_only=True)
    loaded = load_predictor(layout(config).teacher, "cpu").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def check(config: Config, info: WeightsInfo | None = None) -> dict[str, Any] | None:
    url = f"{config.run_dir}/validation.parquet"
    return check_teacher(config, layout(config), info or read_info(layout(config).teacher), url, accept_chance=True)


def test_other_weights_under_the_same_name_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    train_teacher(config, layout(config))
    torch.manual_seed(1)
    torch.save(build_model("resnetrs26", 10, MODEL).state_dict(), tmp_path / "elsewhere.pth")
    with pytest.raises(StageRefusedError, match="weights: changed upstream"):
        train_teacher(config, layout(config))


def test_a_teacher_worse_than_expected_is_refused_before_labeling(make_config: MakeConfig) -> None:
    config = make_config("teacher.expected_top1=0.9")
    train_teacher(config, layout(config))
    with pytest.raises(StageError, match=r"expected top-1 0\.900"):
        check(config)


def test_a_teacher_as_good_as_expected_passes_and_expected_top1_can_be_corrected(make_config: MakeConfig) -> None:
    config = make_config("teacher.expected_top1=0.9")
    train_teacher(config, layout(config))
    info = read_info(layout(config).teacher)
    corrected = make_config(f"teacher.expected_top1={info.validation_top1}")
    train_teacher(corrected, layout(corrected))
    found = check(corrected)
    assert found is not None
    assert found["found_top1"] == pytest.approx(info.validation_top1)
    rows = read_labels(f"{corrected.run_dir}/validation.parquet")
    right = pc.sum(pc.equal(rows.column("label"), rows.column("predicted"))).as_py()
    assert (right / len(rows), len(rows)) == (pytest.approx(info.validation_top1), 60)


def test_a_teacher_labels_in_the_precision_of_its_calibration(make_config: MakeConfig) -> None:
    config = make_config("teacher.precision=bf16")
    train_teacher(config, layout(config))
    folder = layout(config).teacher
    assert Preprocessing.of_weights(read_info(folder)).precision == "bf16"
    assert load_predictor(folder, "cpu").preprocessing.precision == "bf16"


@pytest.mark.parametrize(("alone", "told"), [(0.9, True), (0.0, False)])
def test_views_that_make_the_labels_worse_are_reported(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    alone: float,
    told: bool,
) -> None:
    config = make_config("label.views=2")
    train_teacher(config, layout(config))
    monkeypatch.setattr(
        "teacher.labeling.teacher_check._compare", lambda *args: {"expected_top1": alone, "found_top1": alone}
    )
    check(config)
    rows = read_labels(f"{config.run_dir}/validation.parquet").to_pylist()
    right = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    message = f"the labels (label.views=2, 1 teachers) have top-1 {right:.3f} on data.validation, the teacher alone on one view 0.900"
    assert (message in capsys.readouterr().out) == told


def test_without_an_expected_accuracy_weights_from_elsewhere_are_not_checked_against_themselves(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    train_teacher(config, layout(config))
    found = check(config)
    assert found is not None
    assert "expected_top1" not in found
    assert found["labels_top1"] == pytest.approx(read_info(layout(config).teacher).validation_top1, abs=0.05)


def test_without_labeled_images_the_check_is_skipped(make_config: MakeConfig) -> None:
    config = make_config("data.validation=[]", "data.num_classes=10")
    train_teacher(config, layout(config))
    assert check(config) is None


def test_a_changed_data_num_classes_is_refused(make_config: MakeConfig) -> None:
    config = make_config("data.validation=[]", "data.num_classes=10")
    train_teacher(config, layout(config))
    other = make_config("data.validation=[]", "data.num_classes=12")
    with pytest.raises(StageRefusedError, match=r"data\.num_classes: 10 there, 12 now"):
        train_teacher(other, layout(other))


def test_classes_in_another_order_are_refused_with_the_first_difference(make_config: MakeConfig) -> None:
    config = make_config()
    train_teacher(config, layout(config))
    info = read_info(layout(config).teacher).model_copy(update={"class_names": ["digit_1", "digit_0"]})
    with pytest.raises(StageError, match=r"class 0 is 'digit_1' for the teacher and 'digit_0' in data\.validation"):
        check(config, info)

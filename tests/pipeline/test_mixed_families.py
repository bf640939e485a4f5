"""A teacher of one family and a student of the other, through the whole pipeline on handwritten digits."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.inference.stage_weights import read_info
from tests.conftest import WriteDigits
from tests.digits_run import Digits, run, summary_of, write_digits_data


@pytest.mark.slow
def test_an_efficientnet_rs_learns_from_a_resnet_rs(tmp_path: Path, digits: Digits, write_digits: WriteDigits) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    words = ["student.model=efficientnetrs_b0", "student.model_args={}", "student.image_size=32", "student.epochs=16"]
    words += [
        "student.optimizer=rmsprop",
        "student.lr=0.05",
        "student.weight_decay=1e-5",
        "evaluate.robustness_images=0",
    ]
    words += ["student.stochastic_depth=0.1", "student.lr_schedule=exponential", "student.augment.num_ops=1"]
    result = run("stage=all", f"config={tmp_path}/config.yaml", f"run_dir={tmp_path}/run", *words)
    assert result.returncode == 0, result.stderr
    assert "student.augment.magnitude=10, as EfficientNet-RS has it at 32 px" in result.stdout
    summary = summary_of(tmp_path / "run")
    assert summary["teacher"]["top1"] > 0.5
    assert 0 <= summary["student"]["top1"] <= 1
    assert read_info(str(tmp_path / "run/gen-1/student")).model == "efficientnetrs_b0"

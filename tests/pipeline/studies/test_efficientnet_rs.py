"""EfficientNet-RS's study: one network at smaller images, and the next smaller network at its own size."""

from __future__ import annotations

import pytest

from data.settings import UsageError
from pipeline.core.config import load_config
from pipeline.studies.efficientnet_rs import EFFICIENTNET_RS
from pipeline.studies.rows import row_configs


def rows(*words: str) -> list[tuple[str, int, float]]:
    teachers = [config.teacher for config in row_configs(EFFICIENTNET_RS, load_config(None, words)).values()]
    return [(teacher.model, teacher.image_size, teacher.augment.magnitude) for teacher in teachers]


def test_rows_are_a_sweep_of_sizes_with_their_magnitudes_and_the_published_size_of_the_smaller_one() -> None:
    assert rows("teacher.model=efficientnetrs_b5", "teacher.image_size=456") == [
        ("efficientnetrs_b5", 456, 20), ("efficientnetrs_b5", 388, 20), ("efficientnetrs_b5", 320, 15),
        ("efficientnetrs_b5", 252, 15), ("efficientnetrs_b4", 380, 20),
    ]  # fmt: skip


def test_a_run_of_another_family_compares_b1_with_b0_on_its_images() -> None:
    found = rows("teacher.model=resnetrs26", "teacher.model_args={width: 0.25}", "teacher.image_size=32")
    assert [model[-2:] for model, _, _ in found] == ["b1"] * 4 + ["b0"]
    assert [size for _, size, _ in found] == [32, 28, 24, 16, 30]


def test_b0_has_no_smaller_one() -> None:
    with pytest.raises(UsageError, match=r"teacher\.model=efficientnetrs_b0 has no smaller one"):
        rows("teacher.model=efficientnetrs_b0")

"""EfficientNet-RS's RandAugment follows the image size, unless somebody has set it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.config import load
from pipeline.core.model_rules import efficientnet_rs_magnitude, follow_models
from pipeline.core.schema import Config


def followed(*words: str) -> Config:
    return follow_models(load(None, words))[0].config


@pytest.mark.parametrize(("size", "magnitude"), [(64, 10), (224, 10), (225, 15), (320, 15), (321, 20), (600, 20)])
def test_the_magnitude_is_the_papers(size: int, magnitude: float) -> None:
    assert efficientnet_rs_magnitude(size) == magnitude
    teacher = followed("teacher.model=efficientnetrs_b3", f"teacher.image_size={size}").teacher
    assert teacher.augment.magnitude == magnitude


def test_one_that_is_set_stays_and_so_do_other_models() -> None:
    words = ["student.model=efficientnetrs_b3", "student.augment.magnitude=15", "teacher.model=tf_efficientnet_b3"]
    config = followed(*words, "teacher.image_size=160", "student.image_size=160")
    assert (config.student.augment.magnitude, config.teacher.augment.magnitude) == (15, 15)


def test_the_rule_wins_over_a_recipe_and_is_said() -> None:
    loaded, lines = follow_models(
        load(None, ["recipe=imagenet", "teacher.model=efficientnetrs_b5", "teacher.image_size=300"])
    )
    assert loaded.config.teacher.augment.magnitude == 15
    assert lines == ["teacher.augment.magnitude=15, as EfficientNet-RS has it at 300 px"]


def test_it_is_not_remembered_so_another_size_in_the_same_run_has_its_own(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}/run", "teacher.model=efficientnetrs_b3", "teacher.image_size=160"]
    loaded, _ = follow_models(load(None, words))
    loaded.write(words)
    again, _ = follow_models(load(None, [f"run_dir={tmp_path}/run", "teacher.image_size=400"]))
    assert (loaded.config.teacher.augment.magnitude, again.config.teacher.augment.magnitude) == (10, 20)

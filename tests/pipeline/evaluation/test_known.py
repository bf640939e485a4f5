"""Results are taken from an earlier evaluation only of the same weights, images and settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.core.layout import Layout
from pipeline.core.stage import Fingerprint, done_record
from pipeline.evaluation.known import find_evaluated
from tests.conftest import WriteDigits
from tests.small_run import NUM_TEST, SmallRun

TEST = "cd" * 8


def test_only_the_same_weights_images_and_settings_are_known(tmp_path: Path, write_digits: WriteDigits) -> None:
    run = SmallRun(tmp_path, write_digits)
    layout, right = Layout(run.config().run_dir), np.arange(NUM_TEST) % 3 > 0
    for role, folder in layout.models.items():
        run.model(folder, role, weights=role.encode())
    run.evaluate(layout, {"teacher": right, "student": ~right}, TEST)
    digests = {role: record["digest"] for role, folder in layout.models.items() if (record := done_record(folder))}

    def known(test: str = TEST, seed: int = 0, robustness: int = 0, **models: str) -> set[str]:
        config = {"seed": seed, "evaluate.robustness_images": robustness}
        found = find_evaluated(layout, Fingerprint(config, {"test": test, **digests, **models}))
        assert all(each.is_as_robust == (robustness == 0) for each in found.values())
        return {*found}

    assert known() == {"teacher", "student"}
    assert known(student="ee" * 8) == {"teacher"}
    assert known(test="ef" * 8) == set()
    assert known(seed=1) == set()
    assert known(robustness=7) == {"teacher", "student"}
    next_teacher = find_evaluated(
        Layout(layout.run_dir, 2), Fingerprint({"seed": 0}, {"test": TEST, "teacher": digests["student"]})
    )
    assert next_teacher["teacher"].figures()["top1"] == float((~right).mean()), "the student before teaches the next"
    assert (
        next_teacher["teacher"].predictions()["label"]
        == np.where(~right, np.arange(NUM_TEST) % 10, (np.arange(NUM_TEST) + 1) % 10)
    ).all()

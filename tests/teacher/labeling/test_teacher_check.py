"""A teacher trained here whose labels are no better than chance stops the run: the message says what to do, and how to go on anyway."""

import numpy as np
import pytest

from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.inference.accuracy import Accuracy
from teacher.labeling.teacher_check import problem_of_labels


@pytest.mark.parametrize(("num_right", "is_refused"), [(10, True), (14, True), (15, False), (90, False)])
def test_labels_within_the_error_of_chance_are_refused(num_right: int, is_refused: bool) -> None:
    """Ten classes, 100 images: by chance 10 are right; 15 or more are so in under 7 %, 16 or more in under 5 % of cases."""
    labels = np.arange(100) % 10
    predicted = np.where(np.arange(100) < num_right + (not is_refused), labels, (labels + 1) % 10)
    found = problem_of_labels(Config(), Layout("run"), Accuracy(labels, predicted), None)
    assert bool(found) == is_refused
    if is_refused:
        assert found.startswith(
            f"its labels are no better than chance: top-1 {num_right}.0% ({num_right} of 100 validation images)"
        )
        assert "train it again, for longer or with a lower learning rate, or check the labels of data.labeled" in found

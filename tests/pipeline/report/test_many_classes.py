"""With 20,000 classes the report takes memory by the classes, not by pairs of them: one dense matrix of counts is 3.2 GB."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.layout import Layout
from pipeline.inference.accuracy import top_k_accuracy
from pipeline.report.build import REPORT_NAME, write_report
from teacher.selection.stage import select
from tests.conftest import WriteDigits
from tests.small_run import NUM_TEST, SmallRun

NUM_CLASSES = 20_000
BOUND = 300_000_000  # bytes; a matrix of one byte for each pair of classes is 400 MB


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail when the block allocates more than BOUND at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BOUND


@pytest.mark.slow
def test_a_report_of_20_000_classes_takes_little_memory(tmp_path: Path, write_digits: WriteDigits) -> None:
    run = SmallRun(tmp_path, write_digits, [f"c{number}" for number in range(NUM_CLASSES)])
    config = run.config()
    run.write_truth()
    layout, numbers = Layout(config.run_dir), np.arange(NUM_TEST)
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    select(config, layout)
    run.model(layout.student, "student", weights=b"other")
    run.evaluate(layout, {"teacher": numbers % 3 > 0, "student": numbers % 4 > 0})
    with little_memory():
        write_report(config, [layout])
    html = (Path(config.run_dir) / REPORT_NAME).read_text()
    assert "c150 taken for c151" in html
    assert len(html) < 2_000_000


@pytest.mark.slow
def test_the_accuracy_of_many_images_and_classes_is_found_piece_by_piece() -> None:
    scores = np.random.default_rng(0).random((2000, NUM_CLASSES), np.float32)
    labels = np.random.default_rng(1).integers(0, NUM_CLASSES, len(scores))
    scores[np.arange(500), labels[:500]] = 2
    with little_memory():
        top1, top5 = top_k_accuracy(scores, labels)
    assert 0.25 <= top1 <= top5 < 0.26

"""The report shows the scaling study of its run, with the run's models in the plot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.layout import Layout
from pipeline.core.stage import StageError
from pipeline.report.build import REPORT_NAME, write_report
from tests.small_run import NUM_TEST, SmallRun

CELLS = [
    {"width": width, "depth": 26, "image_size": 32, "epochs": epochs, "flops": 1e8 * width, "errors": [30.0 / width, 31.0]}
    for width in (1.0, 2.0)
    for epochs in (10, 40)
]  # fmt: skip
FINDING = {"question": "40 epochs: depth or width?", "answer": "cannot tell: no pair of equal cost"}


def write_study(run: SmallRun, text: str) -> Path:
    file = run.folder / "run/ablate/scaling/findings.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file


def test_plot_findings_and_the_runs_models_are_shown(run: SmallRun) -> None:
    config = run.config(truth=False)
    layout, right = Layout(config.run_dir), np.arange(NUM_TEST) % 3 > 0
    for role in ("teacher", "student"):
        run.model(layout.teacher if role == "teacher" else layout.student, role)
    run.evaluate(layout, {"teacher": right, "student": right}, "test-digest")
    write_study(run, json.dumps({"cells": CELLS, "findings": [FINDING]}))
    write_report(config, [layout])
    html = Path(config.run_dir, REPORT_NAME).read_text()
    section = html[html.index("<h2>Scaling study</h2>") :].partition("</section>")[0]
    assert "Error against FLOPs per image of 4 models, a panel for each of 2 lengths of training" in section
    assert "; teacher 37.5 % at 7.53e+06; student 37.5 % at 7.53e+06." in section
    assert "depth or width?</th><td>cannot tell: no pair of equal cost</td>" in section


def test_a_run_without_a_study_has_no_such_section_and_a_damaged_one_is_named(run: SmallRun) -> None:
    config = run.config(truth=False)
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    write_report(config, [layout])
    assert "Scaling study" not in Path(config.run_dir, REPORT_NAME).read_text()
    write_study(run, '{"cells": [{}]}')
    with pytest.raises(StageError, match=r"findings.json: damaged .*run stage=ablate ablate.study=scaling again"):
        write_report(config, [layout])

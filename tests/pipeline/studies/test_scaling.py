"""The scaling study: its grid, its rule of regularization, and what its analysis can and cannot tell of laws that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.settings import UsageError
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.models.resnet_rs import ModelError
from pipeline.pages.plots import error_against_flops
from pipeline.run import main
from pipeline.studies.rows import row_configs
from pipeline.studies.scaling import Cell, cells_of, flops_of, scaling_study, size_of
from pipeline.studies.scaling_fit import CANNOT_TELL, CellResult, findings, fit_power_law
from pipeline.studies.stage import open_study
from tests.conftest import WriteDigits
from tests.digits_run import Digits, write_digits_data

GRID = [
    "ablate.study=scaling", "ablate.grid.width=[0.25,0.5]", "ablate.grid.depth=[26,50]", "ablate.grid.image_size=[32]",
    "ablate.grid.epochs=[10,40]", "teacher.epochs=20", "teacher.warmup_epochs=2", "teacher.dropout=0.2",
    "teacher.stochastic_depth=0.1", "teacher.model_args={width: 1.0, blocks: [1, 1, 1, 1], stem: 16}",
]  # fmt: skip


def grid(*words: str) -> Config:
    return load_config(None, [*GRID, *words])


def test_every_combination_is_a_row_and_regularization_grows_with_the_model_in_the_longest_trainings() -> None:
    configs = row_configs(scaling_study(grid()), grid())
    assert len(configs) == 8
    short = configs["width 0.5, depth 50, 32 px, 10 epochs"].teacher
    assert (short.model, short.model_args) == ("resnetrs50", {"width": 0.5, "stem": 16})
    assert (short.epochs, short.warmup_epochs, short.eval_every_epochs) == (10, 1, 10)
    assert (short.dropout, short.stochastic_depth, short.label_smoothing, short.augment.num_ops) == (0, 0, 0, 0)
    largest, smallest = (
        configs[f"width {width}, depth {depth}, 32 px, 40 epochs"].teacher for width, depth in ((0.5, 50), (0.25, 26))
    )
    assert (largest.dropout, largest.stochastic_depth, largest.label_smoothing) == (0.2, 0.1, 0.1)
    assert (smallest.dropout, smallest.stochastic_depth) == (0.1, pytest.approx(0.1 * 8 / 16))


def test_without_image_sizes_and_lengths_the_cells_have_the_teachers() -> None:
    cells = cells_of(grid("ablate.grid.image_size=[]", "ablate.grid.epochs=[]", "teacher.image_size=48"))
    assert {(cell.image_size, cell.epochs) for cell in cells} == {(48, 20)}


@pytest.mark.parametrize(("word", "message"), [
    ("ablate.grid.depth=[26,51]", r"ablate.grid.depth: 51 is none of 26, 50, 101"),
    ("ablate.grid.width=[0.5,0.5]", r"ablate.grid.width=\[0.5, 0.5\]: a value is there twice"),
    ("ablate.grid.width=[]", r"ablate.grid.width=\[\]: expected one value or more"),
])  # fmt: skip
def test_a_grid_that_cannot_be_is_refused_by_its_field(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        scaling_study(grid(word))


def test_a_cell_that_cannot_be_built_is_named() -> None:
    with pytest.raises(ModelError, match=r"study scaling, width 0.001, depth 26, 32 px, 10 epochs: .*width"):
        flops_of(Cell(0.001, 26, 32, 10), grid(), 10)


def test_costs_are_counted() -> None:
    small, large = (size_of(Cell(width, 26, size, 10), grid(), 10) for width, size in ((0.25, 32), (0.25, 64)))
    assert small.parameters == large.parameters
    assert large.flops / small.flops == pytest.approx(4, rel=0.05)
    assert large.activation_bytes / small.activation_bytes == pytest.approx(4, rel=0.1)


def cell(width: float, depth: int, image_size: int, error: float, **changes: Any) -> CellResult:
    flops = round(1e8 * width**2 * depth / 26 * (image_size / 32) ** 2)
    made = CellResult(width, depth, image_size, 10, (error - 0.1, error + 0.1), 1, flops, 1, flops / 1e6, 1.0)
    return replace(made, **changes)


@pytest.mark.parametrize("law", [(30.0, 0.5, 4.0), (80.0, 0.2, 0.0), (5.0, 1.3, 20.0)])
def test_a_power_law_is_found_again(law: tuple[float, float, float]) -> None:
    a, b, c = law
    flops = np.geomspace(1, 1000, 12) * 1e7
    found = fit_power_law(flops, c + a * (flops / 1e7) ** -b)
    assert found.b == pytest.approx(b, abs=0.011)  # the step of the grid
    assert found.c == pytest.approx(c, abs=0.5)
    assert found(flops) == pytest.approx(c + a * (flops / 1e7) ** -b, abs=0.1)


def series(error_of: Any) -> list[CellResult]:
    flops = [round(value) for value in np.geomspace(1, 1000, 10) * 1e7]
    return [cell(0.5, 26, 32, error_of(value / 1e7), flops=value) for value in flops]


def test_a_law_that_holds_and_one_that_breaks_are_told_apart() -> None:
    def law(size: float) -> float:
        return 5 + 40 * size**-0.4

    kept = next(f for f in findings(series(law)) if "larger half" in f.question)
    assert kept.answer == CANNOT_TELL  # no break beyond the spread of the seeds
    assert kept.value == pytest.approx(0, abs=0.3)
    broken = next(
        f for f in findings(series(lambda size: law(min(size, 40)) + 3 * (size > 40))) if "larger half" in f.question
    )
    assert broken.answer == "it breaks: more errors"
    assert broken.low is not None
    assert broken.low > 0


def test_few_flops_or_one_seed_tell_nothing() -> None:
    near = [
        replace(c, flops=10**7 + number * 10**6) for number, c in enumerate(series(lambda size: 5 + 40 * size**-0.4))
    ]
    assert next(f for f in findings(near) if "larger half" in f.question).answer.startswith(
        f"{CANNOT_TELL}: FLOPs range"
    )
    alone = [replace(c, errors=c.errors[:1]) for c in series(lambda size: 5 + 40 * size**-0.4)]
    assert all(finding.answer.startswith(CANNOT_TELL) for finding in findings(alone) if finding.low is None)
    assert all(finding.low is None for finding in findings(alone))


def test_depth_and_width_are_compared_at_equal_time_and_pixels_and_depth_at_equal_flops() -> None:
    cells = [
        cell(0.5, 26, 32, 20.0, step_ms=10, flops=10**8), cell(0.25, 101, 32, 18.0, step_ms=11, flops=10**7),
        cell(0.25, 50, 64, 18.5, step_ms=99, flops=10**7),
    ]  # fmt: skip
    depth = next(f for f in findings(cells) if "depth or width" in f.question)
    assert (depth.value, depth.answer) == (pytest.approx(2.0), "depth")
    pixels = next(f for f in findings(cells) if "depth or pixels" in f.question)
    assert (pixels.value, pixels.answer) == (pytest.approx(-0.5), "depth")
    spread = next(f for f in findings(cells) if "difference" in f.question)
    assert spread.answer == "width 0.25, depth 101, 32 px is better than width 0.25, depth 50, 64 px"
    wide = [replace(cells[0], errors=(17.0, 19.2)), cells[1]]
    assert next(f for f in findings(wide) if "depth or width" in f.question).answer == CANNOT_TELL


def test_at_equal_flops_no_cell_is_called_better_within_the_spread_of_seeds_or_with_one_seed() -> None:
    clear = [cell(0.5, 26, 32, 20.0, flops=10**8), cell(0.25, 50, 32, 18.0, flops=10**8)]
    noisy = [replace(clear[0], errors=(17.0, 19.2)), clear[1]]
    alone = [replace(one, errors=one.errors[:1]) for one in clear]
    better, unclear, single = (
        next(f for f in findings(cells) if "difference" in f.question).answer for cells in (clear, noisy, alone)
    )
    assert better == "width 0.25, depth 50, 32 px is better than width 0.5, depth 26, 32 px"
    assert (unclear, single) == (CANNOT_TELL, CANNOT_TELL)


def test_the_plot_has_a_panel_per_length_and_the_same_bytes_again() -> None:
    panels = {
        "10 epochs": [("depth 26", [1e7, 4e7], [30.0, 20.0])],
        "40 epochs": [("depth 26", [1e7, 4e7], [25.0, 15.0])],
    }
    svg = error_against_flops(panels)
    assert svg == error_against_flops(panels)
    assert svg.count(b" epochs</text>") == 2
    assert b">10 M</text>" in svg
    assert b"mathdefault" not in svg


def test_the_longest_trainings_start_first(tmp_path: Path, digits: Digits, write_digits: WriteDigits) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    config = load_config(
        f"{tmp_path}/config.yaml", [*GRID[:5], f"run_dir={tmp_path}/run", "ablate.seeds=2", "ablate.grid.width=[0.125]"]
    )
    _, trials = open_study(config, Layout(config.run_dir))
    names = [trial.row.removeprefix("width 0.125, ") for trial in trials]
    assert names == [
        f"depth {depth}, 32 px, {epochs} epochs"
        for epochs, depth in ((40, 50), (40, 26), (10, 50), (10, 26))
        for _ in range(2)
    ]


@pytest.mark.slow
def test_the_command_trains_the_grid_once_and_writes_cells_findings_and_plots(
    tmp_path: Path, digits: Digits, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    command = [
        "stage=ablate", f"config={tmp_path}/config.yaml", f"run_dir={tmp_path}/run", "ablate.study=scaling", "ablate.seeds=1",
        "ablate.grid.width=[0.0625,0.125]", "ablate.grid.depth=[26]", "ablate.grid.image_size=[16]", "ablate.grid.epochs=[1,2]",
    ]  # fmt: skip
    assert main([*command, "plan=true"]) == 0
    assert "4 trainings to make take" in capsys.readouterr().out
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "1 epochs: depth or width, at equal time of a step?: cannot tell: no pair of equal cost" in text
    folder = tmp_path / "run/ablate/scaling"
    table = pq.read_table(folder / "cells.parquet").to_pylist()
    assert [(row["width"], row["epochs"]) for row in table] == [(0.0625, 1), (0.0625, 2), (0.125, 1), (0.125, 2)]
    assert all(row["flops"] > 0 and row["step_ms"] > 0 and 0 <= row["errors"][0] <= 100 for row in table)
    content = json.loads((folder / "findings.json").read_text())
    assert [{name: value for name, value in cell.items() if name != "changes"} for cell in content["cells"]] == table
    assert main(["stage=advise", f"run_dir={tmp_path}/run", "advise.latency_ms=1000000"]) == 0
    assert "advise: width " in capsys.readouterr().out
    assert (folder / "scaling.svg").read_bytes().startswith(b"<?xml")
    before = {path: path.read_bytes() for path in folder.rglob("done.json")}
    assert main(command) == 0
    assert {path: path.read_bytes() for path in folder.rglob("done.json")} == before
    assert len(before) == 4

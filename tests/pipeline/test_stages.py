"""A stage is one row of the table: a toy stage that is added as a row is known to every command."""

from __future__ import annotations

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest

from data import storage
from pipeline import stages
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import open_stage
from pipeline.run import main
from pipeline.stages import StageRow
from pipeline.upstream.stage_inputs import explain_inputs, fingerprint_of
from tests.conftest import WriteDigits
from tests.pipeline.report.test_report import whole_run
from tests.small_run import SmallRun

TOY = StageRow(
    "count",
    "count the selected pseudo-labels",
    "tests.pipeline.test_stages:count_labels",
    folder="counts",
    fingerprint=("export.samples_per_shard",),
    reads=("data.exclude",),
    upstream={"selection": "select"},
    is_long=True,
)


def count_labels(config: Config, layout: Layout, force: bool) -> None:
    stage = open_stage(
        layout.folder_of("count"), "count", fingerprint_of(config, layout, "count"), force, explain_inputs(layout)
    )
    if not stage.is_done:
        storage.write_text(stage.path("count.txt"), "1\n")
        stage.commit(["count.txt"], {})


def do_nothing(config: Config, layout: Layout, force: bool) -> None:
    """Stands in for the stages whose output `SmallRun` has made up."""


@pytest.fixture
def run_dir(tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch) -> str:
    """A finished run, and the table with a toy stage before the report."""
    made_up = [
        replace(row, run="tests.pipeline.test_stages:do_nothing", reads=(), is_long=False)
        for row in stages.STAGES
        if row.kind == "generation"
    ]
    others = [row for row in stages.STAGES if row.kind != "generation"]
    monkeypatch.setattr(stages, "STAGES", (*made_up, TOY, *others))
    config, _ = whole_run(SmallRun(tmp_path, write_digits))
    return config.run_dir


def test_a_stage_is_one_row(run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main([*words, f"run_dir={run_dir}"]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    test_images = f"data.test=['{tmp_path}/labeled/*.tar']"
    assert "    count      count the selected pseudo-labels\n" in printed("--help")
    assert "did you mean 'count'?" in printed("stage=coutn", code=2)
    assert "generation 1  count     not begun\n" in printed("stage=status")
    assert "generation 1  count     would run\n" in printed("stage=count", "plan=true")
    assert f"report: {run_dir}/report.html" in printed("stage=all", test_images)
    assert (Path(run_dir) / "gen-1/counts/count.txt").read_text() == "1\n"
    assert "count" in json.loads((Path(run_dir) / "summary.json").read_text())["seconds"]
    assert '<th scope="row">count</th>' in (Path(run_dir) / "report.html").read_text()
    assert "generation 1  count     done " in printed("stage=status")
    assert "generation 1  count     done\n" in printed("stage=count", "plan=true")
    refusal = printed("stage=count", "export.samples_per_shard=7", code=2)
    assert "export.samples_per_shard: 10000 there, 7 now" in refusal
    assert "export.samples_per_shard is from the command line" in refusal
    printed("stage=count", "export.samples_per_shard=7", "force=true")
    assert (Path(run_dir) / "gen-1/counts.old-1/count.txt").exists()
    missing = f"data.exclude={tmp_path}/nowhere.txt"
    assert "data.exclude" in printed("stage=count", missing, code=2)


def test_every_function_that_a_row_names_is_there() -> None:
    assert all(callable(stages.function_of(row.name)) for row in stages.STAGES)


def test_rows_name_each_other_and_fields_that_exist() -> None:
    names = set(stages.names_of())
    assert len(names) == len(stages.STAGES)
    for row in stages.STAGES:
        assert {*row.upstream.values(), *filter(None, [row.followed_by])} <= names
        for field in stages.fields_in_force((*row.fingerprint, *row.reads), Config()):
            attrgetter(field)(Config())

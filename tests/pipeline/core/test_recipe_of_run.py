"""A run directory keeps what its recipe was resolved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline import run as run_module
from pipeline.run import main
from tests.conftest import WriteDigits
from tests.pipeline.core.test_remembered import replace_stages


class Run:
    """Commands on a run directory whose stages do nothing but open; `Run.config` is what the last stage was given."""

    def __init__(self, folder: Path, write: WriteDigits) -> None:
        self.folder, self.write = folder, write
        self.write(folder / "labeled", 0, 40)
        self.write(folder / "unlabeled", 40, 140, labeled=False)
        data = f"data: {{labeled: ['{folder}/labeled/*.tar'], unlabeled: ['{folder}/unlabeled/*.tar']}}\n"
        (folder / "mine.yaml").write_text(f"recipe: small\n{data}")

    def __call__(self, *words: str, stage: str = "teacher", named: bool = True) -> int:
        return main(
            [
                f"stage={stage}",
                f"run_dir={self.folder}/run",
                *([f"config={self.folder}/mine.yaml"] if named else []),
                *words,
            ]
        )

    def remembered(self) -> Any:
        return OmegaConf.to_container(OmegaConf.load(self.folder / "run/config.yaml"))


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch) -> Run:
    replace_stages(monkeypatch)
    monkeypatch.setattr(run_module, "write_summary", lambda config, layout: None)
    return Run(tmp_path, write_digits)


def test_it_is_resolved_once_printed_and_kept(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert "recipe=small for 40 labeled and 100 unlabeled images, 10 classes, " in printed
    assert "teacher.batch_size=32   " in printed
    assert "select.per_class=5  " in printed
    assert "55% of 100 unlabeled images / 10 classes" in printed
    before = run.remembered()
    assert before["recipe"] == "small"
    assert before["teacher"]["batch_size"] == 32
    assert before["from_recipe"]["sizes"]["labeled"] == 40
    run.write(run.folder / "more", 140, 260)
    for named in (True, False):
        assert run(f"data.labeled=[{run.folder}/labeled/*.tar,{run.folder}/more/*.tar]", named=named) == 0
        words = capsys.readouterr().out
        assert "the data has 160 labeled and 100 unlabeled images now" in words
        assert "as resolved for 40 and 100; another run_dir= resolves it again" in words
        assert run(named=named) == 0
        assert {**run.remembered(), "data": before["data"], "command_line": []} == before
        assert "teacher.batch_size" not in capsys.readouterr().out


def test_a_plan_shows_it_before_and_after(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.planning.plan.print_plan", lambda *_: None)  # it times the models
    assert run("plan=true") == 0
    assert "teacher.batch_size=32  " in capsys.readouterr().out
    assert not (run.folder / "run/config.yaml").exists()
    assert run() == 0
    capsys.readouterr()
    assert run("plan=true", named=False) == 0
    assert "teacher.batch_size=32  " in capsys.readouterr().out


def test_the_files_fields_win_over_what_was_kept_and_an_edit_is_seen(run: Run) -> None:
    assert run() == 0
    text = (run.folder / "mine.yaml").read_text()
    (run.folder / "mine.yaml").write_text(text + "student: {batch_size: 64}\nteacher: {lr: 0.3}\n")
    assert run(stage="student") == 0
    assert (run.remembered()["student"]["batch_size"], run.remembered()["teacher"]["lr"]) == (64, 0.3)
    (run.folder / "mine.yaml").write_text(text)
    assert run(stage="student") == 0
    assert (run.remembered()["student"]["batch_size"], run.remembered()["teacher"]["lr"]) == (128, 0.2)


def test_fields_that_wait_for_unlabeled_images_follow_them_later(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.write(run.folder / "few", 0, 40)
    (run.folder / "mine.yaml").write_text(f"recipe: small\ndata: {{labeled: ['{run.folder}/few/*.tar']}}\n")
    assert run() == 0
    assert "per_class" not in run.remembered()["select"]
    assert "per_class" not in capsys.readouterr().out
    config = run.folder / "run/config.yaml"
    config.write_text(
        config.read_text().replace("batch_size: 32", "batch_size: 16")
    )  # as an earlier version resolved it
    assert run(f"data.unlabeled=[{run.folder}/unlabeled/*.tar]") == 0
    assert run.remembered()["select"]["per_class"] == 5
    assert run.remembered()["teacher"]["batch_size"] == 16
    assert "select.per_class=5  " in capsys.readouterr().out


@pytest.mark.parametrize("named", [True, False])
def test_another_recipe_on_a_run_that_was_begun_is_refused(
    run: Run, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    assert run("recipe=finetune", named=named) == 2
    assert (
        "run was begun with recipe=small (recipe is from the command line); give another run_dir="
        in capsys.readouterr().err
    )
    (run.folder / "mine.yaml").write_text((run.folder / "mine.yaml").read_text().replace("recipe: small\n", ""))
    assert run(named=named) == 0, "not named any more: as the run was begun"
    assert run.remembered()["teacher"]["batch_size"] == 32


def test_a_run_without_a_recipe_gets_none(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.folder / "mine.yaml").write_text((run.folder / "mine.yaml").read_text().replace("recipe: small\n", ""))
    assert run() == 0
    assert "from_recipe" not in run.remembered()
    assert run("recipe=small") == 2
    assert "was begun without a recipe" in capsys.readouterr().err


def test_a_missing_shard_is_said_with_where_it_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data.labeled=[nowhere/*.tar]") == 2
    assert "data.labeled is from the command line" in capsys.readouterr().err
    assert not (run.folder / "run/config.yaml").exists()


def test_readers_need_no_data(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    for shard in run.folder.glob("*labeled/*.tar"):
        shard.unlink()
    assert run(stage="status", named=False) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("old", "new"), [("labeled: 40", "labeled: none"), ("teacher.epochs:", "teacher.epoch:"), ("reasons:", "reason:")]
)
def test_a_damaged_record_is_named(run: Run, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    config = run.folder / "run/config.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    assert run() == 2
    assert "run/config.yaml: from_recipe is damaged (" in capsys.readouterr().err

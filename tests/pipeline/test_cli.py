"""The command line explains itself, and a user's mistake gets a sentence, not a traceback."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import pytest

from pipeline import run, stages
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageRefusedError, open_stage
from pipeline.run import main
from tests.conftest import WriteDigits
from tests.small_run import SmallRun


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_alone_or_with_help_it_explains_stages_and_fields(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in ("stage=all", "The same command again continues", "student.unlabeled_ratio=3", "fashion_mnist"):
        assert part in text


def test_an_unknown_stage_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'student'" in error_of(capsys, "stage=studnet", "run_dir=x")


def test_a_missing_stage_or_run_dir_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "stage=… is missing" in error_of(capsys, "run_dir=x")
    assert "run_dir=DIR is needed" in error_of(capsys, "stage=all")


def test_the_status_of_a_run_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=status", f"run_dir={tmp_path}/mistyped"]) == 2
    assert f"run_dir={tmp_path}/mistyped: no run there" in capsys.readouterr().err


def test_shards_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "stage=teacher", f"run_dir={tmp_path}/run", f"data.labeled=[{tmp_path}/no-*.tar]")
    assert f"{tmp_path}/no-*.tar" in message
    message = error_of(capsys, "stage=teacher", f"run_dir={tmp_path}/other")
    assert "data.labeled is empty" in message


def test_a_stage_whose_input_is_not_done_names_the_stage_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "run stage=teacher first" in error_of(capsys, "stage=label", f"run_dir={tmp_path}/run")


def test_a_flag_that_is_neither_true_nor_false_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "plan=yes: expected true or false" in error_of(capsys, "stage=all", f"run_dir={tmp_path}", "plan=yes")


@pytest.mark.parametrize("stages", ["all", "teacher,label", "status"])
def test_force_needs_one_stage_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: str) -> None:
    message = error_of(capsys, f"stage={stages}", f"run_dir={tmp_path}/run", "force=true")
    assert "name the one stage to start over" in message
    assert "stage=teacher force=true" in message
    assert not (tmp_path / "run").exists()


def record_forced(
    monkeypatch: pytest.MonkeyPatch, refusing: tuple[tuple[str, int], ...] = ()
) -> list[tuple[str, int, bool]]:
    """Stages that do nothing but note (stage, generation, force), and refuse where they are told to."""
    calls: list[tuple[str, int, bool]] = []

    def stage(name: str, config: Config, layout: Layout, force: bool) -> None:
        if (name, layout.generation) in refusing and not force:
            raise StageRefusedError(f"{name} of generation {layout.generation} refuses")
        calls.append((name, layout.generation, force))

    monkeypatch.setattr(run, "write_summary", lambda config, layout: None)
    monkeypatch.setattr(stages, "function_of", lambda name: partial(stage, name))
    return calls


def begin(layout: Layout, *folders: str) -> None:
    for folder in folders:
        open_stage(folder, "any", Fingerprint({}, {})).commit([], {})


def test_force_starts_the_named_stage_over_and_not_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_forced(monkeypatch)
    assert main(["stage=label", f"run_dir={tmp_path}/run", "force=true"]) == 0
    assert calls == [("label", 1, True), ("select", 1, False)]


def test_an_export_can_be_started_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_forced(monkeypatch)
    assert main(["stage=export", f"run_dir={tmp_path}/run", "force=true"]) == 0
    assert calls == [("export", 1, True)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=all"], "data.test is empty"),
        (
            ["stage=label", "data.held_out_hashes=[nowhere.parquet]"],
            "data.held_out_hashes=nowhere.parquet: no such file",
        ),
        (["stage=all", "data.test=[x.tar]", "data.truth=nowhere.parquet"], "data.truth=nowhere.parquet: no such file"),
        (["stage=teacher", "data.exclude=nowhere.txt"], "data.exclude=nowhere.txt"),
        (
            ["stage=teacher,student", "student.from_teacher=true", "student.model=resnetrs26"],
            "student.init=teacher: the teacher is resnetrs50",
        ),
        (["stage=label", "before=1"], "before= and after= go with stage=diff"),
        (["stage=label", "verify=true", "force=true"], "verify=true goes with stage=label alone, without force=true"),
    ],
)
def test_what_a_later_stage_would_miss_is_said_before_the_first_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    calls = record_forced(monkeypatch)
    assert message in error_of(capsys, *words, f"run_dir={tmp_path}/run")
    assert calls == []
    assert not (tmp_path / "run/config.yaml").exists()


def test_force_moves_one_generations_output_the_last_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = [Layout(f"{tmp_path}/run", generation) for generation in (1, 2, 3)]
    begin(layouts[0], layouts[0].labels, layouts[0].student, layouts[1].labels)
    calls = record_forced(monkeypatch)
    assert main(["stage=label", f"run_dir={tmp_path}/run", "generations=3", "force=true"]) == 0
    assert [call for call in calls if call[0] == "label"] == [("label", 1, False), ("label", 2, True)]


def test_force_goes_to_the_first_generation_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = [Layout(f"{tmp_path}/run", generation) for generation in (1, 2)]
    begin(layouts[0], layouts[0].labels, layouts[0].student, layouts[1].labels)
    calls = record_forced(monkeypatch, refusing=(("label", 1), ("label", 2)))
    message = error_of(capsys, "stage=label", f"run_dir={tmp_path}/run", "generations=2", "force=true")
    assert calls == [("label", 1, True), ("select", 1, False)]
    assert "label of generation 2 refuses" in message


@pytest.mark.parametrize("stage", ["teacher", "status", "report", "evaluate"])
def test_a_run_dir_that_is_a_file_is_called_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    (tmp_path / "run").touch()
    assert f"run_dir={tmp_path}/run: a file is there" in error_of(capsys, f"stage={stage}", f"run_dir={tmp_path}/run")


def test_a_configuration_in_a_folder_without_ending_or_mistyped_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("confg.yaml", "folder.yaml"):
        assert f"config={tmp_path}/{name}: " in error_of(capsys, "stage=all", f"config={tmp_path}/{name}", "run_dir=x")


def test_a_gpu_that_is_not_there_is_named(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_digits(tmp_path / "labeled", 0, 10)
    words = [f"run_dir={tmp_path}/run", f"data.labeled=[{tmp_path}/labeled/*.tar]", "device=cuda"]
    assert "device=cuda: torch finds no GPU" in error_of(capsys, "stage=teacher", *words)


def test_a_file_that_cannot_be_written_is_named_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in error_of(capsys, "stage=select", f"run_dir={tmp_path}/file/run")


def test_selection_status_and_comparison_do_without_torch_and_ray(tmp_path: Path, write_digits: WriteDigits) -> None:
    """They take seconds to import, and most of a gigabyte; with generations=auto too, before there is a student."""
    small = SmallRun(tmp_path, write_digits)
    config = small.config(generations=2, truth=False)
    layout = small.layouts(config)[0]
    small.model(layout.teacher, "teacher")
    small.label(config, layout)
    words = [f"run_dir={config.run_dir}", "generations=auto", f"data.validation=['{tmp_path}/labeled/*.tar']"]
    commands = [["stage=select"], ["stage=select", "select.per_class=5"], ["stage=diff"], ["stage=status"]]
    heavy = ("torch", "torchvision", "timm", "ray", "matplotlib", "webdataset")
    script = f"""
import sys
from pipeline.run import main
codes = [main([*command, *{words}]) for command in {commands}]
print(codes, [name for name in {heavy} if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0] []", done.stderr


def test_what_is_imported_later_is_there() -> None:
    names = re.findall(r'_later\(\s*"([\w.:]+)"', Path(run.__file__).read_text())
    assert len(names) >= 6
    assert all(callable(resolve_name(name)) for name in names)

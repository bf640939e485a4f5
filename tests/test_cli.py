"""The command line explains itself, and a user's mistake gets a sentence, not a traceback."""

from pathlib import Path

import pytest

from pipeline.run import main


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


def test_a_file_that_cannot_be_written_is_named_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in error_of(capsys, "stage=select", f"run_dir={tmp_path}/file/run")

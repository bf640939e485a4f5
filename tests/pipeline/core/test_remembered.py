"""What a run directory remembers: nothing of a command that failed at its inputs, nothing secret; and where a value is from is said."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data import storage
from data.errors import DataError
from data.labels.sources.run import _data_field
from data.settings import UsageError
from pipeline import run as run_module
from pipeline import stages
from pipeline.core.config import load, load_config
from pipeline.core.config_layers import literal
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageError, open_stage
from pipeline.run import main
from tests.conftest import WriteDigits

SECRET = "s3cr3t-of-the-environment"


class Run:
    """A run directory, labeled shards, and a YAML file that names them; stages do nothing but open."""

    def __init__(self, folder: Path, write: WriteDigits) -> None:
        self.folder, self.config = folder, folder / "run/config.yaml"
        write(folder / "labeled", 0, 20)
        self.yaml(f"data: {{labeled: ['{folder}/labeled/*.tar']}}\nteacher: {{epochs: 7, warmup_epochs: 1}}\n")

    def yaml(self, text: str) -> None:
        (self.folder / "mine.yaml").write_text(text)

    def __call__(self, *words: str, stage: str = "teacher", named: bool = True) -> int:
        named_config = [f"config={self.folder}/mine.yaml"] if named else []
        return main([f"stage={stage}", f"run_dir={self.folder}/run", *named_config, *words])

    def remembered(self) -> Any:
        return OmegaConf.to_container(OmegaConf.load(self.config), resolve=False)


def open_only(config: Config, layout: Layout, force: bool, name: str) -> None:
    stage = open_stage(
        f"{layout.run_dir}/{name}", name, Fingerprint({"teacher.epochs": config.teacher.epochs}, {}), force
    )
    if not stage.is_done:
        storage.write_text(stage.path("x"), "x")
        stage.commit(["x"], {})


def replace_stages(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Run `functions` by stage name, and `open_only` for the other stages of a generation."""
    others = {name: partial(open_only, name=name) for name in stages.names_of("generation")} | functions
    function_of = stages.function_of
    monkeypatch.setattr(stages, "function_of", lambda name: others.get(name) or function_of(name))


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch) -> Run:
    replace_stages(monkeypatch)
    monkeypatch.setattr(run_module, "write_summary", lambda config, layout: None)
    monkeypatch.setattr("student.warm_start.require_warm_start", lambda *_: None)
    return Run(tmp_path, write_digits)


MISTYPED = [
    ("data.labeled=[nowhere/x-*.tar]", "nowhere/x-*.tar"),
    ("data.labeled=[nowhere/x.tar]", "nowhere/x.tar: no such shard"),
    ("data.validation=[nowhere/x.tar]", "nowhere/x.tar: no such shard"),
    ("data.unlabeled=[nowhere/x.tar]", "nowhere/x.tar: no such shard"),
    ("data.labeled=[nowhere/x.zip]", "not a .tar shard"),
    ("teacher.weights=nowhere.pth", "teacher.weights=nowhere.pth: no such file"),
    ("teacher.ensemble=[nowhere]", "teacher.ensemble=nowhere: no such file"),
    ("data.exclude=nowhere.txt", "data.exclude=nowhere.txt: expected a text file"),
    ("data.truth=nowhere.parquet", "data.truth=nowhere.parquet: no such file"),
    ("data.held_out_hashes=[nowhere.parquet]", "data.held_out_hashes=nowhere.parquet: no such file"),
]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("word", "message"), MISTYPED)
def test_a_mistyped_input_is_not_remembered(
    run: Run, word: str, message: str, force: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    forced = ["force=true"] if force else []
    assert run(word, *forced) == 2
    assert not run.config.exists()
    assert run() == 0
    before = run.config.read_bytes()
    assert run(word, "teacher.epochs=9", *forced) == 2
    assert run.config.read_bytes() == before
    error = capsys.readouterr().err
    assert message in error
    assert f"({word.partition('=')[0]} is from the command line)" in error
    run.yaml(
        f"data: {{labeled: ['{run.folder}/labeled/labeled-000000.tar']}}\nteacher: {{epochs: 7, warmup_epochs: 1}}\n"
    )
    assert run() == 0
    assert run.remembered()["data"]["labeled"] == [f"{run.folder}/labeled/labeled-000000.tar"]


def test_a_mistyped_yaml_file_can_be_corrected(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    good = (run.folder / "mine.yaml").read_text()
    run.yaml("data: {labeled: [nowhere/*.tar]}\n")
    assert run() == 2
    assert f"(data.labeled is from {run.folder}/mine.yaml)" in capsys.readouterr().err
    run.yaml(good)
    assert run() == 0
    assert run(named=False) == 0


def test_a_study_that_cannot_begin_is_not_remembered(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    before = run.config.read_bytes()
    for words in (["data.validation=[nowhere/x.tar]"], ["data.validation=[nowhere/x.tar]", "force=true"], []):
        assert run("teacher.epochs=9", *words, stage="ablate") == 2
        assert run.config.read_bytes() == before
    assert "no such shard" in capsys.readouterr().err


def test_a_stage_that_refuses_leaves_what_is_remembered_and_says_where_the_value_is_from(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("teacher.epochs=9") == 0
    before = run.config.read_bytes()
    assert run("teacher.epochs=10") == 2
    assert "teacher.epochs is from the command line" in capsys.readouterr().err
    assert run.config.read_bytes() == before
    (run.folder / "run/teacher/started.json").unlink()
    (run.folder / "run/teacher/done.json").write_text(
        '{"fingerprint": {"config": {"teacher.epochs": 8}, "inputs": {}}, "outputs": {}, "summary": {}, "digest": "d"}'
    )
    assert run() == 2
    assert f"teacher.epochs is remembered in {run.folder}/run/config.yaml" in capsys.readouterr().err
    assert run.config.read_bytes() == before


def files(run: Run) -> dict[Path, bytes]:
    """All but what is noted of the failure."""
    paths = (path for path in (run.folder / "run").rglob("*") if path.is_file() and path.name != "last_stop.json")
    return {path: path.read_bytes() for path in paths}


def test_a_check_that_refuses_leaves_what_is_remembered_and_what_was_made(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run() == 0
    before = files(run)

    def refuse() -> None:
        raise StageError("no such classes")

    def checked(config: Config, layout: Layout, force: bool) -> None:
        fingerprint = Fingerprint({"teacher.epochs": config.teacher.epochs}, {})
        open_stage(f"{layout.run_dir}/teacher", "teacher", fingerprint, force, check=refuse)

    replace_stages(monkeypatch, teacher=checked)
    assert run("teacher.epochs=9", "force=true") == 2
    assert files(run) == before


def test_an_accepted_command_is_remembered_before_its_stage_begins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(config: Config, layout: Layout, force: bool) -> None:
        open_only(config, layout, force, "teacher")
        raise KeyboardInterrupt

    replace_stages(monkeypatch, teacher=begin)
    with pytest.raises(KeyboardInterrupt):
        run("teacher.epochs=9")
    assert run.remembered()["teacher"]["epochs"] == 9


def test_remembered_words_that_win_over_a_named_file_are_printed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("teacher.epochs=9", "label.workers=2", "teacher.warmup_epochs=1") == 0
    capsys.readouterr()
    assert run("label.workers=3") == 0
    printed = capsys.readouterr().out
    assert (
        f"remembered in {run.config}, so that it wins over {run.folder}/mine.yaml:\n  teacher.epochs=9\nTo" in printed
    )
    assert run("teacher.epochs=9") == 0
    assert run(named=False) == 0
    printed = capsys.readouterr().out
    assert "label.workers=3" in printed  # of the first of both
    assert printed.count("wins over") == 1


def test_a_bad_field_says_where_it_is_from(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.yaml("teacher: {epochs: many}\nseed: 1\n")
    assert run("student.epochs=few", "nothing=3") == 2
    error = capsys.readouterr().err
    assert f"(teacher.epochs is from {run.folder}/mine.yaml)" in error
    assert "(student.epochs is from the command line)" in error
    assert "(nothing is from the command line)" in error


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(MISTYPED), min_size=1, max_size=3), st.integers(1, 400), st.booleans())
def test_whatever_fails_at_its_inputs_leaves_config_yaml_as_it_was(
    run: Run, bad: list[tuple[str, str]], epochs: int, force: bool
) -> None:
    before = run.config.read_bytes() if run.config.exists() else run() or run.config.read_bytes()
    words = [word for word, _ in bad]
    assert run(*words, f"teacher.epochs={epochs}", *(["force=true"] if force else [])) == 2
    assert run.config.read_bytes() == before


# variables


def test_variables_are_written_as_they_were_typed_and_used_as_they_are(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LABELED", f"{run.folder}/labeled")
    monkeypatch.setenv("HIDDEN", SECRET)
    monkeypatch.setenv("EPOCHS", "5")
    run.yaml(
        "device: cpu\n"  # auto would ask the cluster
        "data: {labeled: ['${oc.env:LABELED}/*.tar']}\n"
        "teacher: {epochs: '${oc.decode:${oc.env:EPOCHS}}', warmup_epochs: 1}\n"
        "student: {epochs: '${teacher.epochs}'}\n"
        "select: {target_precision: null}\n"
    )
    assert run("ray_address=${oc.env:HIDDEN}") == 0
    text = run.config.read_text()
    assert SECRET not in text
    written = run.remembered()
    assert written["data"]["labeled"] == ["${oc.env:LABELED}/*.tar"]
    assert written["ray_address"] == "${oc.env:HIDDEN}"
    assert written["command_line"] == ["ray_address=${oc.env:HIDDEN}"]
    assert (written["teacher"]["epochs"], written["student"]["epochs"]) == (5, 5)
    assert run(named=False) == 2
    error = capsys.readouterr().err
    assert "variables are filled in only where they are given with the command" in error
    assert main(["stage=status", f"run_dir={run.folder}/run"]) == 0
    assert run("ray_address=null") == 0


def test_a_run_directory_of_somebody_else_reads_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HIDDEN", SECRET)
    (tmp_path / "config.yaml").write_text(
        "data:\n  test: ['http://127.0.0.1:9/${oc.env:HIDDEN}/x.tar']\n  unlabeled: ['${data.test.0}']\n"
        "command_line: ['data.test=[\"http://127.0.0.1:9/${oc.env:HIDDEN}/x.tar\"]']\n"
    )
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    for named in (None, str(tmp_path / "mine.yaml")):
        config = load_config(named, [f"run_dir={tmp_path}"])
        assert SECRET not in str(config)
        assert config.data.test == ["http://127.0.0.1:9/${oc.env:HIDDEN}/x.tar"]
    assert main(["stage=evaluate", f"run_dir={tmp_path}"]) == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_a_secret_that_was_blanked_is_asked_for_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.config.parent.mkdir()
    run.config.write_text("data: {labeled: ['https://host/x.tar?sig=***']}\n")
    assert run(named=False) == 2
    error = capsys.readouterr().err
    assert "secrets are known only where they are given with the command" in error
    assert f"data.labeled is remembered in {run.config}" in error


@settings(max_examples=200, deadline=None)
@given(st.text("\\${}a:.'\" ,[]xé", max_size=14) | st.sampled_from(["${oc.env:HOME}", "\\${a}", "\\\\${oc.env:HOME}"]))
def test_literal_text_stays_what_it_is(text: str) -> None:
    assert OmegaConf.to_container(OmegaConf.create({"a": literal(text)}), resolve=True) == {"a": text}


def test_a_run_dir_with_an_unknown_variable_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"run_dir: .*nothing"):
        load(None, ["run_dir=${nothing}"])


@pytest.mark.parametrize("field", ["unlabeled: ['http://h/${oc.env:HIDDEN}/x.tar']", "exclude: '${oc.env:HIDDEN}'"])
def test_labels_of_somebody_elses_run_read_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setenv("HIDDEN", SECRET)
    (tmp_path / "config.yaml").write_text(f"data:\n  {field}\n")
    with pytest.raises(DataError, match=r"variables of a run directory are not filled in") as told:
        _data_field(str(tmp_path), field.partition(":")[0])
    assert SECRET not in str(told.value)

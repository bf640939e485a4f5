"""stage=transfer: each cell computed once, killed anywhere to the same bytes, refused where inputs changed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from data.errors import DataError
from data.settings import UsageError
from data.storage.failpoint import VARIABLE
from pipeline.core.config import load, load_config
from pipeline.core.schema import Config
from pipeline.core.stage import StageRefusedError, inspect_stage
from pipeline.models.resnet_rs import ModelError
from pipeline.run import main
from pipeline.transfer.cells import EXPERIMENT, trials_of
from pipeline.transfer.stage import _open
from pipeline.transfer.table import results_of
from pipeline.trials.trial import _run_trial, expected_seconds
from tests.conftest import WriteDigits
from tests.digits_run import run
from tests.pipeline.transfer.test_backbones import weights_in

CLOCKS = {"seconds.json"}
WORDS = [
    "threads=1", "device=cpu", "teacher.model=resnetrs26", "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}",
    "teacher.image_size=16", "transfer.backbones.fresh=random", "transfer.batch_size=50", "transfer.knn_k=[1,5]", "transfer.seeds=2",
    "transfer.finetune.lr=[0.1,1.0]", "transfer.finetune.epochs=[2]", "transfer.finetune.batch_size=20",
    "transfer.finetune.augment.crop_scale=[0.7,1.0]", "transfer.finetune.augment.hflip=0", "transfer.finetune.loader_workers=0",
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path, write_digits: WriteDigits) -> list[str]:
    """Fields of a comparison on digits: 100 labeled, 60 validation and 200 test images."""
    for split, start, stop in (("labeled", 0, 100), ("validation", 100, 160), ("test", 160, 360)):
        write_digits(tmp_path / "digits" / split, start, stop, per_shard=80)
    return [*WORDS, f"transfer.sets.digits={tmp_path}/digits", f"run_dir={tmp_path}/run"]


def computed(config: Config) -> dict[str, dict[str, Any]]:
    """Run every trial in this process, without Ray; results by `row seed`."""
    trials = trials_of(config)
    for trial in trials:
        _run_trial(trial, EXPERIMENT)
    return {f"{trial.row} {trial.seed}": dict(trial.result() or {}) for trial in trials}


def test_every_cell_is_measured_and_features_serve_all_methods(words: list[str]) -> None:
    config = load_config(None, [*words, "transfer.methods=[linear,knn,finetune]"])
    found = computed(config)
    assert [name.removeprefix("fresh, digits, ") for name in found] == [
        f"{method} {seed}" for method in ("features", "linear", "knn", "finetune") for seed in (0, 1)
    ]
    linear, tuned = found["fresh, digits, linear 0"], found["fresh, digits, finetune 0"]
    assert linear["top1"] > 0.3  # three times chance
    assert sum(linear["images"]) == 200
    assert [setting["lr"] for setting in tuned["grid"]] == [0.1, 1.0]
    assert found["fresh, digits, linear 1"]["right"] != linear["right"]  # each seed has weights of its own
    folder = Path(config.run_dir) / "transfer/fresh/digits"
    assert sorted(file.name for file in (folder / "features/seed-0").glob("*.safetensors")) == [
        "labeled.safetensors", "test.safetensors", "validation.safetensors",
    ]  # fmt: skip
    assert {file.name for file in (folder / "finetune/seed-0").iterdir()} == {
        "started.json",
        "done.json",
        "seconds.json",
    }

    record = results_of(config, trials_of(config))
    assert [row["method"] for row in record["rows"]] == ["linear", "knn", "finetune"]
    assert record["missing"] == 0
    assert record["rows"][0]["mean"] == pytest.approx(50 * (linear["top1"] + found["fresh, digits, linear 1"]["top1"]))


def test_a_seed_that_changes_nothing_is_not_run_again(words: list[str], tmp_path: Path) -> None:
    source = f"transfer.backbones.fixed={tmp_path}/weights"
    weights_in(tmp_path / "weights")
    config = load_config(None, [*words, source, "transfer.methods=[linear,finetune]", "transfer.seeds=3"])
    seeds = {(trial.row, trial.seed) for trial in trials_of(config) if trial.row.startswith("fixed")}
    assert seeds == {("fixed, digits, features", 0), ("fixed, digits, linear", 0)} | {
        ("fixed, digits, finetune", seed) for seed in (0, 1, 2)
    }


def test_another_grid_and_another_set_are_refused_and_further_backbones_are_not(
    words: list[str], tmp_path: Path, write_digits: WriteDigits
) -> None:
    usual = load_config(None, [*words, "transfer.methods=[linear]", "transfer.seeds=1"])
    computed(usual)
    more = load_config(
        None, [*words, "transfer.methods=[linear,knn]", "transfer.backbones.other=random", "transfer.seeds=1"]
    )
    states = {trial.row: inspect_stage(trial.folder, trial.stage, trial.fingerprint)[0] for trial in trials_of(more)}
    assert states["fresh, digits, linear"] == "done"
    assert states["other, digits, knn"] == "new"
    with pytest.raises(StageRefusedError, match=r"transfer.l2: \[1e-05.*there, \[0.5\] now"):
        _open(load_config(None, [*words, "transfer.methods=[linear]", "transfer.l2=[0.5]"]))
    write_digits(tmp_path / "other/labeled", 400, 500)
    shards = f"transfer.sets.digits={{folder: {tmp_path}/digits, labeled: ['{tmp_path}/other/labeled/*.tar']}}"
    with pytest.raises(StageRefusedError, match="labeled: changed upstream"):
        _open(load_config(None, [*words, "transfer.methods=[linear]", shards]))


def test_bad_input_is_one_sentence_that_names_the_field(
    words: list[str], tmp_path: Path, write_digits: WriteDigits
) -> None:
    for word, expected in {
        "transfer.backbones={}": "transfer.backbones is empty: give one or more, as transfer.backbones.mine=RUN",
        f"transfer.sets={{digits: {tmp_path}/nowhere}}": f"transfer.sets.digits, labeled: .*{tmp_path}/nowhere/labeled",
    }.items():
        config = load_config(None, [*words, word])
        if word.endswith("{}"):  # words add to a mapping: an empty one comes from a file
            config = config.model_copy(update={"transfer": config.transfer.model_copy(update={"backbones": {}})})
        with pytest.raises(UsageError, match=expected):
            _open(config)
    write_digits(tmp_path / "unlabeled/labeled", 0, 50, labeled=False)
    shards = f"transfer.sets.digits={{folder: {tmp_path}/digits, labeled: ['{tmp_path}/unlabeled/labeled/*.tar']}}"
    with pytest.raises(DataError, match=r"transfer.sets.digits: its labeled images are of fewer than two classes"):
        _open(load_config(None, [*words, shards]))


def test_lost_features_are_an_error_that_says_what_to_remove(words: list[str]) -> None:
    config = load_config(None, [*words, "transfer.methods=[linear]", "transfer.seeds=1"])
    features, linear = trials_of(config)
    _run_trial(features, EXPERIMENT)
    (Path(features.folder) / "test.safetensors").unlink()
    with pytest.raises(DataError, match=r"test.safetensors: missing or damaged .*; remove the folder"):
        _run_trial(linear, EXPERIMENT)


def test_the_plan_says_what_is_compared_and_computes_nothing(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["stage=transfer", *words, "plan=true"]) == 0
    text = capsys.readouterr().out
    assert "backbone fresh: resnetrs26 at 16 px, random random" in text
    assert "set digits: 10 classes; images: 100 labeled, 60 validation, 200 test" in text
    assert "features 0 of 2 done; linear 0 of 2 done; knn 0 of 2 done" in text
    assert re.search(
        r"transfer: 6 results and sets of features to make take about [\d.]+ \w+ on this machine, \d+ at once", text
    ), text
    assert not (tmp_path / "run").exists()


def test_time_is_expected_of_features_and_fine_tunings_by_their_images(words: list[str]) -> None:
    config = load_config(None, [*words, "transfer.methods=[linear,finetune]", "transfer.seeds=1"])
    features, linear, finetune = trials_of(config)
    (work,) = EXPERIMENT.workloads(features.config, ())
    assert (work.images, work.batches, work.trains, work.loaders) == (360, 8, False, 0)  # 50 images a batch
    assert work.loading_s > 0
    assert EXPERIMENT.workloads(linear.config, linear.sources) == []
    works = EXPERIMENT.workloads(finetune.config, ())  # two learning rates, 2 epochs each, evaluated once
    assert [(work.images, work.trains) for work in works] == [
        (200, True), (60, False), (200, True), (60, False), (200, False),
    ]  # fmt: skip
    seconds = expected_seconds([features, linear, finetune], [features, linear, finetune], EXPERIMENT)
    assert seconds[linear.row] == 1.0
    assert seconds[finetune.row] > 0


@pytest.mark.parametrize(("other", "expected"), [
    ("{weights: random, model: resnet81}", "resnet81"),
    ("{weights: random, model: resnet18, model_args: {foo: 1}}", "foo"),
    ("FILE", "does not fit resnetrs26"),
])  # fmt: skip
def test_a_model_that_cannot_be_built_is_found_before_anything_is_computed(
    words: list[str], tmp_path: Path, other: str, expected: str
) -> None:
    safetensors.torch.save_file({"conv1.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    other = other.replace("FILE", f"{tmp_path}/other.safetensors")
    with pytest.raises(ModelError, match=expected):
        trials_of(load_config(None, [*words, f"transfer.backbones.other={other}"]))


@pytest.mark.parametrize(("word", "expected"), [
    ("transfer.backbones={a/b: x}", "'a/b' names a folder: expected letters, digits and"),
    ("transfer.backbones.rs={weight: x}", "transfer.backbones.rs.weight: no such field"),
    ("transfer.backbones.rs=x/{sed}", r"rs: \{sed\} in 'x/\{sed\}': expected \{seed\} or no braces"),
    ("transfer.sets.d={labeled: [a]}", "d: no shards for validation, test; give a folder, or patterns"),
    ("transfer.methods=[lin]", "transfer.methods.0='lin': input should be 'linear', 'knn' or 'finetune'"),
    ("transfer.methods=[]", "expected some of linear, knn, finetune"),
    ("transfer.l2=[0]", "transfer.l2.0=0: input should be greater than 0"),
    ("transfer.finetune.lr=[0.1,0.1]", "transfer.finetune.lr=.*: expected one value or more, none twice"),
])  # fmt: skip
def test_a_bad_field_is_named_with_what_was_expected(word: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        load_config(None, [word])


def test_a_secret_in_a_short_form_is_remembered_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "a-secret")
    words = ["transfer.backbones.mine=${oc.env:HIDDEN}", f"run_dir={tmp_path}"]
    loaded = load(None, words)
    assert loaded.config.transfer.backbones["mine"].weights == "a-secret"
    loaded.write(words)
    assert "a-secret" not in (tmp_path / "config.yaml").read_text()
    assert load(None, words).config.transfer.backbones["mine"].weights == "a-secret"


def made(folder: Path) -> dict[str, bytes]:
    """Every file of the comparison, but for clocks."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in CLOCKS]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_killed_anywhere_the_same_command_makes_the_same_bytes(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a fine-tuning, the commit of a cell, features: Ray's workers are killed until it gives up, but after a commit."""
    words = ["stage=transfer", *words[:-1], "transfer.seeds=1"]
    both = "transfer.methods=[linear,finetune]"
    whole = run(*words, both, f"run_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    expected = made(tmp_path / "whole/transfer")
    assert json.loads(expected["results.json"])["missing"] == 0
    killed = [*words, f"run_dir={tmp_path}/killed"]
    for point, methods, code in (
        ("step-3/finetune/*", "transfer.methods=[finetune]", 2),
        ("evaluation-*/finetune", "transfer.methods=[finetune]", 2),
        ("before-done/transfer", "transfer.methods=[finetune]", 2),
        ("after-done/transfer", "transfer.methods=[finetune]", 0),
        ("features-test", both, 2),
    ):
        monkeypatch.setenv(VARIABLE, point)
        stopped = run(*killed, methods)
        assert (stopped.returncode, "a Ray task was lost" in stopped.stderr) == (code, code == 2), (
            point,
            stopped.stderr,
        )
    monkeypatch.delenv(VARIABLE)
    assert run(*killed, both).returncode == 0
    assert made(tmp_path / "killed/transfer") == expected


@pytest.mark.slow
def test_the_command_writes_table_plot_and_page_and_continues(words: list[str], tmp_path: Path) -> None:
    command = ["stage=transfer", *words, "transfer.seeds=1"]
    first = run(*command)
    assert first.returncode == 0, first.stderr
    assert "linear probe" in first.stdout
    assert "highest top-1 of 2 columns: fresh 2" in first.stdout
    folder = tmp_path / "run/transfer"
    assert (folder / "plot.svg").read_bytes().startswith(b"<?xml")
    page = (folder / "transfer.html").read_text()
    assert "<h3>Linear probe</h3>" in page
    assert "± " in page
    before = made(folder)
    again = run(f"run_dir={tmp_path}/run", "stage=transfer")  # the run directory remembers the fields
    assert again.returncode == 0, again.stderr
    assert "results and sets of features" not in again.stdout
    assert made(folder) == before

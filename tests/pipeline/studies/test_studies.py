"""Studies: every row changes what it says; finished trainings are reused, killed ones continue; seeds are compared in pairs."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from data.settings import UsageError
from pipeline.core.config import config_names, load_config
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageRefusedError, differences, open_stage
from pipeline.models.expected_time import Workload
from pipeline.run import main
from pipeline.studies.rows import FromRun, Row, Study, _slug, additive, row_configs, rows_for, trials_of
from pipeline.studies.stage import STUDIES
from pipeline.studies.table import describe, row_results
from pipeline.trials.trial import Experiment, Trial, expected_seconds, run_trials
from tests.conftest import WriteDigits
from tests.digits_run import Digits, write_digits_data

RECIPE = ["teacher.stochastic_depth=0.1", "ablate.seeds=2"]
SMALL = Study(
    "small",
    "nowhere",
    {"teacher.dropout": 0.0},
    additive(
        Row("plain", {}, 70.0),
        Row("+ dropout", {"teacher.dropout": FromRun()}, 71.0),
        Row("+ seed", {"threads": 1}, 70.5),
    ),
)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_each_row_differs_from_the_one_it_changes_in_the_fields_that_it_names(study: Study) -> None:
    configs = row_configs(study, load_config(None, RECIPE))
    for row in rows_for(study, load_config(None, RECIPE)):
        if row.of is not None and row.changes:
            changed = differences(configs[row.of].fingerprint(""), configs[row.name].fingerprint(""))
            named = [field.partition("_args")[0] for field in row.changes]
            named += ["student.from_teacher"] * ("student.init" in named)  # its name in fingerprints
            assert all(field.startswith(tuple(named)) for field in changed)
            assert changed


def test_the_last_row_of_the_additive_study_is_the_recipe_itself() -> None:
    recipe = load_config(None, RECIPE)
    last = row_configs(STUDIES["resnet_rs"], recipe)["+ ResNet-D"]
    changed = differences(recipe.fingerprint(""), last.fingerprint(""))
    assert changed == {
        "teacher.model_args": ({}, {"se_ratio": 0.25, "resnet_d": True})
    }  # the model's defaults, spelled out


def test_the_baseline_has_none_of_the_components() -> None:
    teacher = row_configs(STUDIES["resnet_rs"], load_config(None, RECIPE))["baseline"].teacher
    assert teacher.lr_schedule == "step"
    assert (teacher.epochs, teacher.weight_decay) == pytest.approx((90, 1e-4))
    off = (
        teacher.ema_decay,
        teacher.label_smoothing,
        teacher.stochastic_depth,
        teacher.augment.num_ops,
        teacher.dropout,
    )
    assert off == (0, 0, 0, 0, 0)
    assert teacher.model_args == {"se_ratio": 0.0, "resnet_d": False}


def test_rows_without_ema_evaluate_with_running_statistics_and_ema_brings_its_own_rule() -> None:
    """Regression: momentum 1.0 without EMA evaluated the three rows before "+ EMA" with the last batch's statistics only."""
    teachers = {name: c.teacher for name, c in row_configs(STUDIES["resnet_rs"], load_config(None, RECIPE)).items()}
    averaged = list(teachers)[3:]
    assert averaged[0] == "+ EMA"
    assert {name: (t.ema_decay, t.bn_momentum) for name, t in teachers.items()} == dict.fromkeys(
        ("baseline", "+ cosine", "+ longer"), (0.0, 0.1)
    ) | dict.fromkeys(averaged, (0.9999, 1.0))


@pytest.mark.parametrize("name", config_names())
@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_no_row_of_any_study_evaluates_with_the_statistics_of_one_batch(study: Study, name: str) -> None:
    words = [
        "teacher.stochastic_depth=0.1",
        "teacher.dropout=0.1",
        "teacher.augment.num_ops=2",
        "teacher.augment.magnitude=5",
    ]
    for config in row_configs(
        replace(study, skip_unchanged=True), load_config(name, [*words, "teacher.weights=null"])
    ).values():
        for stage in ("teacher", "student"):
            config.require_trainable(stage)


def test_a_study_of_a_recipe_without_ema_is_refused(
    tmp_path: Path, digits: Digits, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    words = ["stage=ablate", f"config={tmp_path}/config.yaml", f"run_dir={tmp_path}/run", "ablate.study=weight_decay"]
    words += ["teacher.dropout=0.1", "teacher.augment.num_ops=1", "teacher.augment.magnitude=5"]
    assert main([*words, "teacher.ema_decay=0", "teacher.bn_momentum=1.0"]) == 2
    assert "teacher.bn_momentum=1 with teacher.ema_decay=0: 100% of" in capsys.readouterr().err


def test_the_command_refuses_before_the_teacher_trains_and_the_plan_says_so(
    tmp_path: Path, digits: Digits, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    words = [
        f"config={tmp_path}/config.yaml",
        f"run_dir={tmp_path}/run",
        "student.ema_decay=0",
        "student.bn_momentum=1.0",
    ]
    assert main(["stage=all", *words]) == 2
    assert "error: student.bn_momentum=1 with student.ema_decay=0" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.pt"))
    assert not (tmp_path / "run/config.yaml").exists()
    assert main(["stage=teacher", "plan=true", *words, "teacher.ema_decay=0", "teacher.bn_momentum=1.0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"teacher +would refuse", out)
    assert "teacher.bn_momentum=1 with teacher.ema_decay=0" in out


def test_a_row_that_would_change_nothing_is_refused_with_the_field() -> None:
    with pytest.raises(UsageError, match=r"row '\+ stochastic depth'.*teacher.stochastic_depth=0"):
        row_configs(STUDIES["resnet_rs"], load_config(None, []))


def test_an_invalid_value_is_refused_with_study_and_row() -> None:
    with pytest.raises(UsageError, match=r"(?s)study resnet_rs, row 'baseline'.*teacher.warmup_epochs=100"):
        row_configs(STUDIES["resnet_rs"], load_config(None, [*RECIPE, "teacher.warmup_epochs=100"]))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Shut Ray down after the tests; the first study starts it."""
    yield
    ray.shutdown()


def no_workloads(config: Config, sources: tuple[str, ...]) -> list[Workload]:
    return []


def small_experiment(top1: Mapping[tuple[str, int], float], runs: Path) -> Experiment:
    """Return an experiment with known results; each run appends a line to a file."""

    def run_one(config: Config, folder: str, sources: tuple[str, ...]) -> dict[str, Any]:
        row, seed = Path(folder).parent.name, config.seed
        with runs.open("a") as file:
            file.write(f"{row} {seed}\n")
        (Path(folder) / "checkpoints").mkdir()
        return {"top1": top1[row, seed]}

    return Experiment(lambda config: Fingerprint(config.fingerprint(""), {}), run_one, no_workloads, ("checkpoints",))


TOP1 = {
    ("plain", 0): 0.50, ("plain", 1): 0.60, ("dropout", 0): 0.52, ("dropout", 1): 0.61, ("seed", 0): 0.51, ("seed", 1): 0.61,
}  # fmt: skip


def small_trials(folder: Path, experiment: Experiment, *words: str) -> list[Trial]:
    return trials_of(
        SMALL, load_config(None, ["ablate.seeds=2", "teacher.loader_workers=0", *words]), str(folder), experiment
    )


def test_a_study_runs_missing_trials_and_compares_seed_by_seed(
    tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    experiment = small_experiment(TOP1, runs)
    trials = small_trials(tmp_path / "study", experiment)
    run_trials("study small", trials, experiment)
    assert sorted(runs.read_text().splitlines()) == sorted(f"{row} {seed}" for row, seed in TOP1)
    assert not list((tmp_path / "study").rglob("checkpoints"))

    (tmp_path / "study/dropout/seed-1/done.json").unlink()
    runs.unlink()
    run_trials("study small", trials, experiment)
    assert runs.read_text() == "dropout 1\n"
    assert "6 trainings, 5 of them done" in capsys.readouterr().out

    plain, dropout, _ = row_results(SMALL.rows, trials)
    assert (plain.top1, plain.mean, plain.change) == ((50, 60), 55, None)
    assert plain.spread == pytest.approx(50**0.5)
    assert dropout.change == pytest.approx(1.5)  # 2 and 1
    assert dropout.change_error == pytest.approx(0.5)
    assert dropout.published_change == 1
    line = describe(SMALL, row_results(SMALL.rows, trials)).splitlines()[2]
    assert re.split("  +", line) == ["+ dropout", "56.50 ± 6.36", "+1.50 ± 0.50", "71.0", "+1.0", "plain"]


def test_rows_without_a_finished_training_are_expected_from_the_others_and_their_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {"plain": 100, "+ dropout": 300, "+ seed": 100}
    monkeypatch.setattr("pipeline.trials.trial.expected_seconds_here", lambda work, device: float(work.images))

    def workloads(config: Config, sources: tuple[str, ...]) -> list[Workload]:
        row = "+ seed" if config.threads == 1 else "+ dropout" if config.teacher.dropout else "plain"
        return [Workload(row, images[row] // 2, 1, True, config.teacher, 10, 1)] * 2

    experiment = replace(small_experiment(TOP1, tmp_path / "runs"), workloads=workloads)
    trials = small_trials(tmp_path / "study", experiment, "device=cpu", "teacher.dropout=0.1")
    assert expected_seconds(trials, trials, experiment) == images
    stage = open_stage(trials[0].folder, "ablate", trials[0].fingerprint)
    stage.commit([], {"top1": 0.5})
    (Path(trials[0].folder) / "seconds.json").write_text('{"seconds": 20}')
    expected = expected_seconds(trials, trials, experiment)
    assert expected == pytest.approx({"plain": 20, "+ dropout": 60, "+ seed": 20})  # this machine is five times as fast
    plain_has_none = replace(
        experiment, workloads=lambda config, sources: workloads(config, sources) if config.teacher.dropout else []
    )
    expected = expected_seconds(trials, trials, plain_has_none)
    assert expected == pytest.approx({"plain": 20, "+ dropout": 300, "+ seed": 100})  # its time is no measure of work


def test_another_configuration_is_refused_before_anything_runs_and_force_moves_it_aside(
    tmp_path: Path, local_ray: None
) -> None:
    runs = tmp_path / "runs"
    experiment = small_experiment(TOP1, runs)
    run_trials("study small", small_trials(tmp_path / "study", experiment), experiment)
    runs.unlink()
    other = small_trials(tmp_path / "study", experiment, "teacher.lr=0.3")
    with pytest.raises(StageRefusedError, match=r"teacher.lr: 0.1 there, 0.3 now"):
        run_trials("study small", other, experiment)
    assert not runs.exists()
    run_trials("study small", other, experiment, force=True)
    assert len(runs.read_text().splitlines()) == len(TOP1)
    assert (tmp_path / "study/plain/seed-0.old-1/done.json").exists()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_an_error_is_raised_as_it_was(tmp_path: Path, local_ray: None) -> None:
    died = tmp_path / "died"

    def run_one(config: Config, folder: str, sources: tuple[str, ...]) -> dict[str, Any]:
        if not died.exists():
            died.touch()
            os._exit(1)
        if config.seed == 1:
            raise UsageError(f"no seed {config.seed}")
        return {"top1": 0.5}

    experiment = Experiment(lambda config: Fingerprint(config.fingerprint(""), {}), run_one, no_workloads)
    trials = small_trials(tmp_path / "study", experiment)
    run_trials("study small", [trial for trial in trials if trial.seed == 0], experiment)
    assert died.exists()
    with pytest.raises(UsageError, match=r"^no seed 1$"):
        run_trials("study small", trials, experiment)


@pytest.mark.slow
def test_the_command_trains_every_row_prints_the_table_and_continues(
    tmp_path: Path,
    digits: Digits,
    write_digits: WriteDigits,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    words = [
        "stage=ablate", f"config={tmp_path}/config.yaml", f"run_dir={tmp_path}/run", "ablate.study=weight_decay",
        "ablate.seeds=1", "teacher.augment.num_ops=1", "teacher.augment.magnitude=5", "teacher.dropout=0.1", "teacher.epochs=2",
    ]  # fmt: skip
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "6 trainings, 0 of them done" in first
    study = tmp_path / "run/ablate/weight_decay"
    record = json.loads((study / "results.json").read_text())
    assert [row["details"][0]["steps"] for row in record["rows"]] == [10] * 6
    assert len({row["details"][0]["loss"] for row in record["rows"]}) == 6  # every row is another training
    assert (study / "plot.svg").read_text().startswith("<?xml")

    monkeypatch.setattr("ray.init", None)  # nothing is left to run
    assert main(words) == 0
    table = first[first.index("study weight_decay: 100 validation images") :]
    assert capsys.readouterr().out == table


@pytest.mark.slow
def test_the_plan_lists_rows_and_trains_none(
    tmp_path: Path, digits: Digits, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    words = ["stage=ablate", f"config={tmp_path}/config.yaml", f"run_dir={tmp_path}/run", "plan=true"]
    words += [
        "teacher.stochastic_depth=0.1",
        "teacher.dropout=0.2",
        "teacher.augment.num_ops=1",
        "teacher.augment.magnitude=5",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "+ dropout                    0 of 3 done   teacher.dropout=0.2" in text
    assert "+ SE                         0 of 3 done   teacher.model_args.se_ratio=0.25" in text
    assert not (tmp_path / "run").exists()
    assert re.search(r"33 trainings to make take about .* on this machine, .* on 1 GPU, .* on 64 GPUs", text)


@pytest.mark.slow
def test_the_plan_of_a_study_trains_nothing_and_shows_no_bar(
    tmp_path: Path,
    digits: Digits,
    write_digits: WriteDigits,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    monkeypatch.setattr("pipeline.training.loop._fit", None)
    words = ["stage=ablate", f"config={tmp_path}/config.yaml", f"run_dir={tmp_path}/run", "plan=true"]
    assert main([*words, "ablate.study=noisy_student", "ablate.seeds=2"]) == 0
    printed = capsys.readouterr()
    assert "trainings to make take about" in printed.out
    assert printed.err == ""


def test_missing_validation_images_and_several_processes_are_refused(
    tmp_path: Path, digits: Digits, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits_data(tmp_path, digits[1], write_digits)
    words = ["stage=ablate", f"config={tmp_path}/config.yaml", f"run_dir={tmp_path}/run"]
    assert main([*words, "data.validation=[]"]) == 2
    assert "compares on data.validation" in capsys.readouterr().err
    assert main([*words, "teacher.workers=2"]) == 2
    assert "teacher.workers=2" in capsys.readouterr().err


NOISY = STUDIES["noisy_student"]


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_row_has_a_folder_of_its_own(study: Study) -> None:
    assert len({_slug(row.name) for row in study.rows}) == len(study.rows)


def test_noisy_students_rows_that_equal_the_recipe_are_skipped() -> None:
    """Ratio 3 and soft labels are the default; teacher and student are the same network: those rows are skipped."""
    names = [row.name for row in rows_for(NOISY, load_config(None, []))]
    assert names == [
        "teacher", "recipe", "no input noise", "no model noise", "noised teacher", "hard labels", "no balancing", "ratio 1", "ratio 7",
        "smaller student", "larger student", "from teacher's weights", "2 generations", "3 generations",
    ]  # fmt: skip
    of = {row.name: row.of for row in rows_for(NOISY, load_config(None, []))}
    assert of["from teacher's weights"] == "recipe"  # which has the teacher's size


def test_noisy_students_rows_take_as_many_steps_at_every_ratio_and_sizes_from_the_teacher() -> None:
    configs = row_configs(
        NOISY, load_config(None, ["teacher.model_args={width: 0.5, blocks: [1, 1, 1, 1]}", "student.batch_size=512"])
    )
    steps = {
        name: c.student.epochs / (c.student.batch_size / (1 + c.student.unlabeled_ratio)) for name, c in configs.items()
    }
    assert steps["ratio 1"] == steps["ratio 7"] == steps["recipe"]
    assert configs["smaller student"].student.model_args == {"width": 0.25, "blocks": [1, 1, 1, 1]}
    assert configs["from teacher's weights"].student.model_args == configs["recipe"].teacher.model_args
    assert configs["noised teacher"].label.augment == configs["recipe"].student.augment

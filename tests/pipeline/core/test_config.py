"""Defaults < YAML < the run's own < key=value; and errors that name every bad field."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from data.settings import UsageError
from pipeline.core.config import config_names, load, load_config, write_config
from pipeline.core.reference import describe_fields
from pipeline.core.schema import Config, TrainConfig
from pipeline.training.ema import EMA


def test_layers_apply_in_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("teacher: {epochs: 7, batch_size: 64}\n")
    config = load_config(str(path), ["teacher.batch_size=32"])
    assert (config.teacher.epochs, config.teacher.batch_size, config.teacher.lr) == (7, 32, 0.1)


def test_an_existing_run_gives_the_defaults_of_later_commands(tmp_path: Path) -> None:
    run = f"run_dir={tmp_path}/run"
    write_config(load_config("fashion_mnist", [run, "teacher.epochs=30"]), [run, "teacher.epochs=30"])
    assert load_config(None, [run]).teacher.epochs == 30
    assert load_config("fashion_mnist", [run]).teacher.epochs == 30, "naming the file again keeps the earlier override"
    assert load_config(None, [run, "teacher.epochs=40"]).teacher.epochs == 40


def test_an_edited_yaml_file_is_seen_by_an_existing_run(tmp_path: Path) -> None:
    path, run = tmp_path / "mine.yaml", f"run_dir={tmp_path}/run"
    path.write_text("teacher: {epochs: 7}\n")
    write_config(load_config(str(path), [run]), [run])
    path.write_text("teacher: {epochs: 8}\n")
    assert load_config(str(path), [run]).teacher.epochs == 8


def test_all_bad_fields_are_reported_at_once_with_their_paths() -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, ["teacher.epochs=minus", "select.confidence_threshold=1.5", "student.unlabeled_ration=3"])
    message = str(caught.value)
    for part in (
        "teacher.epochs='minus'",
        "select.confidence_threshold=1.5",
        "did you mean 'student.unlabeled_ratio'?",
    ):
        assert part in message


def test_a_batch_that_cannot_hold_the_exact_ratio_is_refused() -> None:
    with pytest.raises(UsageError, match=r"student.batch_size=100: expected a multiple .* = 8"):
        load_config(None, ["student.batch_size=100", "student.unlabeled_ratio=7"])


@pytest.mark.parametrize("stage", ["teacher", "student"])
@pytest.mark.parametrize(("momentum", "decay", "share"), [(1.0, 0.0, 100), (0.6, 0.0, 60), (1.0, 0.4, 60)])
def test_a_training_that_would_be_evaluated_with_one_batchs_statistics_is_refused_with_both_fields(
    stage: str, momentum: float, decay: float, share: int
) -> None:
    config = load_config(None, [f"{stage}.bn_momentum={momentum}", f"{stage}.ema_decay={decay}"])
    message = rf"^{stage}\.bn_momentum={momentum:g} with {stage}\.ema_decay={decay:g}: {share}% of .*{stage}\.bn_momentum=0\.1"
    with pytest.raises(UsageError, match=message):
        config.require_trainable(stage)
    if stage == "teacher":
        load_config(None, ["teacher.weights=x", "teacher.ema_decay=0"]).require_trainable("teacher")  # is not trained


@pytest.mark.parametrize(("momentum", "decay"), [(0.1, 0.0), (1.0, 0.9999), (1.0, 0.9), (0.5, 0.0)])
def test_running_or_averaged_statistics_are_not_refused(momentum: float, decay: float) -> None:
    load_config(None, [f"student.bn_momentum={momentum}", f"student.ema_decay={decay}"]).require_trainable("student")


@given(st.floats(0.01, 1), st.floats(0, 1), st.integers(1, 30))
def test_the_share_that_is_refused_is_that_of_the_last_batch_in_the_evaluated_statistics(
    momentum: float, decay: float, steps: int
) -> None:
    """Batches with mean 0, then one with mean 1: what arrives in the averaged model."""
    model = nn.BatchNorm1d(1, momentum=momentum)
    average = EMA(model, decay)
    average.num_updates = 10**9  # past its warm-up
    for step in range(steps):
        model(torch.full((2, 1), float(step == steps - 1)))
        average.update(model)
    assert isinstance(average.module.running_mean, torch.Tensor)
    share = float(average.module.running_mean)
    assert share == pytest.approx(momentum * (1 - decay), abs=1e-5)
    section = TrainConfig(bn_momentum=momentum, ema_decay=decay)
    with pytest.raises(UsageError) if share > 0.5 + 1e-5 else nullcontext():
        if not 0.5 - 1e-5 < share <= 0.5 + 1e-5:
            section.require_averaged_statistics("teacher")


@pytest.mark.parametrize("words", [["epochs"], ["=3"], ["a b=3"]])
def test_words_that_are_no_overrides_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="expected key=value"):
        load_config(None, words)


@pytest.mark.parametrize("path", ["a/*.tar", "a-{0..9}.tar", "s3://bucket/a.tar"])
def test_one_path_is_accepted_where_a_list_belongs(tmp_path: Path, path: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {{labeled: '{path}', unlabeled: [b.tar]}}\n")
    config = load_config(str(file), [f"data.unlabeled={path}", f"teacher.ensemble={path}"])
    assert (config.data.labeled, config.data.unlabeled, config.teacher.ensemble) == ([path], [path], [path])


def test_one_number_where_a_list_belongs_is_shown_as_a_list() -> None:
    with pytest.raises(UsageError, match=r"expected a list; give 'transfer\.l2=\[x\]', in quotes"):
        load_config(None, ["transfer.l2=x"])


def test_an_empty_mapping_clears_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    run_dir = tmp_path / "run"
    file.write_text(f"run_dir: {run_dir}\nteacher: {{epochs: 8, model_args: {{width: 0.1, blocks: [1]}}}}\n")
    words = ["teacher.model_args={}"]
    loaded = load(str(file), words)
    assert (loaded.config.teacher.model_args, loaded.config.teacher.epochs) == ({}, 8)
    assert loaded.origin("teacher.model_args").endswith("is from the command line")
    loaded.write(words)
    assert load(str(file), []).config.teacher.model_args == {}, "remembered, as other words are"
    assert list(load(str(file), []).remembered) == ["teacher.model_args"]
    assert load(str(file), [*words, "teacher.model_args.depth=2"]).config.teacher.model_args == {"depth": 2}
    assert load(None, [f"run_dir={run_dir}"]).config.teacher.model_args == {}


def test_an_unknown_configuration_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'fashion_mnist'"):
        load_config("fashion_mnits", [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.model_args={width: 0.1"], r"teacher\.model_args=\{width: 0\.1: not readable as a value"),
        (["data.labeled=[shards-{0..9}.tar]"], "Text with braces needs quotes of its own"),
        (["seed=${x}"], "Interpolation key 'x' not found"),
        (["data.labeled.x=3", "config=c"], "data.labeled.x"),
        (["run_dir="], "run_dir"),
        (["teacher.epochs=inf"], "teacher.epochs"),
        (["teacher.augment.crop_scale=[1,0.5]"], r"teacher\.augment\.crop_scale.*the smaller first"),
        (["teacher.augment.crop_ratio=[2,1]"], r"teacher\.augment\.crop_ratio.*the smaller first"),
        (["teacher.std=[0,1,1]"], r"teacher\.std\.0=0: input should be greater than 0"),
    ],
)
def test_values_that_cannot_be_read_or_used_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "c.yaml").write_text("data: {labeled: [x.tar]}\n")
    config = str(tmp_path / "c.yaml") if "config=c" in words else None
    with pytest.raises(UsageError, match=message):
        load_config(config, [word for word in words if word != "config=c"])


def test_fields_that_do_not_go_together_are_all_named_at_once() -> None:
    words = [
        "generations=auto",
        "student.batch_size=7",
        "teacher.warmup_epochs=9",
        "teacher.epochs=3",
        "teacher.batch_size=3",
        "teacher.workers=2",
    ]
    with pytest.raises(UsageError) as caught:
        load_config(None, words)
    for field in ("generations=auto", "student.batch_size=7", "teacher.warmup_epochs=9", "teacher.batch_size=3"):
        assert f"\n  {field}" in str(caught.value)


def test_a_yaml_file_that_is_no_mapping_or_not_yaml_is_refused(tmp_path: Path) -> None:
    for content in (b"- 1\n", b"a: [\n", b"\xff\xfe\x00", b"seed: ${nothing}\n"):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.yaml"):
            load_config(str(tmp_path / "bad.yaml"), [])


def test_secrets_in_urls_do_not_reach_the_run_directory(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", "data.truth=https://user:pass@host/x?token=hush&signature=hush2"]
    write_config(load_config(None, words), words)
    written = (tmp_path / "config.yaml").read_text()
    assert "pass" not in written
    assert "hush" not in written


def test_fingerprints_hold_what_changes_the_output_and_nothing_else() -> None:
    fields = Config().stage_fields("teacher")
    assert fields["teacher.epochs"] == 350
    assert (fields["teacher.augment.num_ops"], fields["teacher.augment.magnitude"]) == (2, 15)
    assert "seed" in fields
    assert not any("loader_workers" in name or "run_dir" in name for name in fields)
    assert "label.workers" not in Config().stage_fields("label")
    assert "data.num_classes" not in fields, "runs that never set it keep their fingerprints"
    assert load_config(None, ["data.num_classes=7"]).stage_fields("teacher")["data.num_classes"] == 7


def test_every_field_can_be_described_and_every_packaged_configuration_loads() -> None:
    assert any(line.startswith("student.unlabeled_ratio=3") for line in describe_fields())
    assert {"fashion_mnist", "imagenet", "imagenet_paper"} <= set(config_names())
    for name in config_names():
        load_config(name, [])


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(
        UsageError, match=r"student\.optimizer=nesterov with student\.momentum=0: expected momentum above 0"
    ):
        load_config(None, ["student.optimizer=nesterov", "student.momentum=0"])


def test_an_optimizer_that_does_not_exist_is_refused_with_the_names_of_those_that_do() -> None:
    with pytest.raises(
        UsageError, match=r"teacher\.optimizer='adam': input should be 'momentum', .* 'adamw' or 'lars'"
    ):
        load_config(None, ["teacher.optimizer=adam"])


@pytest.mark.parametrize(("text", "init"), [("true", "teacher"), ("false", None)])
def test_from_teacher_of_earlier_versions_is_read(tmp_path: Path, text: str, init: str | None) -> None:
    (tmp_path / "mine.yaml").write_text(f"student: {{from_teacher: {text}}}\n")
    for config in (load_config(str(tmp_path / "mine.yaml"), []), load_config(None, [f"student.from_teacher={text}"])):
        assert config.student.init == init
        assert config.stage_fields("student")["student.from_teacher"] == (init == "teacher")


def test_init_teacher_is_in_fingerprints_as_it_was_in_earlier_versions() -> None:
    now = load_config(None, ["student.init=teacher"]).stage_fields("student")
    assert now["student.from_teacher"] is True
    assert "student.init" not in now
    assert load_config(None, ["student.init=x.pth"]).stage_fields("student") == Config().stage_fields("student")


def test_of_both_names_the_later_layer_counts(tmp_path: Path) -> None:
    run = [f"run_dir={tmp_path}"]
    (tmp_path / "config.yaml").write_text("student: {from_teacher: true}\ncommand_line: [student.from_teacher=true]\n")
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert load_config(None, run).student.init == "teacher"
    assert load_config(None, [*run, "student.init=x.pth"]).student.init == "x.pth"
    assert load_config(None, [*run, "student.init=null"]).student.init is None
    assert load_config(None, [*run, "student.init=x.pth", "student.from_teacher=true"]).student.init == "teacher"
    write_config(load_config(None, [*run, "student.init=x.pth"]), ["student.init=x.pth"])
    for named in (None, str(tmp_path / "mine.yaml")):
        assert load_config(named, run).student.init == "x.pth", "the word under the old name is forgotten"
    (tmp_path / "both.yaml").write_text("student: {from_teacher: true, init: x.pth}\n")
    with pytest.raises(UsageError, match=r"from_teacher=true is init=teacher now, but init=x\.pth is given; give one"):
        load_config(str(tmp_path / "both.yaml"), [])

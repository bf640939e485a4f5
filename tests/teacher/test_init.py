"""teacher.init: one command fine-tunes; preprocessing follows the weights; what fails is not remembered; what is done stays done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from pipeline.core.command import parse_command
from pipeline.core.config import load_config
from pipeline.inference.stage_weights import read_info
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from pipeline.run import main
from tests.conftest import WriteDigits

ARGS = {"width": 0.125, "blocks": [1, 1, 1, 1]}
PREPROCESSING = {"image_size": 16, "crop_pct": 1.0, "interpolation": "bilinear", "mean": (0.3,) * 3, "std": (0.4,) * 3}
Run = Callable[..., int]


def weights_in(folder: Path, seed: int = 1, **changes: Any) -> Path:
    """A folder of weights of seven classes."""
    torch.manual_seed(seed)
    state = build_model("resnetrs26", 7, ARGS).state_dict()
    values = {"model": "resnetrs26", "model_args": ARGS, "num_classes": 7} | PREPROCESSING
    save_weights(str(folder), state, WeightsInfo.model_validate(values | changes))
    return folder


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits) -> Run:
    write_digits(tmp_path / "labeled", 0, 60)
    write_digits(tmp_path / "validation", 60, 100)
    weights_in(tmp_path / "weights")

    def command(*words: str, stage: str = "teacher", run_dir: str = "run") -> int:
        fixed = [
            f"stage={stage}", f"run_dir={tmp_path}/{run_dir}", f"data.labeled=[{tmp_path}/labeled/*.tar]", "threads=1",
            f"data.validation=[{tmp_path}/validation/*.tar]", "teacher.model=resnetrs26", "teacher.epochs=1", "teacher.warmup_epochs=0",
            "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}", "teacher.batch_size=20", "teacher.loader_workers=0",
            "teacher.augment.num_ops=0",
        ]  # fmt: skip
        return main([*fixed, *words])

    return command


def test_a_teacher_begins_with_weights_and_takes_their_preprocessing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"teacher.init={tmp_path}/weights") == 0
    printed = capsys.readouterr().out
    total = len(build_model("resnetrs26", 7, ARGS).state_dict())
    assert (
        f"teacher.init={tmp_path}/weights: {total - 2} of {total} tensors loaded; head is new: 7 → 10 classes"
        in printed
    )
    assert (
        f"teacher: image_size=16 crop_pct=1.0 interpolation=bilinear mean=[0.3,0.3,0.3] std=[0.4,0.4,0.4], as in {tmp_path}/weights"
        in printed
    )
    info = read_info(f"{tmp_path}/run/gen-1/teacher")
    assert {name: getattr(info, name) for name in PREPROCESSING} == PREPROCESSING
    recorded = json.loads((tmp_path / "run/gen-1/teacher/done.json").read_text())["fingerprint"]
    assert len(recorded["inputs"]["init"]) == 16
    assert recorded["config"]["teacher.image_size"] == 16


@pytest.mark.slow
def test_later_commands_need_not_repeat_it_and_find_it_done(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"teacher.init={tmp_path}/weights") == 0
    remembered: Any = OmegaConf.to_container(OmegaConf.load(tmp_path / "run/config.yaml"))
    assert remembered["teacher"]["init"] == f"{tmp_path}/weights"
    assert "image_size" not in remembered["teacher"]
    capsys.readouterr()
    assert main(["stage=teacher", f"run_dir={tmp_path}/run"]) == 0
    assert run() == 0
    assert capsys.readouterr().out.count("teacher: done") == 2


def test_what_is_given_counts_and_what_the_weights_have_is_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"teacher.init={tmp_path}/weights", "teacher.image_size=24", "teacher.mean=[0.485,0.456,0.406]"]
    assert run(*words) == 0
    assert "image_size=24 mean=[0.485,0.456,0.406] as given, though " in capsys.readouterr().out
    info = read_info(f"{tmp_path}/run/gen-1/teacher")
    assert (info.image_size, info.mean, info.std) == (24, (0.485, 0.456, 0.406), (0.4, 0.4, 0.4))
    assert main(["stage=teacher", f"run_dir={tmp_path}/run"]) == 0
    assert "teacher: done" in capsys.readouterr().out


def test_the_weights_image_size_must_go_together_with_the_other_fields(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"student.init={weights_in(tmp_path / 'large', image_size=256)}", "student.fix_resolution_epochs=1"]
    assert run(*words, "student.fix_resolution_image_size=224", stage="student") == 2
    told = capsys.readouterr().err
    assert "student: image_size=256 crop_pct=1.0 " in told
    assert f"as in {tmp_path}/large/config.json: student.fix_resolution_image_size=224: expected at least" in told
    assert run(*words, "student.fix_resolution_image_size=256", stage="student") == 2  # for want of labels
    assert "fix_resolution_image_size=256: expected" not in capsys.readouterr().err


@pytest.mark.slow
def test_other_weights_bring_their_own_preprocessing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in a run that began without any, whose config.yaml has the defaults that nobody chose."""
    assert run("teacher.image_size=16") == 0
    assert run(f"teacher.init={tmp_path}/weights", "force=true") == 0
    assert read_info(f"{tmp_path}/run/gen-1/teacher").mean == (0.3, 0.3, 0.3)
    weights_in(tmp_path / "others", seed=2, mean=(0.6, 0.6, 0.6))
    assert run(f"teacher.init={tmp_path}/others") == 2
    assert "teacher.mean: [0.3, 0.3, 0.3] there, [0.6, 0.6, 0.6] now" in capsys.readouterr().err
    assert run(f"teacher.init={tmp_path}/others", "force=true") == 0
    assert read_info(f"{tmp_path}/run/gen-1/teacher").mean == (0.6, 0.6, 0.6)


def test_another_file_under_the_same_name_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"teacher.init={tmp_path}/weights") == 0
    weights_in(tmp_path / "weights", seed=2)
    assert run() == 2
    assert "init: changed upstream" in capsys.readouterr().err


BAD = [
    ("teacher.init=nowhere.pth", "teacher.init=nowhere.pth: no such file"),
    ("teacher.init={tmp}/labeled", "no model.safetensors there; expected a .safetensors or .pth file"),
    ("teacher.init=pretrain", "run stage=pretrain first"),
    ("teacher.init={tmp}/larger", "does not fit teacher.model=resnetrs26: its conv1.0.weight has the shape"),
    ("teacher.model=resnetrs51", "model 'resnetrs51': neither ResNet-RS, EfficientNet-RS nor a timm model"),
    ("student.init={tmp}/larger", "student.init={tmp}/larger does not fit student.model=resnetrs50"),
]


@pytest.mark.parametrize(
    ("word", "message"), [*BAD[:1], *(pytest.param(*case, marks=pytest.mark.slow) for case in BAD[1:])]
)
def test_what_fails_is_not_remembered(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    larger = build_model("resnetrs26", 7, ARGS | {"width": 0.25}).state_dict()
    values = {"model": "resnetrs26", "model_args": ARGS, "num_classes": 7} | PREPROCESSING
    save_weights(f"{tmp_path}/larger", larger, WeightsInfo.model_validate(values))
    word, message = (text.replace("{tmp}", str(tmp_path)) for text in (word, message))
    stage = "teacher,student" if word.startswith("student") else "teacher"
    assert run(word, "teacher.lr=0.3", stage=stage) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/config.yaml").exists()
    assert run() == 0
    before = (tmp_path / "run/config.yaml").read_bytes()
    assert run(word, "teacher.lr=0.3", "force=true") == 2 or stage != "teacher"
    if stage == "teacher":
        assert (tmp_path / "run/config.yaml").read_bytes() == before


@pytest.mark.slow
def test_a_later_stage_that_fails_while_the_earlier_ones_are_done_is_not_remembered(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    before = (tmp_path / "run/config.yaml").read_bytes()
    assert run("student.lr=0.7", stage="teacher,student") == 2
    assert "stage label is not done" in capsys.readouterr().err
    assert (tmp_path / "run/config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["teacher.init=pretrained", "teacher.weights=x.pth"],
            "teacher.weights=x.pth is used as it is, teacher.init=pretrained is trained; give one of them",
        ),
        (["teacher.init=teacher"], "teacher.init=teacher: that is for the student"),
        (["teacher.freeze_backbone_epochs=2"], "teacher.freeze_backbone_epochs=2: belongs to teacher.init"),
        (["student.init_head_lr_scale=2"], "student.init_head_lr_scale=2: belongs to student.init"),
        (
            ["teacher.init=pretrained", "teacher.freeze_backbone_epochs=2"],
            "teacher.freeze_backbone_epochs=2: expected at most teacher.epochs=1",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_named(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_the_plan_says_what_a_training_begins_with(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"teacher.init={tmp_path}/weights", "plan=true") == 0
    printed = capsys.readouterr().out
    assert "resnetrs26 at 16 px" in printed
    assert f"begins with {tmp_path}/weights" in printed
    assert not (tmp_path / "run/config.yaml").exists()


def test_pretraining_is_in_all_with_teacher_init_pretrain_alone() -> None:
    everything = parse_command(["stage=all"])
    assert "pretrain" not in everything.with_config(load_config(None, ["teacher.init=x.pth"])).stages
    assert everything.with_config(load_config(None, ["teacher.init=pretrain"])).stages[:2] == ("pretrain", "teacher")


def test_a_teacher_begins_with_the_pretraining_of_the_same_command(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teacher.init=pretrain", "teacher.image_size=16", "pretrain.epochs=1", "pretrain.warmup_epochs=0"]
    words += ["pretrain.batch_size=20", "pretrain.loader_workers=0", "pretrain.projection_dim=8"]
    assert run(*words, "plan=true", stage="pretrain,teacher") == 0
    assert "would refuse" not in capsys.readouterr().out
    assert run(*words, stage="pretrain,teacher") == 0
    printed = capsys.readouterr().out
    total = len(build_model("resnetrs26", 7, ARGS).state_dict())
    assert f"{total - 2} of {total} tensors loaded; head is new: 10 classes" in printed
    assert run(stage="pretrain,teacher") == 0
    assert "teacher: done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_what_another_run_begins_with(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its head, as its classes are the same ones."""
    assert run(f"teacher.init={tmp_path}/weights") == 0
    capsys.readouterr()
    assert run(f"teacher.init={tmp_path}/run", run_dir="second") == 0
    total = len(build_model("resnetrs26", 7, ARGS).state_dict())
    assert (
        f"teacher.init={tmp_path}/run/gen-1/teacher/weights: {total} of {total} tensors loaded\n"
        in capsys.readouterr().out
    )
    assert read_info(f"{tmp_path}/second/gen-1/teacher").mean == (0.3, 0.3, 0.3)

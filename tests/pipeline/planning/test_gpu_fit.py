"""Does a stage fit into a GPU? What a plan shows, what is refused before it starts, and that the ImageNet configurations fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, TrainConfig
from pipeline.planning import gpu_fit, memory
from pipeline.planning.gpu_fit import misfit, parts_of
from pipeline.planning.memory import evaluation_memory, inference_memory, training_memory
from pipeline.run import main
from tests.conftest import WriteDigits

STAGES = ("teacher", "label", "student", "evaluate")
CONFIGS = Path(gpu_fit.__file__).parents[1] / "configs"
TINY = {"model": "resnetrs50", "model_args": {"width": 0.25, "blocks": [1, 1, 1, 1]}, "image_size": 32}


def misfits(config: Config, gigabytes: float) -> dict[str, str]:
    """Why each stage of the first generation does not fit."""
    found = {stage: misfit(parts_of(config, Layout("run"), stage, 1000), gigabytes * 1e9) for stage in STAGES}
    return {stage: why for stage, why in found.items() if why}


def words_for_one_gpu(name: str) -> list[str]:
    """The words in the comment of a shipped configuration."""
    return re.findall(r"On one GPU of 80 GB:\n#\s+(.+)\n", (CONFIGS / f"{name}.yaml").read_text())[0].split()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet", "imagenet_paper"])
def test_the_imagenet_configurations_fit_8_gpus_and_with_the_fields_of_their_comment_one(name: str) -> None:
    config = load_config(name, [])
    assert config.student.workers == 8
    assert misfits(config, 80) == {}
    words = words_for_one_gpu(name)
    alone = load_config(name, words)
    assert (alone.student.workers, alone.student.batch_size) == (1, 4096)
    assert misfits(alone, 80) == {}
    without = load_config(name, [word for word in words if "accumulate_steps" not in word])
    assert "student.accumulate_steps=8" in misfits(without, 80)["student"]  # what the comment says is what is advised


def test_efficientnet_l2_at_800_pixels_is_calibrated_in_batches_that_fit() -> None:
    section = load_config("imagenet_paper", []).teacher
    assert (section.model, section.image_size) == ("tf_efficientnet_l2.ns_jft_in1k", 800)
    assert inference_memory(section, 1000, section.eval_batch_size).total < 80e9
    assert inference_memory(section, 1000, 256).total > 80e9
    config = load_config("imagenet_paper", ["teacher.eval_batch_size=256"])
    assert misfits(config, 80)["teacher"].endswith("of a GPU's 80.0: give teacher.eval_batch_size=128")


def test_the_parts_of_a_training_process() -> None:
    section = TrainConfig(model="resnetrs50", image_size=160, batch_size=1024, precision="bf16")
    found = training_memory(section, 1000)
    weights = 35.7e6 * 4
    for name in ("weights", "gradients", "optimizer", "ema"):
        assert getattr(found, name) == pytest.approx(weights, rel=0.01)
    assert found.activations == pytest.approx(1024 * 29.6e6, rel=0.02)
    assert found.inputs == 1024 * (3 * 160 * 160 * 5 + 4 * 1000)
    assert found.workspace > 2e9
    assert found.total == found.workspace + sum(
        getattr(found, name) for name in ("weights", "gradients", "optimizer", "ema", "activations", "inputs")
    )


def test_workers_micro_batches_and_checkpointing_take_less_per_gpu() -> None:
    section = TrainConfig(image_size=64, batch_size=1024, precision="bf16")
    whole = training_memory(section, 1000)
    spread, split, twice = (
        training_memory(section.model_copy(update=fields), 1000)
        for fields in ({"workers": 8}, {"accumulate_steps": 8}, {"checkpoint_activations": True})
    )
    assert spread.images == split.images == 128
    assert spread.activations == split.activations < 0.2 * whole.activations
    assert spread.gradients == whole.gradients  # DDP's buckets
    assert split.inputs > spread.inputs  # the pixels of all micro-batches are there
    assert twice.activations < 0.4 * whole.activations


def test_advice_continues_from_the_fields_as_they_are() -> None:
    student = {"image_size": 64, "batch_size": 1024, "unlabeled_ratio": 0, "precision": "bf16", "accumulate_steps": 3}
    config = Config.model_validate({"student": student})
    (part, *_) = parts_of(config, Layout("run"), "student", 1000)
    room = part.memory.total - 1
    micro_batches, checkpoints, *_ = part.remedies(room)
    assert micro_batches == "student.accumulate_steps=6"
    assert checkpoints == "student.checkpoint_activations=true"  # enough by itself
    fitting = config.student.model_copy(update={"checkpoint_activations": True})
    assert training_memory(fitting, 1000).total <= room


def test_evaluation_in_a_training_counts_beside_its_state() -> None:
    section = TrainConfig(image_size=64, batch_size=64)
    beside, alone = evaluation_memory(section, 1000, 256), inference_memory(section, 1000, 256)
    assert beside.total - alone.total == pytest.approx(1.05 * 4 * 35.7e6 * 3, rel=0.01)  # gradients, momentum, EMA


@pytest.mark.parametrize(("optimizer", "values"), [("momentum", 1), ("rmsprop", 2), ("adamw", 2), ("lars", 1)])
def test_the_state_of_the_optimizer_is_counted(optimizer: str, values: int) -> None:
    section = TrainConfig.model_validate({"optimizer": optimizer, "image_size": 64, "batch_size": 64})
    assert training_memory(section, 1000).optimizer == pytest.approx(4 * 35.7e6 * values, rel=0.01)


def test_an_ensemble_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section_of(folder: str) -> TrainConfig:
        assert folder == "elsewhere"
        return TrainConfig(model="resnetrs101", image_size=64)

    monkeypatch.setattr(gpu_fit, "_section_of_weights", section_of)
    alone = Config.model_validate({"teacher": {"image_size": 64}})
    both = Config.model_validate({"teacher": {"image_size": 64, "ensemble": ["elsewhere"]}})
    first, second = (parts_of(config, Layout("run"), "label", 1000)[0].memory for config in (alone, both))
    assert second.weights - first.weights == pytest.approx(63.6e6 * 4, rel=0.01)


def test_a_share_of_a_gpu_is_the_room_of_a_labeling_worker() -> None:
    config = Config.model_validate(
        {"label": {"gpus_per_worker": 0.25}, "device": "cuda", "plan": {"gpu_memory_gb": 40}}
    )
    parts = parts_of(config, Layout("run"), "label", 1000)
    assert parts[0].memory.total < 10e9
    assert not gpu_fit.refusal(config, "label", parts)
    less = config.model_copy(update={"label": config.label.model_copy(update={"gpus_per_worker": 0.05})})
    assert "of a GPU's 2.0: give" in gpu_fit.refusal(less, "label", parts)


def small(tmp_path: Path, write_digits: WriteDigits) -> list[str]:
    write_digits(tmp_path / "labeled", 0, 100)
    return [
        f"run_dir={tmp_path}/run",
        f"data.labeled=[{tmp_path}/labeled/*.tar]",
        "teacher.model_args={width: 0.25, blocks: [1, 1, 1, 1]}",
        "teacher.image_size=64",
        "teacher.batch_size=512",
        "teacher.bn_momentum=0.1",
    ]


def test_a_stage_that_cannot_fit_is_refused_before_it_starts_and_the_advice_helps(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*small(tmp_path, write_digits), "device=cuda", "plan.gpu_memory_gb=2.3"]
    assert main(["stage=teacher", *words]) == 2
    error = capsys.readouterr().err
    found = re.search(r"stage=teacher needs 2\.\d GB of a GPU's 2\.3: give (teacher\.accumulate_steps=\d+)", error)
    assert found, error
    assert "teacher.checkpoint_activations=true" in error
    assert re.search(r"teacher\.batch_size=\d+", error)
    assert "teacher.image_size" in error
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert main(["stage=teacher", *words, found[1]]) == 2  # fits, so that the next check is reached
    assert "device=cuda: torch finds no GPU here" in capsys.readouterr().err


def test_a_cpu_is_asked_for_no_gpu_memory(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*small(tmp_path, write_digits), "device=cpu", "teacher.epochs=0.001", "teacher.warmup_epochs=0"]
    words += ["teacher.batch_size=64", "plan.gpu_memory_gb=0.5"]
    assert main(["stage=teacher", *words, "plan=true"]) == 0
    plan = capsys.readouterr().out
    assert re.search(r"teacher +would run", plan)
    assert "teacher needs 2.1 GB of a GPU's 0.5: give a smaller teacher.image_size" in plan
    assert main(["stage=teacher", *words]) == 0


def test_a_plan_shows_the_memory_of_each_stage_and_refuses_on_a_gpu(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*small(tmp_path, write_digits), "plan=true"]
    assert main(["stage=teacher", *words]) == 0
    plan = capsys.readouterr().out
    table = plan[plan.index("memory of one GPU, MB (of 80 GB, assumed: plan.gpu_memory_gb)") :].splitlines()
    assert table[1].split()[-8:] == list(gpu_fit._COLUMNS)
    assert table[2].split()[:2] == ["teacher", "512"]
    assert all(float(cell.replace(",", "")) > 0 for cell in table[2].split()[3:])  # none is "0.0"
    assert main(["stage=teacher", *words, "device=cuda", "plan.gpu_memory_gb=1"]) == 0
    assert re.search(r"teacher +would refuse", capsys.readouterr().out)


def test_a_model_that_cannot_be_counted_is_left_out(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("depends on values")

    monkeypatch.setattr(memory, "count_pass", fails)
    memory._count_model.cache_clear()
    assert main(["stage=teacher", *small(tmp_path, write_digits), "plan=true"]) == 0
    assert "memory of one GPU" not in capsys.readouterr().out
    memory._count_model.cache_clear()

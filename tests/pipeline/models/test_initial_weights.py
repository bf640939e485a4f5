"""Weights to begin with: found wherever they are, loaded by name, with a new head where classes differ, or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from pipeline.core.layout import Layout
from pipeline.core.schema import TrainConfig
from pipeline.core.stage import StageError
from pipeline.models.heads import head_layers, match
from pipeline.models.initial_weights import (
    InitialWeights,
    find_source,
    init_digest,
    initial_weights,
    recorded_preprocessing,
)
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import WeightsInfo, save_weights

ARGS = {"width": 0.125, "blocks": [1, 1, 1, 1]}
SECTION = TrainConfig.model_validate({"model": "resnetrs26", "model_args": ARGS, "init": "x"})


def state_of(num_classes: int, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(build_model("resnetrs26", num_classes, ARGS).state_dict())


def info(**changes: Any) -> WeightsInfo:
    values = {
        "model": "resnetrs26", "model_args": ARGS, "num_classes": 7, "image_size": 96, "crop_pct": 0.9,
        "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
    }  # fmt: skip
    return WeightsInfo.model_validate(values | changes)


@pytest.mark.parametrize(
    ("name", "args", "head"),
    [
        ("resnetrs26", ARGS, ("fc",)), ("resnetrs50", {}, ("fc",)), ("tf_efficientnet_lite0", {}, ("classifier",)),
        ("vit_tiny_patch16_224", {}, ("head",)), ("deit_tiny_distilled_patch16_224", {}, ("head", "head_dist")),
        ("mobilenetv3_small_100", {}, ("classifier",)), ("convnext_atto", {}, ("head.fc",)),
    ],
)  # fmt: skip
def test_the_head_is_what_depends_on_the_number_of_classes(
    name: str, args: dict[str, Any], head: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        one, two = build_model(name, 5, args), build_model(name, 6, args)
    assert head_layers(one) == head
    shapes = ({key: value.shape for key, value in model.state_dict().items()} for model in (one, two))
    first, second = shapes
    changed = {key.rpartition(".")[0] for key in first if first[key] != second[key]}
    assert changed == set(head)


def test_all_but_the_head_is_loaded_where_the_classes_differ() -> None:
    torch.manual_seed(0)
    model = build_model("resnetrs26", 9, ARGS)
    before = model.get_parameter("fc.weight").detach().clone()
    theirs = state_of(1000)
    found = match(model, theirs)
    total = len(theirs)
    assert found.note == f"{total - 2} of {total} tensors loaded; head is new: 1000 → 9 classes"
    assert "fc.weight" not in found.tensors
    model.load_state_dict(model.state_dict() | found.tensors)
    assert torch.equal(model.get_parameter("fc.weight"), before)
    assert torch.equal(model.get_parameter("conv1.0.weight"), theirs["conv1.0.weight"])


def test_an_equal_head_is_loaded_unless_its_classes_are_others() -> None:
    model, theirs = build_model("resnetrs26", 7, ARGS), state_of(7)
    assert match(model, theirs).note == f"{len(theirs)} of {len(theirs)} tensors loaded"
    assert match(model, theirs, new_head=True).note.endswith("head is new: 7 other classes")
    without = {name: tensor for name, tensor in theirs.items() if not name.startswith("fc.")}
    assert match(model, without).note == f"{len(theirs) - 2} of {len(theirs)} tensors loaded; head is new: 7 classes"


def test_counters_that_old_files_lack_are_no_reason_to_refuse() -> None:
    theirs = {name: tensor for name, tensor in state_of(7).items() if not name.endswith("num_batches_tracked")}
    assert len(match(build_model("resnetrs26", 7, ARGS), theirs).tensors) == len(theirs)


def changed(state: dict[str, Tensor], **tensors: Tensor | None) -> dict[str, Tensor]:
    state = state | {name.replace("__", "."): tensor for name, tensor in tensors.items() if tensor is not None}
    return {name: tensor for name, tensor in state.items() if tensors.get(name.replace(".", "__"), tensor) is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn1__weight": None, "layer1__0__bn1__weight": None}, r"it has no tensor bn1\.weight, the model has"),
        ({"bn1__weight": torch.ones(3)}, r"its bn1\.weight has the shape \[3\], the model's \[8\]"),
        ({"projection__weight": torch.ones(3)}, r"it has a tensor projection\.weight, the model has none"),
    ],
)
def test_another_model_is_refused_by_the_first_tensor_that_differs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        match(build_model("resnetrs26", 7, ARGS), changed(state_of(7), **changes))


def test_the_refusal_names_field_file_and_model(tmp_path: Path) -> None:
    path = tmp_path / "larger.safetensors"
    safetensors.torch.save_file(dict(build_model("resnetrs26", 7, ARGS | {"width": 0.25}).state_dict()), path)
    with pytest.raises(
        ModelError,
        match=rf"teacher\.init={path} does not fit teacher\.model=resnetrs26: its conv1\.0\.weight has the shape .*give the model and",
    ):
        InitialWeights("teacher.init", str(path)).check(SECTION, 9)


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".pth.tar"])
def test_a_file_is_loaded_by_name(tmp_path: Path, ending: str) -> None:
    theirs, path = state_of(5), tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file(theirs, path)
    else:
        torch.save({"state_dict": theirs} if ending == ".pth.tar" else theirs, path)
    model = build_model("resnetrs26", 9, ARGS)
    note = InitialWeights("teacher.init", str(path)).load_into(model, "resnetrs26", ARGS)
    assert "head is new: 5 → 9 classes" in note
    assert torch.equal(model.get_parameter("bn1.weight"), theirs["bn1.weight"])
    assert len(init_digest(SECTION.model_copy(update={"init": str(path)}), "teacher", "run")["init"]) == 16


def test_a_torch_file_with_other_names_in_the_models_order_fits_with_other_classes_too(tmp_path: Path) -> None:
    theirs = state_of(5)
    torch.save(
        {f"their.{number}.{name.rpartition('.')[2]}": t for number, (name, t) in enumerate(theirs.items())},
        tmp_path / "x.pth",
    )
    model = build_model("resnetrs26", 9, ARGS)
    InitialWeights("teacher.init", f"{tmp_path}/x.pth").load_into(model, "resnetrs26", ARGS)
    assert torch.equal(model.get_buffer("layer4.0.bn3.running_var"), theirs["layer4.0.bn3.running_var"])


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made_by_pickle",)


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malicious()}, "x.pth")
    with pytest.raises(ModelError, match="holds pickled code"):
        InitialWeights("teacher.init", "x.pth").check(SECTION, 9)
    assert not Path("made_by_pickle").exists()


def test_a_run_stands_for_its_last_model_and_a_stage_for_its_weights(tmp_path: Path) -> None:
    run = Layout(f"{tmp_path}/run")
    for number, folder in enumerate((run.teacher, run.student, Layout(run.run_dir, 2).student)):
        save_weights(f"{folder}/weights", state_of(7, seed=number), info())
        assert find_source(run.run_dir, "teacher.init", "run") == f"{folder}/weights"
    assert find_source(run.teacher, "teacher.init", "run") == f"{run.teacher}/weights"
    assert find_source(f"{run.teacher}/weights", "teacher.init", "run") == f"{run.teacher}/weights"
    with pytest.raises(
        StageError, match=rf"teacher\.init={tmp_path}: no model\.safetensors there; expected a \.safetensors"
    ):
        find_source(str(tmp_path), "teacher.init", "run")


def test_the_pretraining_of_the_run_is_found_where_it_is(tmp_path: Path) -> None:
    layout = Layout(f"{tmp_path}/run")
    with pytest.raises(
        StageError, match=r"teacher\.init=pretrain: \S+/run/pretrain has no weights; run stage=pretrain first"
    ):
        find_source("pretrain", "teacher.init", layout.run_dir)
    save_weights(f"{layout.run_dir}/pretrain/weights", state_of(7), info())
    assert find_source("pretrain", "teacher.init", layout.run_dir) == f"{layout.run_dir}/pretrain/weights"


def test_a_head_of_other_class_names_is_left(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(7)]
    save_weights(f"{tmp_path}/weights", state_of(7), info(class_names=names))
    section = SECTION.model_copy(update={"init": f"{tmp_path}/weights"})

    def new_head(*data_names: str) -> bool:
        found = initial_weights(section, "teacher", "run", data_names or None)
        assert found is not None
        return found.new_head

    assert not new_head(*names)
    assert not new_head(), "names that are not known are taken to be the same"
    assert new_head(*reversed(names))
    assert new_head(*names[:6], "another")


def test_a_folder_records_its_preprocessing_and_a_file_has_that_of_timms_weights(tmp_path: Path) -> None:
    save_weights(f"{tmp_path}/ours", state_of(7), info())
    recorded = {
        "image_size": 96,
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    assert recorded_preprocessing(f"{tmp_path}/ours", "resnetrs26", ARGS) == (recorded, f"{tmp_path}/ours/config.json")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(
        '{"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5, 0.5, 0.5], "crop_pct": 1.0,'
        ' "interpolation": "random"}}'
    )
    expected = {"image_size": 64, "crop_pct": 1.0, "mean": (0.5, 0.5, 0.5)}
    assert recorded_preprocessing(str(theirs), "resnet18", {})[0] == expected
    lite0, source = recorded_preprocessing("some.pth", "tf_efficientnet_lite0", {})
    assert (lite0["mean"], lite0["image_size"], source) == (
        (0.5, 0.5, 0.5), 224, "timm's weights of tf_efficientnet_lite0",
    )  # fmt: skip
    assert recorded_preprocessing("pretrained", "tf_efficientnet_lite0", {})[0] == lite0


def test_pretrained_weights_without_a_network_say_what_to_bring() -> None:
    """The tests have HF_HUB_OFFLINE=1."""
    section = TrainConfig.model_validate({"model": "tf_efficientnet_lite0", "init": "pretrained"})
    with pytest.raises(
        ModelError,
        match=r"teacher\.init=pretrained: timm's weights of tf_efficientnet_lite0 are not in the cache and cannot be downloaded .*"
        r"download model\.safetensors of timm/tf_efficientnet_lite0\.in1k .*and give teacher\.init=PATH/model\.safetensors",
    ):
        InitialWeights("teacher.init", "pretrained").check(section, 9)
    assert init_digest(section, "teacher", "run") == {"init": "pretrained timm/tf_efficientnet_lite0.in1k"}


def test_a_model_without_pretrained_weights_says_so() -> None:
    section = TrainConfig.model_validate({"model": "test_vit4", "init": "pretrained"})
    name = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(ModelError, match=rf"teacher\.init=pretrained: timm has no weights of {name}; give a file"):
        InitialWeights("teacher.init", "pretrained").check(section.model_copy(update={"model": name}), 9)


FROM_THE_CACHE = """
from pipeline.core.schema import TrainConfig
from pipeline.models.initial_weights import InitialWeights
section = TrainConfig.model_validate({"model": "test_resnet", "init": "pretrained"})
print(InitialWeights("teacher.init", "pretrained").check(section, 9))
"""


@pytest.mark.slow
def test_pretrained_weights_in_the_hubs_cache_need_no_network(tmp_path: Path) -> None:
    known = timm.get_pretrained_cfg("test_resnet")
    assert known is not None
    hub = str(known.hf_hub_id)
    snapshot = tmp_path / "hub" / f"models--{hub.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    model = timm.create_model("test_resnet")
    safetensors.torch.save_file(model.state_dict(), snapshot / "model.safetensors")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_CACHE], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("tensors loaded; head is new: 1000 → 9 classes")

"""timm loads our weights, we load weights of others, and pickled code never runs."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from pipeline.inference.stage_weights import read_info
from pipeline.models.external_weights import load_external
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import WeightsInfo, load_weights, save_weights


def info(model: str, **changes: object) -> WeightsInfo:
    fields = {
        "model": model, "num_classes": 3, "class_names": ["a", "b", "c"], "image_size": 32, "crop_pct": 1.0,
        "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "temperature": 1.5, "validation_top1": 0.75,
    }  # fmt: skip
    return WeightsInfo.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("name", "args"), [("resnetrs50", {}), ("resnetrs50", {"width": 0.25, "blocks": [1, 2, 4, 1]}), ("resnet10t", {})]
)
def test_timm_loads_the_folder_with_outputs_classes_and_preprocessing(
    tmp_path: Path, name: str, args: dict[str, object]
) -> None:
    model = build_model(name, 3, args).eval()
    save_weights(str(tmp_path), model.state_dict(), info(name, model_args=args))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    preprocessing: dict[str, Any] = theirs.pretrained_cfg  # type: ignore[assignment]
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert tuple(preprocessing["mean"]) == (0.5, 0.4, 0.3)
    assert tuple(preprocessing["input_size"]) == (3, 32, 32)


def test_saved_weights_load_unchanged_and_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    state = build_model("resnetrs26", 3, {"width": 0.125}).state_dict()
    for name in ("a", "b"):
        save_weights(str(tmp_path / name), state, info("resnetrs26", model_args={"width": 0.125}))
    loaded, tensors = load_weights(str(tmp_path / "a"))
    (tmp_path / "a/model.safetensors").rename(tmp_path / "weights")
    assert read_info(str(tmp_path / "a")) == loaded, "read_info must not need the weights"
    (tmp_path / "weights").rename(tmp_path / "a/model.safetensors")
    assert (loaded.temperature, loaded.validation_top1, loaded.class_names) == (1.5, 0.75, ["a", "b", "c"])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tied_weights_are_saved_under_both_names(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    save_weights(str(tmp_path), {"head.weight": tensor, "embedding.weight": tensor}, info("resnetrs26"))
    _, tensors = load_weights(str(tmp_path))
    assert all(torch.equal(tensors[name], tensor) for name in ("head.weight", "embedding.weight"))


def small_state() -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone() for name, tensor in build_model("resnetrs26", 3, {"width": 0.125}).state_dict().items()
    }


def external(path: Path) -> dict[str, torch.Tensor]:
    return load_external("resnetrs26", {"width": 0.125}, 3, str(path))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_ema"])
def test_torch_files_load_bare_or_wrapped_and_from_parallel_training(tmp_path: Path, wrapper: str | None) -> None:
    state = small_state()
    named = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({wrapper: named} if wrapper else named, tmp_path / "w.pth")
    loaded = external(tmp_path / "w.pth")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_timms_training_checkpoint_loads_with_its_averaged_weights(tmp_path: Path) -> None:
    state = small_state()
    raw = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    arguments = Namespace(model="resnetrs26", lr=0.1, mean=None, opt_betas=(0.9, 0.99), model_kwargs={"width": 0.125})
    content = {"epoch": 1, "arch": "resnetrs26", "state_dict": raw, "optimizer": {"state": {}}, "version": 2}
    torch.save(content | {"args": arguments, "state_dict_ema": state, "metric": 77.1}, tmp_path / "last.pth.tar")
    loaded = external(tmp_path / "last.pth.tar")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_other_names_with_each_shape_in_order_are_mapped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = small_state()
    torch.save({f"_{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    loaded = external(tmp_path / "w.pth")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert "loaded by order" in caplog.text


def test_a_file_that_does_not_keep_the_order_is_never_mapped_by_order(tmp_path: Path) -> None:
    safetensors.torch.save_file(
        {f"_{name}": tensor for name, tensor in small_state().items()}, tmp_path / "w.safetensors"
    )
    with pytest.raises(ModelError, match="does not fit the model"):
        external(tmp_path / "w.safetensors")


def test_tensors_of_another_kind_in_the_same_place_are_not_mapped_by_order(tmp_path: Path) -> None:
    state = {f"_{name}": tensor for name, tensor in small_state().items()}
    swapped = [name.replace("bias", "X").replace("weight", "bias").replace("X", "weight") for name in state]
    torch.save(dict(zip(swapped, state.values(), strict=True)), tmp_path / "w.pth")
    with pytest.raises(ModelError, match="does not fit the model"):
        external(tmp_path / "w.pth")


def test_timms_weights_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ModelError, match="know 1000 classes, not 10"):
        load_external("resnet10t", {}, 10, "pretrained")


def test_timm_rebuilds_a_model_of_fixed_input_size_with_the_same_outputs(tmp_path: Path) -> None:
    model = build_model("test_vit", 3, {}).eval()
    save_weights(str(tmp_path), model.state_dict(), info("test_vit", image_size=160))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).num_classes == 7


def test_weights_of_another_model_are_refused_with_names(tmp_path: Path) -> None:
    state = small_state()
    del state["fc.weight"]
    safetensors.torch.save_file(state | {"head.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"missing fc\.weight; unexpected head\.weight"):
        external(tmp_path / "w.safetensors")
    safetensors.torch.save_file(small_state() | {"fc.weight": torch.zeros(5, 64)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"other shapes than the model's for fc\.weight"):
        external(tmp_path / "w.safetensors")


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_pickled_code_is_refused_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Runs()}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"pickled code \(\S*print\), which is never run") as caught:
        external(tmp_path / "w.pth")
    assert "safetensors.torch.save_file" in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"version https://git-lfs", b"x" * 100, b""])
def test_a_file_that_is_not_of_torch_is_refused_by_its_first_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.pth: not a file of torch\.save"):
        external(tmp_path / "w.pth")


def test_a_truncated_torch_file_is_reported_as_damaged(tmp_path: Path) -> None:
    torch.save(small_state(), tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:500])
    with pytest.raises(ModelError, match=r"w\.pth: damaged"):
        external(tmp_path / "w.pth")


def test_missing_and_damaged_files_and_folders_of_others_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no\.pth'?: no such file"):
        external(tmp_path / "no.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match=r"bad\.safetensors: not readable"):
        external(tmp_path / "bad.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="not a weights folder of this pipeline"):
        load_weights(str(tmp_path))

"""The count of a model's memory: against published counts, torch's own tracker, and the tensors that real passes keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from pipeline.models import memory
from pipeline.models.memory import count_pass
from pipeline.models.registry import build_model
from pipeline.training.state import freeze_early_layers
from pipeline.training.step import to_training_mode

SMALL: dict[str, Any] = {"width": 0.25, "blocks": [1, 1, 1, 1]}
Build = Callable[[], nn.Module]


def builder(name: str, args: dict[str, Any] | None = None, trains: bool = True) -> Build:
    return lambda: build_model(name, 1000, args or {}).train(trains)


def kept_by_a_real_pass(build: Build, images: int, size: int) -> int:
    """Bytes of the tensors that autograd saves for the backward pass, parameters and buffers left out."""
    model, kept = build(), dict[int, Tensor]()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(torch.zeros(images, 3, size, size))
        assert outputs.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("name", "size", "megabytes"), [("resnetrs101", 192, 62.4), ("resnetrs152", 224, 118.7)])
def test_the_imagenet_models_keep_what_was_counted_by_hand(name: str, size: int, megabytes: float) -> None:
    counted = count_pass(builder(name), size, bf16=True, trains=True)
    assert counted.kept_per_image / 1e6 == pytest.approx(megabytes, abs=0.1)
    assert counted.per_image == pytest.approx(counted.kept_per_image, rel=0.01)  # at the peak little else is alive


@pytest.mark.parametrize("name", ["resnetrs50", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_a_real_pass_keeps_as_much(name: str) -> None:
    args = SMALL if name == "resnetrs50" else {}
    size = 224 if name.startswith("vit") else 64
    real = (kept_by_a_real_pass(builder(name, args), 6, size) - kept_by_a_real_pass(builder(name, args), 2, size)) / 4
    assert count_pass(builder(name, args), size, True, True).kept_per_image == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_peak_of_a_step_is_that_of_torchs_tracker(bf16: bool) -> None:
    build, images = builder("resnetrs50", SMALL), 512
    with FakeTensorMode():
        model, batch = build(), torch.empty(images, 3, 64, 64)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = model(batch)
            outputs.float().square().mean().backward()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    theirs = sum(size for kind, size in snapshot.items() if any(word in str(kind) for word in ("ACT", "TEMP")))
    assert count_pass(build, 64, bf16, trains=True).peak(images) == pytest.approx(theirs, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True])
def test_no_smaller_batch_takes_more_than_the_chord(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build = builder("mobilenetv3_small_050", trains=trains)
    counted = count_pass(build, 64, True, trains)
    for images in (2, 100):
        monkeypatch.setattr(memory, "_COUNTED", images)
        exact = count_pass(build, 64, True, trains).peak(images)
        assert exact <= counted.peak(images) < 1.5 * exact + 2e7


def test_frozen_layers_keep_nothing_and_inference_less_than_training() -> None:
    def frozen() -> nn.Module:
        model = build_model("resnetrs50", 10, SMALL)
        freeze_early_layers(model)
        return to_training_mode(model)

    trained = count_pass(builder("resnetrs50", SMALL), 64, False, True)
    last = count_pass(frozen, 64, False, True)
    infers = count_pass(builder("resnetrs50", SMALL, trains=False), 64, False, False)
    assert last.kept_per_image < 0.1 * trained.kept_per_image
    assert last.trained < 0.2 * trained.trained
    assert infers.kept_per_image == 4 * 1000  # the classifier's outputs
    assert infers.per_image < 0.5 * trained.per_image


def test_layer_norms_are_counted_in_float32_as_on_gpus() -> None:
    with_norms = count_pass(builder("convnext_atto"), 64, True, True).kept_per_image
    floats = memory._FLOAT32_ON_GPU
    try:
        memory._FLOAT32_ON_GPU = ()  # type: ignore[assignment]
        as_on_cpu = count_pass(builder("convnext_atto"), 64, True, True).kept_per_image
    finally:
        memory._FLOAT32_ON_GPU = floats
    assert with_norms > 1.05 * as_on_cpu

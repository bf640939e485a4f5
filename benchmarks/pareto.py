"""Networks of ResNet-RS's Pareto front (arXiv 2103.07579, figures 1 and 4, table 3): what is published, counted and timed of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.efficientnet import PUBLISHED
from pipeline.models.memory import count_pass
from pipeline.models.registry import build_model, count_flops, count_parameters, on_meta
from pipeline.training.optimizer import build_optimizer

RESNET_RS, EFFICIENTNET = "ResNet-RS", "EfficientNet"


@dataclass(frozen=True)
class Network:
    """A network at its published image size.

    Attributes:
        top1: on ImageNet, percent; of EfficientNets with RandAugment where published, else with AutoAugment.
        parameters, flops: published, in millions, and in billions per image (2 × multiply-adds).
        v100_s, tpu_s: published seconds of a training step of 128 images, in halves that fit, on a V100 (fp32) and a TPUv3 (bf16).
        tpu_gb: published memory of that step.
    """

    family: str
    model: str
    image_size: int
    top1: float
    parameters: float
    flops: float
    v100_s: float | None = None
    tpu_s: float | None = None
    tpu_gb: float | None = None

    @property
    def name(self) -> str:
        """`RS-350 @256`, `B6 @528`"""
        short = self.model.replace("resnetrs", "RS-").replace("tf_efficientnet_b", "B")
        return f"{short} @{self.image_size}"


_TABLE_3 = {  # seconds on a V100, on a TPUv3, gigabytes there
    ("resnetrs350", 256): (4.7, 1.1, 7.3),
    ("resnetrs420", 320): (10.2, 2.1, 15.5),
    ("tf_efficientnet_b6", 528): (15.7, 3.0, 16.6),
    ("tf_efficientnet_b7", 600): (29.9, 6.0, 28.3),
}
_RESNETS = (
    (50, 160, 78.8, 35.7, 4.6), (101, 160, 80.3, 63.7, 8.4), (101, 192, 81.2, 63.7, 12), (152, 192, 82.0, 86.8, 18),
    (152, 224, 82.2, 86.8, 24), (152, 256, 83.0, 86.8, 31), (200, 256, 83.4, 93.4, 40), (270, 256, 83.8, 130.1, 54),
    (350, 256, 84.0, 164.3, 69), (350, 320, 84.2, 164.3, 108), (420, 320, 84.4, 191.9, 128),
)  # fmt: skip


def _network(family: str, model: str, size: int, top1: float, parameters: float, flops: float) -> Network:
    return Network(family, model, size, top1, parameters, flops, *_TABLE_3.get((model, size), ()))


NETWORKS = (
    *(_network(RESNET_RS, f"resnetrs{depth}", *others) for depth, *others in _RESNETS),  # type: ignore[arg-type]
    *(
        _network(
            EFFICIENTNET, f"tf_efficientnet_b{size}", known.image_size, known.rand_augment or known.auto_augment,
            known.parameters, 2 * known.multiply_adds,
        )
        for size, known in PUBLISHED.items()
    ),
)  # fmt: skip
PAIRS = (  # about equal in accuracy
    ("RS-50 @160", "B1 @240"), ("RS-101 @160", "B2 @260"), ("RS-152 @256", "B4 @380"), ("RS-350 @256", "B6 @528"),
    ("RS-420 @320", "B7 @600"),
)  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """Of one image at the network's size.

    Attributes:
        parameters, flops: as `count_parameters`, `count_flops`.
        activations: values that all convolutions put out (the definition of arXiv 2003.13678).
        kept_bytes: what torch keeps in bf16 between forward and backward pass; see `count_pass`.
    """

    parameters: int
    flops: int
    activations: int
    kept_bytes: float


def count(network: Network) -> Counted:
    """Count a network without running it."""
    model = on_meta(_builder(network))
    kept = count_pass(lambda: _builder(network)().train(), network.image_size, bf16=True, trains=True).kept_per_image
    activations = count_activations(model, network.image_size)
    return Counted(count_parameters(model), count_flops(model, network.image_size), activations, kept)


def count_activations(model: nn.Module, image_size: int) -> int:
    """Values that the convolutions of a model on the meta device put out for one image."""
    outputs: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.numel()))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size, device="meta"))
    return sum(outputs)


def _builder(network: Network) -> Callable[[], nn.Module]:
    return partial(build_model, network.model, 1000, {})


@dataclass(frozen=True)
class Latency:
    """Median seconds of `batch` images, and how many of them fit at once (`training_batch`, `inference_batch`)."""

    training_s: float
    training_batch: int
    inference_s: float
    inference_batch: int


class Timer:
    """A network on a device, timed in turns with others: training steps with its family's optimizer, and forward passes."""

    def __init__(self, network: Network, device: str, batch: int) -> None:
        self._device, self._batch, self._size = device, batch, network.image_size
        self._model = _builder(network)().to(device).to(memory_format=torch.channels_last)
        self._optimizer = build_optimizer(
            self._model, 0.9, 1e-5, "momentum" if network.family == RESNET_RS else "rmsprop"
        )
        self._fits = {True: batch, False: batch}
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def warm_up(self) -> None:
        """Find the batches that fit: half of what does not, as in the paper."""
        for trains in (True, False):
            while not self._runs(trains):
                self._fits[trains] //= 2

    def turn(self) -> None:
        """Time one training step and one forward pass."""
        for trains in (True, False):
            started = time.perf_counter()
            self._run(trains)
            self._seconds[trains].append((time.perf_counter() - started) * self._batch / self._fits[trains])

    def result(self) -> Latency:
        """Medians over the turns."""
        training, inference = (median(self._seconds[trains]) for trains in (True, False))
        return Latency(training, self._fits[True], inference, self._fits[False])

    def _runs(self, trains: bool) -> bool:
        try:
            self._run(trains)
        except torch.OutOfMemoryError:
            if self._fits[trains] == 1:
                raise
            return False
        return True

    def _run(self, trains: bool) -> None:
        shape = self._fits[trains], 3, self._size, self._size
        images = torch.zeros(shape, device=self._device).contiguous(memory_format=torch.channels_last)
        self._model.train(trains)
        with torch.set_grad_enabled(trains):
            with torch.autocast(self._device, torch.bfloat16, enabled=self._device == "cuda"):
                outputs = self._model(images)
            if trains:
                F.cross_entropy(
                    outputs.float(), torch.zeros(len(images), dtype=torch.long, device=self._device)
                ).backward()
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
        if self._device == "cuda":
            torch.cuda.synchronize()

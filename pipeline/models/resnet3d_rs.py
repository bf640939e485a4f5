"""3D ResNet-RS for clips (arXiv 2109.01696) and its baseline R3D-50, as released in the TensorFlow Model Garden.

Three differences from the 2D family: a max-pool after the stem, projections without average pooling (ResNet-D is the stem alone), and
a last batch-norm gain of 1. Padding is symmetric, where TensorFlow's `same` pads an even size on one side only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from pipeline.models.resnet_rs import BLOCKS, EXPANSION, ModelError, check, is_count, is_number, stage_drop_rates

DEPTHS = (50, 101, 152, 200)
# frames that the first convolution of each block sees, per stage; the last entry repeats for further blocks
_RS_KERNELS = ((1,), (1,), (3,), (3,))
_R3D_KERNELS = ((3, 3, 3), (3, 1, 3, 1), (3, 1, 3, 1, 3, 1), (1, 3, 1))


@dataclass(frozen=True)
class ClipArchitecture:
    """Everything but the number of classes that decides names and shapes of the state dict.

    Attributes:
        depth: 50, 101, 152 or 200.
        width: multiplies all channels; 32 × width is rounded to a whole number.
        se_ratio: squeeze-excitation bottleneck in every block: 0.25 (the paper's), or 0 for none.
        self_gating: channel gates in the last block of each stage.
        resnet_d: the stem of three convolutions; False: one of 5×7×7.
        r3d: the baseline's temporal kernels, and a pool that halves the number of frames; needs depth 50.
        small_input: for clips of about 16 × 32 × 32: the stem keeps height and width, and there is no max-pool.

    Raises:
        ModelError: a field is out of range.
    """

    depth: int
    width: float = 1.0
    se_ratio: float = 0.25
    self_gating: bool = True
    resnet_d: bool = True
    r3d: bool = False
    small_input: bool = False

    def __post_init__(self) -> None:
        check("depth", self.depth, self.depth in DEPTHS, f"one of {', '.join(map(str, DEPTHS))}")
        wide = is_number(self.width) and round(32 * self.width) > 0
        check("width", self.width, wide, "a number above 1/64, such as 0.25")
        check("se_ratio", self.se_ratio, is_number(self.se_ratio) and 0 <= self.se_ratio <= 1, "from 0 to 1")
        for field in ("self_gating", "resnet_d", "r3d", "small_input"):
            check(field, getattr(self, field), isinstance(getattr(self, field), bool), "true or false")
        check("r3d", self.r3d, not self.r3d or self.depth == 50, "false at depths other than 50")

    @property
    def channels(self) -> tuple[int, ...]:
        """Inner channels of each stage's blocks; a stage puts out `EXPANSION` times as many."""
        return tuple(2 * round(32 * self.width) * 2**stage for stage in range(4))

    def temporal_kernel(self, stage: int, block: int) -> int:
        """Frames that the first convolution of a block sees. `stage` (0 to 3) and `block` count from 0."""
        kernels = (_R3D_KERNELS if self.r3d else _RS_KERNELS)[stage]
        return kernels[min(block, len(kernels) - 1)]


class SqueezeExcite3d(nn.Module):
    """Channel gates from the pooled features: 1×1×1, ReLU, 1×1×1, sigmoid (arXiv 1709.01507)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        squeezed = max(1, int(channels * ratio))
        self.fc1 = nn.Conv3d(channels, squeezed, 1)
        self.fc2 = nn.Conv3d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` (batch, channels, frames, height, width)."""
        pooled = x.mean((2, 3, 4), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(pooled), inplace=True)).sigmoid()


class SelfGating(nn.Module):
    """Channel gates from one convolution of the pooled features (S3D-G, arXiv 1712.04851)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` (batch, channels, frames, height, width)."""
        return x * self.fc(x.mean((2, 3, 4), keepdim=True)).sigmoid()


def _convolution(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> nn.Conv3d:
    """A convolution without bias that pads by half its kernel."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)


class Bottleneck3d(nn.Module):
    """k×1×1, 1×3×3 (with the spatial stride) and 1×1×1; then self-gating, squeeze-excitation, stochastic depth, add, ReLU."""

    def __init__(
        self, inputs: int, inner: int, kernel: int, stride: int, drop_rate: float, se_ratio: float, gated: bool
    ) -> None:
        super().__init__()
        outputs = inner * EXPANSION
        strides = (1, stride, stride)
        self.conv1 = _convolution(inputs, inner, (kernel, 1, 1), (1, 1, 1))
        self.bn1 = nn.BatchNorm3d(inner)
        self.conv2 = _convolution(inner, inner, (1, 3, 3), strides)
        self.bn2 = nn.BatchNorm3d(inner)
        self.conv3 = _convolution(inner, outputs, (1, 1, 1), (1, 1, 1))
        self.bn3 = nn.BatchNorm3d(outputs)
        self.gate: nn.Module = SelfGating(outputs) if gated else nn.Identity()
        self.se: nn.Module = SqueezeExcite3d(outputs, se_ratio) if se_ratio else nn.Identity()
        self.drop_path = StochasticDepth(drop_rate, "row")  # per sample, scaled by 1 / keep
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = _convolution(inputs, outputs, (1, 1, 1), strides)
            self.downsample = nn.Sequential(projection, nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, frames, h, w) → (batch, 4 × inner, frames, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.drop_path(self.se(self.gate(self.bn3(self.conv3(out)))))
        return F.relu(out + self.downsample(x), inplace=True)


def _stem(shape: ClipArchitecture) -> nn.Sequential:
    """Convolutions, each with batch norm and ReLU, that halve frames, height and width (frames alone with `small_input`)."""
    width = round(32 * shape.width)
    space = 1 if shape.small_input else 2
    layers = [(3, 2 * width, (5, 7, 7), (2, space, space))]
    if shape.resnet_d:
        layers = [
            (3, width, (5, 3, 3), (2, space, space)),
            (width, width, (1, 3, 3), (1, 1, 1)),
            (width, 2 * width, (1, 3, 3), (1, 1, 1)),
        ]
    modules: list[nn.Module] = []
    for inputs, outputs, kernel, stride in layers:
        modules += [_convolution(inputs, outputs, kernel, stride), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules)


class ResNet3dRS(nn.Module):
    """A classifier of clips; see `resnet3d_rs`."""

    def __init__(
        self, architecture: ClipArchitecture, num_classes: int, dropout: float, stochastic_depth: float
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.in_chans = 3
        self.num_classes = num_classes
        self.grad_checkpointing = False
        self.stem = _stem(architecture)
        frames = 2 if architecture.r3d else 1
        pool = nn.MaxPool3d((1, 3, 3), (frames, 2, 2), (0, 1, 1))
        self.maxpool: nn.Module = nn.Identity() if architecture.small_input else pool
        self.stages = nn.ModuleList(_stages(architecture, stochastic_depth))
        self.dropout = nn.Dropout(dropout)
        width = architecture.channels[-1] * EXPANSION
        self.fc: nn.Module = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep each block's input alone for the backward pass, and compute the block again there."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Clips (batch, frames, 3, height, width), float → logits (batch, num_classes); features without classes."""
        x = self.maxpool(self.stem(x.transpose(1, 2)))
        if self.grad_checkpointing:
            x = checkpoint_seq(list(self.stages), x, flatten=True)
        else:
            for stage in self.stages:
                x = stage(x)
        return self.fc(self.dropout(x.mean((2, 3, 4))))


def _stages(shape: ClipArchitecture, stochastic_depth: float) -> list[nn.Sequential]:
    stages = []
    inputs = 2 * round(32 * shape.width)
    for stage, (inner, count) in enumerate(zip(shape.channels, BLOCKS[shape.depth], strict=True)):
        drop_rate = stage_drop_rates(stochastic_depth)[stage]
        blocks = []
        for block in range(count):
            stride = 2 if block == 0 and stage > 0 else 1
            kernel = shape.temporal_kernel(stage, block)
            gated = shape.self_gating and block == count - 1
            blocks.append(Bottleneck3d(inputs, inner, kernel, stride, drop_rate, shape.se_ratio, gated))
            inputs = inner * EXPANSION
        stages.append(nn.Sequential(*blocks))
    return stages


def resnet3d_rs(
    depth: int,
    num_classes: int = 400,
    *,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    **architecture: Any,
) -> ResNet3dRS:
    """A 3D ResNet-RS with fresh weights.

    Args:
        depth: 50, 101, 152 or 200.
        num_classes: outputs of the classifier; 0: none, the model gives its features.
        dropout: probability after the global average pool (paper: 0.5).
        stochastic_depth: drop rate (not survival) of the last stage's blocks (paper: 0.1); see `stage_drop_rates`.
        architecture: further fields of `ClipArchitecture`: width, se_ratio, self_gating, resnet_d, r3d, small_input.

    Raises:
        ModelError: a value is out of range, or a field is unknown.
    """
    known = num_classes == 0 or is_count(num_classes)
    check("num_classes", num_classes, known, "a whole number, 0 for features alone")
    for field, rate in {"dropout": dropout, "stochastic_depth": stochastic_depth}.items():
        check(field, rate, is_number(rate) and 0 <= rate < 1, "a drop rate from 0 to below 1")
    unknown = sorted(architecture.keys() - ClipArchitecture.__dataclass_fields__.keys())
    if unknown:
        fields = "width, se_ratio, self_gating, resnet_d, r3d, small_input"
        raise ModelError(f"{unknown[0]}: no field of a 3D ResNet-RS; expected some of {fields}")
    return ResNet3dRS(ClipArchitecture(depth, **architecture), num_classes, dropout, stochastic_depth)


_R3D: dict[str, Any] = {"se_ratio": 0, "resnet_d": False, "r3d": True}


def r3d50(num_classes: int = 400, **fields: Any) -> ResNet3dRS:
    """The baseline R3D-50: a plain stem, no squeeze-excitation, temporal kernels in every other block.

    `fields`: as of `resnet3d_rs`; those that the baseline needs may be given, too.
    """
    return resnet3d_rs(50, num_classes, **{**_R3D, **fields})


CLIP_MODELS = (*(f"resnet3drs{depth}" for depth in DEPTHS), "r3d50")
"""Names of the models of clips."""


def named_clip_model(
    name: str, num_classes: int, args: Mapping[str, Any], dropout: float, stochastic_depth: float
) -> ResNet3dRS:
    """One of `CLIP_MODELS`; the other arguments as of `resnet3d_rs`. Raises ModelError as it."""
    rates = {"dropout": dropout, "stochastic_depth": stochastic_depth}
    if name == "r3d50":
        return r3d50(num_classes, **rates, **args)
    return resnet3d_rs(int(name.removeprefix("resnet3drs")), num_classes, **rates, **args)

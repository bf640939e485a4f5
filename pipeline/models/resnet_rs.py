"""ResNet-RS (arXiv 2103.07579) at any width, with the tensor names and shapes of timm's `resnetrs50 … resnetrs420`.

State dicts load both ways between this module and timm's model of the same architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

# bottlenecks per stage: from the released code; 300 and 400 from the paper's scaling study; 26 from secondary notes
BLOCKS: Mapping[int, tuple[int, ...]] = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    270: (4, 29, 53, 4),
    300: (4, 36, 54, 4),
    350: (4, 36, 72, 4),
    400: (6, 48, 72, 6),
    420: (4, 44, 87, 4),
}
EXPANSION = 4
# squeeze-excitation ratio → `create_model` arguments, JSON values, with which timm rebuilds it; 0.25 is timm's default
_TIMM_BLOCK_ARGS: Mapping[float, dict[str, Any]] = {
    0.0: {"block_args": {"attn_layer": None}},
    0.0625: {"block_args": {"attn_layer": "se"}},
    0.25: {},
}
_TIMM_DEPTHS = (50, 101, 152, 200, 270, 350, 420)
_PLAIN_STEM = 64


class ModelError(ValueError):
    """A model cannot be built, read or converted. The message names the field or file, what was expected and what to do."""


@dataclass(frozen=True)
class Architecture:
    """Everything but the number of classes that decides names and shapes of the state dict.

    Attributes:
        depth: a key of `BLOCKS`.
        width: multiplies all channels, the deep stem's included; 32 × width is rounded to a whole number.
        blocks: bottlenecks in each of the four stages; None: the depth's own.
        in_chans: channels of the input images.
        se_ratio: squeeze-excitation bottleneck: 0.25 (the paper's), 0.0625, or 0 for none.
        resnet_d: False, for the paper's additive study, gives the plain ResNet's stem (one 7×7 convolution with 64 channels at any
            width, and a max-pool) and projection (1×1 with stride).
        stem: channels of the deep stem's first convolution; None: 32 × width. With 32 the deep stem is as wide as the plain one.

    Raises:
        ModelError: a field is out of range.
    """

    depth: int
    width: float = 1.0
    blocks: tuple[int, ...] | None = None
    in_chans: int = 3
    se_ratio: float = 0.25
    resnet_d: bool = True
    stem: int | None = None

    def __post_init__(self) -> None:
        check("depth", self.depth, self.depth in BLOCKS, f"one of {', '.join(map(str, BLOCKS))}")
        check("width", self.width, is_number(self.width) and self.channels[0] > 0, "a number above 1/64, such as 0.25")
        check("in_chans", self.in_chans, is_count(self.in_chans), "a whole number above 0")
        ratios = ", ".join(map(str, _TIMM_BLOCK_ARGS))
        known = is_number(self.se_ratio) and self.se_ratio in _TIMM_BLOCK_ARGS
        check("se_ratio", self.se_ratio, known, f"one of {ratios} (those timm can rebuild)")
        check("stem", self.stem, self.stem is None or is_count(self.stem), "a whole number above 0, such as 32")
        check("resnet_d", self.resnet_d, isinstance(self.resnet_d, bool), "true or false")
        if self.blocks is not None:
            valid = isinstance(self.blocks, list | tuple) and len(self.blocks) == 4 and all(map(is_count, self.blocks))
            check("blocks", self.blocks, valid, "four whole numbers above 0, such as [3, 4, 6, 3]")
            object.__setattr__(self, "blocks", tuple(self.blocks))  # YAML gives a list

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Number of bottlenecks in each stage."""
        return self.blocks or BLOCKS[self.depth]

    @property
    def stem_width(self) -> int:
        """Channels of the stem's first convolution."""
        return round(32 * self.width) if self.stem is None else self.stem

    @property
    def channels(self) -> tuple[int, ...]:
        """Inner channels of each stage's bottlenecks; a stage puts out `EXPANSION` times as many."""
        return tuple(2 * round(32 * self.width) * 2**stage for stage in range(4))


def check(field: str, value: object, valid: bool, expected: str) -> None:
    """Raise a ModelError that names the field, what was expected and what came, unless `valid`."""
    if not valid:
        raise ModelError(f"{field}: must be {expected}, but got {value!r}")


def is_number(value: object) -> bool:
    """True for a finite int or float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def is_count(value: object) -> bool:
    """True for an int above 0; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class SqueezeExcite(nn.Module):
    """Channel gates from the pooled features: 1×1, ReLU, 1×1, sigmoid (arXiv 1709.01507)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        squeezed = max(8, int(channels * ratio + 4) // 8 * 8)  # to a multiple of 8, as in timm
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` (batch, channels, height, width)."""
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(pooled), inplace=True)).sigmoid()


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions; then squeeze-excitation, stochastic depth, add, ReLU."""

    def __init__(self, inputs: int, inner: int, stride: int, drop_rate: float, architecture: Architecture) -> None:
        super().__init__()
        outputs = inner * EXPANSION
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        ratio = architecture.se_ratio
        self.se: nn.Module = SqueezeExcite(outputs, ratio) if ratio else nn.Identity()
        self.drop_path = StochasticDepth(drop_rate, "row")  # per sample, scaled by 1 / keep
        changes_shape = stride != 1 or inputs != outputs
        self.downsample = (
            _projection(inputs, outputs, stride, architecture.resnet_d) if changes_shape else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, h, w) → (batch, 4 × inner, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.drop_path(self.se(self.bn3(self.conv3(out))))
        return F.relu(out + self.downsample(x), inplace=True)


def _projection(inputs: int, outputs: int, stride: int, resnet_d: bool) -> nn.Sequential:
    """The shortcut where the shape changes. ResNet-D strides by average pooling (arXiv 1812.01187)."""
    norm = nn.BatchNorm2d(outputs)
    if not resnet_d:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm)
    pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride != 1 else nn.Identity()
    return nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), norm)


def _deep_stem(in_chans: int, width: int) -> nn.Sequential:
    """Three 3×3 convolutions, the first with stride 2. The last one's norm and ReLU are outside, as in timm."""
    return nn.Sequential(
        nn.Conv2d(in_chans, width, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
    )


def _strided_convolution(channels: int) -> nn.Sequential:
    """ResNet-RS's replacement for the max-pool."""
    convolution = nn.Conv2d(channels, channels, 3, 2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def stage_drop_rates(stochastic_depth: float) -> tuple[float, ...]:
    """Drop rate of every block in stages 1 to 4: constant in a stage, the full rate in the last (released code)."""
    return tuple(stochastic_depth * share / 5 for share in (2, 3, 4, 5))


class ResNetRS(nn.Module):
    """A ResNet-RS classifier; see `resnet_rs`. Stages and norms have timm's names (`maxpool` holds a convolution)."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, architecture: Architecture, num_classes: int, dropout: float, stochastic_depth: float) -> None:
        super().__init__()
        self.architecture = architecture
        self.in_chans = architecture.in_chans
        self.num_classes = num_classes
        self.grad_checkpointing = False
        self._add_stem()
        self._add_stages(stochastic_depth)
        self.dropout = nn.Dropout(dropout)
        width = architecture.channels[-1] * EXPANSION
        self.fc: nn.Module = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self._initialize()

    def _add_stem(self) -> None:
        width = self.architecture.stem_width
        plain = not self.architecture.resnet_d
        self.stem_channels = _PLAIN_STEM if plain else 2 * width
        plain_convolution = nn.Conv2d(self.in_chans, _PLAIN_STEM, 7, 2, padding=3, bias=False)
        self.conv1: nn.Module = plain_convolution if plain else _deep_stem(self.in_chans, width)
        self.bn1 = nn.BatchNorm2d(self.stem_channels)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1) if plain else _strided_convolution(self.stem_channels)

    def _add_stages(self, stochastic_depth: float) -> None:
        shape = self.architecture
        inputs = self.stem_channels
        stages = zip(shape.channels, shape.stage_blocks, stage_drop_rates(stochastic_depth), strict=True)
        for stage, (inner, count, drop_rate) in enumerate(stages, start=1):
            blocks = []
            for block in range(count):
                stride = 2 if block == 0 and stage > 1 else 1
                blocks.append(Bottleneck(inputs, inner, stride, drop_rate, shape))
                inputs = inner * EXPANSION
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # every block starts as its shortcut

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep each block's input alone for the backward pass, and compute the block again there; under timm's name for it."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (batch, in_chans, height, width), float → logits (batch, num_classes); features without classes."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        if self.grad_checkpointing:
            x = checkpoint_seq(stages, x, flatten=True)
        else:
            for stage in stages:
                x = stage(x)
        return self.fc(self.dropout(x.mean((2, 3))))


def resnet_rs(
    depth: int,
    num_classes: int = 1000,
    *,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    **architecture: Any,
) -> ResNetRS:
    """A ResNet-RS with fresh weights.

    Args:
        depth: 26, 50, 101, 152, 200, 270, 300, 350, 400 or 420.
        num_classes: outputs of the classifier; 0: none, the model gives its features, as timm's do.
        dropout: probability after the global average pool.
        stochastic_depth: drop rate (not survival) of the last stage's blocks; see `stage_drop_rates`.
        architecture: further fields of `Architecture`: width, blocks, in_chans, se_ratio, resnet_d, stem.

    Raises:
        ModelError: a value is out of range.
    """
    check("num_classes", num_classes, num_classes == 0 or is_count(num_classes), "a whole number, 0 for features alone")
    for field, rate in {"dropout": dropout, "stochastic_depth": stochastic_depth}.items():
        check(field, rate, is_number(rate) and 0 <= rate < 1, "a drop rate from 0 to below 1")
    return ResNetRS(Architecture(depth, **architecture), num_classes, dropout, stochastic_depth)


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Set the last batch's weight in the running statistics of all batch norms (torch's `momentum`).

    ResNet-RS trains with 1.0: each step's statistics are its batch's, and the EMA of the weights averages them. torch's default is 0.1.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def timm_args(architecture: Architecture) -> tuple[str, dict[str, Any]]:
    """timm's model name and `create_model` arguments (JSON values) that rebuild the same network."""
    name = f"resnetrs{architecture.depth if architecture.depth in _TIMM_DEPTHS else 50}"
    args: dict[str, Any] = dict(_TIMM_BLOCK_ARGS[architecture.se_ratio])
    if architecture.stage_blocks != BLOCKS[int(name.removeprefix("resnetrs"))]:
        args["layers"] = list(architecture.stage_blocks)
    if (architecture.channels[0], architecture.stem_width) != (64, 32):
        args |= {"channels": list(architecture.channels), "stem_width": architecture.stem_width}
    if architecture.in_chans != 3:
        args["in_chans"] = architecture.in_chans
    if not architecture.resnet_d:
        args |= {"stem_type": "", "replace_stem_pool": False, "avg_down": False}
    return name, args

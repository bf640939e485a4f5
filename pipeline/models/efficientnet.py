"""EfficientNet-B0 … B7 (arXiv 1905.11946) and EfficientNet-RS (arXiv 2103.07579, figure 5), both by timm.

    tf_efficientnet_b0 … b7, efficientnet_b0 … b7    timm's: as released (padding as TensorFlow's), and with torch's padding
    efficientnetrs_b0 … b7                           the network of tf_efficientnet_b0 … b7 at an image size of one's own choice

EfficientNet-RS keeps width and depth; what it changes is the image size and, with it, RandAugment (`pipeline/core/model_rules.py`).
Stochastic depth grows linearly from block to block, and dropout is before the classifier, as timm has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """What is published of a B0 … B7 (released code).

    Attributes:
        image_size: pixels.
        parameters, multiply_adds: in millions, and in billions of one image at that size.
        auto_augment, rand_augment: top-1 on ImageNet in percent, by what the training images were distorted with.
    """

    image_size: int
    parameters: float
    multiply_adds: float
    auto_augment: float
    rand_augment: float | None = None


PUBLISHED: Mapping[int, Published] = {
    0: Published(224, 5.29, 0.40, 77.1),
    1: Published(240, 7.79, 0.71, 79.1),
    2: Published(260, 9.11, 1.02, 80.1),
    3: Published(300, 12.23, 1.87, 81.6),
    4: Published(380, 19.34, 4.49, 82.9),
    5: Published(456, 30.39, 10.46, 83.6, 83.7),
    6: Published(528, 43.04, 19.4, 84.0),
    7: Published(600, 66.35, 38.3, 84.3, 84.7),
}
_RS = "efficientnetrs_"
NAMES = tuple(f"{prefix}b{size}" for prefix in (_RS, "tf_efficientnet_", "efficientnet_") for size in PUBLISHED)


def timm_name(name: str) -> str:
    """timm's name of the network: of `efficientnetrs_b0`, `tf_efficientnet_b0`; the others are timm's already."""
    return f"tf_efficientnet_{name.removeprefix(_RS)}" if name.startswith(_RS) else name

"""Fields that follow from the name of a model, where nobody has set them.

EfficientNet-RS (arXiv 2103.07579, section 7.1) distorts small images less: RandAugment's magnitude follows the image size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pipeline.core.config import Loaded

_ROLES: tuple[Literal["teacher", "student"], ...] = ("teacher", "student")
_FIELD = "augment.magnitude"


def efficientnet_rs_magnitude(image_size: int) -> float:
    """RandAugment's magnitude: 10 up to 224 pixels, 15 up to 320, 20 above."""
    return 10.0 if image_size <= 224 else 15.0 if image_size <= 320 else 20.0


def follow_models(loaded: Loaded) -> tuple[Loaded, list[str]]:
    """Give EfficientNet-RS its magnitude, after all that decides on the image size; RUN/config.yaml leaves it out, so that it follows.

    A recipe's magnitude is for its own models, so it does not count as set.

    Returns:
        The configuration, and a line for each value that changed.
    """
    lines = []
    for role in _ROLES:
        section, field = loaded.config.training(role), f"{role}.{_FIELD}"
        magnitude = efficientnet_rs_magnitude(section.image_size)
        follows = section.model.startswith("efficientnetrs_") and loaded.is_unset(field)
        if follows and magnitude != section.augment.magnitude:
            augment = section.augment.model_copy(update={"magnitude": magnitude})
            config = loaded.config.model_copy(update={role: section.model_copy(update={"augment": augment})})
            loaded = replace(loaded, config=config)
            lines.append(f"{field}={magnitude:g}, as EfficientNet-RS has it at {section.image_size} px")
        if follows:
            loaded = replace(loaded, followed=loaded.followed | {field})
    return loaded, lines

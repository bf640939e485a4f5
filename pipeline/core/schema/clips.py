"""How `data.modality=clip` and the section `clip` reach the trainings, and what does not go together with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.core.schema.sections import DataConfig, EvaluateConfig, LabelConfig
from pipeline.core.schema.training import ClipConfig, TrainConfig

MODELS = ("resnet3drs50", "resnet3drs101", "resnet3drs152", "resnet3drs200", "r3d50")
"""Models of clips."""

_SECTIONS = ("pretrain", "teacher", "student")


def share_clip(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values before they are checked, with `clip` and `clip.size` in each training; without clips, in none."""
    data, clip = values.get("data", {}), values.get("clip", {})
    trainings = {name: values.get(name, {}) for name in _SECTIONS}
    if not all(isinstance(section, dict) for section in (data, clip, *trainings.values())):
        return values
    if data.get("modality", "image") != "clip":
        others = {
            name: {key: value for key, value in section.items() if key != "clip"} for name, section in trainings.items()
        }
        return values | {name: section for name, section in others.items() if name in values}
    size = {} if clip.get("size") is None else {"image_size": clip["size"]}
    return values | {name: section | {"clip": clip} | size for name, section in trainings.items()}


def clip_problems(
    data: DataConfig,
    label: LabelConfig,
    evaluate: EvaluateConfig,
    clip: ClipConfig,
    trainings: Mapping[str, TrainConfig],
) -> Iterator[str]:
    """Yield a sentence per set of fields that do not go together."""
    if data.modality == "image":
        if clip != ClipConfig() or label.clips * label.crops > 1:
            yield "clip, label.clips and label.crops are for videos; give data.modality=clip, or leave them out"
        return
    if label.views > 1:
        yield f"label.views={label.views}: for images; of videos give label.clips and label.crops"
    if label.augment is not None:
        yield "label.augment: for images; leave it out with data.modality=clip"
    if evaluate.robustness_images:
        yield f"evaluate.robustness_images={evaluate.robustness_images}: corruptions are for images; leave it out"
    for name, section in trainings.items():
        yield from _training_problems(name, section)


def _training_problems(name: str, section: TrainConfig) -> Iterator[str]:
    if section.model not in MODELS and name != "pretrain":
        yield f"{name}.model={section.model}: expected one for clips with data.modality=clip: {', '.join(MODELS)}"
    for field in ("channels_last", "mixup"):
        if getattr(section, field):
            yield f"{name}.{field}={getattr(section, field)}: for images; leave it out with data.modality=clip"
    if section.augment_on == "device":
        yield f"{name}.augment_on=device: for images; give host with data.modality=clip"
    augment = section.augment
    jitter = ("rotation", "zoom", "translate", "shear", "brightness", "contrast", "cutout")
    if given := [field for field in jitter if getattr(augment, field)]:
        yield f"{name}.augment.{given[0]}: for images; clips have crop, flip and RandAugment; leave it out"

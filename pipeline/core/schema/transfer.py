"""Fields of stage=transfer: which models are compared, on which data sets, and how."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from pipeline.core.schema.section import Patterns, Positive, PositiveFraction, Section, runtime, setting
from pipeline.core.schema.training import AugmentConfig

Method = Literal["linear", "knn", "finetune"]
SPLITS = ("labeled", "validation", "test")  # of a set
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


def _check_names(value: dict[str, Any]) -> dict[str, Any]:
    if bad := [name for name in value if not _FOLDER_NAME.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} names a folder: expected letters, digits and . _ + -, a letter or digit first")
    return value


def _from_text(field: str) -> BeforeValidator:
    """A text stands for a mapping with this one field."""
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str) else value)


def _not_empty(value: list[Any]) -> list[Any]:
    if not value or len(set(value)) < len(value):
        raise ValueError("expected one value or more, none twice")
    return value


Grid = Annotated[list[Positive], AfterValidator(_not_empty)]
Counts = Annotated[list[Annotated[int, Field(ge=1)]], AfterValidator(_not_empty)]


class BackboneConfig(Section):
    """A model whose features are compared. What is null is as the weights record it, or as `teacher` has it for a file or `random`."""

    weights: str = Field(
        min_length=1,
        description="a folder of weights, of a stage or of a run (its newest student, teacher or pretraining), a .safetensors file, "
        "the name of a timm model with pretrained weights, or random; {seed} stands for each seed",
    )
    model: str | None = None
    model_args: dict[str, Any] | None = None
    image_size: int | None = Field(None, ge=8)
    crop_pct: PositiveFraction | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None


class SetConfig(Section):
    """A labeled data set: shards of each split. `folder` stands for folder/labeled/*.tar and so on."""

    folder: str | None = None
    labeled: Patterns = Field([])
    validation: Patterns = Field([])
    test: Patterns = Field([])

    def patterns(self, split: str) -> list[str]:
        """The shards of `labeled`, `validation` or `test`."""
        given: list[str] = getattr(self, split)
        return given or ([f"{self.folder.rstrip('/')}/{split}/*.tar"] if self.folder else [])


class FinetuneAugmentConfig(AugmentConfig):
    """Input noise of a fine-tuning: crop and flip alone, as published (SimCLR, arXiv 2002.05709, B.8.2)."""

    num_ops: int = setting(0, "RandAugment: operations per image (0: none)", ge=0)


class FinetuneConfig(Section):
    """Fine-tuning of all layers with a fresh head; validation images choose among learning rates × epochs × weight decays."""

    lr: Grid = setting([0.01, 0.1], "peak learning rates per 256 images; a cosine to 0")
    epochs: Grid = setting([10, 30], "passes over the labeled images")
    weight_decay: Annotated[list[Annotated[float, Field(ge=0)]], AfterValidator(_not_empty)] = setting(
        [4e-5], "on all parameters except those of batch norm"
    )
    batch_size: int = setting(64, "images per step", ge=1)
    augment: FinetuneAugmentConfig = setting(FinetuneAugmentConfig(), "input noise")
    loader_workers: int = runtime(1, "loading processes of a training", ge=0)


class TransferConfig(Section):
    """Which features stage=transfer compares, on which data sets. `backbones` and `sets` map names to what the names stand for."""

    backbones: Annotated[dict[str, Annotated[BackboneConfig, _from_text("weights")]], AfterValidator(_check_names)] = (
        runtime({}, "name → weights, as transfer.backbones.rs=FOLDER; or a mapping with weights and further fields")
    )
    sets: Annotated[dict[str, Annotated[SetConfig, _from_text("folder")]], AfterValidator(_check_names)] = runtime(
        {}, "name → folder with labeled/, validation/ and test/; or a mapping that gives the shards of each"
    )
    methods: list[Method] = runtime(["linear", "knn"], "some of linear, knn, finetune")
    seeds: int = runtime(
        3, "seeds seed, seed + 1, …, where a seed changes anything: random weights, {seed}, finetune", ge=1
    )
    batch_size: int = setting(256, "images per forward pass", ge=1)
    l2: Grid = setting(
        [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        "linear: weights of ½‖w‖² beside the mean cross-entropy, chosen on validation images",
    )
    knn_k: Counts = setting([1, 5, 20, 200], "knn: numbers of neighbours, chosen on validation images")
    knn_temperature: Grid = setting([0.05, 0.1, 0.5], "knn: temperatures of the votes, chosen on validation images")
    finetune: FinetuneConfig = setting(FinetuneConfig(), "the grid of methods=[finetune]")

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, value: list[Method]) -> list[Method]:
        if not value:
            raise ValueError("expected some of linear, knn, finetune")
        return list(dict.fromkeys(value))

    @field_validator("backbones")
    @classmethod
    def _check_backbones(cls, value: dict[str, BackboneConfig]) -> dict[str, BackboneConfig]:
        for name, entry in value.items():
            if bad := re.findall(r"(?<!\$)\{(?!seed\})[^}]*\}?", entry.weights):
                raise ValueError(f"{name}: {bad[0]} in {entry.weights!r}: expected {{seed}} or no braces")
        return value

    @field_validator("sets")
    @classmethod
    def _check_sets(cls, value: dict[str, SetConfig]) -> dict[str, SetConfig]:
        for name, entry in value.items():
            if missing := [split for split in SPLITS if not entry.patterns(split)]:
                raise ValueError(
                    f"{name}: no shards for {', '.join(missing)}; give a folder, or patterns for each split"
                )
        return value

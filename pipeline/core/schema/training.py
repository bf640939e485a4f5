"""Fields of teacher and student: a model, its noise, and its training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from data.settings import UsageError
from pipeline.core.schema.section import BY_DIGEST, RESUMABLE, RUNTIME, Fraction, Positive, PositiveFraction, Section

_MAX_SHARE_OF_LAST_BATCH = 0.5


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("expected two numbers, the smaller first")
    return value


class AugmentConfig(Section):
    """Input noise, in training only."""

    crop: Literal["random_resized_crop", "pad_crop"] = Field(
        "random_resized_crop", description="how to bring an image to image_size"
    )
    crop_scale: Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(_check_range)] = Field(
        (0.08, 1.0), description="area range of random_resized_crop"
    )
    crop_ratio: Annotated[tuple[Positive, Positive], AfterValidator(_check_range)] = Field(
        (3 / 4, 4 / 3), description="aspect range of random_resized_crop"
    )
    pad: int = Field(4, ge=0, description="pixels of padding for pad_crop")
    hflip: Fraction = Field(0.5, description="probability of a horizontal flip")
    num_ops: int = Field(2, ge=0, description="RandAugment: operations per image (0: none)")
    magnitude: float = Field(
        15, ge=0, le=30, description="RandAugment: magnitude on the published scale, not clipped at 10"
    )
    rotation: float = Field(0, ge=0, le=180, description="affine jitter: degrees, uniform in ±")
    zoom: float = Field(0, ge=0, lt=1, description="affine jitter: scale, uniform in 1 ±")
    translate: float = Field(0, ge=0, lt=1, description="affine jitter: fraction of the side, uniform in ±")
    shear: float = Field(0, ge=0, le=1, description="affine jitter: shear factor, uniform in ±")
    brightness: float = Field(0, ge=0, le=1, description="brightness factor, uniform in 1 ±")
    contrast: float = Field(0, ge=0, le=1, description="contrast factor, uniform in 1 ±")
    cutout: int = Field(0, ge=0, description="side in pixels of a grey square at a random place (0: none)")


class TrainConfig(Section):
    """A model and its training. Defaults: ResNet-RS (arXiv 2103.07579)."""

    model: str = Field("resnetrs50", description="resnetrs26 … resnetrs420, or any timm model")
    model_args: dict[str, Any] = Field({}, description="for ResNet-RS: width, blocks; for a timm model: its arguments")
    image_size: int = Field(224, ge=8, description="pixels")
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="evaluation: side of the centre crop as a fraction of the resized side"
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="per-channel mean of pixels in 0 to 1")
    std: tuple[Positive, Positive, Positive] = Field(
        (0.229, 0.224, 0.225), description="per-channel deviation of pixels in 0 to 1"
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="input noise")
    augment_on: Literal["host", "device"] = Field(
        "host",
        description="device: add noise to whole batches on the model's device, all but crop, flip and affine jitter",
    )
    decoder: Literal["fast", "pillow"] = Field(
        "pillow",
        description="for training; fast: decode JPEGs that are four times too large for their crop at reduced size",
    )
    epochs: float = Field(350, gt=0, description="passes over the labeled images")
    batch_size: int = Field(4096, ge=1, description="images per step over all workers, including pseudo-labeled ones")
    accumulate_steps: int = Field(
        1,
        ge=1,
        description="micro-batches whose gradients are added up to one step of batch_size images, to fit memory; batch norm sees each "
        "by itself",
        json_schema_extra=RESUMABLE,
    )
    checkpoint_activations: bool = Field(
        False,
        description="keep the input of each block alone, and compute it again in the backward pass: less memory, a third more time",
        json_schema_extra=RUNTIME,
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate per 256 images of batch_size")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum (not Nesterov)")
    weight_decay: float = Field(4e-5, ge=0, description="on all parameters except those of batch norm")
    warmup_epochs: float = Field(5, ge=0, description="linear warm-up from 0")
    lr_schedule: Literal["cosine", "step"] = Field(
        "cosine", description="after the warm-up; step: divide by 10 after 1/3, 2/3 and 8/9 of the training"
    )
    label_smoothing: Fraction = 0.1
    mixup: float = Field(0, ge=0, description="alpha of mixup's Beta distribution (0: none)")
    dropout: Fraction = Field(0.25, description="after global pooling")
    stochastic_depth: Fraction = Field(0, description="drop rate of the last stage's blocks")
    ema_decay: Fraction = Field(0.9999, description="limit of min(decay, (1+t)/(10+t))")
    bn_momentum: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the newest batch, as in torch; 1.0: statistics of the last batch, averaged by the EMA",
    )
    eval_every_epochs: float = Field(
        5, gt=0, description="epochs between measurements of the EMA weights' validation accuracy"
    )
    eval_batch_size: int = Field(
        256,
        ge=1,
        description="images per forward pass on data.validation: in the training, to calibrate and to compare",
        json_schema_extra=RESUMABLE,
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast, for GPUs; for training, labeling and evaluation"
    )
    channels_last: bool = False
    compile: bool = Field(False, description="torch.compile")
    workers: int = Field(
        1, ge=1, description="training processes; two or more run under Ray Train", json_schema_extra=RESUMABLE
    )
    max_failures: int = Field(
        3, ge=0, description="how often to restart lost training processes", json_schema_extra=RUNTIME
    )
    loader_workers: int = Field(
        1, ge=0, description="loading processes per training process", json_schema_extra=RUNTIME
    )
    checkpoint_every_s: float = Field(60, ge=0, description="seconds between checkpoints", json_schema_extra=RUNTIME)
    keep_checkpoints: int = Field(
        2, ge=1, description="newest checkpoints to keep, besides the best one", json_schema_extra=RUNTIME
    )
    log_every_steps: int = Field(50, ge=1, description="steps between lines of metrics.jsonl")

    @property
    def labeled_per_step(self) -> int:
        """Labeled images per training step."""
        return self.batch_size

    def require_averaged_statistics(self, name: str) -> None:
        """Raise UsageError when the batch-norm statistics of the EMA weights would be mostly those of one batch.

        The last batch has the share `bn_momentum` of the running statistics, and these the share 1 - `ema_decay` of the EMA's. Checked
        before a training, not when a configuration is loaded, so that finished runs stay readable.

        Args:
            name: the section, for the message.
        """
        share = self.bn_momentum * (1 - self.ema_decay)
        if share > _MAX_SHARE_OF_LAST_BATCH:
            raise UsageError(
                f"{name}.bn_momentum={self.bn_momentum:g} with {name}.ema_decay={self.ema_decay:g}: {share:.0%} of the batch-norm "
                f"statistics for evaluation and labeling would be the last batch's; give {name}.bn_momentum=0.1, or "
                f"an average over many steps, as {name}.ema_decay=0.9999"
            )


class TeacherConfig(TrainConfig):
    """The teacher: trained here, or elsewhere (`weights`)."""

    weights: str | None = Field(
        None, description="weights trained elsewhere: a file, a weights folder, or 'pretrained' (timm's)"
    )
    class_names: str | None = Field(
        None,
        description="of `weights`: text file of class names, one a line, in the order of its outputs; they are reordered to the data's",
        json_schema_extra=BY_DIGEST,
    )
    ensemble: list[str] = Field(
        [],
        description="folders of further teachers (gen-N/teacher or gen-N/student of runs); labels are the mean over all",
        json_schema_extra=BY_DIGEST,
    )
    expected_top1: Fraction | None = Field(
        None,
        description="top-1 of `weights` on the validation images; checked before labeling",
        json_schema_extra=RUNTIME,
    )
    accuracy_tolerance: Fraction = Field(
        0.02, description="how far below expected_top1 the check may find the top-1", json_schema_extra=RUNTIME
    )


class StudentConfig(TrainConfig):
    """The student: noised, trained on labeled and pseudo-labeled images together."""

    unlabeled_ratio: int = Field(
        3, ge=0, description="pseudo-labeled images per labeled one in every batch (0: labeled images alone)"
    )
    pseudo_labels: Literal["soft", "hard"] = "soft"
    from_teacher: bool = Field(
        False,
        description="start from the teacher's weights: the same model, or a ResNet-RS with more blocks and the same width",
    )
    pseudo_label_temperature: float = Field(1.0, gt=0, description="below 1 sharpens soft pseudo-labels")
    fix_resolution_epochs: float = Field(
        0,
        ge=0,
        description="after the training: epochs of the last layers at a larger image size, on labeled images without noise",
    )
    fix_resolution_image_size: int | None = Field(
        None, ge=8, description="image size of those epochs and of inference, in pixels"
    )
    fix_resolution_lr: float = Field(
        0.01, gt=0, description="peak learning rate of those epochs per 256 images; a cosine to 0"
    )

    @property
    def labeled_per_step(self) -> int:
        """Labeled images per training step; the others of the batch are pseudo-labeled."""
        return self.batch_size // (1 + self.unlabeled_ratio)

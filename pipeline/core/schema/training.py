"""Fields of pretraining, teacher and student: a model, its noise, and its training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from data.settings import UsageError
from pipeline.core.schema.section import (
    Fraction,
    Patterns,
    Positive,
    PositiveFraction,
    Section,
    added,
    by_digest,
    reporting,
    resumable,
    runtime,
    setting,
)

_MAX_SHARE_OF_LAST_BATCH = 0.5


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("expected two numbers, the smaller first")
    return value


class ClipConfig(Section):
    """The clips of a video that a model sees, with data.modality=clip."""

    frames: int = setting(16, "frames of a clip", ge=1, le=1024)
    stride: int = setting(1, "frames of the video from one frame of a clip to the next", ge=1)
    size: int | None = setting(None, "side of the frames, pixels: image_size of teacher, student and pretrain", ge=8)


class AugmentConfig(Section):
    """Input noise, in training only."""

    crop: Literal["random_resized_crop", "pad_crop"] = setting(
        "random_resized_crop", "how to bring an image to image_size"
    )
    crop_scale: Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(_check_range)] = setting(
        (0.08, 1.0), "area range of random_resized_crop"
    )
    crop_ratio: Annotated[tuple[Positive, Positive], AfterValidator(_check_range)] = setting(
        (3 / 4, 4 / 3), "aspect range of random_resized_crop"
    )
    pad: int = setting(4, "pixels of padding for pad_crop", ge=0)
    hflip: Fraction = setting(0.5, "probability of a horizontal flip")
    num_ops: int = setting(2, "RandAugment: operations per image (0: none)", ge=0)
    magnitude: float = setting(15, "RandAugment: magnitude on the published scale, not clipped at 10", ge=0, le=30)
    rotation: float = setting(0, "affine jitter: degrees, uniform in ±", ge=0, le=180)
    zoom: float = setting(0, "affine jitter: scale, uniform in 1 ±", ge=0, lt=1)
    translate: float = setting(0, "affine jitter: fraction of the side, uniform in ±", ge=0, lt=1)
    shear: float = setting(0, "affine jitter: shear factor, uniform in ±", ge=0, le=1)
    brightness: float = setting(0, "brightness factor, uniform in 1 ±", ge=0, le=1)
    contrast: float = setting(0, "contrast factor, uniform in 1 ±", ge=0, le=1)
    cutout: int = setting(0, "side in pixels of a grey square at a random place (0: none)", ge=0)


class ViewsConfig(AugmentConfig):
    """The views of an image that a self-supervised training compares. Defaults: SimCLR on ImageNet (arXiv 2002.05709, appendix A).

    After crop and flip, in this order: colour jitter, grey, blur, solarize. What changes colours alone is left out for grey images.
    """

    num_ops: int = setting(0, "RandAugment: operations per view (0: none)", ge=0)
    color_jitter: float = setting(
        1.0,
        "strength s: brightness, contrast and saturation by factors uniform in 1 ± 0.8 s, hue by ± 0.2 s of its circle, in random "
        "order; 0.5 for small images (0: none)",
        ge=0,
        le=2,
    )
    color_jitter_prob: Fraction = setting(0.8, "probability of the colour jitter")
    grey: Fraction = setting(0.2, "probability of a view in grey")
    blur: Annotated[tuple[Fraction, ...], Field(min_length=1)] = setting(
        (0.5,),
        "probability of a Gaussian blur, for each view in turn: sigma uniform in 0.1 to 2 pixels, kernel a tenth of image_size (none "
        "below 20 pixels); BYOL: [1.0, 0.1]",
    )
    solarize: Annotated[tuple[Fraction, ...], Field(min_length=1)] = setting(
        (0.0,), "probability that levels from 128 up are inverted, for each view in turn; BYOL: [0.0, 0.2]"
    )


class TrainConfig(Section):
    """A model and its training. Defaults: ResNet-RS (arXiv 2103.07579)."""

    model: str = setting(
        "resnetrs50",
        "resnetrs26 … resnetrs420, efficientnetrs_b0 … b7, or any timm model; for clips resnet3drs50, 101, 152, 200 or r3d50",
    )
    model_args: dict[str, Any] = setting({}, "for ResNet-RS: width, blocks; for a timm model: its arguments")
    clip: ClipConfig | None = added(
        None, "clips that the model sees; taken from clip and data.modality, do not give it"
    )
    init: str | None = by_digest(
        None,
        "begin with these weights, with a new head where the classes differ: a file (.safetensors, .pth), a folder of weights, of a "
        "stage or of a run, `pretrained` (timm's), `pretrain` (of this run's stage=pretrain); the student's also: `teacher`",
    )
    init_head_lr_scale: float = added(1.0, "with init: learning rate of the head as a multiple of lr", gt=0)
    freeze_backbone_epochs: float = added(
        0, "with init: first epochs, in which only the head changes; all else stays, also batch norm statistics", ge=0
    )
    image_size: int = setting(
        224, "pixels; with init, this and the four fields below default to those of its weights", ge=8
    )
    crop_pct: float = setting(
        0.875, "evaluation: side of the centre crop as a fraction of the resized side", gt=0, le=1
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = setting((0.485, 0.456, 0.406), "per-channel mean of pixels in 0 to 1")
    std: tuple[Positive, Positive, Positive] = setting(
        (0.229, 0.224, 0.225), "per-channel deviation of pixels in 0 to 1"
    )
    augment: AugmentConfig = setting(AugmentConfig(), "input noise")
    augment_on: Literal["host", "device"] = setting(
        "host", "device: add noise to whole batches on the model's device, all but crop, flip and affine jitter"
    )
    decoder: Literal["fast", "pillow"] = setting(
        "pillow", "for training; fast: decode JPEGs that are four times too large for their crop at reduced size"
    )
    epochs: float = setting(350, "passes over the labeled images", gt=0)
    batch_size: int = setting(4096, "images per step over all workers, including pseudo-labeled ones", ge=1)
    accumulate_steps: int = resumable(
        1,
        "micro-batches whose gradients are added up to one step of batch_size images, to fit memory; batch norm sees each by itself",
        ge=1,
    )
    checkpoint_activations: bool = runtime(
        False,
        "keep the input of each block alone, and compute it again in the backward pass: less memory, a third more time",
    )
    optimizer: Literal["momentum", "nesterov", "rmsprop", "adamw", "lars"] = added(
        "momentum", "momentum and nesterov: SGD; rmsprop: TensorFlow's, as for EfficientNet; adamw; lars: for SimCLR"
    )
    lr: float = setting(
        0.1, "peak learning rate per 256 images of batch_size; rmsprop needs about 0.016, adamw about 0.001", gt=0
    )
    momentum: float = setting(0.9, "of SGD, rmsprop and lars; of adamw: beta 1", ge=0, lt=1)
    weight_decay: float = setting(
        4e-5, "on all parameters except those of batch norm; with lars also except biases; with adamw decoupled", ge=0
    )
    warmup_epochs: float = setting(5, "linear warm-up from 0", ge=0)
    lr_schedule: Literal["cosine", "step", "exponential"] = setting(
        "cosine",
        "after the warm-up; step: divide by 10 after 1/3, 2/3 and 8/9 of the training; exponential: times 0.97 every 2.4 epochs, as "
        "for EfficientNet",
    )
    label_smoothing: Fraction = 0.1
    mixup: float = setting(0, "alpha of mixup's Beta distribution (0: none)", ge=0)
    dropout: Fraction = setting(0.25, "after global pooling")
    stochastic_depth: Fraction = setting(0, "drop rate of the last stage's blocks")
    ema_decay: Fraction = setting(0.9999, "limit of min(decay, (1+t)/(10+t))")
    bn_momentum: float = setting(
        1.0,
        "share of the newest batch, as in torch; 1.0: statistics of the last batch, averaged by the EMA",
        gt=0,
        le=1,
    )
    eval_every_epochs: float = reporting(5, "epochs between measurements of the EMA weights' validation accuracy", gt=0)
    eval_batch_size: int = resumable(
        256, "images per forward pass on data.validation: in the training, to calibrate and to compare", ge=1
    )
    precision: Literal["fp32", "tf32", "bf16"] = setting(
        "fp32",
        "of training, labeling and evaluation; bf16: autocast; fp32 is torch's, with TF32 in convolutions on GPUs; tf32: in the "
        "matrix products of training, too",
    )
    channels_last: bool = False
    compile: bool = setting(False, "torch.compile")
    workers: int = resumable(1, "training processes; two or more run under Ray Train", ge=1)
    max_failures: int = runtime(3, "how often to restart lost training processes", ge=0)
    loader_workers: int = runtime(
        1, "loading processes per training process; an evaluation decodes in as many threads, at least two", ge=0
    )
    checkpoint_every_s: float = runtime(
        60,
        "seconds between checkpoints, which are written beside the training; 0: after every step, and it waits for the one before",
        ge=0,
    )
    keep_checkpoints: int = runtime(2, "newest checkpoints to keep", ge=1)
    log_every_steps: int = reporting(50, "steps between lines of metrics.jsonl", ge=1)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """Shape of what the model sees of a sample: (3, S, S), of clips (frames, 3, S, S)."""
        frame = (3, self.image_size, self.image_size)
        return frame if self.clip is None else (self.clip.frames, *frame)

    @property
    def labeled_per_step(self) -> int:
        """Labeled images per training step."""
        return self.batch_size

    @property
    def views(self) -> int:
        """Noised views of each image in a step."""
        return 1

    @property
    def compares_images(self) -> bool:
        """Whether an image's loss depends on the other images of the batch, so that micro-batches would change it."""
        return False

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


class PretrainConfig(TrainConfig):
    """Self-supervised training of a model's features, on labeled and unlabeled images alike; for `teacher.init=pretrain`.

    Fields of the model and its preprocessing have the teacher's values unless given. Defaults: SimCLR (arXiv 2002.05709).
    """

    objective: Literal["simclr", "simclrv2", "byol"] = setting(
        "simclr", "simclrv2: a deeper head; byol: no negatives, so that small batches are enough"
    )
    temperature: float = setting(0.1, "of SimCLR's loss; 0.5 is usual for small images", gt=0)
    projection_dim: int = setting(128, "outputs of the head that pretraining drops in the end", ge=1)
    projection_hidden: int | None = setting(None, "width of the head's hidden layers; null: that of the features", ge=1)
    augment: ViewsConfig = setting(ViewsConfig(), "how the views of an image differ")
    epochs: float = setting(100, "passes over the labeled and unlabeled images", gt=0)
    optimizer: Literal["momentum", "nesterov", "rmsprop", "adamw", "lars"] = setting(
        "lars", "as for teacher and student; lars for large batches, momentum or adamw for small ones"
    )
    lr: float = setting(
        0.3, "peak learning rate per 256 images of batch_size, for lars; momentum needs about 0.06", gt=0
    )
    weight_decay: float = setting(1e-4, "on all parameters except those of batch norm", ge=0)
    warmup_epochs: float = setting(10, "linear warm-up from 0", ge=0)
    label_smoothing: Fraction = setting(0.0, "not used: there are no labels")
    dropout: Fraction = setting(0.0, "after global pooling")
    ema_decay: Fraction = setting(0.99, "limit of min(decay, (1+t)/(10+t)); with byol it rises to 1 on a cosine")
    bn_momentum: float = setting(0.1, "share of the newest batch, as in torch", gt=0, le=1)
    eval_every_epochs: float = reporting(
        5, "epochs between measurements of the features: kNN on the labeled images, leave-one-out", gt=0
    )

    @property
    def views(self) -> int:
        """Noised views of each image in a step."""
        return 2

    @property
    def compares_images(self) -> bool:
        """Whether an image's loss depends on the other images of the batch: all are negatives, but for BYOL."""
        return self.objective != "byol"


class TeacherConfig(TrainConfig):
    """The teacher: trained here, or elsewhere (`weights`)."""

    weights: str | None = setting(None, "weights trained elsewhere: a file, a weights folder, or 'pretrained' (timm's)")
    class_names: str | None = by_digest(
        None,
        "of `weights`: text file of class names, one a line, in the order of its outputs; they are reordered to the data's",
    )
    ensemble: Patterns = by_digest(
        [], "folders of further teachers (gen-N/teacher or gen-N/student of runs); labels are the mean over all"
    )
    expected_top1: Fraction | None = runtime(
        None, "top-1 of `weights` on the validation images; checked before labeling"
    )
    accuracy_tolerance: Fraction = runtime(0.02, "how far below expected_top1 the check may find the top-1")


class StudentConfig(TrainConfig):
    """The student: noised, trained on labeled and pseudo-labeled images together."""

    unlabeled_ratio: int = setting(
        3, "pseudo-labeled images per labeled one in every batch (0: labeled images alone)", ge=0
    )
    pseudo_labels: Literal["soft", "hard"] = "soft"
    pseudo_label_temperature: float = setting(1.0, "below 1 sharpens soft pseudo-labels", gt=0)
    fix_resolution_epochs: float = setting(
        0, "after the training: epochs of the last layers at a larger image size, on labeled images without noise", ge=0
    )
    fix_resolution_image_size: int | None = setting(
        None, "image size of those epochs and of inference, in pixels", ge=8
    )
    fix_resolution_lr: float = setting(0.01, "peak learning rate of those epochs per 256 images; a cosine to 0", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _take_from_teacher(cls, values: Any) -> Any:
        """Read `from_teacher: true` of earlier versions as `init: teacher`."""
        if not isinstance(values, dict) or "from_teacher" not in values:
            return values
        others = {name: value for name, value in values.items() if name != "from_teacher"}
        is_true = {"true": True, "false": False}.get(str(values["from_teacher"]).lower())
        if is_true is None:
            raise ValueError(
                f"from_teacher={values['from_teacher']}: expected true or false; init=teacher is its name now"
            )
        if is_true and others.get("init", "teacher") != "teacher":
            raise ValueError(
                f"from_teacher=true is init=teacher now, but init={others['init']} is given; give one of them"
            )
        return others | {"init": "teacher"} if is_true else others

    def fingerprint(self, prefix: str, every: bool = False) -> dict[str, Any]:
        """As any section's; `init: teacher` is there under the name that it had in earlier versions, so that their runs stay valid."""
        return super().fingerprint(prefix, every) | {f"{prefix}from_teacher": self.init == "teacher"}

    @property
    def labeled_per_step(self) -> int:
        """Labeled images per training step; the others of the batch are pseudo-labeled."""
        return self.batch_size // (1 + self.unlabeled_ratio)

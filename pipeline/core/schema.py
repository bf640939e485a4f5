"""The fields of a run's configuration, with their defaults and what they mean; `python -m pipeline.run --help` prints them.

A field marked RUNTIME changes how fast or how loudly something runs, never what comes out, and stays out of the fingerprints.
One marked RESUMABLE is in them, but may have another value when a stage continues: a cluster may have shrunk.
One marked BY_DIGEST is in them by what it names, not by its value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from data.settings import UsageError
from data.storage.redact import redacted
from pipeline.stages import fields_in_force, find

RUNTIME: dict[str, Any] = {"runtime": True}
RESUMABLE: dict[str, Any] = {"resumable": True}
BY_DIGEST: dict[str, Any] = {"by_digest": True}

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Patterns = list[str]
_MOST_OF_ONE_BATCH = 0.5


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("expected two numbers, the smaller first")
    return value


def _check_generations(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError("expected a number from 1, or auto")


class Section(BaseModel):
    """A group of fields; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def fingerprint(self, prefix: str) -> dict[str, Any]:
        """`{prefix + field: value}` of every field that can change the output, nested sections flattened."""
        fields: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if info.json_schema_extra in (RUNTIME, BY_DIGEST):
                continue
            if isinstance(value, Section):
                fields |= value.fingerprint(f"{prefix}{name}.")
            else:
                fields[f"{prefix}{name}"] = redacted(value) if isinstance(value, str) else value
        return fields


class DataConfig(Section):
    """Where the images are: paths, globs, brace expansions (`{000..999}`, `{a,b}`) or fsspec URLs of .tar shards. A path that is there
    as it is written is taken for that file, whatever signs it has; of an http(s) URL, what follows the `?` is no pattern."""

    labeled: Patterns = Field([], description="labeled training shards")
    validation: Patterns = Field([], description="held-out labeled shards: calibration and training curves")
    unlabeled: Patterns = Field([], description="unlabeled shards")
    test: Patterns = Field([], description="labeled test shards, read by evaluate alone")
    held_out_hashes: Patterns = Field(
        [], description="hashes.parquet files of held-out images that selection must avoid"
    )
    exclude: str | None = Field(
        None, description="text file of keys never to be trained on, labeled or not, one a line"
    )
    truth: str | None = Field(
        None,
        description="Parquet of (shard, ordinal, label) for unlabeled images; only for the figures in report and summary",
    )
    num_classes: int | None = Field(None, ge=2, description="needed only where no manifest has class names")


class AugmentConfig(Section):
    """Noise on the input, in training only."""

    crop: Literal["random_resized_crop", "pad_crop"] = Field(
        "random_resized_crop", description="how an image becomes image_size"
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
    cutout: int = Field(0, ge=0, description="side of a grey square at a random place, in pixels (0: none)")


class TrainConfig(Section):
    """A model and its training. Defaults: ResNet-RS (arXiv 2103.07579)."""

    model: str = Field("resnetrs50", description="resnetrs26 … resnetrs420, or any timm model")
    model_args: dict[str, Any] = Field({}, description="for ResNet-RS: width, blocks; for a timm model: its arguments")
    image_size: int = Field(224, ge=8, description="pixels")
    crop_pct: float = Field(0.875, gt=0, le=1, description="evaluation: centre crop as a fraction of the resized side")
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="of the pixels, in 0 to 1")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="of the pixels, in 0 to 1")
    augment: AugmentConfig = Field(AugmentConfig(), description="input noise")
    augment_on: Literal["host", "device"] = Field(
        "host",
        description="device: the model's device adds all noise but crop, flip and affine jitter, to whole batches",
    )
    decoder: Literal["fast", "pillow"] = Field(
        "pillow",
        description="of training views; fast: JPEGs four times as large as their crop needs are decoded at a fraction",
    )
    epochs: float = Field(350, gt=0, description="passes over the labeled images")
    batch_size: int = Field(4096, ge=1, description="images per step over all workers, pseudo-labeled ones included")
    lr: float = Field(0.1, gt=0, description="peak learning rate per 256 images of batch_size")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum (plain, not Nesterov)")
    weight_decay: float = Field(4e-5, ge=0, description="on all parameters but batch norm's")
    warmup_epochs: float = Field(5, ge=0, description="linear warm-up from 0")
    lr_schedule: Literal["cosine", "step"] = Field(
        "cosine", description="after the warm-up; step: a tenth after 1/3, 2/3 and 8/9 of the run"
    )
    label_smoothing: Fraction = 0.1
    mixup: float = Field(0, ge=0, description="alpha of mixup's Beta distribution (0: none)")
    dropout: Fraction = Field(0.25, description="after global pooling")
    stochastic_depth: Fraction = Field(0, description="drop rate of the last stage's blocks")
    ema_decay: Fraction = Field(0.9999, description="limit of min(decay, (1+t)/(10+t))")
    bn_momentum: float = Field(
        1.0, gt=0, le=1, description="torch's sense; 1.0: statistics of the last batch, averaged by the EMA"
    )
    eval_every_epochs: float = Field(5, gt=0, description="validation accuracy of the EMA weights")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast, for GPUs; in training, and when the model labels or is evaluated"
    )
    channels_last: bool = False
    compile: bool = Field(False, description="torch.compile")
    workers: int = Field(
        1, ge=1, description="training processes; more than one run under Ray Train", json_schema_extra=RESUMABLE
    )
    max_failures: int = Field(
        3, ge=0, description="how often lost training processes are started again", json_schema_extra=RUNTIME
    )
    loader_workers: int = Field(
        1, ge=0, description="loading processes per training process", json_schema_extra=RUNTIME
    )
    checkpoint_every_s: float = Field(60, ge=0, description="seconds between checkpoints", json_schema_extra=RUNTIME)
    keep_checkpoints: int = Field(
        2, ge=1, description="newest checkpoints that are kept; the best one is, too", json_schema_extra=RUNTIME
    )
    log_every_steps: int = Field(50, ge=1, description="steps between lines of metrics.jsonl")

    def require_averaged_statistics(self, name: str) -> None:
        """Raise UsageError when the trained model would be evaluated with the batch-norm statistics of one batch.

        Batch norm gives the last batch the share `bn_momentum` of its statistics, the EMA gives that model the share
        1 - `ema_decay`. Asked before a training, not of every configuration: finished runs stay readable.

        Args:
            name: the section, for the message.
        """
        share = self.bn_momentum * (1 - self.ema_decay)
        if share > _MOST_OF_ONE_BATCH:
            raise UsageError(
                f"{name}.bn_momentum={self.bn_momentum:g} with {name}.ema_decay={self.ema_decay:g}: {share:.0%} of the batch-norm "
                f"statistics that the model is evaluated and labels with would be the last batch's; give {name}.bn_momentum=0.1, or "
                f"an average over many steps, as {name}.ema_decay=0.9999"
            )


class TeacherConfig(TrainConfig):
    """The teacher: trained here, or trained elsewhere (`weights`)."""

    weights: str | None = Field(
        None, description="weights trained elsewhere: a file, a weights folder, or 'pretrained' (timm's)"
    )
    class_names: str | None = Field(
        None,
        description="of `weights`: text file of their class names in the order of their outputs, one a line; brought into the data's",
        json_schema_extra=BY_DIGEST,
    )
    ensemble: list[str] = Field(
        [],
        description="folders of further teachers (runs' gen-N/teacher or gen-N/student): labels are the mean of all",
        json_schema_extra=BY_DIGEST,
    )
    expected_top1: Fraction | None = Field(
        None, description="of `weights` on the validation images; checked before labeling", json_schema_extra=RUNTIME
    )
    accuracy_tolerance: Fraction = Field(
        0.02, description="how far below the expected top-1 the check may find it", json_schema_extra=RUNTIME
    )


class StudentConfig(TrainConfig):
    """The student: noised, trained on labeled and pseudo-labeled images together."""

    unlabeled_ratio: int = Field(
        3, ge=0, description="pseudo-labeled images per labeled one in every batch (0: labels alone)"
    )
    pseudo_labels: Literal["soft", "hard"] = "soft"
    from_teacher: bool = Field(
        False,
        description="begin as the teacher (the same model, or a ResNet-RS with more blocks and the same width) instead of from scratch",
    )
    pseudo_label_temperature: float = Field(1.0, gt=0, description="below 1 sharpens soft pseudo-labels")
    fix_resolution_epochs: float = Field(
        0, ge=0, description="then so many epochs of the last layers, at a larger size, on labeled images without noise"
    )
    fix_resolution_image_size: int | None = Field(
        None, ge=8, description="pixels of those epochs, and of inference ever after"
    )
    fix_resolution_lr: float = Field(0.01, gt=0, description="their peak learning rate per 256 images; a cosine to 0")


class LabelConfig(Section):
    """How the teacher labels."""

    top_k: int = Field(10, ge=1, description="probabilities kept per image; all of them when there are no more classes")
    batch_size: int = Field(256, ge=1, description="images per forward pass")
    augment: AugmentConfig | None = Field(
        None,
        description="input noise of the images that are labeled, for Noisy Student's ablation; null: none, as published",
    )
    views: int = Field(
        1, ge=1, le=10, description="average the teacher over this many views: mirrored and shifted ones"
    )
    decoder: Literal["fast", "pillow"] = Field(
        "fast", description="pillow: timm's pixels exactly; fast: the same but for rounding, in half the time"
    )
    workers: int | str = Field(
        1, description="labeling actors: a number, or MIN..MAX to use what room there is", json_schema_extra=RUNTIME
    )
    gpus_per_worker: float = Field(
        1, gt=0, description="with device=cuda; fractions share one", json_schema_extra=RUNTIME
    )
    cpus_per_worker: float = Field(
        1, ge=0, description="cores that Ray reserves for each actor", json_schema_extra=RUNTIME
    )
    stall_timeout_s: float = Field(
        600, gt=0, description="seconds without progress after which an actor is replaced", json_schema_extra=RUNTIME
    )
    start_timeout_s: float = Field(
        600,
        gt=0,
        description="seconds in which an actor that runs must have loaded the model; without any that has, the stage gives up",
        json_schema_extra=RUNTIME,
    )
    threads: int = Field(2, ge=1, description="CPU threads of the model in each actor")
    decode_threads: int = Field(2, ge=1, description="decoding threads in each actor", json_schema_extra=RUNTIME)
    max_quarantined: Fraction = Field(
        0.01, description="stop when a larger fraction of the images cannot be used", json_schema_extra=RUNTIME
    )
    max_damaged_shards: int = Field(
        0,
        ge=0,
        description="stop when more shards are cut short or damaged; of so many, the images before the damage are labeled",
        json_schema_extra=RUNTIME,
    )

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, value: int | str) -> int | str:
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value))
        if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise ValueError("expected a number from 1, or MIN..MAX as in 2..16")
        return value

    def worker_range(self) -> tuple[int, int]:
        """Fewest and most labeling actors."""
        least, _, most = str(self.workers).partition("..")
        return int(least), int(most or least)


class SelectConfig(Section):
    """Which pseudo-labels the student sees, and how often."""

    confidence_threshold: Fraction = Field(0.3, description="labels below it are left out")
    target_precision: float | None = Field(
        None, gt=0, lt=1, description="raise the threshold until so many of the labels above it are right"
    )
    precision_by_class: bool = Field(
        False, description="with target_precision: a threshold for each class with enough validation images"
    )
    per_class: int | None = Field(
        130_000, ge=1, description="images per class, the most confident first; null: no balancing"
    )
    keep_images: bool = Field(
        False,
        description="from the second generation on: the images of the generation before, and their copies, with new labels",
        json_schema_extra=BY_DIGEST,
    )
    max_copies: int = Field(10, ge=1, le=60_000, description="most copies of one image in a rare class")
    copy_correlation: float = Field(
        0.99, ge=0.5, le=1, description="of the thumbnails of a held-out image and its copies; photos allow 0.95"
    )
    max_near_duplicates: int | None = Field(
        None, ge=1, description="images of one perceptual hash, the most confident first; null: no limit"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, values: Any) -> Any:
        """Runs of earlier versions wrote `exclude: null`; a list that is given there is an error that says where it belongs."""
        if isinstance(values, dict) and values.get("exclude", "") is None:
            return {name: value for name, value in values.items() if name != "exclude"}
        return values


class ExportConfig(Section):
    """Pseudo-labels for other projects."""

    out: str | None = Field(
        None,
        description="folder or URL for the versions v1, v2, …; null: RUN/exports",
        json_schema_extra=RUNTIME,
    )
    format: Literal["shards", "parquet", "columns", "csv"] = Field(
        "shards",
        description="shards: images and labels; labels alone: parquet, columns (tars beside the unlabeled shards), csv",
    )
    selected: bool = Field(True, description="only the images that the student sees; false: all labels")
    samples_per_shard: int = Field(10_000, ge=1, description="shards: at most so many samples")
    bytes_per_shard: int | None = Field(None, ge=1, description="shards: at most so many bytes of images")
    shuffle_shards: int = Field(
        0,
        ge=0,
        description="shards: mix the images of so many unlabeled shards, in an order of the seed (0: as they lie)",
    )
    repeats: Literal["field", "written"] = Field(
        "field", description="images that the student sees several times: once with their number, or so many times"
    )


class ServeConfig(Section):
    """Pseudo-labels over HTTP. No field is in a fingerprint: nothing is written."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0: on all of this machine's", json_schema_extra=RUNTIME
    )
    port: int = Field(8080, ge=0, le=65_535, description="0: any that is free", json_schema_extra=RUNTIME)
    source: str = Field(
        "run",
        pattern=r"^(run|latest|v[1-9]\d*)$",
        description="run: labels are joined to the unlabeled shards as they are sent; or an export: latest, v1, v2, …",
        json_schema_extra=RUNTIME,
    )
    token_file: str | None = Field(
        None,
        description="file with the token that clients must send; or give it in NOISY_STUDENT_SERVER_TOKEN",
        json_schema_extra=RUNTIME,
    )
    open_to_all: bool = Field(
        False,
        description="without a token, answer everyone: on other addresses than loopback, and under any name (Host)",
        json_schema_extra=RUNTIME,
    )
    max_connections: int = Field(
        256, ge=1, description="answers at once; beyond, clients are told to come again", json_schema_extra=RUNTIME
    )
    grace_s: float = Field(
        30, ge=0, description="seconds that what is being sent may still take after Ctrl-C", json_schema_extra=RUNTIME
    )


class EvaluateConfig(Section):
    """What is measured on the test images besides accuracy."""

    robustness_images: int = Field(
        0, ge=0, description="test images, chosen by the seed, that are also tried under 15 corruptions × 5 severities"
    )


class AblateConfig(Section):
    """Which study stage=ablate makes. Neither field is in a fingerprint: each row's own configuration is."""

    study: Literal["resnet_rs", "weight_decay", "noisy_student"] = Field(
        "resnet_rs",
        description="of the teacher's recipe: ResNet-RS's Table 1, or its Table 2; noisy_student: of teacher, labels and student",
        json_schema_extra=RUNTIME,
    )
    seeds: int = Field(
        3, ge=1, description="trainings of every row: seeds seed, seed + 1, …", json_schema_extra=RUNTIME
    )


class Config(Section):
    """One run."""

    run_dir: str = Field("", description="where everything goes: a folder or an fsspec URL", json_schema_extra=RUNTIME)
    seed: int = Field(0, ge=0)
    generations: Annotated[int | Literal["auto"], BeforeValidator(_check_generations)] = Field(
        1,
        description="rounds: each student is the next round's teacher; auto: as long as it beats its own on data.validation",
    )
    max_generations: int = Field(3, ge=1, description="with generations=auto: at most so many")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(2, ge=1, description="CPU threads of training and evaluation in one process")
    ray_address: str | None = Field(
        None,
        description="a running Ray cluster; null starts Ray here, whatever RAY_ADDRESS says",
        json_schema_extra=RUNTIME,
    )
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    label: LabelConfig = LabelConfig()
    select: SelectConfig = SelectConfig()
    student: StudentConfig = StudentConfig()
    export: ExportConfig = ExportConfig()
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ablate: AblateConfig = AblateConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if problems := "\n  ".join(self._problems()):
            raise ValueError(problems)
        return self

    def _problems(self) -> Iterator[str]:
        """Fields that do not go together, a sentence each."""
        if self.generations == "auto" and not self.data.validation:
            yield (
                "generations=auto compares each student with its teacher on data.validation, which is empty; give shards, or a number"
            )
        if self.teacher.class_names is not None and self.teacher.weights is None:
            yield f"teacher.class_names={self.teacher.class_names}: is of teacher.weights, which is not given; leave it out"
        ratio, batch = self.student.unlabeled_ratio, self.student.batch_size
        if batch % ((1 + ratio) * self.student.workers):
            yield (
                f"student.batch_size={batch}: expected a multiple of (1 + student.unlabeled_ratio) × student.workers = "
                f"{(1 + ratio) * self.student.workers}, so that every batch has exactly {ratio} pseudo-labeled images per labeled one"
            )
        for name, section in (("teacher", self.teacher), ("student", self.student)):
            if section.warmup_epochs > section.epochs:
                yield f"{name}.warmup_epochs={section.warmup_epochs}: expected at most {name}.epochs={section.epochs}"
        size = self.student.fix_resolution_image_size
        if self.student.fix_resolution_epochs and (size is None or size < self.student.image_size):
            yield (
                f"student.fix_resolution_image_size={size}: expected at least student.image_size={self.student.image_size}, usually a "
                f"seventh to a half more, with student.fix_resolution_epochs={self.student.fix_resolution_epochs}"
            )
        if self.teacher.batch_size % self.teacher.workers:
            yield f"teacher.batch_size={self.teacher.batch_size}: expected a multiple of teacher.workers={self.teacher.workers}"

    def resolved_device(self) -> str:
        """`cpu` or `cuda`."""
        if self.device == "auto":
            import torch  # only here: half a gigabyte, which selection does without

            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def most_generations(self) -> int:
        """How many rounds there may be."""
        return self.max_generations if self.generations == "auto" else self.generations

    def require_trainable(self, stage: str) -> None:
        """Raise UsageError when the fields of a stage that is yet to train make a model that cannot be used; see `TrainConfig`."""
        if stage == "teacher" and self.teacher.weights is None:
            self.teacher.require_averaged_statistics(stage)
        if stage == "student":
            self.student.require_averaged_statistics(stage)

    def stage_fields(self, stage: str) -> dict[str, Any]:
        """`{dotted field: value}` of the fields that a stage's output depends on."""
        found: dict[str, Any] = {}
        for name in fields_in_force(find(stage).fingerprint, self):
            value = self.resolved_device() if name == "device" else attrgetter(name)(self)
            found |= value.fingerprint(f"{name}.") if isinstance(value, Section) else {name: value}
        return found

    def numerics(self) -> dict[str, Any]:
        """What every trained or predicted number depends on besides a stage's own fields."""
        return {"seed": self.seed, "device": self.resolved_device(), "threads": self.threads}


@cache
def resumable_fields() -> frozenset[str]:
    """Dotted names of the fields that may change while a stage is not done."""
    sections: dict[str, type[Section]] = {"teacher": TeacherConfig, "student": StudentConfig}
    return frozenset(
        f"{prefix}.{name}"
        for prefix, section in sections.items()
        for name, info in section.model_fields.items()
        if info.json_schema_extra == RESUMABLE
    )


@cache
def default_fields() -> dict[str, Any]:
    """`{dotted field: default}` of every field that is in a fingerprint."""
    return Config().fingerprint("")

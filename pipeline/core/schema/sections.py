"""Fields of the data, and of the stages that train nothing."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from data.picture_folders import folder_of
from pipeline.core.schema.section import (
    Fraction,
    Patterns,
    Positive,
    Section,
    added,
    by_digest,
    cpu_numerics,
    runtime,
    setting,
)
from pipeline.core.schema.training import AugmentConfig


class DataConfig(Section):
    """Where the images are: paths, globs, brace expansions (`{000..999}`, `{a,b}`) or fsspec URLs of .tar shards. A path that exists as
    written names that file, whatever characters it has. The query of an http(s) URL (after `?`) is not expanded. Or a folder of images,
    with a folder per class where they are labeled: the run packs it into shards once."""

    modality: Literal["image", "clip"] = added(
        "image",
        "what samples are: images; or videos, of which models see clips (see clip), with 3D models and the extra [video]",
    )
    labeled: Patterns = setting([], "labeled training shards, or a folder")
    validation: Patterns = setting([], "held-out labeled shards or folder, for calibration and training curves")
    unlabeled: Patterns = setting([], "unlabeled shards, or a folder")
    test: Patterns = setting([], "labeled test shards or folder, read by evaluate; the report shows a few of them")
    validation_share: float = by_digest(
        0.1, "of a folder data.labeled, without data.validation: the share of each class to hold out for it", ge=0, lt=1
    )
    group: str = by_digest(
        "",
        "of a folder data.labeled: a regular expression for paths; images with the same text in its parentheses stay in one split",
    )
    held_out_hashes: Patterns = setting(
        [], "hashes.parquet files of held-out images; their near-duplicates are not selected"
    )
    exclude: str | None = setting(None, "text file of keys, one a line, that no stage trains on, labeled or not")
    truth: str | None = setting(
        None,
        "the classes of unlabeled images, for report and summary alone: CSV of (path, class), the folder of class folders that they "
        "are from, or Parquet of (shard, ordinal, label)",
    )
    num_classes: int | None = setting(None, "needed only when no manifest has class names", ge=2)

    @property
    def holds_out(self) -> bool:
        """Whether validation images are to be a share of the folder `labeled`."""
        return not self.validation and self.validation_share > 0 and folder_of(self.labeled) is not None


class LabelConfig(Section):
    """How the teacher labels."""

    top_k: int = setting(10, "probabilities kept per image; all of them when there are at most this many classes", ge=1)
    batch_size: int = setting(256, "images per forward pass", ge=1)
    augment: AugmentConfig | None = setting(
        None, "input noise while labeling, for Noisy Student's ablation; null: none, as published"
    )
    views: int = setting(1, "average the teacher over this many mirrored and shifted views", ge=1, le=10)
    clips: int = added(
        1, "of videos: average the teacher over this many clips, spread evenly over the video", ge=1, le=32
    )
    crops: Literal[1, 3] = added(1, "of videos: and over this many crops of each clip, along its longer side")
    decoder: Literal["fast", "pillow"] = setting(
        "fast", "pillow: exactly timm's pixels; fast: half the time, other rounding"
    )
    workers: int | str = runtime(1, "labeling actors: a number, or MIN..MAX to scale with free resources")
    gpus_per_worker: float = runtime(1, "GPUs per actor with device=cuda; actors with fractions share one", gt=0)
    cpus_per_worker: float = runtime(1, "cores that Ray reserves for each actor", ge=0)
    stall_timeout_s: float = runtime(600, "seconds without progress after which an actor is replaced", gt=0)
    start_timeout_s: float = runtime(
        600, "seconds for a running actor to load the model; the stage fails when no actor has", gt=0
    )
    threads: int = cpu_numerics(2, "CPU threads of the model in each actor", ge=1)
    decode_threads: int | None = runtime(
        None, "decoding threads in each actor; null: the actor's share of its machine's cores", ge=1
    )
    memory_mb: int = runtime(
        2048,
        "MiB in each actor for files and decoded images; two batches and the largest image are held in any case",
        ge=1,
    )
    max_quarantined: Fraction = runtime(0.01, "stop when a larger fraction of the images is quarantined")
    max_damaged_shards: int = runtime(
        0, "stop when more shards are cut short or damaged; up to this many, images before the damage are labeled", ge=0
    )

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, value: int | str) -> int | str:
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value))
        if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise ValueError("expected a number from 1, or MIN..MAX as in 2..16")
        return value

    @property
    def num_views(self) -> int:
        """Views of an image or a video that are averaged."""
        return self.views * self.clips * self.crops

    @property
    def patience_s(self) -> float:
        """Seconds to decode an image in a process of its own, after others were lost: far below the stall of its actor."""
        return self.stall_timeout_s / 4

    def worker_range(self) -> tuple[int, int]:
        """Minimum and maximum number of labeling actors."""
        minimum, _, maximum = str(self.workers).partition("..")
        return int(minimum), int(maximum or minimum)


class SelectConfig(Section):
    """Which pseudo-labels the student trains on, and in how many copies."""

    confidence_threshold: Fraction = setting(0.3, "minimum confidence of a selected label")
    target_precision: float | None = setting(
        None, "raise the threshold until this fraction of the labels above it is right", gt=0, lt=1
    )
    precision_by_class: bool = setting(
        False, "with target_precision: one threshold per class that has enough validation images"
    )
    per_class: int | None = setting(130_000, "images per class, most confident first; null: no balancing", ge=1)
    keep_images: bool = by_digest(
        False, "from the second generation on: reuse the images and copies of the generation before, with new labels"
    )
    max_copies: int = setting(10, "maximum copies of one image in a rare class", ge=1, le=60_000)
    copy_correlation: float = setting(
        0.99,
        "minimum correlation of thumbnails for an image to count as a copy of a held-out one; 0.95 works for photos",
        ge=0.5,
        le=1,
    )
    max_near_duplicates: int | None = setting(
        None, "maximum images with one perceptual hash, most confident first; null: no limit", ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, values: Any) -> Any:
        """Accept `exclude: null` of earlier versions; a value there stays an error that names the new field."""
        if isinstance(values, dict) and values.get("exclude", "") is None:
            return {name: value for name, value in values.items() if name != "exclude"}
        return values


class ExportConfig(Section):
    """Pseudo-labels for other projects."""

    out: str | None = runtime(None, "folder or URL of the versions v1, v2, …; null: RUN/exports")
    format: Literal["shards", "parquet", "columns", "csv"] = setting(
        "shards", "shards: images and labels; parquet, columns (tars beside the unlabeled shards), csv: labels alone"
    )
    selected: bool = setting(True, "only the images that the student trains on; false: all labels")
    samples_per_shard: int = setting(10_000, "format=shards: maximum samples per shard", ge=1)
    bytes_per_shard: int | None = setting(None, "format=shards: maximum bytes of images per shard", ge=1)
    shuffle_shards: int = setting(
        0,
        "format=shards: shuffle images within windows of this many unlabeled shards, seeded (0: keep their order)",
        ge=0,
    )
    repeats: Literal["field", "written"] = setting(
        "field", "an image with several copies: field writes it once with their number, written repeats it"
    )


class ServeConfig(Section):
    """Pseudo-labels over HTTP. No field is in a fingerprint: nothing is written."""

    host: str = runtime("127.0.0.1", "address to listen on; 0.0.0.0: all addresses of this machine")
    port: int = runtime(8080, "0: any free port", ge=0, le=65_535)
    source: str = runtime(
        "run",
        "run: join labels to the unlabeled shards while sending; or an export: latest, v1, v2, …",
        pattern=r"^(run|latest|v[1-9]\d*)$",
    )
    token_file: str | None = runtime(
        None, "file with the token that clients must send; or set NOISY_STUDENT_SERVER_TOKEN"
    )
    open_to_all: bool = runtime(False, "without a token, answer everyone, also beyond loopback and under any Host")
    max_connections: int = runtime(256, "concurrent answers; further clients are told to retry", ge=1)
    processes: int | None = runtime(
        None, "processes that answer, each with caches of its own; null: one per CPU core, at most 4", ge=1
    )
    grace_s: float = runtime(30, "seconds to finish running answers after Ctrl-C", ge=0)


class EvaluateConfig(Section):
    """How the test images are measured, and what besides accuracy."""

    batch_size: int = setting(256, "images per forward pass", ge=1)
    robustness_images: int = setting(
        0, "test images, chosen by the seed, to evaluate under 15 corruptions × 5 severities", ge=0
    )


class SuggestConfig(Section):
    """Which unlabeled images to label next. No field is in a fingerprint: no stage depends on the suggestions."""

    images: int = runtime(100, "number of images to suggest", ge=1)
    candidates_per_image: int = runtime(
        20, "so many uncertain images, by their labels, are looked at for each that is suggested", ge=1
    )
    format: Literal["folder", "csv"] = runtime("folder", "folder: a CSV and the pictures; csv: the CSV alone")
    out: str | None = runtime(None, "folder or URL; null: RUN/suggestions")


class AdviseConfig(Section):
    """Which student a scaling study advises, within a budget. No field is in a fingerprint: no stage depends on the advice."""

    study: str | None = runtime(None, "run with a finished ablate.study=scaling; null: this run")
    hours: float | None = runtime(None, "of one training on this kind of machine, at most", gt=0)
    latency_ms: float | None = runtime(None, "of an image in a batch of predictions, at most", gt=0)
    gpu_memory_gb: float | None = runtime(None, "GiB of a training step, at most", gt=0)
    images: int | None = runtime(
        None, "images in an epoch of that training, pseudo-labeled ones too; null: as many as the study had", ge=1
    )


class PlanConfig(Section):
    """What plan=true, and the check before a stage, compare a stage's memory with."""

    gpu_memory_gb: float | None = runtime(
        None, "memory of one GPU, 10⁹ bytes; null: of the GPU that is found here, or 80 assumed in a plan", gt=0
    )


class GridConfig(Section):
    """The grid of study=scaling: every combination is trained. The longest of several lengths has the teacher's regularization."""

    width: list[Positive] = runtime([0.25, 0.5, 1.0], "widths of ResNet-RS")
    depth: list[int] = runtime([26, 50, 101], "depths of ResNet-RS: 26, 50, 101, 152, 200, 270, 300, 350, 400, 420")
    image_size: list[int] = runtime([], "sides in pixels; none: teacher.image_size")
    epochs: list[Positive] = runtime([], "lengths of training; none: teacher.epochs")

    @field_validator("width", "depth")
    @classmethod
    def _check_not_empty(cls, value: list[Any]) -> list[Any]:
        if not value:
            raise ValueError("expected one value or more")
        return value


class AblateConfig(Section):
    """Which study stage=ablate runs. No field is in a fingerprint: each row's own configuration is."""

    study: Literal["resnet_rs", "weight_decay", "noisy_student", "efficientnet_rs", "scaling"] = runtime(
        "resnet_rs",
        "ResNet-RS's Table 1 or Table 2, of the teacher's recipe; noisy_student: of teacher, labels and student; efficientnet_rs: at "
        "smaller images; scaling: ablate.grid",
    )
    seeds: int = runtime(3, "trainings per row, with seeds seed, seed + 1, …", ge=1)
    grid: GridConfig = runtime(GridConfig(), "of study=scaling: width × depth × image_size × epochs")

"""Fields of the data, and of the stages that train nothing."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.schema.section import BY_DIGEST, RUNTIME, Fraction, Patterns, Section
from pipeline.core.schema.training import AugmentConfig


class DataConfig(Section):
    """Where the images are: paths, globs, brace expansions (`{000..999}`, `{a,b}`) or fsspec URLs of .tar shards. A path that exists as
    written names that file, whatever characters it has. The query of an http(s) URL (after `?`) is not expanded."""

    labeled: Patterns = Field([], description="labeled training shards")
    validation: Patterns = Field([], description="held-out labeled shards, for calibration and training curves")
    unlabeled: Patterns = Field([], description="unlabeled shards")
    test: Patterns = Field([], description="labeled test shards, read by evaluate; the report shows a few of them")
    held_out_hashes: Patterns = Field(
        [], description="hashes.parquet files of held-out images; their near-duplicates are not selected"
    )
    exclude: str | None = Field(
        None, description="text file of keys, one a line, that no stage trains on, labeled or not"
    )
    truth: str | None = Field(
        None,
        description="Parquet of (shard, ordinal, label) for unlabeled images; only report and summary use it",
    )
    num_classes: int | None = Field(None, ge=2, description="needed only when no manifest has class names")


class LabelConfig(Section):
    """How the teacher labels."""

    top_k: int = Field(
        10, ge=1, description="probabilities kept per image; all of them when there are at most this many classes"
    )
    batch_size: int = Field(256, ge=1, description="images per forward pass")
    augment: AugmentConfig | None = Field(
        None,
        description="input noise while labeling, for Noisy Student's ablation; null: none, as published",
    )
    views: int = Field(1, ge=1, le=10, description="average the teacher over this many mirrored and shifted views")
    decoder: Literal["fast", "pillow"] = Field(
        "fast", description="pillow: exactly timm's pixels; fast: half the time, other rounding"
    )
    workers: int | str = Field(
        1, description="labeling actors: a number, or MIN..MAX to scale with free resources", json_schema_extra=RUNTIME
    )
    gpus_per_worker: float = Field(
        1,
        gt=0,
        description="GPUs per actor with device=cuda; actors with fractions share one",
        json_schema_extra=RUNTIME,
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
        description="seconds for a running actor to load the model; the stage fails when no actor has",
        json_schema_extra=RUNTIME,
    )
    threads: int = Field(2, ge=1, description="CPU threads of the model in each actor")
    decode_threads: int = Field(2, ge=1, description="decoding threads in each actor", json_schema_extra=RUNTIME)
    max_quarantined: Fraction = Field(
        0.01, description="stop when a larger fraction of the images is quarantined", json_schema_extra=RUNTIME
    )
    max_damaged_shards: int = Field(
        0,
        ge=0,
        description="stop when more shards are cut short or damaged; up to this many, images before the damage are labeled",
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
        """Minimum and maximum number of labeling actors."""
        minimum, _, maximum = str(self.workers).partition("..")
        return int(minimum), int(maximum or minimum)


class SelectConfig(Section):
    """Which pseudo-labels the student trains on, and in how many copies."""

    confidence_threshold: Fraction = Field(0.3, description="minimum confidence of a selected label")
    target_precision: float | None = Field(
        None, gt=0, lt=1, description="raise the threshold until this fraction of the labels above it is right"
    )
    precision_by_class: bool = Field(
        False, description="with target_precision: one threshold per class that has enough validation images"
    )
    per_class: int | None = Field(
        130_000, ge=1, description="images per class, most confident first; null: no balancing"
    )
    keep_images: bool = Field(
        False,
        description="from the second generation on: reuse the images and copies of the generation before, with new labels",
        json_schema_extra=BY_DIGEST,
    )
    max_copies: int = Field(10, ge=1, le=60_000, description="maximum copies of one image in a rare class")
    copy_correlation: float = Field(
        0.99,
        ge=0.5,
        le=1,
        description="minimum correlation of thumbnails for an image to count as a copy of a held-out one; 0.95 works for photos",
    )
    max_near_duplicates: int | None = Field(
        None, ge=1, description="maximum images with one perceptual hash, most confident first; null: no limit"
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

    out: str | None = Field(
        None,
        description="folder or URL of the versions v1, v2, …; null: RUN/exports",
        json_schema_extra=RUNTIME,
    )
    format: Literal["shards", "parquet", "columns", "csv"] = Field(
        "shards",
        description="shards: images and labels; parquet, columns (tars beside the unlabeled shards), csv: labels alone",
    )
    selected: bool = Field(True, description="only the images that the student trains on; false: all labels")
    samples_per_shard: int = Field(10_000, ge=1, description="format=shards: maximum samples per shard")
    bytes_per_shard: int | None = Field(None, ge=1, description="format=shards: maximum bytes of images per shard")
    shuffle_shards: int = Field(
        0,
        ge=0,
        description="format=shards: shuffle images within windows of this many unlabeled shards, seeded (0: keep their order)",
    )
    repeats: Literal["field", "written"] = Field(
        "field", description="an image with several copies: field writes it once with their number, written repeats it"
    )


class ServeConfig(Section):
    """Pseudo-labels over HTTP. No field is in a fingerprint: nothing is written."""

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; 0.0.0.0: all addresses of this machine",
        json_schema_extra=RUNTIME,
    )
    port: int = Field(8080, ge=0, le=65_535, description="0: any free port", json_schema_extra=RUNTIME)
    source: str = Field(
        "run",
        pattern=r"^(run|latest|v[1-9]\d*)$",
        description="run: join labels to the unlabeled shards while sending; or an export: latest, v1, v2, …",
        json_schema_extra=RUNTIME,
    )
    token_file: str | None = Field(
        None,
        description="file with the token that clients must send; or set NOISY_STUDENT_SERVER_TOKEN",
        json_schema_extra=RUNTIME,
    )
    open_to_all: bool = Field(
        False,
        description="without a token, answer everyone, also beyond loopback and under any Host",
        json_schema_extra=RUNTIME,
    )
    max_connections: int = Field(
        256, ge=1, description="concurrent answers; further clients are told to retry", json_schema_extra=RUNTIME
    )
    grace_s: float = Field(
        30, ge=0, description="seconds to finish running answers after Ctrl-C", json_schema_extra=RUNTIME
    )


class EvaluateConfig(Section):
    """How the test images are measured, and what besides accuracy."""

    batch_size: int = Field(256, ge=1, description="images per forward pass")
    robustness_images: int = Field(
        0, ge=0, description="test images, chosen by the seed, to evaluate under 15 corruptions × 5 severities"
    )


class PlanConfig(Section):
    """What plan=true, and the check before a stage, compare a stage's memory with."""

    gpu_memory_gb: float | None = Field(
        None,
        gt=0,
        description="memory of one GPU, 10⁹ bytes; null: of the GPU that is found here, or 80 assumed in a plan",
        json_schema_extra=RUNTIME,
    )


class AblateConfig(Section):
    """Which study stage=ablate runs. No field is in a fingerprint: each row's own configuration is."""

    study: Literal["resnet_rs", "weight_decay", "noisy_student"] = Field(
        "resnet_rs",
        description="ResNet-RS's Table 1 or Table 2, of the teacher's recipe; noisy_student: of teacher, labels and student",
        json_schema_extra=RUNTIME,
    )
    seeds: int = Field(
        3, ge=1, description="trainings per row, with seeds seed, seed + 1, …", json_schema_extra=RUNTIME
    )

"""The fields of a run, what they must fulfil together, and those that a stage's output depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.core.devices import known_device, resolve_device
from pipeline.core.schema.clips import clip_problems, share_clip
from pipeline.core.schema.section import Section, added, cpu_numerics, fields_of, runtime, setting
from pipeline.core.schema.sections import (
    AblateConfig,
    AdviseConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    LabelConfig,
    PlanConfig,
    SelectConfig,
    ServeConfig,
    SuggestConfig,
)
from pipeline.core.schema.training import ClipConfig, PretrainConfig, StudentConfig, TeacherConfig, TrainConfig
from pipeline.core.schema.transfer import TransferConfig
from pipeline.stages import fields_in_force, find

_OF_THE_MODEL = (
    "model", "model_args", "image_size", "crop_pct", "interpolation", "mean", "std", "decoder", "precision", "channels_last",
)  # fmt: skip  # fields of `teacher` that `pretrain` shares


def _check_generations(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError("expected a number from 1, or auto")


class Config(Section):
    """One run."""

    run_dir: str = runtime("", "where everything goes: a folder or an fsspec URL")
    recipe: str | None = runtime(
        None, "small, imagenet or finetune: values for what a run does not set, some by the sizes of its data"
    )
    labels_from: str | None = runtime(
        None, "another run: take its teacher and labels as they are, and its settings for what is not given here"
    )
    seed: int = Field(0, ge=0)
    generations: Annotated[int | Literal["auto"], BeforeValidator(_check_generations)] = setting(
        1,
        "self-training rounds: each student teaches the next; auto: go on while it beats its teacher on data.validation",
    )
    max_generations: int = setting(3, "with generations=auto: the maximum", ge=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if this machine or the cluster has a GPU")
    threads: int = cpu_numerics(2, "CPU threads of training and evaluation in one process", ge=1)
    ray_address: str | None = runtime(None, "a running Ray cluster; null: start Ray here and ignore RAY_ADDRESS")
    data: DataConfig = DataConfig()
    clip: ClipConfig = added(ClipConfig(), "with data.modality=clip: which frames of a video a model sees")
    pretrain: PretrainConfig = PretrainConfig()
    teacher: TeacherConfig = TeacherConfig()
    label: LabelConfig = LabelConfig()
    select: SelectConfig = SelectConfig()
    student: StudentConfig = StudentConfig()
    export: ExportConfig = ExportConfig()
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ablate: AblateConfig = AblateConfig()
    transfer: TransferConfig = TransferConfig()
    suggest: SuggestConfig = SuggestConfig()
    advise: AdviseConfig = AdviseConfig()
    plan: PlanConfig = PlanConfig()

    @model_validator(mode="before")
    @classmethod
    def _share_model(cls, values: Any) -> Any:
        """Give `pretrain` the teacher's model and preprocessing where it has none of its own."""
        sections = [values.get(name, {}) for name in ("teacher", "pretrain")] if isinstance(values, dict) else []
        if not all(isinstance(section, dict) for section in sections) or not sections:
            return values
        teacher, pretrain = sections
        shared = {name: teacher[name] for name in _OF_THE_MODEL if name in teacher}
        return values | {"pretrain": shared | pretrain} if shared else values

    @model_validator(mode="before")
    @classmethod
    def _share_clip(cls, values: Any) -> Any:
        """Give every training the clips of `clip`."""
        return share_clip(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> Config:
        if problems := "\n  ".join(self._problems()):
            raise ValueError(problems)
        return self

    def _problems(self) -> Iterator[str]:
        """Yield a sentence per set of fields that do not go together."""
        if self.generations == "auto" and not (self.data.validation or self.data.holds_out):
            yield (
                "generations=auto compares each student with its teacher on data.validation, which is empty; give shards there, or a "
                "number of generations"
            )
        if self.labels_from and self.labels_from.rstrip("/") == self.run_dir.rstrip("/"):
            yield f"labels_from={self.labels_from} is this run itself; give another run_dir="
        if self.teacher.class_names is not None and self.teacher.weights is None:
            yield f"teacher.class_names={self.teacher.class_names}: belongs to teacher.weights, which is not given; leave it out"
        yield from self._problems_of_init()
        yield from clip_problems(self.data, self.label, self.evaluate, self.clip, self.trainings())
        ratio, batch = self.student.unlabeled_ratio, self.student.batch_size
        if batch % ((1 + ratio) * self.student.workers):
            yield (
                f"student.batch_size={batch}: expected a multiple of (1 + student.unlabeled_ratio) × student.workers = "
                f"{(1 + ratio) * self.student.workers}, so that every batch has exactly {ratio} pseudo-labeled images per labeled one"
            )
        for name, section in self.trainings().items():
            if section.optimizer == "nesterov" and not section.momentum:
                yield f"{name}.optimizer=nesterov with {name}.momentum=0: expected momentum above 0; give {name}.momentum=0.9"
            if section.warmup_epochs > section.epochs:
                yield f"{name}.warmup_epochs={section.warmup_epochs}: expected at most {name}.epochs={section.epochs}"
            images = section.batch_size // section.workers
            if section.accumulate_steps > images:
                yield (
                    f"{name}.accumulate_steps={section.accumulate_steps}: expected at most {images}, the images per process and "
                    f"step ({name}.batch_size={section.batch_size} / {name}.workers={section.workers})"
                )
        size = self.student.fix_resolution_image_size
        if self.student.fix_resolution_epochs and (size is None or size < self.student.image_size):
            yield (
                f"student.fix_resolution_image_size={size}: expected at least student.image_size={self.student.image_size}, usually a "
                f"seventh to a half more, with student.fix_resolution_epochs={self.student.fix_resolution_epochs}"
            )
        for name in ("pretrain", "teacher"):
            section = self.training(name)
            if section.batch_size % section.workers:
                yield f"{name}.batch_size={section.batch_size}: expected a multiple of {name}.workers={section.workers}"
        yield from self._pretrain_problems()

    def _pretrain_problems(self) -> Iterator[str]:
        section = self.pretrain
        if section.compares_images and section.accumulate_steps > 1:
            yield (
                f"pretrain.accumulate_steps={section.accumulate_steps}: with pretrain.objective={section.objective} each image is "
                "compared with all others of its micro-batch, so micro-batches would change the loss; give 1, with "
                "pretrain.checkpoint_activations=true, more pretrain.workers or a smaller pretrain.batch_size to fit memory, or "
                "pretrain.objective=byol"
            )
        if section.mixup:
            yield f"pretrain.mixup={section.mixup}: pretraining has no labels to mix; leave it out"

    def _problems_of_init(self) -> Iterator[str]:
        if self.teacher.init == "teacher":
            yield "teacher.init=teacher: that is for the student; give a file, a folder, pretrained, or null"
        if self.teacher.init is not None and self.teacher.weights is not None:
            yield (
                f"teacher.weights={self.teacher.weights} is used as it is, teacher.init={self.teacher.init} is trained; give one of "
                "them, and null for the other"
            )
        if self.pretrain.init is not None:
            yield f"pretrain.init={self.pretrain.init}: pretraining begins with random weights; leave it out"
        for name, section in self.trainings().items():
            for field in ("init_head_lr_scale", "freeze_backbone_epochs"):
                value = getattr(section, field)
                if section.init is None and value != type(section).model_fields[field].default:
                    yield f"{name}.{field}={value:g}: belongs to {name}.init, which is not given; give it, or leave this out"
            if section.freeze_backbone_epochs > section.epochs:
                yield (
                    f"{name}.freeze_backbone_epochs={section.freeze_backbone_epochs:g}: expected at most "
                    f"{name}.epochs={section.epochs:g}"
                )

    @property
    def source_dir(self) -> str:
        """The run that made what comes before the selection: `labels_from`, or else this one."""
        return self.labels_from or self.run_dir

    def resolved_device(self) -> str:
        """`cpu` or `cuda`; see `resolve_device`."""
        return resolve_device(self.device, self.ray_address)

    def known_device(self) -> str:
        """`cpu`, `cuda` or UNKNOWN_DEVICE: for what can be said, or is done, without the cluster."""
        return known_device(self.device, self.ray_address)

    def trainings(self) -> dict[str, TrainConfig]:
        """The sections of the stages that make models, by stage."""
        return {"pretrain": self.pretrain, "teacher": self.teacher, "student": self.student}

    def training(self, stage: str) -> TrainConfig:
        """The section of a stage that makes a model."""
        return self.trainings()[stage]

    def most_generations(self) -> int:
        """The maximum number of generations."""
        return self.max_generations if self.generations == "auto" else self.generations

    def require_trainable(self, stage: str) -> None:
        """Raise UsageError when a stage would train a useless model; see `TrainConfig.require_averaged_statistics`."""
        if stage == "teacher" and self.teacher.weights is None:
            self.teacher.require_averaged_statistics(stage)
        if stage in ("pretrain", "student"):
            self.training(stage).require_averaged_statistics(stage)

    def stage_fields(self, stage: str) -> dict[str, Any]:
        """`{dotted field: value}` of the fields that a stage's output depends on."""
        return self.values_of(fields_in_force(find(stage).fingerprint, self))

    def values_of(self, names: Iterable[str]) -> dict[str, Any]:
        """`{dotted field: value}` of fields and whole sections, as a fingerprint has them."""
        found: dict[str, Any] = {}
        for name in names:
            value = self.known_device() if name == "device" else attrgetter(name)(self)
            found |= value.fingerprint(f"{name}.") if isinstance(value, Section) else {name: value}
        return found


@cache
def fields_marked(mark: str) -> frozenset[str]:
    """Dotted names of the fields with a mark of `section`, as `resumable`."""
    return frozenset(name for name, info in fields_of(Config) if info.json_schema_extra == {mark: True})


def accepted_changes(device: str | None) -> frozenset[str]:
    """Fields of a fingerprint whose other values a stage accepts that was made on `device`, and is on it now."""
    always = fields_marked("resumable") | fields_marked("reporting")
    return always | fields_marked("cpu_numerics") if device == "cuda" else always


@cache
def default_fields() -> dict[str, Any]:
    """`{dotted field: default}` of every field that may be in a fingerprint, ADDED ones too."""
    return Config().fingerprint("", every=True)

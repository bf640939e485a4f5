"""plan=true: print what each stage would do, its size, and an estimate of the time. Runs nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from data.images.corruptions import CORRUPTIONS, SEVERITIES
from data.labels.exclusions import read_keys
from data.shards.split import Split, open_split
from data.storage.redact import redacted
from pipeline.core.devices import UNKNOWN_DEVICE
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, SelectConfig, TrainConfig
from pipeline.core.stage import StageError, done_record, is_begun
from pipeline.core.timing import byte_size
from pipeline.evaluation.generations import describe_decision
from pipeline.inputs.streams import labeled_stream
from pipeline.models.expected_time import Workload, size_of
from pipeline.models.resnet_rs import ModelError
from pipeline.planning.estimate import HostSpeeds, print_estimate
from pipeline.planning.gpu_fit import Part, counted_parts, print_memory, refusal
from pipeline.planning.outlook import REFUSES, Forecast, Outlook
from pipeline.planning.status import last_begun
from pipeline.stages import rows_of
from pipeline.training.job import TrainingError, num_steps
from pipeline.training.optimizer import state_per_parameter
from pipeline.upstream.labeled_splits import check_splits, classes_of, splits_to_check
from pipeline.upstream.picture_folders import describe_packed
from teacher.labeling.worker_needs import WorkerNeeds, decode_threads
from teacher.selection.quota import describe_planned_quota

_SPLITS = ("labeled", "validation", "unlabeled", "test")
_WITH_MODELS = ("teacher", "label", "student")  # stages whose size depends on the number of classes
_LABEL_BYTES, _TOP_K_BYTES = (
    48,
    4,
)  # per label row before compression: identity, label, confidence, rest, hash; per kept class


def print_plan(config: Config, layouts: Sequence[Layout], stages: Sequence[str], forced: str | None = None) -> None:
    """Print for each stage whether it would run, continue or refuse, why, and its size. Writes only indexes of foreign shards.

    Args:
        forced: the stage that force=true would start over.

    Raises:
        DataError, StageError, StorageError: shards are missing or have changed, labels are wrong, or classes differ between labeled,
            validation and test images.
    """
    layout = layouts[0]
    for line in describe_packed(config.run_dir):
        print(line)
    splits = {
        name: open_split(patterns, layout.indexes) for name in _SPLITS if (patterns := getattr(config.data, name))
    }
    for name, split in splits.items():
        print(f"{name:12}{len(split.shards):8,} shards {split.num_samples:14,} images {byte_size(split.bytes):>12}")
    if config.known_device() == UNKNOWN_DEVICE:
        print(
            f"device      unknown: no Ray cluster answers at ray_address={config.ray_address}; what is left needs one, or device=cpu"
        )
    for note in check_splits(config, {name: splits[name] for name in splits_to_check(config, layouts, stages)}):
        print(note)
    if "validation" not in splits and {"teacher", "label", "student"} & set(stages):
        print("validation  none: confidences are not calibrated, and the accuracy of the labels is unknown")
    student: Outlook | None = None
    workloads: list[Workload] = []
    speeds = HostSpeeds(config, splits)
    on_gpu: dict[str, list[Part]] = {}
    for layout in layouts:
        forecast = Forecast(config, layout, splits, student)
        for stage in (row.name for row in rows_of(layout.generation) if row.name in stages):
            found = forecast.outlook(stage)
            if stage == forced and (found.state == REFUSES or layout == last_begun(layouts, stage)):
                found, forced = forecast.outlook(stage, forced=is_begun(layout.folder_of(stage))), None
            found, on_gpu[_name_of(config, layout, stage)] = _fit(config, layout, stage, found, splits)
            workloads += _print_outlook(_StageSize(config, layout, stage, splits, speeds), found)
        student = forecast.seen.get("student")
        if config.generations == "auto":
            print(describe_decision(config, layout))
    if "export" in stages:
        print(f"export      {_export_size(config, layouts, splits.get('unlabeled'))}")
    print_memory(config, on_gpu)
    if workloads:
        print_estimate(config, workloads, speeds.decoded_per_s if "label" in stages else None)


def _name_of(config: Config, layout: Layout, stage: str) -> str:
    return f"{stage} {layout.generation}" if config.generations != 1 else stage


def _fit(
    config: Config, layout: Layout, stage: str, found: Outlook, splits: Mapping[str, Split]
) -> tuple[Outlook, list[Part]]:
    """The outlook of a stage once its memory is known, and what it runs on each GPU."""
    if not found.works:
        return found, []
    try:
        parts = counted_parts(config, layout, stage, splits)
    except (ModelError, TrainingError) as error:
        return Outlook(REFUSES, str(error)), []
    why = refusal(config, stage, parts)
    return (Outlook(REFUSES, why) if why else found), parts


def _export_size(config: Config, layouts: Sequence[Layout], unlabeled: Split | None) -> str:
    """Images and bytes of an export, as far as they are known."""
    if config.export.format != "shards":
        return "labels alone, no images"
    if unlabeled is None or not unlabeled.num_samples:
        return ""
    folder = last_begun(layouts, "export").current_selection()
    record = done_record(folder) if folder else None
    images = record["summary"]["kept"] if record else unlabeled.num_samples
    size = byte_size(unlabeled.bytes * images / unlabeled.num_samples)
    return f"{'' if record else 'at most '}{images:,} images, about {size}, beside the unlabeled shards"


def _print_outlook(size: _StageSize, found: Outlook) -> list[Workload]:
    """Print a stage's lines; returns what its models have to do."""
    words, workloads = "", list[Workload]()
    try:
        if size.stage in _WITH_MODELS:
            _ = size.num_classes  # or refuse
        words = size.describe()
        workloads = size.workloads() if found.works else []
    except (StageError, ModelError) as error:
        if found.works:
            found = Outlook(REFUSES, str(error))
    print(f"generation {size.layout.generation}  {size.stage:10}{found.state:18}{words}".rstrip())
    for line in found.reason.splitlines():
        print(f"    {line}")
    return workloads


@dataclass(frozen=True)
class _StageSize:
    """How much a stage has to do in one generation, finished parts included."""

    config: Config
    layout: Layout
    stage: str
    splits: Mapping[str, Split]
    speeds: HostSpeeds

    @cached_property
    def num_classes(self) -> int:
        """Of the models; 0 for a pretraining. Raises StageError if nothing tells."""
        if self.stage == "pretrain":
            return 0
        return classes_of(self.config, self.splits.get("labeled") or self.splits.get("validation"))[0]

    @property
    def trains(self) -> bool:
        """Whether the stage trains a model."""
        if self.stage == "pretrain":
            return bool(self.splits.keys() & {"labeled", "unlabeled"})
        is_new_teacher = self.stage == "teacher" and self.layout.generation == 1 and not self.config.teacher.weights
        return (is_new_teacher or self.stage == "student") and "labeled" in self.splits

    @property
    def section(self) -> TrainConfig:
        """The model that the stage trains or labels with."""
        if self.stage == "pretrain":
            return self.config.pretrain
        return self.config.training("student" if self.stage == "student" else self.layout.teacher_stage)

    def num_steps(self) -> int:
        """Steps of the whole training."""
        per_step = self.section.labeled_per_step
        if self.stage == "pretrain":
            images = sum(self.splits[name].num_samples for name in ("labeled", "unlabeled") if name in self.splits)
            return num_steps(self.section.epochs, images / per_step)
        stream = labeled_stream(self.splits["labeled"], per_step, read_keys(self.config.data.exclude))
        return num_steps(self.section.epochs, stream.num_images / per_step)

    def workloads(self) -> list[Workload]:
        """Images through models; none for a stage that takes seconds."""
        if self.trains:
            return self._training()
        if self.stage == "label" and "unlabeled" in self.splits:
            return [self._labeling(self.splits["unlabeled"])]
        if self.stage == "evaluate" and {"test", "labeled"} <= self.splits.keys():
            return self._evaluation(self.splits["test"])
        return []

    def _training(self) -> list[Workload]:
        """The steps, and the evaluations between them."""
        section, steps = self.section, self.num_steps()
        images = steps * section.batch_size
        work = Workload(
            self._name, images * section.views, steps, True, section, self.num_classes, self.config.threads,
            section.workers, images * self.speeds.loading_s(section), section.loader_workers * section.workers,
        )  # fmt: skip
        validation = self.splits.get("validation")
        if self.stage == "pretrain" or validation is None:
            return [work]
        evaluations = max(1, round(section.epochs / section.eval_every_epochs))
        return [work, self._forward(section, evaluations * validation.num_samples, section.eval_batch_size)]

    def _labeling(self, unlabeled: Split) -> Workload:
        label, cores = self.config.label, os.cpu_count() or 1
        images = unlabeled.num_samples * label.num_views * (1 + len(self.config.teacher.ensemble))
        work = self._forward(self.section, images, label.batch_size)
        workers = min(label.worker_range()[1], max(1, cores // label.threads))
        threads = decode_threads(label, self.config.known_device(), cores, torch.cuda.device_count())
        loading_s = unlabeled.num_samples / (self.speeds.decoded_per_s or math.inf)
        return replace(work, threads=label.threads, processes=workers, loading_s=loading_s, loaders=workers * threads)

    def _evaluation(self, test: Split) -> list[Workload]:
        """Of teacher and student: on the test images, and on corruptions of some."""
        corrupted = min(self.config.evaluate.robustness_images, test.num_samples)
        images = test.num_samples + corrupted * (1 + len(CORRUPTIONS) * len(SEVERITIES))
        sections = self.config.training(self.layout.teacher_stage), self.config.student
        with suppress(StageError):  # the number of classes is not known: the stage can do without
            return [self._forward(section, images, self.config.evaluate.batch_size) for section in sections]
        return []

    def _forward(self, section: TrainConfig, images: int, batch_size: int) -> Workload:
        batches = math.ceil(images / batch_size)
        return Workload(self._name, images, batches, False, section, self.num_classes, self.config.threads)

    @property
    def _name(self) -> str:
        return _name_of(self.config, self.layout, self.stage)

    def describe(self) -> str:
        """Model, steps, shards and bytes, in words."""
        if self.trains:
            return self._describe_training()
        if self.stage == "teacher" and self.layout.generation > 1:
            return "the student of the generation before"
        if self.stage == "teacher" and self.config.teacher.weights:
            return f"{self._describe_model()}; weights from {self.config.teacher.weights}"
        if self.stage == "label" and "unlabeled" in self.splits:
            return self._describe_labels(self.splits["unlabeled"])
        return self._describe_quota() if self.stage == "select" else ""

    def _describe_quota(self) -> str:
        """The rule of the selection, and below it what is wrong with its quota."""
        rule, unlabeled = self.config.select, self.splits.get("unlabeled")
        labeled = self.splits.get("labeled") or self.splits.get("validation")
        classes = self.config.data.num_classes or len((labeled and labeled.class_names) or ())
        images = unlabeled.num_samples if unlabeled else 0
        problem = describe_planned_quota(rule.per_class, classes, images, rule.max_copies)
        return _describe_selection(rule) + (f"\n    {problem}" if problem else "")

    def _describe_training(self) -> str:
        section, steps = self.section, self.num_steps()
        labeled = f"{section.labeled_per_step:,} labeled" if section.views == 1 else f"{section.views} views of each"
        batch = f"{section.batch_size:,} ({labeled})"
        size = byte_size((section.keep_checkpoints + 1) * _checkpoint_bytes(section, self.num_classes))
        begins = f"; begins with {redacted(section.init)}" if section.init is not None else ""
        return (
            f"{self._describe_model()}{begins}; {steps:,} steps of {batch}, {steps * section.batch_size:,} images; "
            f"about {size} of checkpoints"
        )

    def _describe_labels(self, unlabeled: Split) -> str:
        row_bytes = _LABEL_BYTES + _TOP_K_BYTES * min(self.config.label.top_k, self.num_classes)
        labels = byte_size(row_bytes * unlabeled.num_samples)
        workers = self.config.label.workers
        size = f"{len(unlabeled.shards):,} shards on {workers} workers, about {labels} of labels"
        return f"{size}\n    {self._describe_worker()}"

    def _describe_worker(self) -> str:
        """What one labeling worker takes of a machine like this one."""
        config, section = self.config, self.section
        parameters = size_of(section, self.num_classes)[0] * (1 + len(config.teacher.ensemble))
        machine = os.cpu_count() or 1, torch.cuda.device_count()
        return WorkerNeeds.of(
            config.label, config.known_device(), *machine, math.prod(section.view_shape), parameters
        ).describe()

    def _describe_model(self) -> str:
        section = self.section
        parameters, flops = size_of(section, self.num_classes)
        size = f"{parameters / 1e6:.1f} M parameters, {flops / 1e9:,.2g} B FLOPs"
        return f"{section.model} at {section.image_size} px ({size})"


def _checkpoint_bytes(section: TrainConfig, num_classes: int) -> int:
    """Weights, EMA and the optimizer's state, 4 bytes a value."""
    return 4 * (2 + state_per_parameter(section.optimizer, section.momentum)) * size_of(section, num_classes)[0]


def _describe_selection(section: SelectConfig) -> str:
    quota = "all" if section.per_class is None else f"{section.per_class:,}"
    target = section.target_precision
    precision = f", and high enough for a precision of {target}" if target is not None else ""
    return f"confidence at least {section.confidence_threshold}{precision}, {quota} images per class"

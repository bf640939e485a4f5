"""What would run: `plan=true`. Reads only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from data.labels.exclusions import read_keys
from data.shards.split import Split, open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, TrainConfig
from pipeline.core.stage import StageError, done_record, is_begun
from pipeline.evaluation.generations import describe_decision
from pipeline.inputs.streams import labeled_stream
from pipeline.models.resnet_rs import ModelError
from pipeline.planning.estimate import Work, print_estimate, size_of
from pipeline.planning.outlook import REFUSES, Command, Outlook
from pipeline.planning.status import last_begun
from pipeline.stages import with_folder
from pipeline.upstream.labeled_splits import check_splits, classes_of, splits_to_check


def print_plan(config: Config, layouts: Sequence[Layout], stages: Sequence[str], forced: str | None = None) -> None:
    """For each stage: whether it would run, continue or refuse, why, and its work. Nothing is run or written, but for indexes of
    foreign shards.

    Raises:
        DataError, StageError, StorageError: shards that are missing or changed, labels that are wrong, or classes that differ between
            labeled, validation and test images.
    """
    layout = layouts[0]
    splits = {
        name: open_split(patterns, layout.indexes) for name in _SPLITS if (patterns := getattr(config.data, name))
    }
    for name, split in splits.items():
        print(f"{name:12}{len(split.shards):8,} shards {split.num_samples:14,} images {split.bytes / 1e9:12,.1f} GB")
    for note in check_splits(config, {name: splits[name] for name in splits_to_check(config, layouts, stages)}):
        print(note)
    if "validation" not in splits and {"teacher", "label", "student"} & set(stages):
        print("validation  none: confidences are not calibrated, and nothing tells how right the labels are")
    student: Outlook | None = None
    works: list[Work] = []
    for layout in layouts:
        command = Command(config, layout, splits, student)
        for stage in (row.name for row in with_folder() if row.name in stages):
            found = command.outlook(stage)
            if stage == forced and (found.state == REFUSES or layout == last_begun(layouts, stage)):
                found, forced = command.outlook(stage, forced=is_begun(layout.folder_of(stage))), None
            works += _print_outlook(config, layout, stage, found, splits)
        student = command.seen.get("student")
        if config.generations == "auto":
            print(describe_decision(config, layout))
    if "export" in stages:
        print(f"export      {_export_size(config, layouts, splits.get('unlabeled'))}")
    if works:
        print_estimate(config, works, splits.get("unlabeled"))


def _export_size(config: Config, layouts: Sequence[Layout], unlabeled: Split | None) -> str:
    """What an export would write, as far as that is known."""
    if config.export.format != "shards":
        return "labels alone, no images"
    if unlabeled is None or not unlabeled.num_samples:
        return ""
    folder = last_begun(layouts, "export").current_selection()
    record = done_record(folder) if folder else None
    kept = record["summary"]["kept"] if record else unlabeled.num_samples
    size = unlabeled.bytes * kept / unlabeled.num_samples / 1e9
    return f"{'' if record else 'at most '}{kept:,} images, about {size:,.2g} GB, beside the unlabeled shards"


def _print_outlook(config: Config, layout: Layout, stage: str, found: Outlook, splits: dict[str, Split]) -> list[Work]:
    """Returns what is to be computed."""
    words, work = "", None
    try:
        num_classes = 0
        if stage in _WITH_MODELS:
            num_classes, _ = classes_of(config, splits.get("labeled") or splits.get("validation"))
        words = _describe(config, stage, splits, num_classes, layout.generation)
        work = _work(config, layout, stage, splits, num_classes) if found.works else None
    except (StageError, ModelError) as error:
        if found.works:
            found = Outlook(REFUSES, str(error))
    print(f"generation {layout.generation}  {stage:10}{found.state:18}{words}".rstrip())
    for line in found.reason.splitlines():
        print(f"    {line}")
    return [work] if work else []


def _work(config: Config, layout: Layout, stage: str, splits: dict[str, Split], num_classes: int) -> Work | None:
    """Images through models; None for stages that take seconds. Of a stage that continues: all of it."""
    number = layout.generation
    name = f"{stage} {number}" if config.generations != 1 else stage
    if stage == "label" and "unlabeled" in splits:
        labels = config.teacher if number == 1 else config.student
        teachers = 1 + len(config.teacher.ensemble)
        return Work(name, splits["unlabeled"].num_samples * config.label.views * teachers, False, labels, num_classes)
    if stage not in ("teacher", "student") or "labeled" not in splits:
        return None
    if stage == "teacher" and (number > 1 or config.teacher.weights):
        return None
    section = config.teacher if stage == "teacher" else config.student
    return Work(name, _steps(config, stage, splits) * section.batch_size, True, section, num_classes)


_SPLITS = ("labeled", "validation", "unlabeled", "test")
_WITH_MODELS = ("teacher", "label", "student")  # stages whose size depends on the number of classes
_CHECKPOINT_BYTES = 12  # per parameter: weights, their moving average, momentum


def _describe(config: Config, stage: str, splits: dict[str, Split], num_classes: int, generation: int) -> str:
    if stage == "teacher" and generation > 1:
        return "the student of the generation before"
    if stage == "teacher" and config.teacher.weights:
        return f"{_model(config.teacher, num_classes)}; weights from {config.teacher.weights}"
    if stage in ("teacher", "student") and "labeled" in splits:
        return _training(config, stage, splits, num_classes)
    if stage == "label" and "unlabeled" in splits:
        unlabeled = splits["unlabeled"]
        gigabytes = _label_bytes(config, num_classes) * unlabeled.num_samples / 1e9
        return f"{len(unlabeled.shards):,} shards on {config.label.workers} workers, about {gigabytes:.2g} GB of labels"
    if stage == "select":
        quota = "all" if config.select.per_class is None else f"{config.select.per_class:,}"
        target = config.select.target_precision
        precision = f", and high enough for a precision of {target}" if target is not None else ""
        return f"confidence at least {config.select.confidence_threshold}{precision}, {quota} images per class"
    return ""


def _labeled_share(config: Config, stage: str) -> int:
    """Labeled images per step."""
    return (
        config.teacher.batch_size
        if stage == "teacher"
        else config.student.batch_size // (1 + config.student.unlabeled_ratio)
    )


def _training(config: Config, stage: str, splits: dict[str, Split], num_classes: int) -> str:
    section = config.teacher if stage == "teacher" else config.student
    steps = _steps(config, stage, splits)
    batch = f"{section.batch_size:,} ({_labeled_share(config, stage):,} labeled)"
    gigabytes = (section.keep_checkpoints + 1) * _CHECKPOINT_BYTES * size_of(section, num_classes)[0] / 1e9
    return (
        f"{_model(section, num_classes)}; {steps:,} steps of {batch}, {steps * section.batch_size:,} images; "
        f"about {gigabytes:.2g} GB of checkpoints"
    )


def _steps(config: Config, stage: str, splits: dict[str, Split]) -> int:
    section = config.teacher if stage == "teacher" else config.student
    labeled_per_step = _labeled_share(config, stage)
    stream = labeled_stream(splits["labeled"], labeled_per_step, read_keys(config.data.exclude))
    return math.ceil(section.epochs * stream.num_images / labeled_per_step)


def _model(section: TrainConfig, num_classes: int) -> str:
    parameters, flops = size_of(section, num_classes)
    return (
        f"{section.model} at {section.image_size} px ({parameters / 1e6:.1f} M parameters, {flops / 1e9:,.2g} B FLOPs)"
    )


def _label_bytes(config: Config, num_classes: int) -> int:
    """Bytes of a label row before compression: identity, label, confidence, rest, hash, and four bytes per kept class."""
    return 48 + 4 * min(config.label.top_k, num_classes)

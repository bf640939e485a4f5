"""What would run, and what is done: `plan=true` and `stage=status`. Reads only."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from tqdm import tqdm

from data import storage
from data.exclude import read_keys
from data.manifest import Split, open_split
from data.settings import UsageError
from pipeline.config import CONFIG_NAME
from pipeline.fields import Config, TrainConfig
from pipeline.generations import RULE, decided
from pipeline.labeled import classes_of
from pipeline.layout import Layout
from pipeline.models.factory import build_model, count_flops, count_parameters, on_meta
from pipeline.models.resnet_rs import ModelError
from pipeline.outlook import REFUSES, Command, Outlook
from pipeline.stage import StageError, done_record, is_begun, recorded_seconds
from pipeline.training.inputs import labeled_stream
from teacher.progress import read_progress

_FRESH_S = 60.0


def stage_folders(layout: Layout) -> dict[str, str]:
    """Stage → folder, in order."""
    folders = {
        "teacher": layout.teacher,
        "label": layout.labels,
        "select": layout.current_selection() or layout.selections,
    }
    return folders | {"student": layout.student, "evaluate": layout.evaluation}


def last_begun(layouts: Sequence[Layout], stage: str) -> Layout:
    """The last generation in which a stage was begun; the first when it was in none."""
    own = layouts[:1] if stage == "teacher" else layouts  # later teachers are students
    return next((layout for layout in reversed(own) if is_begun(stage_folders(layout)[stage])), layouts[0])


def print_status(config: Config, layouts: Sequence[Layout]) -> None:
    """One line per stage: done, with its time; begun; or not begun. Raises UsageError when there is no such run."""
    if not storage.exists(storage.join(config.run_dir, CONFIG_NAME)):
        raise UsageError(f"run_dir={config.run_dir}: no run there ({CONFIG_NAME} is missing); check the path")
    for layout in layouts:
        for stage, folder in stage_folders(layout).items():
            print(f"generation {layout.generation}  {stage:10}{_state(folder):12}{_progress(layout, stage)}")
        if config.generations == "auto":
            print(_decision(config, layout))


def _decision(config: Config, layout: Layout) -> str:
    """With generations=auto, whether another generation follows this one, or the rule by which that will be decided."""
    if (found := decided(layout)) is not None:
        return found.describe(layout.generation, config.max_generations)
    return f"generation {layout.generation}: then {RULE}; at most max_generations={config.max_generations}"


def _state(folder: str) -> str:
    if done_record(folder) is not None:
        return "done"
    return "begun" if storage.exists(storage.join(folder, "started.json")) else "not begun"


def _progress(layout: Layout, stage: str) -> str:
    folder = stage_folders(layout)[stage]
    if done_record(folder) is not None:
        return f"{recorded_seconds(folder):9.1f} s  {folder}"
    if stage != "label":
        return ""
    if (progress := read_progress(folder)) is None:
        return ""
    age = time.time() - progress.written_at
    when = "" if age < _FRESH_S else f"; as of {tqdm.format_interval(age)} ago"
    shards = f"{progress.shards_done:,} of {progress.shards_total:,} shards"
    return f"{shards}, {progress.images_done:,} of {progress.images_total:,} images{when}: {progress.describe()}"


def print_plan(config: Config, layouts: Sequence[Layout], stages: Sequence[str], forced: str | None = None) -> None:
    """For each stage: whether it would run, continue or refuse, why, and its work. Nothing is run or written, but for indexes of
    foreign shards.

    Raises:
        DataError, StorageError: shards that are missing or changed.
    """
    layout = layouts[0]
    splits = {
        name: open_split(patterns, layout.indexes) for name in _SPLITS if (patterns := getattr(config.data, name))
    }
    for name, split in splits.items():
        print(f"{name:12}{len(split.shards):8,} shards {split.num_samples:14,} images {split.bytes / 1e9:12,.1f} GB")
    student: Outlook | None = None
    for layout in layouts:
        command = Command(config, layout, splits, student)
        for stage in (stage for stage in stages if stage in stage_folders(layout)):
            found = command.outlook(stage)
            if stage == forced and (found.state == REFUSES or layout == last_begun(layouts, stage)):
                found, forced = command.outlook(stage, forced=is_begun(stage_folders(layout)[stage])), None
            _print_outlook(config, layout, stage, found, splits)
        student = command.seen.get("student")
        if config.generations == "auto":
            print(_decision(config, layout))


def _print_outlook(config: Config, layout: Layout, stage: str, found: Outlook, splits: dict[str, Split]) -> None:
    try:
        num_classes, _ = classes_of(config, splits.get("labeled") or splits.get("validation"))
        work = _work(config, stage, splits, num_classes, layout.generation)
    except (StageError, ModelError) as error:
        work = ""
        if found.works:
            found = Outlook(REFUSES, str(error))
    print(f"generation {layout.generation}  {stage:10}{found.state:18}{work}".rstrip())
    for line in found.reason.splitlines():
        print(f"    {line}")


_SPLITS = ("labeled", "validation", "unlabeled", "test")


def _work(config: Config, stage: str, splits: dict[str, Split], num_classes: int, generation: int) -> str:
    if stage == "teacher" and generation > 1:
        return "the student of the generation before"
    if stage == "teacher" and config.teacher.weights:
        return f"{_model(config.teacher, num_classes)}; weights from {config.teacher.weights}"
    if stage in ("teacher", "student") and "labeled" in splits:
        section = config.teacher if stage == "teacher" else config.student
        exclude = read_keys(config.data.exclude)
        return _training(section, _labeled_share(config, stage), splits, num_classes, exclude)
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


def _training(
    section: TrainConfig, labeled_per_step: int, splits: dict[str, Split], num_classes: int, exclude: frozenset[str]
) -> str:
    num_images = labeled_stream(splits["labeled"], labeled_per_step, exclude).num_images
    steps = math.ceil(section.epochs * num_images / labeled_per_step)
    images = steps * section.batch_size
    batch = f"{section.batch_size:,} ({labeled_per_step:,} labeled)"
    return f"{_model(section, num_classes)}; {steps:,} steps of {batch}, {images:,} images"


def _model(section: TrainConfig, num_classes: int) -> str:
    model = on_meta(
        lambda: build_model(section.model, num_classes, section.model_args, section.dropout, section.stochastic_depth)
    )
    flops = count_flops(model, section.image_size)
    return f"{section.model} at {section.image_size} px ({count_parameters(model) / 1e6:.1f} M parameters, {flops / 1e9:.2g} B FLOPs)"


def _label_bytes(config: Config, num_classes: int) -> int:
    """Bytes of a label row before compression: identity, label, confidence, rest, hash, and four bytes per kept class."""
    return 48 + 4 * min(config.label.top_k, num_classes)

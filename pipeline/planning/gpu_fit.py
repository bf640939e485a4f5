"""Whether each stage fits into a GPU: a table for plan=true, and a refusal before a stage starts that names the fields to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from data.settings import UsageError
from data.shards.split import Split
from pipeline.core.layout import Layout
from pipeline.core.schema import ClipConfig, Config, StudentConfig, TrainConfig
from pipeline.core.stage import StageError, done_record
from pipeline.inference.stage_weights import read_info
from pipeline.planning.estimate import print_table
from pipeline.planning.memory import GpuMemory, evaluation_memory, inference_memory, training_memory
from pipeline.stages import with_folder
from pipeline.training.job import TrainingError
from pipeline.upstream.labeled_splits import classes_of

_GB = 1e9
_ASSUMED_GB, _CLASSES = 80, 1000  # of a plan without a GPU, or without labels
_SMALL_GB = 10  # a table of less is in MB
_COLUMNS = ("weights", "gradients", "optimizer", "ema", "activations", "inputs", "workspace", "total")


def known_gpu_bytes(config: Config) -> float | None:
    """The memory of one GPU: plan.gpu_memory_gb, else that of the GPU that torch finds here; None without either."""
    if config.plan.gpu_memory_gb is not None:
        return config.plan.gpu_memory_gb * _GB
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Part:
    """One thing that a stage runs on a GPU.

    Attributes:
        field: whose value decides its memory.
        remedies: words of a command with which it fits into so many bytes, each by itself.
    """

    field: str
    memory: GpuMemory
    remedies: Callable[[float], Iterator[str]]


def parts_of(config: Config, layout: Layout, stage: str, num_classes: int) -> list[Part]:
    """What a stage of one generation runs on each GPU, one after the other; empty for a stage without models.

    Raises:
        RuntimeError: a model cannot be counted.
        ModelError: there is no such model.
    """
    if stage not in {row.name for row in with_folder(layout.generation)}:
        return []  # a later generation's teacher is made already
    teacher = config.training(layout.teacher_stage)
    if stage == "teacher" and config.teacher.weights:
        return [_measuring(stage, teacher, num_classes)]
    if stage == "label":
        return [_labeling(config, teacher, num_classes), _measuring(layout.teacher_stage, teacher, num_classes)]
    if stage in config.trainings():
        return list(_training(stage, config.training(stage), 0 if stage == "pretrain" else num_classes))
    if stage == "evaluate":
        size = config.evaluate.batch_size
        return [_predicting("evaluate.batch_size", model, num_classes, size) for model in (teacher, config.student)]
    return []


def _measuring(stage: str, section: TrainConfig, num_classes: int) -> Part:
    """Predictions of the validation images, to calibrate or check a model."""
    return _predicting(f"{stage}.eval_batch_size", section, num_classes, section.eval_batch_size)


def _training(stage: str, section: TrainConfig, num_classes: int) -> Iterator[Part]:
    step = _step(stage, section, num_classes, "trains")
    yield step
    if section.eval_batch_size > step.memory.images:  # else it takes less than the step, which keeps activations
        yield _batched(
            f"{stage}.eval_batch_size",
            lambda size: evaluation_memory(section, num_classes, size),
            section.eval_batch_size,
        )
    if (larger := _at_last_resolution(section)) is not section:
        yield _step(stage, larger, num_classes, "frozen")


def _step(stage: str, section: TrainConfig, num_classes: int, kind: Literal["trains", "frozen"]) -> Part:
    memory = training_memory(section, num_classes, kind)
    return Part(f"{stage}.batch_size", memory, lambda room: _smaller_steps(stage, section, num_classes, kind, room))


def _labeling(config: Config, teacher: TrainConfig, num_classes: int) -> Part:
    """The teacher, and the members of its ensemble: all loaded, one at work."""
    members = [teacher, *map(_section_of_weights, config.teacher.ensemble)]

    def count(batch_size: int) -> GpuMemory:
        counted = [inference_memory(_at_last_resolution(member), num_classes, batch_size) for member in members]
        largest = max(counted, key=lambda memory: memory.activations)
        return replace(largest, weights=sum(memory.weights for memory in counted))

    return _batched("label.batch_size", count, config.label.batch_size)


def _section_of_weights(folder: str) -> TrainConfig:
    """What weights record of their model. Raises ModelError as `read_info`."""
    info = read_info(folder)
    clip = ClipConfig(frames=info.clip.frames, stride=info.clip.stride) if info.clip else None
    return TrainConfig(
        model=info.model,
        model_args=info.model_args,
        image_size=info.image_size,
        precision=info.precision,
        clip=clip,
    )


def _predicting(field: str, section: TrainConfig, num_classes: int, batch_size: int) -> Part:
    """Inference, at the resolution that the model has in the end."""
    section = _at_last_resolution(section)
    return _batched(field, lambda size: inference_memory(section, num_classes, size), batch_size)


def _at_last_resolution(section: TrainConfig) -> TrainConfig:
    if isinstance(section, StudentConfig) and section.fix_resolution_epochs:
        return section.model_copy(update={"image_size": section.fix_resolution_image_size})
    return section


def _batched(field: str, count: Callable[[int], GpuMemory], batch_size: int) -> Part:
    def remedies(room: float) -> Iterator[str]:
        fitting = [size for size in _powers_of_two(batch_size) if count(size).total <= room]
        yield from (f"{field}={size}" for size in fitting[-1:])
        if not fitting:
            yield "a smaller model"

    return Part(field, count(batch_size), remedies)


def _smaller_steps(
    stage: str, section: TrainConfig, num_classes: int, kind: Literal["trains", "frozen"], room: float
) -> Iterator[str]:
    """Micro-batches, without and with activations computed twice; smaller batches; smaller images."""

    def fits(**fields: Any) -> bool:
        return training_memory(section.model_copy(update=fields), num_classes, kind).total <= room

    images, now = section.batch_size // section.workers, section.accumulate_steps
    powers = [1] if section.compares_images else [*_powers_of_two(images), images]
    numbers = [now * power for power in powers if now * power <= images]
    for checkpoints in sorted({section.checkpoint_activations, True}):
        words = [f"{stage}.checkpoint_activations=true"] * (checkpoints and not section.checkpoint_activations)
        with suppress(TrainingError):  # a model that cannot
            fitting = (n for n in numbers if fits(accumulate_steps=n, checkpoint_activations=checkpoints))
            if number := next(fitting, None):
                yield " ".join([*words, *[f"{stage}.accumulate_steps={number}"] * (number > now)])
    sizes = [size * section.workers for size in _powers_of_two(images)]
    yield from (f"{stage}.batch_size={size}" for size in [size for size in sizes if fits(batch_size=size)][-1:])
    yield f"a smaller {stage}.image_size"


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … below `limit`."""
    return [2**power for power in range((limit - 1).bit_length())]


def require_memory(
    config: Config, layouts: Sequence[Layout], stages: Sequence[str], splits: Mapping[str, Split]
) -> None:
    """Before anything runs: does every stage that is not done fit into the memory of a GPU? Nothing is asked of a CPU.

    Raises:
        UsageError: one does not; names the fields to change.
        ModelError: there is no such model.
    """
    if config.known_device() != "cuda" or known_gpu_bytes(config) is None:
        return
    for layout in layouts:
        for row in with_folder(layout.generation):
            is_due = row.name in stages and done_record(layout.folder_of(row.name)) is None
            parts = counted_parts(config, layout, row.name, splits) if is_due else []
            if why := refusal(config, row.name, parts):
                raise UsageError(
                    f"stage={row.name} {why}; plan=true shows the parts, plan.gpu_memory_gb=… sets the limit"
                )


def refusal(config: Config, stage: str, parts: Sequence[Part]) -> str:
    """Why a stage does not fit into the GPUs that it would run on, if their memory is known; empty on a CPU."""
    gpu_bytes = known_gpu_bytes(config)
    if config.known_device() != "cuda" or gpu_bytes is None:
        return ""
    return misfit(parts, gpu_bytes * _share(config, stage))


def counted_parts(config: Config, layout: Layout, stage: str, splits: Mapping[str, Split]) -> list[Part]:
    """`parts_of` with the classes of the data (1,000 while they are not known); empty where a model cannot be counted."""
    try:
        num_classes, _ = classes_of(config, splits.get("labeled") or splits.get("validation") or splits.get("test"))
    except StageError:  # refused elsewhere, if it matters
        num_classes = _CLASSES
    try:
        return parts_of(config, layout, stage, num_classes)
    except RuntimeError:
        return []


def _share(config: Config, stage: str) -> float:
    """The part of a GPU that one process has."""
    return min(1.0, config.label.gpus_per_worker) if stage == "label" else 1.0


def misfit(parts: Sequence[Part], room: float) -> str:
    """Why a stage does not fit into `room` bytes, and what to change, for a sentence that begins with its name; empty when it fits."""
    too_large = {part.field: part for part in sorted(parts, key=_total) if part.memory.total > room}
    if not too_large:
        return ""
    needed = max(map(_total, too_large.values()))
    remedies = [", or ".join(part.remedies(room)) for part in too_large.values()]
    return f"needs {_gb(needed)} GB of a GPU's {_gb(room)}: give {'; and '.join(remedies)}"


def _total(part: Part) -> float:
    return part.memory.total


def print_memory(config: Config, parts: Mapping[str, Sequence[Part]]) -> None:
    """Print a table of the largest part of each stage, and for those that do not fit what to change."""
    known = known_gpu_bytes(config)
    room = known or _ASSUMED_GB * _GB
    largest = {name: max(some, key=_total).memory for name, some in parts.items() if some}
    small = max((memory.total for memory in largest.values()), default=0.0) < _SMALL_GB * _GB
    unit, unit_bytes = ("MB", 1e6) if small else ("GB", _GB)
    rows = [["", "images", "MB an image", *_COLUMNS]]
    rows += [[name, *_cells(memory, unit_bytes)] for name, memory in largest.items()]
    notes = []
    for name, some in parts.items():
        if why := misfit(some, room * _share(config, name.split()[0])):
            notes.append(f"{name} {why}")
    if len(rows) == 1:
        return
    print(f"\nmemory of one GPU, {unit} ({_of(config, known, unit)}); workspace is assumed, the rest counted:")
    print_table(rows)
    print("".join(f"  {note}\n" for note in notes), end="")


def _of(config: Config, known: float | None, unit: str) -> str:
    gigabytes = "" if unit == "GB" else " GB"
    if config.plan.gpu_memory_gb is not None:
        return f"of {_gb(config.plan.gpu_memory_gb * _GB)}{gigabytes}: plan.gpu_memory_gb"
    if known:
        return f"of {_gb(known)}{gigabytes}, found here"
    return f"of {_ASSUMED_GB}{gigabytes}, assumed: plan.gpu_memory_gb"


def _cells(memory: GpuMemory, unit_bytes: float) -> list[str]:
    amounts = [f"{getattr(memory, column) / unit_bytes:,.1f}" for column in _COLUMNS]
    return [f"{memory.images:,}", f"{memory.per_image / 1e6:,.1f}", *amounts]


def _gb(count: float) -> str:
    return f"{count / _GB:,.1f}"

"""Whether each stage fits into a GPU: a table for plan=true, and a refusal before a stage starts that names the fields to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from data.settings import UsageError
from data.shards.split import Split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, StudentConfig, TrainConfig
from pipeline.core.stage import StageError, done_record
from pipeline.planning.estimate import print_table
from pipeline.planning.memory import GpuMemory, evaluation_memory, inference_memory, training_memory
from pipeline.stages import with_folder
from pipeline.upstream.labeled_splits import classes_of

_GB = 1e9
_ASSUMED_GB, _CLASSES = 80, 1000  # of a plan without a GPU, or without labels
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
    teacher = config.training(layout.teacher_stage)
    teacher_batch = f"{layout.teacher_stage}.eval_batch_size"
    if stage == "student" or (stage == "teacher" and config.teacher.weights is None):
        return list(_training(stage, config.training(stage), num_classes))
    if stage == "teacher":
        return [_predicting(teacher_batch, teacher, num_classes, teacher.eval_batch_size)]
    if stage == "label":
        return [
            _predicting("label.batch_size", teacher, num_classes, config.label.batch_size),
            _predicting(teacher_batch, teacher, num_classes, teacher.eval_batch_size),
        ]
    if stage == "evaluate":
        size = config.evaluate.batch_size
        return [_predicting("evaluate.batch_size", model, num_classes, size) for model in (teacher, config.student)]
    return []


def _training(stage: str, section: TrainConfig, num_classes: int) -> Iterator[Part]:
    first = training_memory(section, num_classes)
    yield Part(f"{stage}.batch_size", first, lambda room: _smaller_steps(stage, section, num_classes, room))
    if section.eval_batch_size > first.images:  # else it takes less than the step, which keeps activations

        def count(batch_size: int) -> GpuMemory:
            return evaluation_memory(section, num_classes, batch_size)

        yield _batched(f"{stage}.eval_batch_size", count, section.eval_batch_size)
    if isinstance(section, StudentConfig) and section.fix_resolution_epochs:
        larger = training_memory(_at_last_resolution(section), num_classes, "frozen")
        yield Part(f"{stage}.fix_resolution_image_size", larger, _no_remedy)


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
        fitting = (size for size in _powers_of_two(batch_size) if count(size).total <= room)
        yield from (f"{field}={size}" for size in [max(fitting, default=0)] if size)

    return Part(field, count(batch_size), remedies)


def _smaller_steps(stage: str, section: TrainConfig, num_classes: int, room: float) -> Iterator[str]:
    for size in reversed(_powers_of_two(section.batch_size)):
        if (
            size >= section.workers
            and training_memory(section.model_copy(update={"batch_size": size}), num_classes).total <= room
        ):
            yield f"{stage}.batch_size={size}"
            return


def _no_remedy(_: float) -> Iterator[str]:
    return iter(())


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
    if config.resolved_device() != "cuda" or known_gpu_bytes(config) is None:
        return
    for layout in layouts:
        for row in with_folder(layout.generation):
            is_due = row.name in stages and done_record(layout.folder_of(row.name)) is None
            parts = counted_parts(config, layout, row.name, splits) if is_due else []
            if why := refusal(config, row.name, parts):
                raise UsageError(f"stage={row.name} {why}; plan=true shows the parts, plan.gpu_memory_gb=… sets the limit")


def refusal(config: Config, stage: str, parts: Sequence[Part]) -> str:
    """Why a stage does not fit into the GPUs that it would run on, if their memory is known; empty on a CPU."""
    gpu_bytes = known_gpu_bytes(config)
    if config.resolved_device() != "cuda" or gpu_bytes is None:
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
    remedies = [" or ".join([*part.remedies(room)]) or f"a lower {part.field}" for part in too_large.values()]
    return f"needs {_gb(needed)} GB of a GPU's {_gb(room)}: give {', and '.join(remedies)}"


def _total(part: Part) -> float:
    return part.memory.total


def print_memory(config: Config, parts: Mapping[str, Sequence[Part]]) -> None:
    """Print a table of the largest part of each stage, and for those that do not fit what to change."""
    known = known_gpu_bytes(config)
    room = known or _ASSUMED_GB * _GB
    rows = [["", "images", "MB an image", *_COLUMNS]]
    notes = []
    for name, some in parts.items():
        if some:
            rows.append([name, *_cells(max(some, key=_total).memory)])
        if why := misfit(some, room * _share(config, name.split()[0])):
            notes.append(f"{name} {why}")
    if len(rows) == 1:
        return
    print(f"\nmemory of one GPU, GB ({_of(config, known)}); workspace is assumed, the rest counted:")
    print_table(rows)
    print("".join(f"  {note}\n" for note in notes), end="")


def _of(config: Config, known: float | None) -> str:
    if config.plan.gpu_memory_gb is not None:
        return f"of {_gb(config.plan.gpu_memory_gb * _GB)}: plan.gpu_memory_gb"
    return f"of {_gb(known)}, found here" if known else f"of {_ASSUMED_GB}, assumed: plan.gpu_memory_gb"


def _cells(memory: GpuMemory) -> list[str]:
    amounts = [_gb(getattr(memory, column)) for column in _COLUMNS]
    return [f"{memory.images:,}", f"{memory.per_image / 1e6:,.1f}", *amounts]


def _gb(count: float) -> str:
    return f"{count / _GB:,.1f}"

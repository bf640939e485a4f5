"""Print what a plan expects of time: a row per stage, a column for this machine and for 1, 8 and 64 GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from data.errors import DataError
from data.images.decode import DecodeError
from data.shards.image_reader import ImageReader, places_in
from data.shards.split import Split
from pipeline.core.devices import device_here
from pipeline.core.schema import Config, TrainConfig
from pipeline.core.timing import duration
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inputs.loading_time import loading_seconds
from pipeline.models.expected_time import (
    GPU_LABELS,
    GPU_STEP_S,
    GPU_TRAINS,
    GPUS,
    LIMIT_S,
    MAX_FLOPS,
    REFERENCE,
    Workload,
    calls_per_s,
    expected_seconds,
    gpu_images_per_s,
    gpu_seconds,
    size_of,
)

_LONG_S = 2 * 86_400.0  # from here on, say what to do
_DECODED = 32  # images, to time decoding on one core


def print_estimate(config: Config, workloads: Sequence[Workload], decoded_per_s: float | None) -> None:
    """Print a table of times, what takes too long, and what the times assume.

    Args:
        workloads: of all stages; those of one name are a row.
        decoded_per_s: images that one core reads and decodes for labeling; None: not known.
    """
    device = device_here(config.known_device())
    here = "this GPU" if device == "cuda" else "here, without a GPU"
    rows, long = [["", here, *map(_gpus, GPUS)]], []
    by_name = {work.name: [other for other in workloads if other.name == work.name] for work in workloads}
    for name, works in by_name.items():
        seconds = [sum(expected_seconds(work, device) for work in works)]
        seconds += [sum(gpu_seconds(work, number) for work in works) for number in GPUS]
        rows.append([name, *map(_in_words, seconds)])
        if seconds[0] > _LONG_S:
            long.append((name, seconds[1]))
    print("\nexpected time:")
    print_table(rows)
    print("\n".join(f"  {line}" for line in [*_advice(long, device), *_assumptions(device, workloads, decoded_per_s)]))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with as many cells each, aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def _in_words(seconds: float) -> str:
    if math.isinf(seconds):
        return f"over {duration(LIMIT_S)}"
    return duration(seconds) if seconds >= 1 else "under 1 s"


def _advice(long: Sequence[tuple[str, float]], device: str) -> list[str]:
    """What to do about stages that take days here: (name, seconds on one GPU)."""
    if not long:
        return []
    names = " and ".join(name for name, _ in long)
    on_gpu = (
        ""
        if device == "cuda"
        else f"give device=cuda on a machine with a GPU ({duration(sum(s for _, s in long))} on one), or "
    )
    fields = "fewer epochs, a smaller model or image_size, or fewer images"
    return [f"{names}: too long for this machine; {on_gpu}{fields}"]


def _assumptions(device: str, workloads: Sequence[Workload], decoded_per_s: float | None) -> list[str]:
    model, size = REFERENCE
    lines = ["here: models and loading were timed now, for a moment; other work on this machine slows both"]
    if any(size_of(work.section, work.num_classes)[1] > MAX_FLOPS[device] for work in workloads):
        lines.append(
            f"      models above {MAX_FLOPS[device] / 1e9:,.0f} B FLOPs per image are scaled by FLOPs from a smaller one"
        )
    lines += [
        f"GPUs: by FLOPs from timm's published {GPU_TRAINS:,.0f} images/s of training (RTX 3090) and {GPU_LABELS:,.0f} of inference",
        f"      (RTX 4090) of {model} at {size} px, mixed precision, if they never wait for images; a step takes at least "
        f"{1000 * GPU_STEP_S:.0f} ms (assumed)",
    ]
    labeling = next((work for work in workloads if work.name.split()[0] == "label"), None)
    if labeling is None:
        return lines
    if decoded_per_s is None:
        return [*lines, "decoding: not timed, because no image of the unlabeled shards could be read"]
    need = [f"{gpu_images_per_s(labeling, number) / decoded_per_s:,.0f}" for number in GPUS]
    return [
        *lines,
        f"decoding: {decoded_per_s:,.0f} images/s per core here (of the first unlabeled shard), so labeling keeps "
        f"{', '.join(map(str, GPUS))} GPUs busy with {', '.join(need)} cores",
    ]


class HostSpeeds:
    """How fast one core of this machine loads the user's images; timed when first asked for, for a moment."""

    def __init__(self, config: Config, splits: Mapping[str, Split]) -> None:
        self._config, self._labeled, self._unlabeled = config, splits.get("labeled"), splits.get("unlabeled")

    def loading_s(self, section: TrainConfig) -> float:
        """Seconds per labeled image of a training; 0 if no image can be read."""
        try:
            return loading_seconds(self._labeled, section) if self._labeled else 0.0
        except (OSError, DataError):
            return 0.0

    @cached_property
    def decoded_per_s(self) -> float | None:
        """Images per second that are read, decoded and resized for labeling; None if no image can be read."""
        if self._unlabeled is None:
            return None
        shard = self._unlabeled.shards[0]
        view = Preprocessing.of_training(self._config.teacher).view(self._config.label.decoder)
        try:
            places = [place for place in places_in(shard.index().slice(0, _DECODED)) if place.size]
            with ImageReader([shard.url]) as reader:
                contents = reader.images(0, places)
            return len(contents) * calls_per_s(lambda: [view(content) for content in contents]) if contents else None
        except (OSError, DataError, DecodeError):
            return None

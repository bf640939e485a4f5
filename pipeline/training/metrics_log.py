"""A training's metrics.jsonl and timing.jsonl, and the same curves for TensorBoard.

`tensorboard --logdir RUN` shows all stages of a run side by side. Each save adds an event file with the lines since the save before:
object stores cannot append, and TensorBoard reads a folder's files in the order of their names.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from data import storage

METRICS_NAME = "metrics.jsonl"
_FOLDER, _PREFIX = "tensorboard", "events.out.tfevents."
Lines = Sequence[Mapping[str, float]]


def write_lines(folder: str, metrics: Lines, timing: Lines) -> None:
    """Write all lines to metrics.jsonl and timing.jsonl."""
    for name, lines in ((METRICS_NAME, metrics), ("timing.jsonl", timing)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        storage.write_text(storage.join(folder, name), text)


def write_events(folder: str, metrics: Lines, timing: Lines, after: int, step: int) -> None:
    """Write the metrics of steps `after` + 1 to `step` to an event file; no file without any."""
    new = [line for line in metrics if after < line["step"] <= step]
    if new:
        name = f"{_PREFIX}{int(step):012d}"  # twelve digits, like the time that usual names begin with
        times = {line["step"]: line["time"] for line in timing}
        storage.write_bytes(storage.join(folder, _FOLDER, name), _events(new, times))


def remove_events_after(folder: str, step: int) -> None:
    """Remove the event files of later steps, for a training that goes back to `step`."""
    for name in storage.list_names(storage.join(folder, _FOLDER)):
        if name.startswith(_PREFIX) and int(name.removeprefix(_PREFIX)) > step:
            storage.remove(storage.join(folder, _FOLDER, name))


def _events(lines: Lines, times: Mapping[float, float]) -> bytes:
    from tensorboardX import SummaryWriter  # here: the import takes half a second

    with tempfile.TemporaryDirectory() as scratch:
        writer = SummaryWriter(scratch)
        for line in lines:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, int(line["step"]), times.get(line["step"], time.time()))
        writer.close()
        (written,) = Path(scratch).iterdir()
        return written.read_bytes()

"""A training's curves for TensorBoard: `tensorboard --logdir RUN` shows all stages of a run beside each other.

Each save adds a file with the lines since the last one: an object store cannot append, and TensorBoard reads files of a folder in
the order of their names.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from data import storage

_FOLDER, _PREFIX = "tensorboard", "events.out.tfevents."
Lines = Sequence[Mapping[str, float]]


def write_events(folder: str, metrics: Lines, timing: Lines, after: int, step: int) -> None:
    """Write the lines of steps after `after`, up to `step`, beside metrics.jsonl; nothing where there are none."""
    new = [line for line in metrics if after < line["step"] <= step]
    if new:
        name = f"{_PREFIX}{int(step):012d}"  # twelve digits as in a file's usual name, which begins with the time
        times = {line["step"]: line["time"] for line in timing}
        storage.write_bytes(storage.join(folder, _FOLDER, name), _events(new, times))


def forget_events_after(folder: str, step: int) -> None:
    """Remove what a training wrote that goes back to an earlier step."""
    for name in storage.list_names(storage.join(folder, _FOLDER)):
        if name.startswith(_PREFIX) and int(name.removeprefix(_PREFIX)) > step:
            storage.remove(storage.join(folder, _FOLDER, name))


def _events(lines: Lines, times: Mapping[float, float]) -> bytes:
    # only here: it takes half a second to import, for which `stage=status` need not wait
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as scratch:
        writer = SummaryWriter(scratch)
        for line in lines:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, int(line["step"]), times.get(line["step"], time.time()))
        writer.close()
        (written,) = Path(scratch).iterdir()
        return written.read_bytes()

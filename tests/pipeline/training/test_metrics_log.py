"""TensorBoard's event files, read with the protocol buffers of tensorboardX."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from pipeline.training.metrics_log import remove_events_after, write_events

METRICS = [
    {"step": 10, "loss": 2.0, "lr": 0.1},
    {"step": 20, "loss": 1.5, "lr": 0.2},
    {"step": 20, "validation_top1": 0.5},
    {"step": 30, "loss": 1.25, "lr": 0.1},
]
TIMING = [{"step": 10, "time": 1000.0}, {"step": 20, "time": 1010.5}, {"step": 30, "time": 1020.0}]


def scalars(folder: Path) -> list[tuple[int, str, float, float]]:
    """(step, name, value, time) of all files, in the order of their names."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            found += [(event.step, v.tag, v.simple_value, event.wall_time) for v in event.summary.value]
    return found


def test_each_save_writes_its_lines_once(tmp_path: Path) -> None:
    write_events(str(tmp_path), METRICS[:3], TIMING[:2], 0, 20)
    write_events(str(tmp_path), METRICS, TIMING, 20, 30)
    write_events(str(tmp_path), METRICS, TIMING, 30, 40)  # nothing new
    names = [name for _, name, _, _ in scalars(tmp_path)]
    assert names == ["loss", "lr", "loss", "lr", "validation_top1", "loss", "lr"]
    assert scalars(tmp_path)[-2][:3] == (30, "loss", 1.25)
    assert scalars(tmp_path)[2] == (20, "loss", 1.5, 1010.5)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_training_that_goes_back_removes_later_lines(tmp_path: Path) -> None:
    write_events(str(tmp_path), METRICS[:3], TIMING, 0, 20)
    write_events(str(tmp_path), METRICS, TIMING, 20, 30)
    remove_events_after(str(tmp_path), 20)
    assert {step for step, *_ in scalars(tmp_path)} == {10, 20}
    remove_events_after(str(tmp_path / "none"), 0)

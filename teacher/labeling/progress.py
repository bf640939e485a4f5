"""Show the progress of labeling: a bar on the screen, `progress.json` for stage=status, `timing.jsonl` for later."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from data import storage
from data.json_files import read_if_usable
from data.progress_bar import ProgressBar, format_interval
from pipeline.training.progress import PROGRESS_NAME, RecentRate, write_every_s

TIMING_NAME = "timing.jsonl"
_MAX_LINES = 500  # of timing.jsonl; beyond, drop every second one


@dataclass(frozen=True)
class LabelProgress:
    """Progress of a label stage; `seconds` in read, decode, model and write, summed over threads."""

    images_done: int
    images_total: int
    shards_done: int
    shards_total: int
    quarantined: int
    workers: int
    images_per_s: float
    eta_s: float | None  # None: the rate is not known yet
    seconds: dict[str, float] = field(default_factory=dict)
    written_at: float = 0.0  # Unix time

    def describe(self) -> str:
        """Describe rate, time left, workers and quarantined images in a few words."""
        if not self.workers and not self.images_per_s:
            return f"waiting for workers, {self.quarantined} quarantined"
        eta = "?" if self.eta_s is None else format_interval(self.eta_s)
        return f"{self.images_per_s:,.0f} img/s, {eta} left, {self.workers} workers, {self.quarantined} quarantined"


def read_progress(folder: str) -> LabelProgress | None:
    """Read the last progress of a label stage that runs or was stopped; None if there is none."""
    return read_if_usable(storage.join(folder, PROGRESS_NAME), LabelProgress)


class ProgressDisplay:
    """Draw and write progress; use as a context manager."""

    def __init__(self, folder: str, images_total: int, images_done: int) -> None:
        self._folder = folder
        layout = "{desc} {percentage:3.0f} %|{bar}| {n:,} of {total:,} images{postfix}"
        self._bar = ProgressBar(total=images_total, initial=images_done, desc="label", unit="image", layout=layout)
        self._rate = RecentRate()
        self._has_begun = False
        timing = storage.join(folder, TIMING_NAME)
        text = storage.read_bytes(timing).decode("utf-8", "replace") if storage.exists(timing) else ""
        self._lines = text.splitlines()
        self._every_s = self._write_s = write_every_s(folder)
        self._line_at = self._written_at = 0.0
        self.last: LabelProgress | None = None

    def rate(self, images_done: int, workers: int) -> float:
        """Images per second over the last two minutes; 0 until a worker is ready."""
        self._has_begun = self._has_begun or workers > 0
        return self._rate(images_done) if self._has_begun else 0.0

    def show(self, progress: LabelProgress) -> None:
        """Draw the progress; write it every few seconds."""
        self.last = progress
        self._bar.n = progress.images_done
        self._bar.set_postfix_str(progress.describe(), refresh=False)
        self._bar.update(0)
        now = time.monotonic()
        if now - self._written_at >= self._write_s:
            self._written_at = now
            self._write(progress)

    def _write(self, progress: LabelProgress) -> None:
        with suppress(OSError, storage.StorageError):  # a failed write must not stop labeling
            self._write_files(progress)

    def _write_files(self, progress: LabelProgress) -> None:
        now = time.monotonic()
        text = json.dumps(asdict(progress) | {"written_at": time.time()})
        storage.write_text(storage.join(self._folder, PROGRESS_NAME), text + "\n")
        if now - self._line_at >= self._every_s:
            self._line_at = now
            self._lines.append(text)
            if len(self._lines) > _MAX_LINES:
                self._lines, self._every_s = self._lines[::2], 2 * self._every_s
            storage.write_text(storage.join(self._folder, TIMING_NAME), "\n".join(self._lines) + "\n")

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        if self.last is not None:
            self._bar.refresh()
            self._write(self.last)
        self._bar.close()

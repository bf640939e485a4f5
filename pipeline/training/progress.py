"""The progress of a running training: a bar, and `progress.json` for stage=status."""

from __future__ import annotations

import json
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from data import storage
from data.json_files import read_if_usable
from data.progress_bar import ProgressBar, format_interval
from pipeline.training.metrics_log import Lines

PROGRESS_NAME = "progress.json"
_WINDOW_S = 120.0  # over which a rate is taken
_WRITE_S, _REMOTE_WRITE_S = 5.0, 20.0
_SHOWN = {
    "validation_top1": "validation top-1 {:.1%}",
    "knn_top1": "kNN top-1 {:.1%}",
    "spread": "feature spread {:.2f}",
}


def write_every_s(folder: str) -> float:
    """Seconds between two writes of a progress file; more on an object store."""
    return _WRITE_S if storage.is_local(folder) else _REMOTE_WRITE_S


class RecentRate:
    """Units per second over the last two minutes, for the time left."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, done: int) -> float:
        """The rate when `done` units are done in total; 0 on the first call."""
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > _WINDOW_S:
            self._seen.popleft()
        start, before = self._seen[0]
        return max(0.0, (done - before) / max(now - start, 1e-9))


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training is; what `progress.json` holds."""

    step: int
    total_steps: int
    images_per_s: float
    eta_s: float | None  # seconds left; None: no rate yet
    loss: float | None  # the last that is known, of a step since the last log line; None: none yet
    workers: int
    written_at: float = 0.0  # Unix time
    figures: dict[str, float] = field(default_factory=dict)  # the newest of metrics.jsonl, by name

    def describe(self) -> str:
        """`step 120 of 500 (24 %), 380 img/s, 01:10 left, loss 0.53`."""
        eta = "?" if self.eta_s is None else format_interval(self.eta_s)
        loss = "" if self.loss is None else f", loss {self.loss:.3g}"
        workers = f", {self.workers} processes" if self.workers > 1 else ""
        done = f"step {self.step:,} of {self.total_steps:,} ({100 * self.step / self.total_steps:.0f} %)"
        return f"{done}, {self.images_per_s:,.0f} img/s, {eta} left{loss}{self._describe_figures()}{workers}"

    def _describe_figures(self) -> str:
        return "".join(
            f", {words.format(self.figures[name])}" for name, words in _SHOWN.items() if name in self.figures
        )


def read_training_progress(folder: str) -> TrainingProgress | None:
    """The last written progress of a training; None if there is none, or it cannot be read."""
    return read_if_usable(storage.join(folder, PROGRESS_NAME), TrainingProgress)


class TrainingDisplay:
    """Draws the bar and writes `progress.json`; a context manager.

    Args:
        step: steps that are done already.
        images_per_step: over all processes.
        metrics: the lines of metrics.jsonl, to which the training adds.
        shown: false in all processes but the first.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        *,
        step: int,
        total_steps: int,
        images_per_step: int,
        workers: int,
        metrics: Lines = (),
        shown: bool,
    ) -> None:
        self._folder, self._total, self._images, self._workers = folder, total_steps, images_per_step, workers
        self._metrics = metrics
        self._shown, self._rate, self._written_at = shown, RecentRate(), 0.0
        self._every_s = write_every_s(folder)
        self._rate(step)
        self._bar = ProgressBar(total=total_steps, initial=step, desc=name, unit="step", shown=shown)

    def show(self, step: int, loss: float | None) -> None:
        """Show that `step` steps are done, and the last loss that is known."""
        self._bar.update()
        if self._shown:
            rate = self._rate(step)
            if time.monotonic() - self._written_at >= self._every_s or step == self._total:
                self._written_at = time.monotonic()
                self._write(step, loss, rate)

    def _write(self, step: int, loss: float | None, steps_per_s: float) -> None:
        eta = round((self._total - step) / steps_per_s) if steps_per_s else None
        images_per_s = round(steps_per_s * self._images, 1)
        figures = {name: value for line in self._metrics for name, value in line.items() if name in _SHOWN}
        progress = TrainingProgress(step, self._total, images_per_s, eta, loss, self._workers, time.time(), figures)
        with suppress(OSError, storage.StorageError):  # for people only: an outage must not stop the work
            storage.write_text(storage.join(self._folder, PROGRESS_NAME), json.dumps(asdict(progress)) + "\n")

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

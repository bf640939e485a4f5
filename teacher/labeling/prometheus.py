"""Export the progress of labeling as Prometheus metrics, where Ray exposes its own (docs/scale.md)."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from ray.util.metrics import Gauge

from teacher.labeling.progress import LabelProgress

_MEANINGS = {
    "images_done": "images that are labeled or quarantined, or in work",
    "images_total": "unlabeled images",
    "shards_done": "shards whose labels are committed",
    "shards_total": "unlabeled shards",
    "quarantined": "images that could not be used",
    "workers": "labeling workers that are ready",
    "images_per_s": "images per second over the last two minutes",
}


class Gauges:
    """Metrics `ray_noisy_student_label_<name>{run="<folder of the labels>"}`. Ray must run. An error is printed once and stops no run.

    Args:
        folder: the labels folder; percent-encoded, as Ray's tags are ASCII.
    """

    def __init__(self, folder: str) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._try(lambda: self._make(quote(folder, safe="/:@ .,;=+*~!$&'()[]{}-_")))

    def _make(self, tag: str) -> None:
        for name, meaning in _MEANINGS.items():
            gauge = Gauge(f"noisy_student_label_{name}", description=meaning, tag_keys=("run",))
            gauge.set_default_tags({"run": tag})
            self._gauges[name] = gauge

    def set(self, progress: LabelProgress) -> None:
        """Set the metrics."""
        self._try(lambda: self._set(progress))

    def _set(self, progress: LabelProgress) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(float(getattr(progress, name)))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # Ray's metrics raise types of several libraries
            self._gauges = {}
            print(
                f"label: no metrics for Prometheus ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
                flush=True,
            )

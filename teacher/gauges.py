"""The progress of labeling as Prometheus metrics, at the addresses where Ray exposes its own (docs/scale.md)."""

from __future__ import annotations

from ray.util.metrics import Gauge

from teacher.progress import Progress

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
    """`ray_noisy_student_label_<name>{run="<folder of the labels>"}`; Ray must run."""

    def __init__(self, folder: str) -> None:
        self._gauges = {
            name: Gauge(f"noisy_student_label_{name}", description=meaning, tag_keys=("run",))
            for name, meaning in _MEANINGS.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": folder})

    def set(self, progress: Progress) -> None:
        """Show these figures from now on."""
        for name, gauge in self._gauges.items():
            gauge.set(float(getattr(progress, name)))

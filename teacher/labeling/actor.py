"""The labeling actor: loads the model once and labels shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import ray

from data.labels.label_files import LabeledShard
from data.shards.split import Shard
from pipeline.core.ray_runtime import cores_and_gpus_here
from pipeline.core.schema import LabelConfig
from pipeline.inference.ensemble import load_labeling_predictor
from pipeline.inference.stage_weights import read_info
from teacher.labeling.crash_isolation import crashing_images, open_shard
from teacher.labeling.label_shard import ShardLabeler
from teacher.labeling.pool import here
from teacher.labeling.worker_needs import decode_threads


@ray.remote(concurrency_groups={"labeling": 2, "asking": 1})  # type: ignore[call-overload]
class Labeler:
    """What `teacher.labeling.pool` calls. `prepare` loads the model, not `__init__`: its errors reach the driver unchanged."""

    def __init__(
        self, teachers: Sequence[str], config: LabelConfig, device: str, made_by: str, temperature: float
    ) -> None:
        self._teachers, self._config, self._device, self._made_by = teachers, config, device, made_by
        self._temperature = temperature

    @ray.method(concurrency_group="asking")
    def place(self) -> tuple[str, int]:
        """Node id and process id, without waiting for other calls."""
        return here()

    @ray.method(concurrency_group="labeling")
    def prepare(self) -> None:
        """Load the model."""
        config = self._config
        self._predictor = predictor = load_labeling_predictor(self._teachers, config, self._device, self._temperature)
        num_classes = read_info(self._teachers[0]).num_classes
        self._labeler = ShardLabeler(
            predictor,
            num_classes,
            config.top_k,
            config.threads,
            decode_threads(config, self._device, *cores_and_gpus_here()),
            self._made_by,
            config.memory_mb << 20,
        )

    @ray.method(concurrency_group="labeling")
    def label(self, shard: Shard, url: str, careful: bool) -> LabeledShard:
        """Label a shard and commit its file; `careful`: first find the images that crash or hang a process, and quarantine them."""
        problems = {}
        if careful:
            problems = crashing_images(
                shard.url,
                shard.num_samples,
                partial(open_shard, shard),
                self._predictor.view,
                self._config.patience_s,
                self._labeler.meter,
            )
        return self._labeler.label(shard, url, problems)

    @ray.method(concurrency_group="asking")
    def progress(self) -> tuple[int, dict[str, float]]:
        """Images so far, and seconds by part of the work (see `Meter`)."""
        return self._labeler.meter.read()

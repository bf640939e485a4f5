"""What a labeling worker takes of its machine: decoding threads, and memory. Imports neither torch nor Ray: the plan says it, too."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.schema import LabelConfig
from teacher.labeling.image_budget import ImageBudget

_PROCESS_BYTES = 1050 << 20  # resident after the imports of an actor, without a GPU's libraries, images and weights
_PARAMETER_BYTES = 4


def decode_threads(config: LabelConfig, device: str, cores: int, gpus: int) -> int:
    """`label.decode_threads`; null: the worker's share of its machine's cores.

    As many workers share a machine as `label.workers` asks for and as the machine has GPUs for (on CPUs: reserved cores).

    Args:
        cores, gpus: of the machine.
    """
    if config.decode_threads is not None:
        return config.decode_threads
    room, each = (gpus, config.gpus_per_worker) if device == "cuda" else (cores, config.cpus_per_worker)
    workers = config.worker_range()[1]
    if each:
        workers = min(workers, int(room / each))
    return max(1, cores // max(1, workers))


@dataclass(frozen=True)
class WorkerNeeds:
    """What one worker takes on a machine.

    Attributes:
        threads: that decode.
        image_bytes: for files and images, by `label.memory_mb`.
        other_bytes: for the process and the weights.
    """

    threads: int
    image_bytes: int
    other_bytes: int

    @classmethod
    def of(
        cls, config: LabelConfig, device: str, cores: int, gpus: int, view_bytes: int, parameters: int
    ) -> WorkerNeeds:
        """The needs on a machine with so many cores and GPUs.

        Args:
            view_bytes: of what the teacher sees of a sample.
            parameters: of all teachers.
        """
        budget = ImageBudget.of(config.memory_mb << 20, config.batch_size * view_bytes)
        other = _PROCESS_BYTES + _PARAMETER_BYTES * parameters
        return cls(decode_threads(config, device, cores, gpus), budget.total_bytes, other)

    def describe(self) -> str:
        """In words."""
        threads = f"{self.threads} decoding thread{'s' * (self.threads > 1)} (label.decode_threads)"
        return (
            f"a worker on a machine like this: {threads}, up to {self.image_bytes / 1e9:.1f} GB for files and images "
            f"(label.memory_mb), {self.other_bytes / 1e9:.1f} GB for the rest"
        )

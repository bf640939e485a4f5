"""The losses and metrics of the steps since the last look: on the device until then, so that no step waits for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from data import storage
from pipeline.inputs.batches import TrainBatches
from pipeline.training.distributed import Ranks
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.state import TrainState

_NON_FINITE = "non_finite_batch.txt"
_NO_METRICS: Mapping[str, torch.Tensor] = MappingProxyType({})


class StepLosses:
    """Collects each step's loss, and looks at them when asked.

    Attributes:
        newest: the last loss that was looked at; None before the first look.
    """

    def __init__(self, job: TrainJob, batches: TrainBatches, ranks: Ranks) -> None:
        self._job, self._batches, self._ranks = job, batches, ranks
        self._losses: list[torch.Tensor] = []
        self._metrics: list[Mapping[str, torch.Tensor]] = []
        self.newest: float | None = None

    def append(self, loss: torch.Tensor, metrics: Mapping[str, torch.Tensor] = _NO_METRICS) -> None:
        """Add the means of this rank's images in a step: float32, scalars on the device; the same metrics in every step."""
        self._losses.append(loss)
        self._metrics.append(metrics)

    def look(self, state: TrainState) -> None:
        """Add the global batches' means to the state's sums. Waits for the device. Called by all ranks after the same step.

        Raises:
            TrainingError: a loss, or a weight, is not finite; on all ranks.
        """
        means, metrics = self._means()
        first = state.step - len(means) + 1
        for step, loss in enumerate(means, first):
            if not math.isfinite(loss):
                self._fail(step, f"the loss is {loss} at step {step}")
            state.loss_sum += loss
        if not _is_finite(state.model):
            self._fail(state.step, f"weights are not finite after step {state.step}, whose loss is {means[-1]:.4g}")
        for name, values in metrics.items():
            for value in values:  # one by one: their sum must not depend on how often a checkpoint asked for a look
                state.metric_sums[name] = state.metric_sums.get(name, 0.0) + value
        state.loss_count += len(means)
        self.newest = means[-1]
        self._losses.clear()
        self._metrics.clear()

    def _means(self) -> tuple[list[float], dict[str, list[float]]]:
        """The loss of each step, and by name each metric of each step, over all ranks; in one copy from the device."""
        names, steps = list(self._metrics[0]), len(self._losses)
        columns = [self._losses, *([metrics[name] for metrics in self._metrics] for name in names)]
        values = torch.stack([value for column in columns for value in column]).double().cpu()
        means = self._ranks.mean(values)
        losses, *others = (means[start : start + steps] for start in range(0, len(means), steps))
        return losses, dict(zip(names, others, strict=True))

    def _fail(self, step: int, what: str) -> None:
        job = self._job
        keys, listing = self._batches.keys(step - 1), storage.join(job.folder, _NON_FINITE)
        if self._ranks.rank == 0:
            storage.write_text(listing, "".join(f"{key}\n" for key in keys))
        rate = (
            f"{job.name}.fix_resolution_lr"
            if job.starts_from
            else f"{job.name}.lr or lengthen {job.name}.warmup_epochs"
        )
        raise TrainingError(
            f"{job.name}: {what} (learning rate {job.learning_rate(step - 1):.4g}). Lower {rate}. The batch's {len(keys)} images are "
            f"listed in {listing}: {', '.join(keys[:3])}, …"
        )


@torch.no_grad()
def _is_finite(model: torch.nn.Module) -> bool:
    """Whether all parameters are finite. Waits for the device."""
    largest = torch._foreach_norm(list(model.parameters()), math.inf)
    return bool(torch.stack(largest).isfinite().all())

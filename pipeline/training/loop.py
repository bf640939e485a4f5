"""Training: one loop for pretraining, teacher and student, in one process or in each process of Ray Train.

    newest checkpoint, or a new state ──► for each batch: step; at times: losses, metrics, evaluation, checkpoint ──► final checkpoint

A step is a function of the state before it and the step's number. So a killed run continues from its last checkpoint to the same
final weights. Between log lines, evaluations and checkpoints the host does not wait for the device. Checkpoints are written beside
the steps (`checkpoint_writer`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from data.storage.failpoint import failpoint
from pipeline.core import interrupt
from pipeline.core.devices import require_device
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.loader import load_batches, raise_on_lost_loaders
from pipeline.training.checkpoint import load_newest
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.distributed import Ranks, join_ranks
from pipeline.training.evaluation import measure, report_collapse
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.losses import StepLosses
from pipeline.training.metrics_log import remove_events_after, write_lines
from pipeline.training.objectives.choice import objective_of
from pipeline.training.progress import TrainingDisplay
from pipeline.training.state import TrainState, new_state
from pipeline.training.step import device_settings, train_step, training_network, unfrozen_network


def fit(job: TrainJob, stop_requested: Callable[[], bool] = interrupt.pending) -> None:
    """Train to the end, from the last checkpoint if there is one. The final checkpoint (`load_trained`) is the result.

    Args:
        stop_requested: asked after every step; once true on any rank, save and return.

    Raises:
        UsageError: there is no GPU, but the job asks for one; or its batch-norm statistics would be those of a single batch.
        TrainingError: a loss or the weights are not finite, or the ranks find different checkpoints.
        CheckpointError: all checkpoints are damaged.
        OSError, StorageError: a checkpoint could not be written; raised after the step at which that is known.
        DataError: an image cannot be read.
        LoaderLostError: a loading process was killed or hangs.
        Interrupted: a signal came; the state is saved.
    """
    require_device(job.device)
    job.config.require_averaged_statistics(job.name)
    with device_settings(job):
        raise_on_lost_loaders(job.name, lambda: _fit(job, stop_requested))


def _fit(job: TrainJob, stop_requested: Callable[[], bool]) -> None:
    ranks = join_ranks()
    state = new_state(job, ranks.world)
    _resume(job, state, ranks)
    network = training_network(state.model, job, ranks.world, state.step)
    batches = TrainBatches(job.streams, job.config, job.num_classes, job.seed, ranks.rank, ranks.world)
    steps = range(state.step, job.total_steps)
    loaded = load_batches(batches, steps, job.config.loader_workers, pin=job.device == "cuda", name=job.name)
    objective = objective_of(job.config, state.model, state.ema.module, ranks)
    losses = StepLosses(job, batches, ranks)
    started, writer = time.monotonic(), CheckpointWriter(job, state.step)
    with closing(batches), closing(loaded), interrupt.deferred(), writer, _display(job, state, ranks.rank) as display:
        for batch in loaded:
            failpoint(f"step-{state.step}/{job.name}/rank-{ranks.rank}")
            if 0 < job.frozen_steps == state.step > steps.start:
                network = unfrozen_network(network, job, ranks.world)
            losses.append(*train_step(job, state, network, batch, ranks.rank, objective))
            writer.raise_on_error()
            stops, due = ranks.any(stop_requested(), ranks.rank == 0 and writer.is_due())
            if stops or due or _logs(job, state.step) or _evaluates(job, state.step):
                losses.look(state)  # waits for the device: at these steps alone
                _log(job, state, (state.step - steps.start) / (time.monotonic() - started), ranks.rank)
                _evaluate(job, state, ranks)
                if ranks.rank == 0 and (stops or due or state.step == job.total_steps):
                    writer.save(state)
            display.show(state.step, losses.newest)
            if stops:
                break
        writer.wait()


def _resume(job: TrainJob, state: TrainState, ranks: Ranks) -> None:
    """Restore the newest checkpoint, if there is one. Write its metrics again: a kill may have come between checkpoint and metrics.

    Raises:
        TrainingError: the ranks find different checkpoints.
    """
    checkpoint = load_newest(job.checkpoints)
    found = ranks.gather(None if checkpoint is None else checkpoint["step"])
    if len(set(found)) > 1:
        raise TrainingError(
            f"{job.checkpoints}: the training processes find checkpoints of different steps ({', '.join(map(str, found))}, by rank); "
            "run_dir must be a folder that all nodes share, or an object store"
        )
    if checkpoint is not None:
        state.restore(checkpoint)
        if ranks.rank == 0:
            write_lines(job.folder, state.metrics, state.timing)
            remove_events_after(job.folder, state.step)


def _logs(job: TrainJob, step: int) -> bool:
    return step % job.config.log_every_steps == 0 or step == job.total_steps


def _log(job: TrainJob, state: TrainState, steps_per_s: float, rank: int) -> None:
    """When due, add the mean loss, and the objective's means, since the last line to the metrics."""
    if not _logs(job, state.step):
        return
    epoch = round(state.step / job.steps_per_epoch, 4)
    mean_loss, rate = state.loss_sum / state.loss_count, job.learning_rate(state.step - 1)
    means = {name: total / state.loss_count for name, total in state.metric_sums.items()}
    state.metrics.append({"step": state.step, "epoch": epoch, "lr": rate, "loss": mean_loss} | means)
    images_per_s = round(steps_per_s * job.images_per_step, 1)
    state.timing.append({"step": state.step, "time": round(time.time(), 3), "images_per_s": images_per_s})
    state.loss_sum, state.loss_count, state.metric_sums = 0.0, 0, {}
    if rank == 0:
        report_collapse(job, state.metrics)


def _evaluates(job: TrainJob, step: int) -> bool:
    every = max(1, round(job.config.eval_every_epochs * job.steps_per_epoch))
    return job.validation is not None and (step % every == 0 or step == job.total_steps)


def _evaluate(job: TrainJob, state: TrainState, ranks: Ranks) -> None:
    """When due, add what the EMA weights achieve on labeled images to the metrics."""
    if job.validation is None or not _evaluates(job, state.step):
        return
    figures = measure(job, job.validation, state, ranks)
    failpoint(f"evaluation-{state.step}/{job.name}")
    state.metrics.append({"step": state.step} | figures)


def _display(job: TrainJob, state: TrainState, rank: int) -> TrainingDisplay:
    return TrainingDisplay(
        job.folder,
        job.name,
        step=state.step,
        total_steps=job.total_steps,
        images_per_step=job.images_per_step,
        workers=state.workers,
        metrics=state.metrics,
        shown=rank == 0,
    )

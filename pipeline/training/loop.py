"""Training: one loop for teacher and student, in one process or in each process of Ray Train.

A step is a function of the state before it and the step's number: the batch follows from the number, and so does the seed of
dropout and stochastic depth. So a run that was killed continues from its last checkpoint to the same final weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn

from data import storage
from data.shards.split import Split
from data.storage.failpoint import failpoint
from pipeline.core import interrupt
from pipeline.core.schema import TrainConfig
from pipeline.inference.predictor import Predictor, predict_split, top_k_accuracy
from pipeline.inputs.batches import TrainBatch, TrainBatches
from pipeline.inputs.loader import load, tell_of_lost_loaders
from pipeline.inputs.noise import add_noise
from pipeline.inputs.streams import StreamSpec
from pipeline.inputs.train_transform import normalize
from pipeline.models.device import require_device
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import set_bn_momentum
from pipeline.models.weights import load_weights
from pipeline.training.checkpoint import load_newest, save_checkpoint
from pipeline.training.distributed import gather, rank_and_world, share_gradients, sum_over_ranks
from pipeline.training.ema import EMA
from pipeline.training.freezing import freeze_early_layers, to_training_mode
from pipeline.training.objective import soft_cross_entropy
from pipeline.training.optimizer import build_optimizer, learning_rate
from pipeline.training.progress import TrainingDisplay
from pipeline.training.state import State
from pipeline.training.tensorboard import forget_events_after, write_events

_NON_FINITE = "non_finite_batch.txt"


class TrainingError(ValueError):
    """Training that cannot go on; the message says where and why."""


@dataclass(frozen=True)
class TrainJob:
    """All that a training process needs; plain data that travels to other processes."""

    name: str  # the section of the configuration, for messages
    folder: str
    config: TrainConfig
    streams: tuple[StreamSpec, ...]  # the labeled one first
    num_classes: int
    num_labeled: int
    seed: int
    threads: int
    device: str
    validation: Split | None = None
    initial_weights: str | None = None  # a folder of weights; what the model has beyond them is fresh (`begins_as`)
    starts_from: TrainJob | None = None  # its EMA weights, of which only the end is trained; see `fix_resolution`

    @property
    def steps_per_epoch(self) -> float:
        """Steps per pass over the labeled images."""
        return self.num_labeled / self.streams[0].images_per_step

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return max(1, math.ceil(self.config.epochs * self.steps_per_epoch))


def fit(job: TrainJob, stop_requested: Callable[[], bool] = interrupt.pending) -> None:
    """Train to the end, or continue to it. The final checkpoint (see `load_trained`) is the result.

    Args:
        stop_requested: asked after every step; once true, the state is saved and the training ends.

    Raises:
        UsageError: there is no GPU, and one is asked for; or the model would be evaluated with one batch's statistics.
        TrainingError: the loss is not finite, or the processes do not find the same checkpoint.
        CheckpointError: all checkpoints are damaged.
        DataError: an image that cannot be read.
        LoaderLostError: a loading process was killed, or no batch comes.
        Interrupted: a signal came; the state is saved.
    """
    require_device(job.device)
    job.config.require_averaged_statistics(job.name)
    torch.set_num_threads(job.threads)
    tell_of_lost_loaders(job.name, lambda: _fit(job, stop_requested))


def _fit(job: TrainJob, stop_requested: Callable[[], bool]) -> None:
    rank, world = rank_and_world()
    state = _new_state(job)
    state.workers = world
    _resume(job, state, rank)
    network = _training_network(state.model, job, world)
    batches = TrainBatches(job.streams, job.config, job.num_classes, job.seed, rank, world)
    steps = range(state.step, job.total_steps)
    loaded = load(batches, steps, job.config.loader_workers, pin=job.device == "cuda", name=job.name)
    last_saved, last_saved_step, started, first = time.monotonic(), state.step, time.monotonic(), state.step
    with closing(batches), closing(loaded), interrupt.deferred(), _display(job, state, rank) as display:
        for batch in loaded:
            failpoint(f"step-{state.step}/{job.name}/rank-{rank}")
            loss = _train_step(job, state, network, batch, rank)
            loss_sum, stops = sum_over_ranks(loss.item(), stop_requested())
            _check_loss(job, state, loss_sum / world, batches, rank)
            display.show(state.step, loss_sum / world)
            is_best = _record(job, state, rank, (state.step - first) / (time.monotonic() - started))
            due = is_best or time.monotonic() - last_saved >= job.config.checkpoint_every_s
            if rank == 0 and (stops or due or state.step == job.total_steps):
                _save(job, state, last_saved_step)
                last_saved, last_saved_step = time.monotonic(), state.step
            if stops:
                break


def load_trained(folder: str, total_steps: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """EMA weights (a state dict) and metrics of a training that has ended.

    Raises:
        TrainingError: it has not ended.
    """
    checkpoint = load_newest(storage.join(folder, "checkpoints"))
    if checkpoint is None or checkpoint["step"] != total_steps:
        raise TrainingError(f"{folder}: training has not reached step {total_steps}; run the stage again to continue")
    return EMA.weights(checkpoint["ema"]), checkpoint["metrics"]


def _new_state(job: TrainJob) -> State:
    config = job.config
    torch.manual_seed(job.seed)
    model = build_model(config.model, job.num_classes, config.model_args, config.dropout, config.stochastic_depth)
    set_bn_momentum(model, config.bn_momentum)
    if job.initial_weights is not None:
        model.load_state_dict(model.state_dict() | load_weights(job.initial_weights)[1])
    if job.starts_from is not None:
        model.load_state_dict(load_trained(job.starts_from.folder, job.starts_from.total_steps)[0])
        freeze_early_layers(model)
    memory = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(job.device, memory_format=memory)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config.momentum, config.weight_decay)
    return State(model, EMA(model, config.ema_decay), optimizer)


def _resume(job: TrainJob, state: State, rank: int) -> None:
    """Go to the newest checkpoint, if there is one, and bring the metrics in line with it: a kill may have come between the two.

    Raises:
        TrainingError: the processes do not find the same one.
    """
    checkpoint = load_newest(_checkpoints(job))
    steps = gather(None if checkpoint is None else checkpoint["step"])
    if len(set(steps)) > 1:
        raise TrainingError(
            f"{_checkpoints(job)}: the training processes find checkpoints of different steps ({', '.join(map(str, steps))}, by rank); "
            "run_dir must be a folder that all nodes share, or an object store"
        )
    if checkpoint is not None:
        state.restore(checkpoint)
        if rank == 0:
            _write_lines(job, state)
            forget_events_after(job.folder, state.step)


def _training_network(model: nn.Module, job: TrainJob, world: int) -> nn.Module:
    """The same parameters, compiled and distributed as asked."""
    if job.config.compile:
        model.compile()
    if world == 1:
        return to_training_mode(model)
    side, images = job.config.image_size, sum(stream.images_per_step for stream in job.streams) // world
    with _autocast(job):
        network = share_gradients(model, torch.zeros(images, 3, side, side, device=job.device))
    return to_training_mode(network)


def _train_step(job: TrainJob, state: State, network: nn.Module, batch: TrainBatch, rank: int) -> torch.Tensor:
    """One optimizer step; returns the loss of this rank's part, a scalar on the device."""
    config = job.config
    torch.manual_seed(_step_seed(job.seed, state.step, rank))
    images = batch.images.to(job.device, non_blocking=True)
    if batch.noise is not None:
        images = add_noise(images, batch.noise, config.augment, config.mean)
    images = normalize(images, config.mean, config.std)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    targets = batch.targets.to(job.device, non_blocking=True)
    if config.mixup:
        images, targets = _mix(images, targets, config.mixup)
    for group in state.optimizer.param_groups:
        group["lr"] = _learning_rate(job, state.step)
    with _autocast(job):
        loss = soft_cross_entropy(network(images), targets)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    state.ema.update(state.model)
    state.step += 1
    return loss.detach()


def _autocast(job: TrainJob) -> torch.autocast:
    return torch.autocast(job.device, torch.bfloat16, enabled=job.config.precision == "bf16")


def _mix(images: torch.Tensor, targets: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """mixup (arXiv 1710.09412) over the whole batch, with one coefficient per image; the image itself has the larger part."""
    drawn = torch.distributions.Beta(alpha, alpha).sample((len(images),))
    weight = torch.maximum(drawn, 1 - drawn).to(images.device)
    other = torch.randperm(len(images)).to(images.device)
    mixed = torch.lerp(images[other], images, weight.view(-1, 1, 1, 1)).contiguous(memory_format=_memory(images))
    return mixed, torch.lerp(targets[other], targets, weight.view(-1, 1))


def _memory(images: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _check_loss(job: TrainJob, state: State, loss: float, batches: TrainBatches, rank: int) -> None:
    """Add the global batch's mean loss to the metrics; raises TrainingError, in all processes, when it is not finite."""
    if not math.isfinite(loss):
        keys, listing = batches.keys(state.step - 1), storage.join(job.folder, _NON_FINITE)
        if rank == 0:
            storage.write_text(listing, "".join(f"{key}\n" for key in keys))
        rate = (
            f"{job.name}.fix_resolution_lr"
            if job.starts_from
            else f"{job.name}.lr or lengthen {job.name}.warmup_epochs"
        )
        raise TrainingError(
            f"{job.name}: the loss is {loss} at step {state.step} (learning rate {_learning_rate(job, state.step - 1):.4g}). "
            f"Lower {rate}. The batch's {len(keys)} images are listed in {listing}: "
            f"{', '.join(keys[:3])}, …"
        )
    state.loss_sum += loss
    state.loss_count += 1


def _record(job: TrainJob, state: State, rank: int, steps_per_s: float) -> bool:
    """Add lines to the metrics where they are due; returns whether these weights are the best so far (rank 0 alone knows)."""
    last = state.step == job.total_steps
    if state.step % job.config.log_every_steps == 0 or last:
        epoch = state.step / job.steps_per_epoch
        line = {"step": state.step, "epoch": round(epoch, 4), "lr": _learning_rate(job, state.step - 1)}
        state.metrics.append(line | {"loss": state.loss_sum / state.loss_count})
        images = sum(stream.images_per_step for stream in job.streams)
        state.timing.append(
            {"step": state.step, "time": round(time.time(), 3), "images_per_s": round(steps_per_s * images, 1)}
        )
        state.loss_sum, state.loss_count = 0.0, 0
    every = max(1, round(job.config.eval_every_epochs * job.steps_per_epoch))
    if job.validation is None or rank or (state.step % every and not last):
        return False
    predictor = Predictor(state.ema.module, job.config, job.device)
    logits, labels = predict_split(job.validation, predictor)
    failpoint(f"evaluation-{state.step}/{job.name}")
    state.metrics.append({"step": state.step, "validation_top1": top_k_accuracy(logits, labels)[0]})
    return state.best_step == state.step


def _save(job: TrainJob, state: State, last_step: int) -> None:
    """Checkpoint, then the metrics up to it, so that the two always agree after the next start."""
    save_checkpoint(_checkpoints(job), state.step, state.as_checkpoint(), job.config.keep_checkpoints, state.best_step)
    _write_lines(job, state)
    write_events(job.folder, state.metrics, state.timing, last_step, state.step)


def _write_lines(job: TrainJob, state: State) -> None:
    for name, lines in (("metrics", state.metrics), ("timing", state.timing)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        storage.write_text(storage.join(job.folder, f"{name}.jsonl"), text)


def _learning_rate(job: TrainJob, step: int) -> float:
    """For the step after `step` steps; `lr` is per 256 images, as published."""
    config = job.config
    peak = config.lr * config.batch_size / 256
    warmup_steps = round(config.warmup_epochs * job.steps_per_epoch)
    return learning_rate(step, job.total_steps, warmup_steps, peak, config.lr_schedule)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank


def _checkpoints(job: TrainJob) -> str:
    return storage.join(job.folder, "checkpoints")


def _display(job: TrainJob, state: State, rank: int) -> TrainingDisplay:
    images = sum(stream.images_per_step for stream in job.streams)
    return TrainingDisplay(job.folder, job.name, state.step, job.total_steps, images, state.workers, shown=rank == 0)

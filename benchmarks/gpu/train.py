"""Training throughput and memory of `fit()` beside timm's loop, and what torch.compile does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timm_loop
from benchmarks.gpu.setting import NUM_CLASSES, Model, Setting
from benchmarks.trainings import fit_rate, on_one_batch
from pipeline.models.registry import build_model
from pipeline.planning.memory import training_memory

Result = dict[str, Any]


def cells(setting: Setting) -> dict[str, Callable[[], Result]]:
    """Name → measurement, the contenders of one model in turn."""
    found: dict[str, Callable[[], Result]] = {}
    for model in setting.models:
        found |= {
            f"train {model.title} ours, one batch": lambda model=model: ours(setting, model, True),  # type: ignore[misc]
            f"train {model.title} timm, one batch": lambda model=model: timm(setting, model, True),  # type: ignore[misc]
            f"train {model.title} ours, photos": lambda model=model: ours(setting, model, False),  # type: ignore[misc]
            f"train {model.title} timm, photos": lambda model=model: timm(setting, model, False),  # type: ignore[misc]
        }
    return found


def compile_cells(setting: Setting) -> dict[str, Callable[[], Result]]:
    """Name → measurement of the same training, not compiled and, unless the setting compiles nothing, compiled."""
    return {
        f"compile {model.title} {'on' if on else 'off'}": lambda model=model, on=on: compiled(setting, model, on)  # type: ignore[misc]
        for model in setting.models
        for on in ((False, True) if setting.compiles else (False,))
    }


def ours(setting: Setting, model: Model, one_batch: bool) -> Result:
    """`fit()` on photos, or on one batch that is in memory."""
    config, split = setting.config(model), setting.photos()
    train = on_one_batch if one_batch else fit_rate
    found = _with_memory(
        setting, model, lambda: train(split, config, setting.steps, setting.warm_up, NUM_CLASSES, setting.device)
    )
    return found | {"counted_gb": training_memory(config, NUM_CLASSES).total / 1e9}


def timm(setting: Setting, model: Model, one_batch: bool) -> Result:
    """timm's loop with the same model, batch, precision, memory format and compilation, and with what timm's script sets for GPUs."""
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    config, split = setting.config(model), setting.photos()
    built = build_model(config.model, NUM_CLASSES, config.model_args).to(
        setting.device, memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    loader = timm_loop.make_loader(split, config, setting.device)
    batches = [next(iter(loader))] if one_batch else loader
    return _with_memory(setting, model, lambda: timm_loop.train(built, batches, config, setting.steps, setting.warm_up))


def compiled(setting: Setting, model: Model, on: bool) -> Result:
    """`fit()` on one batch: rate, graphs, graphs compiled again, and graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = setting.config(model).model_copy(update={"compile": on})
    rate = on_one_batch(setting.photos(), config, setting.steps, setting.warm_up, NUM_CLASSES, setting.device)
    counters = torch._dynamo.utils.counters
    return {
        "img_per_s": rate * config.batch_size,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def _with_memory(setting: Setting, model: Model, run: Callable[[], float]) -> Result:
    """Images per second of a function that returns steps per second, and the peak memory of the GPU in GB."""
    gc.collect()  # of the measurement before
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found: Result = {"img_per_s": run() * model.train_batch}
    if setting.device == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found

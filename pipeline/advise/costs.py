"""What the cells of a scaling study would cost, and the budget that they are held against."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data import storage
from data.storage.redact import redacted
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, TrainConfig
from pipeline.core.stage import StageError
from pipeline.pages.scaling_plot import FINDINGS_NAME, SCALING
from pipeline.planning.memory import training_memory
from pipeline.studies.scaling import Cell

_GIB = 1024**3
_PREFIX = "teacher."


@dataclass(frozen=True)
class Cost:
    """Of a training and its model, or the most that they may cost.

    Attributes:
        hours: of the training.
        latency_ms: of an image in a batch of predictions.
        memory_gb: GiB of a training step.
    """

    hours: float
    latency_ms: float
    memory_gb: float

    @classmethod
    def endless(cls) -> Cost:
        """A budget that everything is within."""
        return cls(math.inf, math.inf, math.inf)

    def is_within(self, budget: Cost) -> bool:
        """Whether no part is above the budget's."""
        return self.times(budget) <= 1

    def times(self, budget: Cost) -> float:
        """How many times the budget the worst part is."""
        return max(self.hours / budget.hours, self.latency_ms / budget.latency_ms, self.memory_gb / budget.memory_gb)


@dataclass(frozen=True)
class Costed:
    """A cell.

    Attributes:
        errors: 100 − top-1 by seed, in per cent.
        changes: dotted fields of the teacher → values.
    """

    name: str
    errors: tuple[float, ...]
    cost: Cost
    changes: Mapping[str, Any]

    @property
    def error(self) -> float:
        """Mean over seeds."""
        return sum(self.errors) / len(self.errors)

    @property
    def seeds(self) -> int:
        """Number of trainings."""
        return len(self.errors)

    def words(self, section: str) -> list[str]:
        """Its fields as words of the command line, of a section."""
        named = {f"{section}.{field.removeprefix(_PREFIX)}": value for field, value in self.changes.items()}
        return [_word(field, value) for field, value in named.items()]


def costs_of(config: Config, layout: Layout) -> list[Costed]:
    """The cells of `advise.study`, or of this run. Raises StageError: there is no finished study."""
    run = config.advise.study or layout.run_dir
    url = storage.join(Layout(run).study(SCALING), FINDINGS_NAME)
    if not storage.exists(url):
        raise StageError(
            f"{redacted(url)}: no such file, so there is no finished scaling study in {redacted(run)}; run stage=ablate "
            f"ablate.study={SCALING} first, or give advise.study=RUN"
        )
    content = json.loads(storage.read_text(url))
    images = config.advise.images or content["images"]
    return [_costed(cell, content, images, config.teacher) for cell in content["cells"]]


def _costed(cell: Mapping[str, Any], content: Mapping[str, Any], images: int, teacher: TrainConfig) -> Costed:
    own = {field.removeprefix(_PREFIX): value for field, value in cell["changes"].items()}
    plain = {name: value for name, value in own.items() if "." not in name}
    section = teacher.model_copy(update=plain | {"batch_size": content["batch_size"]})
    steps = math.ceil(cell["epochs"] * images / content["batch_size"])
    memory = training_memory(section, content["num_classes"]).total / _GIB
    name = Cell(cell["width"], cell["depth"], cell["image_size"], cell["epochs"]).name
    cost = Cost(steps * cell["step_ms"] / 3.6e6, cell["inference_ms"], memory)
    return Costed(name, tuple(cell["errors"]), cost, cell["changes"])


def _word(field: str, value: Any) -> str:
    word = f"{field}={json.dumps(value).replace(chr(34), '')}"
    return f"'{word}'" if set(word) & set(" {}[]") else word

"""The scaling study of ResNet-RS (arXiv 2103.07579, section 4, figures 2 and 3): width × depth × image size × length of training.

A row is a cell of `ablate.grid`. Regularization grows with the model, and only the longest length has it, as in the paper: the short
trainings have crop and flip alone. No cell is stopped early: short trainings rank models otherwise than long ones, which is the paper's
first warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from data.settings import UsageError
from pipeline.core.schema import Config, TrainConfig
from pipeline.models import expected_time
from pipeline.models.memory import count_pass
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import BLOCKS, ModelError
from pipeline.pages.scaling_plot import SCALING
from pipeline.studies.rows import Row, Study, no_input_noise

_PREFIX = "resnetrs"
_ARGS = ("se_ratio", "resnet_d", "stem", "in_chans")  # of the teacher's model_args, which the cells keep
_REGULARIZATION = ("label_smoothing", "dropout", "stochastic_depth")
_BASE = {
    "teacher.weights": None,
    "teacher.init": None,
    "teacher.init_head_lr_scale": 1.0,
    "teacher.freeze_backbone_epochs": 0.0,
}


@dataclass(frozen=True)
class Cell:
    """One combination of the grid."""

    width: float
    depth: int
    image_size: int
    epochs: float

    @property
    def name(self) -> str:
        """The name of its row."""
        return f"width {self.width:g}, depth {self.depth}, {self.image_size} px, {self.epochs:g} epochs"

    @property
    def model(self) -> str:
        """Name of its model."""
        return f"{_PREFIX}{self.depth}"


@dataclass(frozen=True)
class Size:
    """What a cell's model costs, counted.

    Attributes:
        parameters: number.
        flops: of the forward pass of one image, 2 × multiply-adds.
        activation_bytes: kept for the backward pass, per image.
    """

    parameters: int
    flops: int
    activation_bytes: int


def cells_of(config: Config) -> list[Cell]:
    """All cells of `ablate.grid`. Raises UsageError: a depth that there is not, or a value twice."""
    grid, teacher = config.ablate.grid, config.teacher
    axes: tuple[list[Any], ...] = (
        grid.width,
        grid.depth,
        grid.image_size or [teacher.image_size],
        grid.epochs or [teacher.epochs],
    )
    for name, values in zip(("width", "depth", "image_size", "epochs"), axes, strict=True):
        if len(set(values)) < len(values):
            raise UsageError(f"ablate.grid.{name}={values}: a value is there twice")
    if unknown := [depth for depth in grid.depth if depth not in BLOCKS]:
        raise UsageError(f"ablate.grid.depth: {unknown[0]} is none of {', '.join(map(str, BLOCKS))}")
    return [Cell(*values) for values in product(*axes)]


def scaling_study(config: Config) -> Study:
    """The study of a configuration's grid. Raises UsageError as `cells_of`."""
    cells = cells_of(config)
    rows = tuple(Row(cell.name, dict(_changes(cell, cells, config))) for cell in cells)
    return Study(SCALING, "ResNet-RS, figures 2 and 3 (arXiv 2103.07579), as plots alone", _BASE, rows)


def model_args(cell: Cell, config: Config) -> dict[str, Any]:
    """Arguments of a cell's model: the teacher's without its blocks, and the width."""
    own = config.teacher.model_args if config.teacher.model.startswith(_PREFIX) else {}
    return {name: own[name] for name in _ARGS if name in own} | {"width": cell.width}


def section_of(cell: Cell, config: Config) -> TrainConfig:
    """The teacher's recipe with a cell's model and image size."""
    changed = {"model": cell.model, "model_args": model_args(cell, config), "image_size": cell.image_size}
    return config.teacher.model_copy(update=changed)


def flops_of(cell: Cell, config: Config, num_classes: int) -> int:
    """FLOPs of an image's forward pass. Raises ModelError, which names the cell, if its model cannot be built."""
    try:
        return expected_time.size_of(section_of(cell, config), num_classes)[1]
    except (ModelError, RuntimeError) as error:
        raise ModelError(f"study {SCALING}, {cell.name}: {error}") from None


def size_of(cell: Cell, config: Config, num_classes: int) -> Size:
    """Count a cell's model, which `flops_of` has built before."""
    section = section_of(cell, config)
    parameters, flops = expected_time.size_of(section, num_classes)
    build = partial(build_model, section.model, num_classes, section.model_args)
    memory = count_pass(build, cell.image_size, section.precision == "bf16", trains=True)
    return Size(parameters, flops, round(memory.kept_per_image))


def _changes(cell: Cell, cells: list[Cell], config: Config) -> Iterator[tuple[str, Any]]:
    """Fields of the teacher: the model, the length, and the regularization by `_strength`."""
    teacher = config.teacher
    fields = {
        "model": cell.model,
        "model_args": model_args(cell, config),
        "image_size": cell.image_size,
        "epochs": cell.epochs,
        "warmup_epochs": teacher.warmup_epochs * cell.epochs / teacher.epochs,
        "eval_every_epochs": cell.epochs,
    }
    if cell.epochs < max(other.epochs for other in cells):
        fields |= dict.fromkeys(_REGULARIZATION, 0.0)
        yield from no_input_noise("teacher").items()
    else:
        widest, deepest = max(other.width for other in cells), max(sum(BLOCKS[other.depth]) for other in cells)
        fields["dropout"] = teacher.dropout * cell.width / widest
        fields["stochastic_depth"] = teacher.stochastic_depth * sum(BLOCKS[cell.depth]) / deepest
    yield from ((f"teacher.{name}", value) for name, value in fields.items())

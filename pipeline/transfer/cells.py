"""The cells of the comparison: backbone × set × method × seed, each a trial with a folder and a done-record.

A trial's configuration names one backbone, one set and one method. Without a method it computes the features that the cells of
`linear` and `knn` read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data import storage
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.schema.transfer import SPLITS
from pipeline.core.stage import Fingerprint
from pipeline.inference.predictor import Predictor
from pipeline.models.expected_time import Workload
from pipeline.transfer.backbones import open_backbone, varies_with_seed
from pipeline.transfer.features import FILES, read_features, write_features
from pipeline.transfer.finetune import INITIAL, TRAININGS, finetune, jobs_of
from pipeline.transfer.probes import Probe, knn_probe, linear_probe
from pipeline.transfer.scores import Score
from pipeline.transfer.sets import open_set
from pipeline.transfer.workloads import features_workload, finetune_workloads
from pipeline.trials.trial import Experiment, Trial

STAGE, FEATURES, FINETUNE = "transfer", "features", "finetune"
_OF_FEATURES = ("transfer.batch_size", "device", "threads")
_FIELDS: Mapping[str, tuple[str, ...]] = {  # that a result depends on, beside its inputs
    FEATURES: _OF_FEATURES,
    "linear": (*_OF_FEATURES, "transfer.l2"),
    "knn": (*_OF_FEATURES, "transfer.knn_k", "transfer.knn_temperature"),
    FINETUNE: (*_OF_FEATURES, "transfer.finetune", "seed"),
}


@dataclass(frozen=True)
class Cell:
    """One backbone, one set and one method, or `features`."""

    backbone: str
    data: str
    method: str

    @classmethod
    def of(cls, config: Config) -> Cell:
        """The cell that a trial's configuration names."""
        (backbone,), (data,), methods = config.transfer.backbones, config.transfer.sets, config.transfer.methods
        return cls(backbone, data, methods[0] if methods else FEATURES)

    @property
    def row(self) -> str:
        """Its name in messages."""
        return f"{self.backbone}, {self.data}, {self.method}"

    def config(self, config: Config, seed: int) -> Config:
        """The configuration of a trial."""
        section = config.transfer
        narrowed = {
            "backbones": {self.backbone: section.backbones[self.backbone]},
            "sets": {self.data: section.sets[self.data]},
            "methods": [] if self.method == FEATURES else [self.method],
        }
        return config.model_copy(update={"transfer": section.model_copy(update=narrowed), "seed": seed})

    def folder(self, config: Config, seed: int) -> str:
        """Where the trial's record is."""
        return storage.join(Layout(config.run_dir).transfer, self.backbone, self.data, self.method, f"seed-{seed}")

    def seeds(self, config: Config) -> Sequence[int]:
        """The seeds with results of their own: one where a seed changes nothing."""
        varies = self.method == FINETUNE or varies_with_seed(config.transfer.backbones[self.backbone])
        return range(config.seed, config.seed + (config.transfer.seeds if varies else 1))


def cells_of(config: Config) -> list[Cell]:
    """All cells with a result, in the order of the table."""
    section = config.transfer
    return [
        Cell(backbone, data, method)
        for data in section.sets
        for method in section.methods
        for backbone in section.backbones
    ]


def trials_of(config: Config) -> list[Trial]:
    """All trials, features first; opens every backbone and set.

    Raises as `open_backbone` and `open_set`, and ModelError where weights are missing or do not fit their model.
    """
    cells = cells_of(config)
    frozen = dict.fromkeys(Cell(c.backbone, c.data, FEATURES) for c in cells if c.method != FINETUNE)
    inputs = _Inputs()
    return [_trial(cell, config, seed, inputs) for cell in (*frozen, *cells) for seed in cell.seeds(config)]


class _Inputs:
    """Digests of backbones and sets, each read and checked once."""

    def __init__(self) -> None:
        self._backbones: dict[tuple[str, int], str] = {}
        self._sets: dict[str, dict[str, str]] = {}

    def digests(self, cell: Cell, config: Config) -> dict[str, str]:
        """Input → digest of a trial."""
        if (key := (cell.backbone, config.seed)) not in self._backbones:
            found = open_backbone(config, cell.backbone)
            found.check()  # now, not after the features of all others
            self._backbones[key] = found.digest()
        if cell.data not in self._sets:
            self._sets[cell.data] = open_set(config, cell.data).digests()
        return {"backbone": self._backbones[key]} | self._sets[cell.data]


def _trial(cell: Cell, config: Config, seed: int, inputs: _Inputs) -> Trial:
    own = cell.config(config, seed)
    made = Fingerprint(own.values_of(_FIELDS[cell.method]), inputs.digests(cell, own))
    sources: tuple[str, ...] = ()
    if cell.method not in (FEATURES, FINETUNE):
        sources = (Cell(cell.backbone, cell.data, FEATURES).folder(config, seed),)
    return Trial(cell.row, seed, own, cell.folder(config, seed), made, sources, STAGE)


def _fingerprint(config: Config) -> Fingerprint:
    cell = Cell.of(config)
    return Fingerprint(config.values_of(_FIELDS[cell.method]), _Inputs().digests(cell, config))


def _run(config: Config, folder: str, sources: tuple[str, ...]) -> dict[str, Any]:
    """Make a cell's result, or the features; accuracies are fractions."""
    cell = Cell.of(config)
    if cell.method == FEATURES:
        return {"features": _write_features(config, cell, folder)}
    probe = _finetune(config, cell, folder) if cell.method == FINETUNE else _probe(config, cell, sources[0])
    score = Score.of(probe.labels, probe.predicted, open_set(config, cell.data).num_classes)
    return {
        "top1": score.top1,
        "mean_per_class": score.mean_per_class,
        "right": score.right,
        "images": score.images,
        "chosen": probe.chosen,
        "grid": probe.grid,
    }


def _write_features(config: Config, cell: Cell, folder: str) -> int:
    torch.set_num_threads(config.threads)
    backbone, device = open_backbone(config, cell.backbone), config.resolved_device()
    predictor = Predictor(backbone.network(), backbone.preprocessing, device, config.transfer.batch_size)
    return write_features(folder, open_set(config, cell.data), predictor)


def _probe(config: Config, cell: Cell, features: str) -> Probe:
    section = config.transfer
    labeled, validation, test = (read_features(features, split) for split in SPLITS)
    if cell.method == "linear":
        return linear_probe(labeled, validation, test, section.l2, config.threads)
    num_classes = open_set(config, cell.data).num_classes
    return knn_probe(labeled, validation, test, num_classes, (section.knn_k, section.knn_temperature), config.threads)


def _finetune(config: Config, cell: Cell, folder: str) -> Probe:
    section, device = config.transfer, config.resolved_device()
    backbone, data = open_backbone(config, cell.backbone), open_set(config, cell.data)
    jobs = jobs_of(backbone, data, section.finetune, folder, config.threads, device, section.batch_size)
    return finetune(jobs, backbone, data, folder, section.batch_size)


def _outputs(config: Config) -> Sequence[str]:
    return FILES if Cell.of(config).method == FEATURES else ()


def _cpus(config: Config) -> int:
    return config.threads + (config.transfer.finetune.loader_workers if FINETUNE in config.transfer.methods else 0)


def _workloads(config: Config, sources: tuple[str, ...]) -> list[Workload]:  # noqa: ARG001 (an `Experiment.workloads`)
    cell, section = Cell.of(config), config.transfer
    if cell.method not in (FEATURES, FINETUNE):
        return []
    backbone, data = open_backbone(config, cell.backbone), open_set(config, cell.data)
    if cell.method == FEATURES:
        return [features_workload(backbone, data, config.threads, section.batch_size)]
    return finetune_workloads(backbone, data, section, config.threads, config.resolved_device())


EXPERIMENT = Experiment(_fingerprint, _run, _workloads, (INITIAL, TRAININGS), _outputs, _cpus)

"""The facts of the report, read from the stages' records and outputs only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from data import storage
from data.json_files import parse_json_lines
from pipeline.core.committed_files import read_output, read_output_table
from pipeline.core.config import CONFIG_NAME
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, done_record
from pipeline.core.timing import Timing, read_timing
from pipeline.evaluation.known import PREDICTIONS_NAME
from pipeline.evaluation.summary import read_speed
from pipeline.inference.accuracy import Comparison, paired_comparison
from pipeline.inference.stage_weights import read_info
from pipeline.models.registry import build_model, count_parameters, on_meta
from pipeline.models.resnet_rs import ModelError
from pipeline.stages import StageRow, find, rows_of
from pipeline.training.metrics_log import METRICS_NAME

Record = dict[str, Any]


@dataclass(frozen=True)
class Predictions:
    """A model's predictions on the test images, in their order; arrays are (N,)."""

    test: str  # digest of the test split
    labels: np.ndarray  # int
    predicted: np.ndarray  # int
    confidence: np.ndarray  # float32

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is right, (N,) bool."""
        return np.asarray(self.predicted == self.labels)


@dataclass(frozen=True)
class Model:
    """A finished teacher or student."""

    name: str
    folder: str
    record: Record
    figures: Record = field(default_factory=dict)  # stage=evaluate's summary: top1, top5, images, …; empty before it
    predictions: Predictions | None = None
    speed: Record | None = (
        None  # measured by stage=evaluate: latency_ms, images_per_s, batch_size, where, busy, perhaps spread
    )

    @property
    def validation_top1(self) -> float | None:
        """Top-1 accuracy on the validation images, in 0 to 1; None without validation images."""
        value: float | None = self.record["summary"].get("validation_top1")
        return value

    @property
    def architecture(self) -> str:
        """Name of the network, from the stage's fingerprint."""
        fields = self.record["fingerprint"]["config"]
        return str(fields.get("student.model") or fields.get("teacher.model") or "")


@dataclass(frozen=True)
class Generation:
    """A generation's finished stages: done-records by stage name."""

    layout: Layout
    records: dict[str, Record]
    selection_folder: str | None
    notes: list[str] = field(default_factory=list)  # outputs that are older than their inputs


@dataclass(frozen=True)
class Facts:
    """Everything that the report shows, but for the survey of the labels."""

    config: Config
    written_config: str  # content of RUN/config.yaml, which has no secrets
    generations: list[Generation]
    models: list[Model]  # the first teacher, then each generation's student
    class_names: list[str]

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of RUN/config.yaml."""
        loaded = OmegaConf.load(io.StringIO(self.written_config))
        return dict(OmegaConf.to_container(loaded))  # type: ignore[arg-type]

    @property
    def last_with_student(self) -> Generation:
        """The generation of the last student; the first where there is none."""
        return next((found for found in reversed(self.generations) if "student" in found.records), self.generations[0])

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if neither labels, weights nor test results tell it."""
        tested: Sequence[Any] = next((model.figures["per_class_top1"] for model in self.models if model.figures), [])
        return len(self.class_names) or len(tested)

    def class_name(self, label: int) -> str:
        """Name of a class; `class 3` if it has none."""
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"

    def stage_name(self, generation: int, stage: str) -> str:
        """Name of a stage, with its generation if there are several."""
        return f"{stage} {generation}" if len(self.generations) > 1 else stage

    def of_generation(self, generation: Generation) -> str:
        """Ending of a heading: `, generation 2`; empty if there is only one."""
        return f", generation {generation.layout.generation}" if len(self.generations) > 1 else ""


def read_facts(config: Config, layouts: Sequence[Layout]) -> Facts:
    """Read the run's records. Raises StageError when no stage is done, or a record is damaged."""
    generations = [_read_generation(layout) for layout in layouts]
    models = _read_models(generations)
    if not models:
        raise StageError(f"{layouts[0].run_dir}: no stage is done there; run stage=teacher first, or check run_dir")
    url = storage.join(layouts[0].run_dir, CONFIG_NAME)
    written = storage.read_text(url) if storage.exists(url) else ""
    return Facts(config, written, generations, models, _class_names(generations, models))


def compare(first: Model, second: Model) -> Comparison | None:
    """Compare top-1 of the second model with that of the first; None if they were not tested on the same images."""
    one, two = first.predictions, second.predictions
    return None if one is None or two is None or one.test != two.test else paired_comparison(one.right, two.right)


def read_metrics(model: Model) -> list[dict[str, float]]:
    """Read the lines of a model's metrics.jsonl; empty for a teacher trained elsewhere."""
    url = storage.join(model.folder, METRICS_NAME)
    if METRICS_NAME not in model.record["outputs"] or not storage.exists(url):
        return []
    remedy = "restore it, or delete it: the report does without"
    content = read_output(model.folder, METRICS_NAME, model.record, remedy)
    return parse_json_lines(content, url, remedy)


def num_parameters(model: Model) -> int | None:
    """Number of parameters, from stage=evaluate or else counted in the network of the weights; None without either."""
    if model.figures:
        return int(model.figures["parameters"])
    try:
        info = read_info(model.folder)
    except (ModelError, OSError):
        return None
    return count_parameters(on_meta(lambda: build_model(info.model, info.num_classes, info.model_args)))


def stage_efforts(facts: Facts) -> dict[tuple[int, str], Timing]:
    """Read each stage's time and memory by (generation, stage); a student that became a teacher counts once."""
    efforts: dict[tuple[int, str], Timing] = {}
    for generation in facts.generations:
        number = generation.layout.generation
        for stage in generation.records:
            if not (find(stage).only_first and number > 1):
                effort = read_timing(generation.layout.folder_of(stage))
                efforts[number, stage] = replace(effort, seconds=effort.seconds + _searching(generation, stage))
    return efforts


def _searching(generation: Generation, stage: str) -> float:
    """Seconds of the search for near-duplicates of held-out images, which stage=select runs first."""
    found = generation.records[stage]["summary"].get("near_duplicates") if stage == "select" else None
    if found is None:
        return 0.0
    return read_timing(storage.join(generation.layout.run_dir, found["listing"].rpartition("/")[0])).seconds


def _read_generation(layout: Layout) -> Generation:
    selection = layout.current_selection()
    generation = Generation(layout, {}, selection)
    for row in rows_of(layout.generation):
        record = done_record(layout.folder_of(row.name))
        if record is not None and not _is_of_older(row, record, generation):
            generation.records[row.name] = record
    return generation


def _is_of_older(row: StageRow, record: Record, generation: Generation) -> bool:
    """Whether to leave out an output that was made from other inputs than the present ones; adds a note if it was.

    A student of an earlier selection is still the run's student, so it stays; figures of other labels or models would mislead.
    """
    stage, inputs = row.name, record["fingerprint"]["inputs"]
    older = [
        source
        for name, source in row.upstream.items()
        if name in inputs and source in generation.records and inputs[name] != generation.records[source]["digest"]
    ]
    if older:
        what = "is not shown: it is" if stage != "student" else "is"
        generation.notes.append(
            f"Generation {generation.layout.generation}: the output of stage {stage} {what} from before stage "
            f"{' and '.join(older)} ran last. Run stage={stage} to bring it up to date."
        )
    return bool(older) and stage != "student"


def _read_models(generations: Sequence[Generation]) -> list[Model]:
    models = []
    for generation in generations:
        roles = ("teacher", "student") if generation.layout.generation == 1 else ("student",)
        for role in roles:
            if role in generation.records:
                number = f" {generation.layout.generation}" if role == "student" and len(generations) > 1 else ""
                models.append(_read_model(role + number, role, generation))
    return models


def _read_model(name: str, role: str, generation: Generation) -> Model:
    folder, record = getattr(generation.layout, role), generation.records[role]
    evaluation = generation.records.get("evaluate")
    figures = evaluation["summary"].get(role) if evaluation else None
    if evaluation is None or figures is None:
        return Model(name, folder, record)
    names = ["label", f"{role}_label", f"{role}_confidence"]
    remedy = "delete it and run stage=evaluate, which makes it again"
    table = read_output_table(generation.layout.evaluation, PREDICTIONS_NAME, evaluation, remedy, names)
    columns = [table.column(name).to_numpy() for name in names]
    predictions = Predictions(evaluation["fingerprint"]["inputs"]["test"], *columns)
    speed = read_speed(generation.layout.evaluation)
    measured = (
        speed["models"][role] | {"where": speed["where"], "busy": speed.get("busy", False)}
        if speed and role in speed["models"]
        else None
    )
    return Model(name, folder, record, figures, predictions, measured)


def _class_names(generations: Sequence[Generation], models: Sequence[Model]) -> list[str]:
    """Class names in label order; `class 3` for classes without names; empty if not even their number is known."""
    labels = next((g.records["label"]["summary"] for g in generations if "label" in g.records), None)
    if labels is not None:
        names, number = labels["class_names"], labels["num_classes"]
    else:
        try:
            info = read_info(models[0].folder)
        except (ModelError, OSError):
            return []
        names, number = info.class_names, info.num_classes
    return list(names) if names else [f"class {index}" for index in range(number)]

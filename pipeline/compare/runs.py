"""The runs that are compared: what their stages committed, and which models, labels and images two of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data import storage
from data.json_files import read_json
from data.settings import UsageError
from pipeline.core.config import CONFIG_NAME, load_config
from pipeline.evaluation.generations import known_layouts
from pipeline.evaluation.summary import SUMMARY_NAME
from pipeline.inference.accuracy import Comparison
from pipeline.report.facts import Facts, Generation, Model, Record, compare, read_facts


@dataclass(frozen=True)
class Run:
    """One of the runs.

    Attributes:
        name: the end of its path that no other run has.
        right: `labels_right` and `kept_right` of summary.json, fractions; empty where no truth is known.
    """

    name: str
    facts: Facts
    right: Mapping[str, float]

    @property
    def teacher(self) -> Model:
        """The first teacher."""
        return self.facts.models[0]

    @property
    def student(self) -> Model | None:
        """The last student; None before the first."""
        return self.facts.models[-1] if len(self.facts.models) > 1 else None

    @property
    def last(self) -> Model:
        """The last student, or the teacher where there is none."""
        return self.facts.models[-1]

    @property
    def generation(self) -> Generation:
        """The generation of the last student; the first where there is none."""
        return self.facts.last_with_student

    def summary_of(self, stage: str) -> Record | None:
        """Summary of a stage's done-record in `generation`; None if it is not done."""
        record = self.generation.records.get(stage)
        return None if record is None else record["summary"]

    def digest_of(self, stage: str) -> str | None:
        """Digest of a stage's output in `generation`; None if it is not done."""
        record = self.generation.records.get(stage)
        return None if record is None else str(record["digest"])


def find_runs(patterns: Iterable[str]) -> list[str]:
    """Run directories that paths and patterns (`runs/*`) name, each once, in order. Raises UsageError unless there are two or more."""
    urls: dict[str, None] = {}
    for pattern in patterns:
        try:
            found = storage.expand(storage.join(pattern, CONFIG_NAME))
        except storage.MissingError:
            found = []
        for url in found or [storage.join(pattern, CONFIG_NAME)]:
            if not storage.exists(url):
                raise UsageError(f"runs={pattern}: no run there ({CONFIG_NAME} is missing); check the path")
            urls[storage.parent(url)] = None
    if len(urls) < 2:
        raise UsageError(
            f"stage=compare needs two runs or more, as in runs=[runs/a,runs/b]; got {', '.join(urls) or 'none'}"
        )
    return list(urls)


def read_runs(urls: Sequence[str]) -> list[Run]:
    """Read what the stages of each run committed. Raises StageError for a run without a finished model."""
    names = short_names(urls)
    return [_read_run(name, url) for name, url in zip(names, urls, strict=True)]


def _read_run(name: str, url: str) -> Run:
    config = load_config(None, [f"run_dir={url}"])
    return Run(name, read_facts(config, known_layouts(config)), _right_labels(url))


def _right_labels(run_dir: str) -> dict[str, float]:
    url = storage.join(run_dir, SUMMARY_NAME)
    summary: dict[str, Any] = read_json(url, "delete it: the next stage writes it again") if storage.exists(url) else {}
    labels = summary.get("labels", {})
    return {name: labels[name] for name in ("labels_right", "kept_right") if name in labels}


def short_names(urls: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `runs/a`, `runs/b` → `a`, `b`."""
    parts = [url.rstrip("/").split("/") for url in urls]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return list(urls)


def difference(first: Model | None, second: Model | None) -> Comparison | None:
    """Compare top-1 of two models; None if one is missing, or they were not tested on the same images."""
    return None if first is None or second is None else compare(first, second)

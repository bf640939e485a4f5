"""Section on the run's timeline: when each stage ran, how fast, and with how much memory."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pipeline.core.timing import Timing, duration
from pipeline.pages import plots
from pipeline.pages.render import Figure, Section
from pipeline.report.facts import Facts, Generation, read_metrics, stage_efforts
from teacher.labeling.progress import read_progress

_UNITS = ((2 * 86_400, 86_400, "days"), (2 * 3600, 3600, "hours"), (0, 60, "minutes"))  # from so many seconds on
_HEADER = ("stage", "time", "images/s", "runs", "began (UTC)", "peak memory")


def stage_times(facts: Facts) -> list[tuple[str, float]]:
    """Seconds of each stage, by its name."""
    return [(facts.stage_name(*key), effort.seconds) for key, effort in stage_efforts(facts).items()]


def timeline_section(facts: Facts) -> Section:
    """Show when each stage ran, and a row per stage; columns without any value are left out."""
    efforts = stage_efforts(facts)
    rows = [_row(facts, key, effort) for key, effort in efforts.items()]
    used = [column for column in range(len(_HEADER)) if column < 2 or any(row[column] != "–" for row in rows)]
    values = {
        "chart": _chart(facts, efforts),
        "header": [_HEADER[column] for column in used],
        "rows": [[row[column] for column in used] for row in rows],
        "total": duration(sum(effort.seconds for effort in efforts.values())),
        "labeling": _labeling_shares(facts),
    }
    return Section("timeline.html", values)


def _chart(facts: Facts, efforts: Mapping[tuple[int, str], Timing]) -> Figure | None:
    known = {key: effort.runs for key, effort in efforts.items() if effort.runs}
    if not known:
        return None
    began = min(start for runs in known.values() for start, _ in runs)
    lasted = max(end for runs in known.values() for _, end in runs) - began
    _, seconds, unit = next(entry for entry in _UNITS if lasted >= entry[0])
    rows = [
        (facts.stage_name(*key), [((start - began) / seconds, (end - began) / seconds) for start, end in runs])
        for key, runs in known.items()
    ]
    alt = f"Timeline of the stages over {lasted / seconds:.3g} {unit} from the start of the first. The table has the values."
    return Figure(plots.timeline(rows, f"{unit} since the run began"), alt)


def _row(facts: Facts, key: tuple[int, str], effort: Timing) -> list[str]:
    images = _num_images(facts, *key)
    speed = f"{images / effort.seconds:,.0f}" if images and effort.seconds else "–"
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(effort.runs[0][0])) if effort.runs else "–"
    runs = f"{len(effort.runs)}" if effort.runs else "–"
    memory = f"{effort.peak_memory / 1e9:.2f} GB" if effort.peak_memory else "–"
    return [facts.stage_name(*key), duration(effort.seconds), speed, runs, began, memory]


def _num_images(facts: Facts, number: int, stage: str) -> int | None:
    """Number of images that the stage ran a model on; None if images/s would not tell the stage's speed."""
    generation = next(entry for entry in facts.generations if entry.layout.generation == number)
    record = generation.records[stage]
    if stage == "label":
        return int(record["summary"]["images"])
    if stage == "evaluate":
        measured = [figures for role in ("teacher", "student") if (figures := record["summary"].get(role))]
        corrupted = any("robustness" in figures for figures in measured)  # 75 views of an image took most of the time
        return None if corrupted else sum(figures["images"] for figures in measured)
    if stage == "pretrain":
        return int(record["summary"]["steps"]) * int(record["fingerprint"]["config"]["pretrain.batch_size"])
    if stage in ("teacher", "student"):
        return _trained_on(facts, generation, stage)
    return None


def _trained_on(facts: Facts, generation: Generation, stage: str) -> int | None:
    """Number of images in all steps, pseudo-labeled ones included."""
    folder = getattr(generation.layout, stage)
    model = next(model for model in facts.models if model.folder == folder)
    steps = [int(line["step"]) for line in read_metrics(model)]
    batch = model.record["fingerprint"]["config"].get(f"{stage}.batch_size")
    return steps[-1] * int(batch) if steps and batch else None


def _labeling_shares(facts: Facts) -> list[tuple[str, str]]:
    """How the labeling workers' threads spent their time, by stage name: what to speed up first."""
    shares = []
    for generation in facts.generations:
        progress = read_progress(generation.layout.labels) if "label" in generation.records else None
        if progress is not None and (total := sum(progress.seconds.values())):
            parts = sorted(progress.seconds.items(), key=lambda item: (-item[1], item[0]))
            words = ", ".join(f"{part} {100 * spent / total:.0f} %" for part, spent in parts)
            shares.append((facts.stage_name(generation.layout.generation, "Labeling"), words))
    return shares

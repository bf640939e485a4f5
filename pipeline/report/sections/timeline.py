"""The report's section on the course of the run: when each stage worked, how fast, and with how much memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pipeline.core.timing import Timing, duration
from pipeline.pages import plots
from pipeline.pages.html import paragraph, plot, section, side_by_side, table
from pipeline.report.facts import Facts, Generation, read_metrics, stage_efforts
from teacher.labeling.progress import read_progress

_UNITS = ((2 * 86_400, 86_400, "days"), (2 * 3600, 3600, "hours"), (0, 60, "minutes"))  # from so many seconds on


def times(facts: Facts) -> list[tuple[str, float]]:
    """Seconds by stage, the generation named where there are several."""
    return [(_name(facts, key), effort.seconds) for key, effort in stage_efforts(facts).items()]


def course_section(facts: Facts) -> str:
    """The story of the run: a timeline, and a row per stage."""
    efforts = stage_efforts(facts)
    rows = [_row(facts, key, effort) for key, effort in efforts.items()]
    header = ["stage", "time", "images/s", "runs", "began (UTC)", "peak memory"]
    used = [column for column in range(len(header)) if column < 2 or any(row[column] != "–" for row in rows)]
    figures = table([header[c] for c in used], [[row[c] for c in used] for row in rows])
    together = duration(sum(effort.seconds for effort in efforts.values()))
    total = f"{together} together; runs that were stopped and continued are added up."
    memory = " Peak memory is that of the process that leads the stage; loading processes and labeling workers have their own."
    return section(
        "The course of the run",
        side_by_side(_timeline(facts, efforts), figures),
        paragraph(total + (memory if len(used) == len(header) else ""), "soft"),
        _parts_of_labeling(facts),
    )


def _timeline(facts: Facts, efforts: Mapping[tuple[int, str], Timing]) -> str:
    known = {key: effort.runs for key, effort in efforts.items() if effort.runs}
    if not known:
        return ""
    began = min(start for runs in known.values() for start, _ in runs)
    lasted = max(end for runs in known.values() for _, end in runs) - began
    _, seconds, unit = next(entry for entry in _UNITS if lasted >= entry[0])
    rows = [
        (_name(facts, key), [((start - began) / seconds, (end - began) / seconds) for start, end in runs])
        for key, runs in known.items()
    ]
    alt = f"Timeline of the stages over {lasted / seconds:.3g} {unit} from the first one's start. The figures are in the table."
    return plot(plots.timeline(rows, f"{unit} since the run began"), alt, "Gaps: nothing ran.")


def _row(facts: Facts, key: tuple[int, str], effort: Timing) -> list[str]:
    images = _images(facts, *key)
    speed = f"{images / effort.seconds:,.0f}" if images and effort.seconds else "–"
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(effort.runs[0][0])) if effort.runs else "–"
    runs = f"{len(effort.runs)}" if effort.runs else "–"
    memory = f"{effort.peak_memory / 1e9:.2f} GB" if effort.peak_memory else "–"
    return [_name(facts, key), duration(effort.seconds), speed, runs, began, memory]


def _name(facts: Facts, key: tuple[int, str]) -> str:
    return f"{key[1]} {key[0]}" if len(facts.generations) > 1 else key[1]


def _images(facts: Facts, number: int, stage: str) -> int | None:
    """Images that the stage's models saw; None where that says nothing."""
    generation = next(entry for entry in facts.generations if entry.layout.generation == number)
    record = generation.records[stage]
    if stage == "label":
        return int(record["summary"]["images"])
    if stage == "evaluate":
        measured = [figures for role in ("teacher", "student") if (figures := record["summary"].get(role))]
        corrupted = any("robustness" in figures for figures in measured)  # many more views, that took most of the time
        return None if corrupted else sum(figures["images"] for figures in measured)
    if stage in ("teacher", "student"):
        return _trained_on(facts, generation, stage)
    return None


def _trained_on(facts: Facts, generation: Generation, stage: str) -> int | None:
    """Images of all steps."""
    folder = getattr(generation.layout, stage)
    model = next(model for model in facts.models if model.folder == folder)
    steps = [int(line["step"]) for line in read_metrics(model)]
    batch = model.record["fingerprint"]["config"].get(f"{stage}.batch_size")
    return steps[-1] * int(batch) if steps and batch else None


def _parts_of_labeling(facts: Facts) -> str:
    """What the labeling workers' threads spent their time with: what to speed up first."""
    lines: list[str] = []
    several = len(facts.generations) > 1
    for generation in facts.generations:
        progress = read_progress(generation.layout.labels) if "label" in generation.records else None
        if progress is not None and (total := sum(progress.seconds.values())):
            lines.append(
                _shares(f"Labeling {generation.layout.generation}" if several else "Labeling", progress.seconds, total)
            )
    return "".join(paragraph(line, "soft") for line in lines)


def _shares(name: str, seconds: Mapping[str, float], total: float) -> str:
    shares: Sequence[tuple[str, float]] = sorted(seconds.items(), key=lambda item: (-item[1], item[0]))
    words = ", ".join(f"{part} {100 * spent / total:.0f} %" for part, spent in shares)
    return f"{name}: of the time of all workers' threads, {words}."

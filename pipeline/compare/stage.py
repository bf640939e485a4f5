"""stage=compare: runs side by side, as one table and one page. It reads what their stages committed, and writes compare.html alone."""

from __future__ import annotations

from collections.abc import Sequence

from data import storage
from data.storage.redact import redacted
from pipeline.compare.page import page_html
from pipeline.compare.runs import Run, difference, find_runs, read_runs
from pipeline.compare.tables import NONE, class_changes, interval, tables
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.pages.text import aligned_rows

PAGE_NAME = "compare.html"
_CLASSES = 5  # printed, of those that changed most


def compare_runs(config: Config, layouts: Sequence[Layout], runs: Sequence[str]) -> None:  # noqa: ARG001 (as every comparison)
    """Print the comparison and write it to `compare.html` in the first run's directory.

    Args:
        config: of the first run.
        runs: paths or patterns of the other runs, and perhaps of the first too.

    Raises:
        UsageError: there is no run where one is named, or there are fewer than two.
        StageError: a run has no finished model.
    """
    found = read_runs(find_runs([config.run_dir, *runs]))
    url = storage.join(config.run_dir, PAGE_NAME)
    storage.write_text(url, page_html(found, verdicts(found)))
    print_comparison(found)
    print(f"compare: {redacted(url)}")


def verdicts(runs: Sequence[Run]) -> list[str]:
    """A sentence per further run: whether its last model is better than the first run's."""
    return [_verdict(runs[0], run) for run in runs[1:]]


def _verdict(first: Run, run: Run) -> str:
    found = difference(first.last, run.last)
    if found is None:
        return f"{run.name} and {first.name} are not compared: they have no results on the same test images (stage=evaluate)"
    if not found.gained + found.lost:
        return f"{run.name} has the same of {found.images:,} test images right as {first.name}"
    ending = f"95 % interval {interval(found)} points, on {found.images:,} test images"
    if found.interval()[0] <= 0 <= found.interval()[1]:
        return f"No clear difference between {run.name} and {first.name}: {ending}"
    amount, word = 100 * abs(found.difference), "better" if found.difference > 0 else "worse"
    return f"{run.name} is {amount:.2f} points {word} than {first.name}: {ending}"


def print_comparison(runs: Sequence[Run]) -> None:
    """Print the verdicts, the table, and the classes that changed most."""
    print("", *verdicts(runs), "", sep="\n")
    rows = [["", *(run.name for run in runs)]]
    for table in tables(runs):
        rows += [[f"{table.title}:", *([""] * len(runs))], *([f"  {row[0]}", *row[1:]] for row in table.rows)]
    if (changed := class_changes(runs, _CLASSES)) is not None:
        rows.append(["Classes that changed most, top-1 and points:", *([""] * len(runs))])
        shown = [changed.runs.index(run) if run in changed.runs else None for run in runs]
        rows += [
            [f"  {row[0]}", *(NONE if place is None else row[1 + place] for place in shown)] for row in changed.rows()
        ]
    print(*aligned_rows(rows), sep="\n")
    print("Intervals are of paired differences on the same test images; they do not cover the variation between seeds.")

"""The results of stage=transfer as tables and a plot, for its own page, the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline.pages import plots
from pipeline.pages.render import Figure, Section

Record = Mapping[str, Any]  # what `TransferRecord` requires
MISSING = "–"
_BEST = " *"  # marks the highest of a column
METHODS = {"linear": "linear probe", "knn": "nearest neighbours", "finetune": "fine-tuned"}


class _Row(BaseModel):
    """A backbone on a set by a method; accuracies in per cent."""

    backbone: str
    set: str
    method: str
    mean: float
    half_width: float
    mean_per_class: float
    is_best: bool


class TransferRecord(BaseModel):
    """Required content of results.json."""

    missing: int
    rows: list[_Row]


class MethodTable(NamedTuple):
    """The accuracies of one method: a row per backbone, a column per set."""

    method: str
    header: list[str]
    rows: list[list[str]]


def method_tables(record: Record) -> list[MethodTable]:
    """A table per method; a cell is `91.20 ± 0.84 (90.77) *`: top-1, half its 95 % interval, mean per-class accuracy, highest."""
    backbones, methods = _names(record["rows"], "backbone"), _names(record["rows"], "method")
    return [_method_table(method, backbones, record) for method in METHODS if method in methods]


def _method_table(method: str, backbones: Sequence[str], record: Record) -> MethodTable:
    """The table of a method: its sets, and all backbones."""
    rows = [row for row in record["rows"] if row["method"] == method]
    cells, sets = {(row["backbone"], row["set"]): row for row in rows}, _names(rows, "set")
    lines = [[name, *(_cell(cells.get((name, data))) for data in sets)] for name in backbones]
    return MethodTable(METHODS[method], ["", *sets], lines)


def _names(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return MISSING
    best = _BEST if row["is_best"] else ""
    return f"{row['mean']:.2f} ± {row['half_width']:.2f} ({row['mean_per_class']:.2f}){best}"


def describe_best(record: Record) -> str:
    """`highest top-1 of 12 columns: rs 7, simclr 5, scratch 0`."""
    columns = len({(row["method"], row["set"]) for row in record["rows"]})
    count = dict.fromkeys(_names(record["rows"], "backbone"), 0)
    for row in record["rows"]:
        count[row["backbone"]] += row["is_best"]
    ordered = sorted(count.items(), key=lambda item: -item[1])
    return f"highest top-1 of {columns} columns: " + ", ".join(f"{name} {number}" for name, number in ordered)


def transfer_plot(record: Record) -> bytes:
    """Draw top-1 of every backbone on each set and by each method, with intervals, as SVG."""
    places = {(row["set"], row["method"]): f"{row['set']}, {row['method']}" for row in record["rows"]}
    series = []
    for position, name in enumerate(_names(record["rows"], "backbone")):
        own = {(row["set"], row["method"]): row for row in record["rows"] if row["backbone"] == name}
        found = [own.get(place) for place in places]
        values = [row["mean"] if row else float("nan") for row in found]
        errors = [row["half_width"] if row else float("nan") for row in found]
        series.append((name, plots.color_of(position), values, errors))
    return plots.intervals_per_row(list(places.values()), series, "% of test images, 95 % interval")


def transfer_section(record: Record) -> Section:
    """The section of the report, and the body of the page."""
    values = {
        "tables": method_tables(record),
        "best": describe_best(record),
        "chart": Figure(transfer_plot(record), "Plot of top-1 per set and method. The tables have the values."),
        "missing": record["missing"],
    }
    return Section("transfer.html", values)


def describe(record: Record) -> str:
    """Lines of aligned tables for the terminal."""
    blocks = [_aligned([[table.method, *table.header[1:]], *table.rows]) for table in method_tables(record)]
    words = "top-1 % ± half its 95 % interval (mean per-class accuracy); * the highest of its column"
    return "\n\n".join([*blocks, f"{words}\n{describe_best(record)}"])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

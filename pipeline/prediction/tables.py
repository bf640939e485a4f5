"""The table of predictions: its rows while the work goes on, and the CSV, Parquet or JSON-lines file that it becomes.

Images that cannot be read or decoded are rows with a reason; at the end they are a table of their own, beside the predictions.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data import storage
from data.labels.top_k import TopK
from data.settings import UsageError
from data.tables import write_table_parts

ENDINGS = (".csv", ".parquet", ".jsonl")
Names = Sequence[str] | None

ROWS = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("reason", pa.string()),  # why there is no prediction; null if there is one
        pa.field("topk_index", pa.list_(pa.int32())),
        pa.field("topk_prob", pa.list_(pa.float32())),
    ]
)
"""Rows of a piece, in the order of its images. The first class of `topk_index` is the label, its probability the confidence."""


def as_rows(paths: Sequence[str], reasons: Sequence[str], top_k: TopK | None) -> pa.Table:
    """Rows of a batch: ROWS.

    Args:
        reasons: empty for an image with a prediction.
        top_k: predictions of those images alone, in order; None if there is none.
    """
    index = iter(top_k.index.tolist() if top_k is not None else ())
    prob = iter(top_k.prob.astype(np.float32) if top_k is not None else ())
    columns: list[list[Any]] = [
        list(paths),
        [reason or None for reason in reasons],
        [None if reason else next(index) for reason in reasons],
        [None if reason else next(prob) for reason in reasons],
    ]
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, ROWS, strict=True)], schema=ROWS)


def ending_of(out: str) -> str:
    """The ending of `out`, which is its format. Raises UsageError for another."""
    found = next((ending for ending in ENDINGS if out.endswith(ending)), None)
    if found is None:
        raise UsageError(f"out={out}: expected a name that ends in {', '.join(ENDINGS)}")
    return found


def rejects_of(out: str) -> str:
    """The name of the table of images without prediction: `predictions.csv` → `predictions.rejected.csv`."""
    return out.removesuffix(ending_of(out)) + ".rejected.csv"


def write_predictions(out: str, parts: Iterable[pa.Table], class_names: Names, top_k: int) -> None:
    """Write the predictions of parts, each of ROWS, as the ending of `out` says; memory holds one part."""
    good = (part.filter(part.column("reason").is_null()) for part in parts)
    if ending_of(out) == ".parquet":
        write_table_parts(out, _parquet_schema(top_k), (_parquet_rows(part, class_names, top_k) for part in good))
        return
    as_text: Callable[..., Iterator[str]] = _csv_lines if ending_of(out) == ".csv" else _json_lines
    with storage.writing(out) as file:
        for text in as_text(good, class_names, top_k):
            file.write(text.encode())


def write_rejects(out: str, parts: Iterable[pa.Table]) -> int:
    """Write path and reason of the images without prediction beside `out`, if there is any; return their number."""
    bad = pa.concat_tables([part.filter(part.column("reason").is_valid()).select(["path", "reason"]) for part in parts])
    storage.remove(rejects_of(out))  # of an earlier table of this name
    if bad.num_rows:
        lines = [_csv_line(["path", "reason"]), *(_csv_line(row.values()) for row in bad.to_pylist())]
        storage.write_text(rejects_of(out), "".join(lines))
    return int(bad.num_rows)


def _csv_lines(parts: Iterable[pa.Table], names: Names, top_k: int) -> Iterator[str]:
    """Header and rows: the label and its confidence, then the next classes with theirs."""
    others = [f"{column}_{place}" for place in range(2, top_k + 1) for column in ("class", "confidence")]
    yield _csv_line(["path", "label", "class_name", "confidence", *others])
    for part in parts:
        for path, classes, probs in _values(part):
            pairs = zip(classes[1:], probs[1:], strict=True)
            further = [value for label, prob in pairs for value in (_class(label, names), _digits(prob))]
            name = names[classes[0]] if names else ""
            yield _csv_line([path, classes[0], name, _digits(probs[0]), *further])


def _json_lines(parts: Iterable[pa.Table], names: Names, top_k: int) -> Iterator[str]:  # noqa: ARG001 (as _csv_lines)
    for part in parts:
        for path, classes, probs in _values(part):
            found = [
                {"label": label, "class_name": names[label] if names else None, "confidence": float(_digits(prob))}
                for label, prob in zip(classes, probs, strict=True)
            ]
            yield json.dumps({"path": path, **found[0], "top_k": found}, ensure_ascii=False) + "\n"


def _parquet_schema(top_k: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("path", pa.string()),
            pa.field("label", pa.int32()),
            pa.field("class_name", pa.string()),
            pa.field("confidence", pa.float32()),
            pa.field("topk_index", pa.list_(pa.int32(), top_k)),
            pa.field("topk_prob", pa.list_(pa.float32(), top_k)),
        ]
    )


def _parquet_rows(part: pa.Table, names: Names, top_k: int) -> pa.Table:
    values = list(_values(part))
    labels = [classes[0] for _, classes, _ in values]
    columns: list[list[Any]] = [
        [path for path, _, _ in values],
        labels,
        [names[label] if names else None for label in labels],
        [probs[0] for _, _, probs in values],
        [classes for _, classes, _ in values],
        [probs for _, _, probs in values],
    ]
    schema = _parquet_schema(top_k)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def _values(part: pa.Table) -> Iterator[tuple[str, list[int], list[float]]]:
    """Path, classes and probabilities of each row."""
    return zip(*(part.column(name).to_pylist() for name in ("path", "topk_index", "topk_prob")), strict=True)


def _class(label: int, names: Names) -> str | int:
    return names[label] if names else label


def _digits(prob: float) -> str:
    """Enough digits to tell two float32 apart."""
    return f"{prob:.9g}"


def _csv_line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()

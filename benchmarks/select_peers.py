"""The selection of `stage=select` in DuckDB and in Polars.

Both write one Parquet file with a row (shard, ordinal, label, copies) per selected image, not a file per shard. They break ties of
confidence arbitrarily; ours by a hash, so that every run selects the same images. Of four ways in DuckDB 2.0 this is the fastest:
QUALIFY, or file names instead of file numbers, takes twice the CPU time and more memory.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.label_files import NUM_CLASSES
from teacher.selection.rule import SelectRule

Totals = list[list[int]]  # selected images and copies, by class


def duckdb(labels: str, out: str, rule: SelectRule, threads: int, memory_gb: int) -> None:
    """Rank within classes by a window function; write `out`/kept.parquet. Spills up to as much as `memory_gb` to `out`."""
    import duckdb as db

    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": threads, "memory_limit": f"{memory_gb}GB", "temp_directory": f"{out}/spill",
        "max_temp_directory_size": f"{memory_gb}GB", "preserve_insertion_order": "false",
    }  # fmt: skip
    with db.connect(config=settings) as connection:
        connection.execute(f"""
            COPY (
                WITH ranked AS (
                    SELECT file_index AS shard, ordinal, label, count(*) OVER (PARTITION BY label) AS available,
                        row_number() OVER (PARTITION BY label ORDER BY confidence DESC) - 1 AS place
                    FROM read_parquet('{labels}/*.parquet') WHERE confidence >= {rule.confidence_threshold}::FLOAT
                )
                SELECT shard, ordinal, label,
                    least(({rule.per_class} - place + available - 1) // available, {rule.max_copies})::USMALLINT AS copies
                FROM ranked WHERE place < {rule.per_class}
            ) TO '{out}/kept.parquet' (FORMAT parquet, COMPRESSION zstd)""")


def polars(labels: str, out: str, rule: SelectRule, threads: int, memory_gb: int) -> None:
    """Sort each class in a streaming group-by; write `out`/kept.parquet. Beyond `memory_gb` it spills what it can."""
    os.environ |= {
        "POLARS_MAX_THREADS": str(threads), "POLARS_OOC_MEMORY_BUDGET_MB": str(memory_gb * 1000),
        "POLARS_OOC_SPILL_DIR": f"{out}/spill",
    }  # fmt: skip
    import polars as pl

    assert rule.per_class is not None
    eligible = (
        pl.scan_parquet(f"{labels}/*.parquet", include_file_paths="shard")
        .select("label", "confidence", "ordinal", "shard")
        .filter(pl.col("confidence") >= pl.lit(rule.confidence_threshold, pl.Float32))
    )
    best = pl.col("ordinal", "shard").sort_by("confidence", descending=True).head(rule.per_class)
    place = pl.int_range(pl.min_horizontal(pl.len(), rule.per_class)).alias("place")
    ranked = (
        eligible.group_by("label").agg(pl.len().alias("available"), place, best).explode("place", "ordinal", "shard")
    )
    available = pl.col("available").cast(pl.Int64)
    copies = (rule.per_class - pl.col("place") + available - 1) // available
    kept = ranked.select(
        "shard", "ordinal", "label", pl.min_horizontal(copies, rule.max_copies).cast(pl.UInt16).alias("copies")
    )
    kept.sink_parquet(f"{out}/kept.parquet", compression="zstd", engine="streaming", maintain_order=False)


def totals(out: str) -> Totals:
    """Count selected images and copies by class in a peer's output."""
    import pyarrow.parquet as pq

    rows = pq.read_table(Path(out) / "kept.parquet", columns=["label", "copies"])
    by_class = rows.group_by("label").aggregate([("copies", "count"), ("copies", "sum")]).to_pydict()
    kept, copies = [0] * NUM_CLASSES, [0] * NUM_CLASSES
    for label, count, total in zip(by_class["label"], by_class["copies_count"], by_class["copies_sum"], strict=True):
        kept[label], copies[label] = count, total
    return [kept, copies]

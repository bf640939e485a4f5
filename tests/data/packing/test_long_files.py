"""Files of any length in bounded memory: the bytes of those that are made at once."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import tables
from data.packing import lines
from data.packing.lines import LineWriter, read_lines, sort_lines
from data.shards.index import build_index, index_digest, read_index
from data.shards.write import index_url, write_shards
from data.tables import read_table, to_parquet, write_table_parts


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 4], [7], [5, 0, 16, 1], [14], [40]])
def test_a_table_in_parts_has_the_bytes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 7)
    schema = pa.schema([pa.field("key", pa.string()), pa.field("thumbnail", pa.binary(4), nullable=False)])
    total = sum(sizes)
    columns = {"key": [f"{n:09d}" for n in range(total)], "thumbnail": [n.to_bytes(4, "big") for n in range(total)]}
    whole = pa.table(columns, schema=schema)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    write_table_parts(
        f"{tmp_path}/parts.parquet", schema, (whole[a : a + n] for a, n in zip(starts, sizes, strict=True))
    )
    assert (tmp_path / "parts.parquet").read_bytes() == to_parquet(whole, row_group_size=7)
    assert read_table(f"{tmp_path}/parts.parquet", "") == whole


@given(st.lists(st.text(alphabet='ab\n\\"é\u2028', max_size=4), max_size=30))
def test_lines_are_sorted_as_in_memory(tmp_path_factory: pytest.TempPathFactory, content: list[str]) -> None:
    folder = tmp_path_factory.mktemp("lines")
    with LineWriter(f"{folder}/lines") as file:
        for line in content:
            file.add(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "LINES_AT_ONCE", 4)
        assert list(sort_lines(read_lines(f"{folder}/lines"), str(folder))) == sorted(content)


def test_the_index_that_is_made_while_a_shard_is_written_is_that_of_the_shard(tmp_path: Path) -> None:
    fields = [
        {"jpg": b"x"}, {"png": b"x", "cls": b"3"}, {"cls": b"7"}, {"JPEG": b"x" * 600, "depth.png": b"y", "cls": b" 12 \n"},
        {"jpg": b""}, {"v1.jpg": b"x", "v2.jpg": b"y"}, {"json": b"{}"}, {"jpg": b"x", "png": b"y", "cls": b"cat"}, {},
        {"jpg": b"x", "cls": b"9" * 40},
    ]  # fmt: skip
    names = [f"{number:03d}" for number in range(len(fields))]
    samples = [*zip(names, fields, strict=True), ("desktop", {"ini": b"x"}), ("thumbs", {"db": b"x", "jpg": b"y"})]
    record = write_shards(samples, str(tmp_path), "x", 100).shards[0]
    table = build_index(f"{tmp_path}/x-000000.tar")
    assert index_digest(table) == record.index_sha256
    assert record.num_samples == table.num_rows > 0
    found = read_index(index_url(str(tmp_path), record.name), record.index_sha256)
    assert found.equals(table, check_metadata=True)

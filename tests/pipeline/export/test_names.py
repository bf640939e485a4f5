"""Whatever the names of classes and files: an export's text files have one line for each, and its card one row."""

from __future__ import annotations

import hashlib
import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data.labels.overlay import RowFilter
from data.labels.sources.archives import open_exported
from data.shards.split import ShardRecord
from pipeline.core.stage import StageError
from pipeline.export.card import render_card
from pipeline.export.manifests import write_manifests
from pipeline.export.stage import _check_names
from pipeline.pages.text import checksum_line, class_lines, code_span, markdown

NAMES = [
    "dress", "digit_3", "a\nb", "a\r\nb", "\n", "", " ", " x ", "a|b", "a\\|b", "\\", "`x`", "``", "*x*", "_x_", "__init__",
    "<b>x</b>", "&amp;", "[x](y)", "- x", "# x", "| a | b |", "---", "|---|", "~~x~~", "$x$", '"quoted"', '"', "'", "a\x00b",
    "\x1b[31m", "a\u2028b", "a\x85b", "\ufeffx", "\u202ex", "é", "猫", "🐈", "=cmd()", "!", "a\tb", "x: y", "{{x}}", "%s", "<!-- x",
    "![a](b)", "\xa0x",
]  # fmt: skip
RECORD = ShardRecord(name="pseudo-000000.tar", bytes=1, num_samples=1, index_sha256="", sha256="0" * 64)
TEXT = st.text(
    st.one_of(st.sampled_from("\n\r\t|\\`*_<>[]&~$\"'#- \x0b\x1c\u2028\u2029\x85{}!:%a"), st.characters(codec="utf-8")),
    max_size=12,
)


def read_classes(text: str) -> list[str]:
    """Read classes.txt in the way of docs/export.md."""
    return [json.loads(line) if line.startswith('"') else line for line in text.splitlines()]


def card_of(names: list[str], **fields: Any) -> str:
    classes = [{"class": n, "name": name, "available": 1, "kept": 1, "copies": 1} for n, name in enumerate(names)]
    facts = {
        "version": "v1", "form": "shards", "generation": 1, "labels": {"images": 1, "quarantined": {}}, "label_fields": fields,
        "selection": {"reasons": {}}, "selected": {"classes": classes, "rule": {}}, "teacher": None, "only_selected": True,
    }  # fmt: skip
    return render_card(facts, [RECORD])


def rows_of(text: str) -> list[list[str]]:
    """Cells of the card's table, as a Markdown reader renders them."""
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    shown = reader.render(text.split("\n---\n", 1)[1])
    assert shown.count("<table>") == 1
    body = shown.partition("<tbody>")[2].partition("</tbody>")[0]
    return [
        re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    ]


def shown(name: str) -> str:
    """A name as a reader sees it: control characters as escapes, no spaces at the ends of a cell."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name).strip()


def check(names: list[str], folder: Path) -> None:
    write_manifests(str(folder), [RECORD], names, True)
    content = (folder / "classes.txt").read_bytes().decode()
    assert read_classes(content) == names
    assert content.count("\n") == len(content.splitlines()) == len(names), "every reader sees so many lines"
    assert open_exported(str(folder), RowFilter()).class_names == tuple(names)
    text = card_of(names)
    head = yaml.safe_load(text.split("---")[1])
    assert head["configs"][0]["data_files"][0]["path"] == "pseudo-*.tar"
    cells = rows_of(text)
    assert [len(row) for row in cells] == [5] * len(names)
    assert [row[0] for row in cells] == [str(number) for number in range(len(names))]
    assert [html.unescape(row[1]) for row in cells] == [shown(name) for name in names]


def test_odd_names_come_back_and_do_not_break_the_table(tmp_path: Path) -> None:
    check(NAMES, tmp_path)


@settings(deadline=None, max_examples=30)
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_any_names_come_back_and_do_not_break_the_table(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    check(names, tmp_path_factory.mktemp("names"))


def test_ordinary_names_are_lines_as_they_are() -> None:
    names = ["dress", "T-shirt/top", "digit_3", "n01440764", "a b", "é", "it's", "C++", "a\\b", "[x]", "#1"]
    assert class_lines(names) == "".join(f"{name}\n" for name in names)


def test_a_name_that_is_no_text_is_refused_before_anything_is_made() -> None:
    _check_names(NAMES)
    with pytest.raises(StageError, match=r"the name of class 1, 'caf\\udce9', is not UTF-8; rename"):
        _check_names(["dress", "caf\udce9"])


@given(TEXT)
def test_values_are_shown_as_they_are(value: str) -> None:
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    line = json.dumps(value)
    assert html.unescape(reader.render(f"- x: {code_span(line)}")) == f"<ul>\n<li>x: <code>{line}</code></li>\n</ul>\n"
    visible = "".join(sign if sign.isprintable() else shown(sign) for sign in value)
    assert html.unescape(reader.render(f"x{markdown(value)}x")) == f"<p>x{visible}x</p>\n"
    assert "\n" not in markdown(value) + code_span(line)


def test_values_of_the_configuration_do_not_break_the_card() -> None:
    text = card_of(["a"], **{"data.unlabeled": "x`y``z\n| a |", "odd|name`": "`"})
    assert len(rows_of(text)) == 1
    assert "- data.unlabeled: ```" in text


@pytest.mark.parametrize(
    "name", ["a.tar", "a b.tar", "a\nb.tar", "a\\b.tar", "a\rb.tar", "é.tar", "-x.tar", "a\\nb.tar"]
)
def test_sha256sum_reads_names_with_line_breaks(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    sums = checksum_line(hashlib.sha256(b"x").hexdigest(), name) + checksum_line(
        hashlib.sha256(b"y").hexdigest(), "b.tar"
    )
    (tmp_path / "b.tar").write_bytes(b"y")
    (tmp_path / "SHA256SUMS").write_text(sums, newline="")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)

"""Templates escape whatever comes from the data, name every variable they need, and are part of the wheel."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError, nodes
from setuptools import Distribution

from pipeline.pages.render import Figure, environment

ROOT = Path(__file__).parents[3]
PACKAGES = ["pipeline.report", "pipeline.serving.page", "pipeline.transfer"]
ODD = "<script>x</script> \"q\" 'a' & {{ 7 * 7 }} \u202e\u2066 \x00 \ud800"


class Tags(HTMLParser):
    """Names of the tags and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}
        self.text += "".join(value or "" for _, value in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


@pytest.mark.parametrize(
    "call",
    [
        "table([x], [[x, x]], x, x)",
        "tiles([(x, x)])",
        "plot(figure, x)",
        "sample(x, x, x, x, x, x)",
        "sample(none, x, x, x, x)",
    ],
)
def test_macros_escape_every_argument(call: str) -> None:
    template = environment("pipeline.report").from_string(
        f'{{% from "macros.html" import {call.partition("(")[0]} %}}{{{{ {call} }}}}'
    )
    page = template.render(x=ODD, figure=Figure(b"<svg><script>", ODD))
    tags = parsed(page)
    assert "script" not in tags.names
    assert tags.names <= {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img", "b", "span",
                          "class", "tabindex", "scope", "src", "alt", "title", "loading"}  # fmt: skip
    assert "<script>x</script> \"q\" 'a' & {{ 7 * 7 }} \ufffd\ufffd \ufffd \ufffd" in tags.text
    assert not re.search("[\u202e\u2066\x00\ud800]", page)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_template_turns_escaping_off(package: str) -> None:
    templates = environment(package)
    for name in templates.list_templates():
        source = (templates.loader and templates.loader.get_source(templates, name)[0]) or ""
        tree = templates.parse(source)
        assert not list(tree.find_all(nodes.ScopedEvalContextModifier)), name
        marked = [filtered.node for filtered in tree.find_all(nodes.Filter) if filtered.name == "safe"]
        assert all(isinstance(node, nodes.Const) for node in marked), (
            f"{name}: only the template's own words may be safe"
        )


def test_an_undefined_variable_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'gone' is undefined"):
        environment("pipeline.report").from_string("{{ gone }}").render()


def test_the_wheel_has_all_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    build: Any = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    shipped = {str(Path(folder, name)) for _, folder, _, names in build.data_files for name in names}
    templates = {str(path.relative_to(ROOT)) for path in ROOT.glob("pipeline/**/templates/*")}
    assert len(templates) > 15
    assert templates <= shipped

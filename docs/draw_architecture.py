"""Draw docs/architecture.svg from the imports that are in the code: `python docs/draw_architecture.py`.

A row is a layer of the contract in pyproject.toml that `make check` enforces: arrows only lead downwards. A box is a package, or a
module that is a layer of its own. Its number counts its modules; an arrow's width shows how many imports it stands for.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import grimp
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "teacher", "student", "noisy_student", "data")
FEWEST = 3  # imports that are worth an arrow
INK, LINE, FACE = (
    "#1f2937",
    "#64748b",
    {"pipeline": "#dbeafe", "teacher": "#fde8cf", "student": "#e4dcfb", "noisy_student": "#d7f0e2", "data": "#d7f0e2"},
)


def layers() -> list[list[str]]:
    """Packages by layer, top first."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    return [re.split(r"\s*[|:]\s*", layer) for layer in contract["layers"]]


def title(package: str) -> str:
    return package.removeprefix("pipeline.")


def imports(rows: list[list[str]]) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Imports by (importer, imported), and modules, by title."""
    graph = grimp.build_graph(*PACKAGES)
    code = "".join((ROOT / name).read_text() for name in ("pipeline/run.py", "pipeline/stages.py"))
    for imported in re.findall(r'"((?:pipeline|teacher|student)[\w.]+):\w+"', code):  # imported when they are called
        graph.add_import(importer="pipeline.run", imported=imported)
    home = {package: title(package) for row in rows for package in row}

    def box_of(module: str) -> str | None:
        while module and module not in home:
            module = module.rpartition(".")[0]
        return home.get(module)

    edges: Counter[tuple[str, str]] = Counter()
    modules: Counter[str] = Counter()
    for module in sorted(graph.modules):
        source = box_of(module)
        if source is None:
            continue
        modules[source] += 1
        for imported in graph.find_modules_directly_imported_by(module):
            target = box_of(imported)
            if target is not None and target != source:
                edges[source, target] += 1
    return edges, modules


def draw(path: Path) -> None:
    rows = layers()
    edges, modules = imports(rows)
    figure = Figure(figsize=(11, 0.78 * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 100)
    axes.set_ylim(-len(rows) + 0.35, 0.65)
    axes.axis("off")
    places: dict[str, tuple[float, float]] = {}
    for depth, row in enumerate(rows):
        for column, package in enumerate(row):
            x, name = 100 * (column + 1) / (len(row) + 1), title(package)
            width = max(9.0, 1.05 * len(name) + 4)
            face = FACE[package.partition(".")[0]]
            places[name] = x, -depth
            axes.add_patch(FancyBboxPatch((x - width / 2, -depth - 0.2), width, 0.4, boxstyle="round,pad=0,rounding_size=0.6",
                                          mutation_aspect=0.06, fc=face, ec=LINE, lw=0.8, zorder=3))  # fmt: skip
            axes.text(x, -depth, f"{name}  {modules[name]}", ha="center", va="center", fontsize=9, color=INK, zorder=4)
    for (source, target), count in sorted(edges.items()):
        if count >= FEWEST:
            start, end = places[source], places[target]
            arrow = FancyArrowPatch((start[0], start[1] - 0.2), (end[0], end[1] + 0.2), arrowstyle="-|>", mutation_scale=8,
                                    lw=0.5 + 0.12 * min(count, 25), color=LINE, alpha=0.45,
                                    connectionstyle=f"arc3,rad={0.12 if end[0] >= start[0] else -0.12}", zorder=2)  # fmt: skip
            axes.add_patch(arrow)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    import matplotlib as mpl

    mpl.rcParams.update({"svg.hashsalt": "architecture", "svg.fonttype": "none", "font.family": "sans-serif"})
    draw(ROOT / "docs" / "architecture.svg")

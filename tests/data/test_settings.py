"""Command lines of `key=value` words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import HANGS_S

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    """The modules that people run with `python -m`."""
    files = [file for folder in ("benchmarks", "data", "pipeline") for file in (ROOT / folder).rglob("*.py")]
    texts = {file.relative_to(ROOT): file.read_text() for file in files}
    shown = [path for path, text in texts.items() if "python -m " in text and "\nif __name__ ==" in text]
    names = (".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in shown)
    return sorted([*names, "tests.chaos", "tests.chaos_train"])


ASK_ALL = """
import contextlib, io, runpy, sys
for module in sys.argv[1:]:
    sys.argv, text = [module, "--help"], io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_module(module, run_name="__main__")
            code = None
        except SystemExit as end:
            code = end.code
    print(module, code, f"python -m {module}" in text.getvalue())
"""


@pytest.mark.slow
def test_every_command_has_help() -> None:
    """In one process: most of the time is that of importing torch and Ray."""
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", ASK_ALL, *commands()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, check=False, cwd=ROOT)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [f"{module} 0 True" for module in commands()]
    assert len(commands()) > 40


def test_a_command_whose_reader_is_gone_does_its_work(tmp_path: Path) -> None:
    """As `python -m data.pack … | head -1` does."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), name == "a").save(tmp_path / "images" / name / "1.png")
    words = [f"images={tmp_path / 'images'}", f"out={tmp_path / 'out'}", "processes=1"]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "data.pack", *words]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=HANGS_S, check=False)
    os.close(writer)
    assert (result.returncode, "roken" in result.stderr) == (0, False)
    assert (tmp_path / "out" / "labeled" / "manifest.json").exists()


@pytest.mark.parametrize("module", ["data.pack", "data.fashion_mnist"])
def test_help_whose_reader_is_gone_ends_without_a_traceback(module: str) -> None:
    """As `python -m data.pack --help | head -1` does, when the text is longer than what a pipe holds, or head is quick."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=HANGS_S, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")

"""Command lines of `key=value` words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import HANGS_S


@pytest.mark.parametrize("module", ["data.pack", "data.fashion_mnist"])
def test_help_whose_reader_is_gone_ends_without_a_traceback(module: str) -> None:
    """As `python -m data.pack --help | head -1` does, when the text is longer than what a pipe holds, or head is quick."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=HANGS_S, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")

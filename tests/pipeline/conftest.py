"""Fixtures of models and trainings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """This process as the only one of a group."""
    from torch import distributed  # most tests do without

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()

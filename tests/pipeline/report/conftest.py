"""A small run, shared by the tests of this folder."""

from pathlib import Path

import pytest

from tests.conftest import WriteDigits
from tests.small_run import SmallRun


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits) -> SmallRun:
    return SmallRun(tmp_path, write_digits)

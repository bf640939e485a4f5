"""Libraries that the benchmark needs. This module imports none of them, and nothing of the benchmark needs Ray."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = {
    "torch": "torch", "torchvision": "torchvision", "timm": "timm", "numpy": "numpy", "pyarrow": "pyarrow", "PIL": "pillow",
    "pydantic": "pydantic", "simplejpeg": "simplejpeg", "fsspec": "fsspec", "filelock": "filelock", "safetensors": "safetensors",
    "tqdm": "tqdm", "webdataset": "webdataset",
}  # fmt: skip
_OF_TESTS = {"pytest": "pytest", "pytest_timeout": "pytest-timeout"}


def missing(tests: bool) -> list[str]:
    """Distributions that are not installed here, by name."""
    needed = _NEEDED | (_OF_TESTS if tests else {})
    return [distribution for module, distribution in needed.items() if find_spec(module) is None]


def remedy(distributions: list[str]) -> str:
    """One line: what is missing, and how to bring it to a machine without network."""
    names, version = " ".join(distributions), ".".join(map(str, sys.version_info[:2]))
    return (
        f"missing here: {names}; where there is a network: pip download --dest wheels --python-version {version} "
        f"--only-binary=:all: {names}; then here: pip install --no-index --find-links wheels {names}"
    )

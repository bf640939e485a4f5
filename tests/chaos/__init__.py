"""Faults for the label stage, one after the other: `make chaos`, or `python -m tests.chaos faults=NAME,NAME`."""

import ray  # noqa: F401 (brings its own psutil, which the modules here use)

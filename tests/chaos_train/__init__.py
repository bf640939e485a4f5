"""Faults for the student's training, one after the other: `make chaos-train`, or `python -m tests.chaos_train faults=NAME,NAME`."""

import ray  # noqa: F401 (has its own psutil, used by these modules)

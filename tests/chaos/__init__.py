"""Inject faults into the label stage: `make chaos`, or `python -m tests.chaos faults=NAME,NAME`."""

import ray  # noqa: F401 (puts its own psutil on the path, which the modules here import)

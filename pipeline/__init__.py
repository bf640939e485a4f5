"""The pipeline. Pseudo-labels alone need less: see `noisy_student`."""

import sys
from importlib.util import find_spec

if find_spec("timm") is None:
    _missing = "the pipeline needs more than is installed: pip install 'noisy-student-pipeline[train]'"
    if sys.argv[:1] == ["-m"]:  # a command: `python -m pipeline.…`
        sys.exit(f"error: {_missing}")
    raise ModuleNotFoundError(_missing, name="timm")

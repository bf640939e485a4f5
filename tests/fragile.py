"""Commands with a decoder that has a bug: images that end with `CRASHES` end the process that decodes them.

python -m tests.fragile predict WORD …             as `python -m pipeline.predict`
python -m tests.fragile screen FOLDER NAME WORD …  screen the shards in FOLDER/labeled and FOLDER/unlabeled, into FOLDER/NAME
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from data.images.clean_view import EvalView
from data.shards.split import open_split
from pipeline.core.config import load_config
from pipeline.predict import main as predict
from teacher.screening.stream import pretrain_stream

CRASHES = b"ends the process"
_decode = EvalView._decode


def _fragile(view: EvalView, content: bytes) -> Any:
    if content.endswith(CRASHES):
        os.kill(os.getpid(), signal.SIGSEGV)
    return _decode(view, content)


def _screen(folder: str, name: str, *words: str) -> int:
    labeled, unlabeled = (
        open_split(f"{folder}/{split}/*.tar", f"{folder}/index") for split in ("labeled", "unlabeled")
    )
    pretrain_stream(load_config(None, words), labeled, unlabeled, f"{folder}/{name}", images_per_step=8)
    return 0


if __name__ in ("__main__", "__mp_main__"):  # and in processes that it spawns
    setattr(EvalView, "_decode", _fragile)  # noqa: B010 (mypy)
if __name__ == "__main__":
    sys.exit(predict(sys.argv[2:]) if sys.argv[1] == "predict" else _screen(*sys.argv[2:]))

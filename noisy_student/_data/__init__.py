"""The modules of the folder `data/` beside this package. They import each other relatively, so they work under this name too."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "data")]

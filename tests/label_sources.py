"""The same pseudo-labels from a run, its exports and a server, and what the stages' own files say about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from data.labels.pseudo_labels import PseudoLabels
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.export.stage import export
from pipeline.export.tasks import make_file
from teacher.selection.stage import select
from tests.conftest import make_writer
from tests.pipeline.export.test_export import with_teacher
from tests.small_run import SmallRun

Said = dict[str, tuple[int, float, int]]  # key → label, confidence, copies


@dataclass
class Sources:
    """The same labels thrice; `every` has those that are not selected, too."""

    run: Path
    export: Path
    every: Path
    kept: Said  # as the stages' own files say
    images: dict[str, np.ndarray]


def export_here(config: Config, layout: Layout) -> None:
    """`stage=export` in this process, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.export.stage.start_ray", lambda address: None)
        patch.setattr(
            "pipeline.export.stage.make_files", lambda job, files, *rest: [make_file(job, file) for file in files]
        )
        export(config, layout)


def exported_run(folder: Path, digits: tuple[np.ndarray, np.ndarray]) -> tuple[SmallRun, Layout]:
    """A run below `folder`: labeled, selected, and exported as v1."""
    run = SmallRun(folder, make_writer(digits))
    layout = with_teacher(run)
    run.label(run.config(), layout)
    select(run.config(), layout)
    export_here(run.config(export={"samples_per_shard": 10}), layout)
    return run, layout


def said_by_stages(layout: Layout) -> Said:
    """Read without any of what is tested."""
    found: Said = {}
    selection = layout.current_selection()
    for path in sorted(Path(layout.labels).glob("unlabeled-*.parquet")):
        copies = pq.read_table(f"{selection}/{path.name}").column("copies").to_pylist()
        for row, number in zip(pq.read_table(path).to_pylist(), copies, strict=True):
            if number:
                found[f"{path.stem}-{row['ordinal']:07d}"] = (row["label"], row["confidence"], number)
    return found


def pixels(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image)


def read(labels: PseudoLabels, workers: int = 0, **options: Any) -> list[dict[str, Any]]:
    """All samples, one by one."""
    loader = DataLoader(labels.dataset(pixels, as_dict=True, **options), batch_size=None, num_workers=workers)
    return list(loader)


def as_said(samples: list[dict[str, Any]]) -> Said:
    said = {sample["key"]: (sample["label"], sample["confidence"], sample["copies"]) for sample in samples}
    assert len(said) == len(samples), "every sample once"
    return said

"""A run directory without any training, for the tests of what reads one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data import storage
from data.labels.label_files import (
    LABELS_MANIFEST,
    QUARANTINE_NAME,
    VALIDATION_NAME,
    Quarantined,
    label_table,
    quarantine_table,
    write_labels,
)
from data.labels.top_k import top_k_of
from data.shards.split import open_split
from data.tables import write_table
from pipeline.core.config import write_config
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, done_record, open_stage
from teacher.validation_labels import ValidationLabels
from tests.conftest import DIGIT_NAMES, WriteDigits

NUM_UNLABELED, PER_SHARD, NUM_TEST = 120, 50, 400
REASON = "not a JPEG, PNG or WebP file"


class SmallRun:
    """A run directory made by the functions that stages write with, from made-up figures."""

    def __init__(self, folder: Path, write: WriteDigits, class_names: Sequence[str] | None = DIGIT_NAMES) -> None:
        self.folder, self.class_names = folder, list(class_names) if class_names else None
        self.num_classes = len(class_names) if class_names else 10
        self.truth = np.array(write(folder / "labeled", 0, NUM_UNLABELED))
        write(folder / "unlabeled", 0, NUM_UNLABELED, labeled=False, per_shard=PER_SHARD)
        self.random = np.random.default_rng(0)

    def config(self, generations: int = 1, truth: bool = True, **sections: Any) -> Config:
        data = {
            "unlabeled": [f"{self.folder}/unlabeled/*.tar"],
            "truth": str(self.folder / "truth.parquet") if truth else None,
        }
        select_rule = {"confidence_threshold": 0.3, "per_class": 8, "max_copies": 4}
        values = {"run_dir": str(self.folder / "run"), "generations": generations, "data": data, "select": select_rule}
        config = Config.model_validate(values | sections)
        write_config(config, [])
        return config

    def layouts(self, config: Config) -> list[Layout]:
        return [Layout(config.run_dir, number + 1) for number in range(config.most_generations())]

    def model(self, folder: str, stage: str, seconds: float = 12.0, weights: bytes = b"weights") -> None:
        """A teacher or student with a training curve."""
        opened = open_stage(
            folder, stage, Fingerprint({f"{stage}.model": "resnetrs50", "seed": 0}, {"labeled": "ab" * 8})
        )
        lines: list[dict[str, float]] = [
            {"step": step, "epoch": step / 10, "lr": 0.1, "loss": 2 / step} for step in (10, 20)
        ]
        lines.append({"step": 20, "validation_top1": 0.625})
        storage.write_text(opened.path("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
        storage.write_bytes(opened.path("weights/model.safetensors"), weights)
        opened.commit(["metrics.jsonl", "weights/model.safetensors"], {"validation_top1": 0.625})
        storage.write_text(opened.path("seconds.json"), json.dumps({"seconds": seconds}))

    def pretrain(self, layout: Layout, spread: float = 0.8) -> None:
        """A pretraining with its curves."""
        fields = {"pretrain.objective": "byol", "pretrain.batch_size": 100}
        stage = open_stage(layout.pretrain, "pretrain", Fingerprint(fields, {"labeled": "ab" * 8}))
        lines = [{"step": step, "loss": 5 / step, "spread": spread} for step in (10, 20)]
        lines.append({"step": 20, "knn_top1": 0.715})
        storage.write_text(stage.path("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
        counts = {"images": 120, "used": 113, "undecodable": 4, "excluded": 2, "held_out_copies": 1, "steps": 20}
        stage.commit(["metrics.jsonl"], counts | {"loss": 0.25, "spread": spread, "knn_top1": 0.715})
        storage.write_text(stage.path("seconds.json"), json.dumps({"seconds": 4.0}))

    def label(
        self, config: Config, layout: Layout, num_wrong: int = 30, validation: ValidationLabels | None = None
    ) -> None:
        """Labels of which the first `num_wrong` are wrong; the last image of each shard is quarantined.

        `validation`: the validation images as labeled; None: there are none.
        """
        teacher = done_record(layout.teacher)
        assert teacher is not None
        labels = self.truth.copy()
        labels[:num_wrong] = (labels[:num_wrong] + 1) % 10
        stage = open_stage(layout.labels, "label", Fingerprint({}, {"teacher": teacher["digest"]}))
        corpus, entries, quarantined, start = open_split(config.data.unlabeled, layout.indexes), [], [], 0
        for shard in corpus.shards:
            count = shard.num_samples - 1
            table = self._label_table(shard.index(), labels[start : start + count])
            bad = Quarantined(shard.name, count, "bad", 0, REASON)
            entries.append(
                write_labels(stage.path(f"{shard.name}.parquet"), shard, table, [bad], stage.fingerprint.digest())
            )
            quarantined.append(bad)
            start += shard.num_samples
        write_table(stage.path(QUARANTINE_NAME), quarantine_table(quarantined))
        storage.write_text(stage.path(LABELS_MANIFEST), json.dumps({"shards": [asdict(entry) for entry in entries]}))
        summary = {
            "corpus": corpus.digest(), "images": corpus.num_samples, "labels": corpus.num_samples - len(quarantined),
            "quarantined": {REASON: len(quarantined)}, "class_names": self.class_names, "num_classes": self.num_classes,
        }  # fmt: skip
        outputs = [LABELS_MANIFEST, QUARANTINE_NAME]
        if validation is not None:
            columns = {name: getattr(validation, name) for name in ("label", "predicted", "confidence")}
            write_table(stage.path(VALIDATION_NAME), pa.table(columns))
            outputs.append(VALIDATION_NAME)
        stage.commit(outputs, summary)

    def _label_table(self, index: pa.Table, labels: np.ndarray) -> pa.Table:
        confidence = self.random.uniform(0.4, 0.99, len(labels)).astype(np.float32)
        probabilities = np.repeat(((1 - confidence) / (self.num_classes - 1))[:, None], self.num_classes, axis=1)
        probabilities[np.arange(len(labels)), labels] = confidence
        hashes = np.arange(len(labels), dtype=np.uint64)
        top_k = top_k_of(probabilities.astype(np.float32), 3)
        return label_table(index, np.arange(len(labels)), top_k, hashes)

    def write_truth(self, count: int = NUM_UNLABELED) -> None:
        """The true labels of the first `count` unlabeled images."""
        numbers = np.arange(count)
        shards = [f"unlabeled-{number // PER_SHARD:06d}" for number in numbers]
        columns = {
            "shard": shards,
            "ordinal": (numbers % PER_SHARD).astype(np.int32),
            "label": self.truth[:count].astype(np.int32),
        }
        write_table(str(self.folder / "truth.parquet"), pa.table(columns))

    def evaluate(self, layout: Layout, right: dict[str, np.ndarray], test: str = "cd" * 8) -> None:
        """Test results: `right` says per role which of NUM_TEST images of class 0 to C−1, in turn, it has right; `test` is the split's
        digest."""
        answers = np.arange(NUM_TEST) * max(1, self.num_classes // NUM_TEST) % self.num_classes
        inputs, summary, columns = {"test": test}, {}, {"label": pa.array(answers, pa.int32())}
        for role, mask in right.items():
            record = done_record(getattr(layout, role))
            assert record is not None
            inputs[role] = record["digest"]
            columns[f"{role}_label"] = pa.array(np.where(mask, answers, (answers + 1) % self.num_classes))
            columns[f"{role}_confidence"] = pa.array(np.full(NUM_TEST, 0.7, np.float32))
            per_class = [
                float(mask[answers == label].mean()) if (answers == label).any() else None
                for label in range(self.num_classes)
            ]
            summary[role] = {
                "top1": float(mask.mean()), "top5": 0.9875, "images": NUM_TEST, "calibration_error": 0.0321, "temperature": 1.0,
                "per_class_top1": per_class, "parameters": 1_234_567, "flops": 7_530_000,
            }  # fmt: skip
        stage = open_stage(layout.evaluation, "evaluate", Fingerprint({"seed": 0}, inputs))
        write_table(stage.path("predictions.parquet"), pa.table(columns))
        stage.commit(["predictions.parquet"], summary)

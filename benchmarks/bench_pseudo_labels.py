"""Which pseudo-labels train the best student: soft or hard targets, and selection rules from the literature, on Fashion-MNIST.

    python -m benchmarks.bench_pseudo_labels [seeds=0,1,2] [arms=all|soft_1,…] [steps=700] [split=development]

Students of `config=fashion_mnist`, trained for `steps` steps on the labels of one teacher from benchmarks.bench_accuracy (made if
missing). Arms differ only in targets and copies:

    hard             the most probable class; the 3,000 most confident images per class (the demo's)
    soft_all         all probabilities
    soft_5, soft_1   the 5 (1) highest probabilities, and the rest spread over the other classes
    adaptive         FlexMatch (arXiv 2110.08263, equations 5 to 7): a class's threshold is 0.8 · b / (2 − b), where b is its number of
                     labels above 0.8 relative to the largest class's; no quota
    threshold        all labels above 0.8, no quota
    aligned          ReMixMatch (arXiv 1911.09785, section 3.1): probabilities times uniform / mean, then the quota
    self_confidence  confident learning (arXiv 1911.00068): drop labels below their class's mean confidence, then the quota
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import bench_accuracy
from data import fashion_mnist
from data.labels.label_files import label_table, read_labels, read_labels_manifest
from data.labels.top_k import TopK, dense_probabilities, stored_top_k, top_k_of
from data.settings import UsageError, run_command
from data.shards.split import open_split
from pipeline.core.config import load_config
from pipeline.core.schema import StudentConfig
from pipeline.inference.accuracy import top_k_accuracy
from pipeline.inference.predictor import Predictor, predict_split
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inputs.streams import StreamSpec, labeled_stream
from pipeline.models.registry import build_model
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.state import load_trained

NUM_CLASSES, QUOTA, THRESHOLD = 10, 3000, 0.8


@dataclass(frozen=True)
class Labels:
    """All pseudo-labels of a run: probabilities, (N, C) float32, and which of them an arm selects, bool (N,)."""

    probabilities: np.ndarray
    kept: np.ndarray


def _most_confident(probabilities: np.ndarray, number: int = QUOTA) -> np.ndarray:
    """Return a mask of the `number` most confident rows per class, bool (N,)."""
    label, confidence = probabilities.argmax(1), probabilities.max(1)
    kept = np.zeros(len(label), bool)
    for index in range(NUM_CLASSES):
        rows = np.flatnonzero(label == index)
        kept[rows[np.argsort(-confidence[rows], kind="stable")[:number]]] = True
    return kept


def _quota(probabilities: np.ndarray) -> Labels:
    return Labels(probabilities, _most_confident(probabilities))


def _truncated(top_k: int) -> Callable[[np.ndarray], Labels]:
    def rule(probabilities: np.ndarray) -> Labels:
        top = top_k_of(probabilities, top_k)
        others = (top.rest / (NUM_CLASSES - top_k))[:, None]
        spread = np.repeat(others, NUM_CLASSES, axis=1).astype(np.float32)
        np.put_along_axis(spread, top.index, top.prob.astype(np.float16).astype(np.float32), axis=1)
        return Labels(spread, _most_confident(probabilities))

    return rule


def _adaptive(probabilities: np.ndarray) -> Labels:
    label, confidence = probabilities.argmax(1), probabilities.max(1)
    learned = np.bincount(label[confidence >= THRESHOLD], minlength=NUM_CLASSES)
    share = learned / learned.max()
    return Labels(probabilities, confidence >= (THRESHOLD * share / (2 - share))[label])


def _threshold(probabilities: np.ndarray) -> Labels:
    return Labels(probabilities, probabilities.max(1) >= THRESHOLD)


def _aligned(probabilities: np.ndarray) -> Labels:
    scaled = probabilities / probabilities.mean(axis=0)
    return _quota((scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32))


def _self_confidence(probabilities: np.ndarray) -> Labels:
    label, confidence = probabilities.argmax(1), probabilities.max(1)
    means = np.array([confidence[label == index].mean() for index in range(NUM_CLASSES)])
    return Labels(probabilities, _most_confident(probabilities) & (confidence >= means[label]))


RULES: dict[str, Callable[[np.ndarray], Labels]] = {
    "hard": _quota, "soft_all": _quota, "soft_5": _truncated(5), "soft_1": _truncated(1), "adaptive": _adaptive,
    "threshold": _threshold, "aligned": _aligned, "self_confidence": _self_confidence,
}  # fmt: skip


def bench(
    seeds: str = "0,1,2",
    arms: str = "all",
    steps: int = 700,
    split: str = "development",
    out: str = "runs/bench_pseudo_labels",
) -> None:
    """Train a student per arm and seed, unless it exists, and print accuracies; see the module docstring."""
    wanted = list(RULES) if arms == "all" else arms.split(",")
    if not set(wanted) <= set(RULES):
        raise UsageError(f"arms={arms}: expected all, or some of {', '.join(RULES)}")
    found: dict[str, list[float]] = {arm: [] for arm in wanted}
    for seed in map(int, seeds.split(",")):
        for arm in wanted:
            result = Path(out) / f"{seed}-{arm}-{steps}" / f"{split}.json"
            if not result.exists():
                result.parent.mkdir(parents=True, exist_ok=True)
                result.write_text(json.dumps(_run_arm(arm, seed, steps, split, str(result.parent))))
            found[arm].append(json.loads(result.read_text())["top1"])
            print(f"seed {seed} {arm}: {json.loads(result.read_text())}", flush=True)
    for arm, values in found.items():
        spread = f" ± {stdev(values):.2%}" if len(values) > 1 else ""
        print(f"  {arm:16} {mean(values):7.2%}{spread}   {'  '.join(f'{value:.2%}' for value in values)}")
    peers = {arm: mean(values) for arm, values in found.items() if arm != "hard"}
    record = {
        "bench": "pseudo_labels", "unit": "top-1 up", "ours": mean(found["hard"]) if "hard" in found else None, "peers": peers,
        "floor": None, "memory_mb": None, "seeds": len(seeds.split(",")), "split": split, "steps": steps,
    }  # fmt: skip
    print(json.dumps(record))


def _run_arm(arm: str, seed: int, steps: int, split: str, out: str) -> dict[str, float]:
    """Return the accuracy of an arm's student, its number of labels, and the fraction of them that is correct."""
    data, run = f"datasets/fashion_mnist-50-{seed}", f"runs/bench_accuracy/50-{seed}/run"
    fashion_mnist.prepare(data, 50, seed)
    if not Path(f"{run}/gen-1/labels/manifest.json").exists():
        bench_accuracy.bench(seeds=str(seed), arms="teacher,student", split="development")
    config = load_config("fashion_mnist", [])
    corpus = open_split(f"{data}/unlabeled/*.tar", f"{data}/index")
    names = list(read_labels_manifest(f"{run}/gen-1/labels"))
    tables = [read_labels(f"{run}/gen-1/labels/{name}.parquet") for name in names]
    labels = RULES[arm](np.concatenate([dense_probabilities(stored_top_k(table), NUM_CLASSES) for table in tables]))
    start = 0
    for name, table in zip(names, tables, strict=True):
        rows = slice(start, start + len(table))
        start += len(table)
        pq.write_table(_with_probabilities(table, labels.probabilities[rows]), f"{out}/{name}.parquet")
        pq.write_table(pa.table({"copies": labels.kept[rows].astype(np.uint16)}), f"{out}/{name}.copies.parquet")
    labeled = open_split(f"{data}/labeled/*.tar", f"{data}/index")
    student = config.student
    per_step = student.batch_size // (1 + student.unlabeled_ratio)
    epochs = steps * per_step / labeled.num_samples
    section = StudentConfig.model_validate(
        student.model_dump()
        | {
            "epochs": epochs,
            "warmup_epochs": epochs * student.warmup_epochs / student.epochs,
            "eval_every_epochs": epochs,
        }
    )
    pseudo = StreamSpec(
        "pseudo_labeled", tuple(shard.url for shard in corpus.shards), tuple(f"{out}/{name}.parquet" for name in names),
        tuple(len(table) for table in tables), student.batch_size - per_step,
        tuple(f"{out}/{name}.copies.parquet" for name in names), "soft" if arm.startswith("soft") else "hard",
    )  # fmt: skip
    job = TrainJob(
        name="student",
        folder=out,
        config=section,
        streams=(labeled_stream(labeled, per_step), pseudo),
        num_classes=NUM_CLASSES,
        num_labeled=labeled.num_samples,
        seed=seed,
        threads=1,
        device="cpu",
    )
    fit(job)
    model = build_model(section.model, NUM_CLASSES, section.model_args, 0.0, 0.0)
    model.load_state_dict(load_trained(job)[0])
    torch.set_num_threads(1)
    preprocessing = Preprocessing.of_training(section)
    predictor = Predictor(model, preprocessing, "cpu", channels_last=section.channels_last)
    logits, truth = predict_split(open_split(f"{data}/{split}/*.tar", f"{data}/index"), predictor)
    right = _answers(data, names, tables)[labels.kept] == labels.probabilities.argmax(1)[labels.kept]
    return {"top1": top_k_accuracy(logits, truth)[0], "kept": int(labels.kept.sum()), "right": float(right.mean())}


def _with_probabilities(table: pa.Table, probabilities: np.ndarray) -> pa.Table:
    """Return a label table with all of an arm's probabilities."""
    top = top_k_of(probabilities, NUM_CLASSES)
    index = pa.table({"key": table.column("__key__"), "offset": table.column("offset"), "size": table.column("size")})
    hashes = table.column("image_hash").to_numpy()
    made = label_table(index, np.arange(len(table)), TopK(top.index, top.prob, top.rest), hashes)
    return made.set_column(0, "ordinal", table.column("ordinal"))


def _answers(data: str, names: list[str], tables: list[pa.Table]) -> np.ndarray:
    """Return the true classes of all label rows, in order."""
    truth = {
        (shard, ordinal): label
        for shard, ordinal, label in zip(*pq.read_table(f"{data}/truth.parquet").to_pydict().values(), strict=True)
    }
    return np.array(
        [
            truth[name, ordinal]
            for name, table in zip(names, tables, strict=True)
            for ordinal in table.column("ordinal").to_pylist()
        ]
    )


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

"""Which features serve other data sets best (Table 5 of ResNet-RS, arXiv 2103.07579), at a small scale.

    python -m benchmarks.bench_transfer [seeds=2] [passes=716800] [minutes=35] [out=runs/bench_transfer]
                                        [results=benchmarks/results/transfer.jsonl]

Every backbone is the same network, trained on the same 54,500 images of Fashion-MNIST for the same number of passes of an image through
the network (forward and backward; the student's teacher and labels come on top):

    scratch        fresh weights
    supervised     the old recipe: true labels, flips, step schedule, larger weight decay
    supervised_rs  the paper's subset: RandAugment, label smoothing, dropout, cosine, smaller weight decay; no EMA
    student        500 labels and pseudo-labels, noised
    simclr, simclrv2   stage=pretrain, without labels

They transfer to four sets: mnist, digits, emoji, stamps (`python -m data.recipes.NAME`), by linear probe and kNN; to emoji and stamps
also by fine-tuning. Each result is a line of `results`, and is not computed again, on any machine. After `minutes` no
training starts (one takes 20 minutes with its results); the same command continues.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.bench_accuracy import pack_truth
from data import fashion_mnist
from data.recipes import digits, emoji, mnist, stamps
from data.settings import run_command
from pipeline.core.config import load_config
from pipeline.core.stage import digest_of
from pipeline.pages.transfer_table import describe
from pipeline.run import main as pipeline
from pipeline.transfer.cells import EXPERIMENT, FEATURES, FINETUNE, Cell, trials_of
from pipeline.transfer.table import record_of
from pipeline.trials.trial import run_trials

SETS = {"mnist": mnist, "digits": digits, "emoji": emoji, "stamps": stamps}
FINETUNED = ("emoji", "stamps")
OURS = "supervised_rs"
NETWORK = "teacher.model_args={width: 0.25, blocks: [2, 2, 4, 2]}"  # of the demo's student
_PLAIN = [f"teacher.augment.{name}=0" for name in ("rotation", "zoom", "shear", "brightness", "contrast", "cutout")]
_SUPERVISED = [
    NETWORK, *_PLAIN, "teacher.augment.pad=2", "teacher.batch_size=256", "teacher.lr=0.2", "teacher.ema_decay=0",
    "teacher.eval_every_epochs=1000",
]  # fmt: skip
RECIPES: Mapping[str, Sequence[str]] = {
    "supervised": [*_SUPERVISED, "teacher.lr_schedule=step", "teacher.weight_decay=0.0005"],
    "supervised_rs": [
        *_SUPERVISED, "teacher.augment.num_ops=2", "teacher.augment.magnitude=5", "teacher.label_smoothing=0.1", "teacher.dropout=0.25",
        "teacher.weight_decay=0.0002",
    ],
    "student": [],
    "simclr": [NETWORK, "pretrain.objective=simclr"],
    "simclrv2": [NETWORK, "pretrain.objective=simclrv2"],
}  # fmt: skip
BACKBONES = ("scratch", *RECIPES)
_WORDS = [
    "transfer.methods=[linear,knn,finetune]", "transfer.finetune.lr=[0.05,0.2]", "transfer.finetune.epochs=[5,15]",
    "transfer.finetune.augment.crop_scale=[0.3,1.0]", "transfer.finetune.loader_workers=0",
]  # fmt: skip
_LABELS_PER_CLASS, _VIEWS = 50, 2


class BenchmarkError(ValueError):
    """A run failed; the message gives its command."""


def bench(
    seeds: int = 2,
    passes: int = 716_800,
    minutes: float = 35,
    out: str = "runs/bench_transfer",
    results: str = "benchmarks/results/transfer.jsonl",
) -> None:
    """Compute what is missing until the time is over, and print the table; see the module docstring."""
    deadline, file = time.monotonic() + 60 * minutes, Path(results)
    for name, recipe in SETS.items():
        recipe.prepare(f"datasets/{name}")
    wanted = list(_wanted(seeds, passes))
    done = _read(file)
    for (seed, backbone), group in groupby(wanted, lambda item: (item[1], item[0].backbone)):
        missing = {cell: key for cell, _, key in group if key not in done}
        if missing and time.monotonic() < deadline:
            if backbone != "scratch":
                _train(backbone, seed, passes, out)
            for cell, result in _measure(backbone, missing, seed, out):
                done[missing[cell]] = _append(file, missing[cell], cell, seed, result)
    _print(wanted, done, seeds)


def _wanted(seeds: int, passes: int) -> Iterator[tuple[Cell, int, str]]:
    """Yield every cell with each seed, and what its result depends on as a digest: complete seeds and backbones first."""
    for seed in range(seeds):
        for backbone in BACKBONES:
            for data in SETS:
                for method in ("linear", "knn", *([FINETUNE] if data in FINETUNED else [])):
                    cell = Cell(backbone, data, method)
                    yield cell, seed, digest_of([cell.row, seed, passes, RECIPES.get(backbone), _WORDS])


def _train(backbone: str, seed: int, passes: int, out: str) -> None:
    """Train a backbone, or continue; a finished one is taken as it is."""
    data = f"datasets/fashion_mnist-{_LABELS_PER_CLASS}-{seed}"
    fashion_mnist.prepare(data, _LABELS_PER_CLASS, seed)
    words = [f"run_dir={_run_dir(out, backbone, seed)}", f"seed={seed}", *RECIPES[backbone]]
    if backbone == "student":
        words += [*_shards(data, "labeled", "unlabeled"), *_epochs("student", passes, 10 * _LABELS_PER_CLASS * 4)]
        stage = "teacher,label,select,student"
    elif backbone in ("simclr", "simclrv2"):
        words += [*_shards(data, "unlabeled"), *_epochs("pretrain", passes, _VIEWS * _num_images(data))]
        stage = "pretrain"
    else:
        pack_truth(data)
        words += [
            f"data.labeled=[{data}/truth/*.tar]",
            f"data.validation=[{data}/validation/*.tar]",
            "data.unlabeled=[]",
        ]
        words += _epochs("teacher", passes, _num_images(data))
        stage = "teacher"
    command = [f"stage={stage}", "config=fashion_mnist", *words, "data.truth=null"]
    if pipeline(command) != 0:
        raise BenchmarkError(f"this command failed: python -m pipeline.run {' '.join(command)}")


def _shards(data: str, *splits: str) -> list[str]:
    labeled = f"data.labeled=[{data}/labeled/*.tar]" if "labeled" in splits else "data.labeled=[]"
    hashes = f"data.held_out_hashes=[{data}/validation/hashes.parquet]"
    return [labeled, f"data.unlabeled=[{data}/unlabeled/*.tar]", f"data.validation=[{data}/validation/*.tar]", hashes]


def _epochs(section: str, passes: int, passes_per_epoch: int) -> list[str]:
    """As many epochs as the passes allow; the warm-up is a twentieth."""
    epochs = passes / passes_per_epoch
    return [f"{section}.epochs={epochs:.4f}", f"{section}.warmup_epochs={epochs / 20:.4f}"]


def _num_images(data: str) -> int:
    """Labeled and unlabeled images."""
    manifests = [json.loads(Path(data, name, "manifest.json").read_text()) for name in ("labeled", "unlabeled")]
    return sum(shard["num_samples"] for manifest in manifests for shard in manifest["shards"])


def _run_dir(out: str, backbone: str, seed: int | str) -> str:
    return f"{out}/{backbone}-{seed}"


def _measure(backbone: str, cells: Collection[Cell], seed: int, out: str) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
    """Compute the results of a backbone; yield each."""
    folder = {"student": "gen-1/student", "simclr": "pretrain", "simclrv2": "pretrain"}.get(backbone, "gen-1/teacher")
    source = "random" if backbone == "scratch" else f"{_run_dir(out, backbone, seed)}/{folder}"
    sets = [f"transfer.sets.{name}=datasets/{name}" for name in SETS]
    words = [
        *_WORDS,
        NETWORK,
        *sets,
        f"transfer.backbones.{backbone}={source}",
        f"run_dir={out}/transfer/{backbone}-{seed}",
    ]
    config = load_config("fashion_mnist", [*words, f"seed={seed}", "transfer.seeds=1"])
    names = {cell.row: cell for cell in cells}
    features = {Cell(cell.backbone, cell.data, FEATURES).row for cell in cells if cell.method != FINETUNE}
    trials = [trial for trial in trials_of(config) if trial.row in {*names, *features}]
    run_trials(f"{backbone}, seed {seed}", trials, EXPERIMENT, unit="results and sets of features")
    for trial in trials:
        if trial.row in names and (result := trial.result()) is not None:
            yield names[trial.row], result


def _read(file: Path) -> dict[str, Mapping[str, Any]]:
    """Results by key."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {record["key"]: record["result"] for record in map(json.loads, lines)}


def _append(file: Path, key: str, cell: Cell, seed: int, result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add a line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = {"backbone": cell.backbone, "set": cell.data, "method": cell.method, "seed": seed}
    kept = {name: result[name] for name in ("top1", "mean_per_class", "right", "images", "chosen")}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps({"key": key, "commit": commit, **names, "result": kept}) + "\n")
    return kept


def _print(wanted: Sequence[tuple[Cell, int, str]], done: Mapping[str, Mapping[str, Any]], seeds: int) -> None:
    """Print the tables, the columns in which supervised_rs is above each other backbone, and the record."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell, _, key in wanted:
        if key in done:
            found.setdefault(cell.row, []).append(done[key])
    missing = sum(key not in done for _, _, key in wanted)
    record = record_of(list(dict.fromkeys(cell for cell, _, _ in wanted)), found, missing)
    if record["rows"]:
        print(describe(record))
    wins = {name: count_wins(record, OURS, name) for name in BACKBONES if name != OURS}
    for name, (won, columns) in wins.items():
        print(f"{OURS} is above {name} in {won} of {columns} columns")
    if missing:
        print(f"{missing} of {len(wanted)} results are missing: the same command continues")
    peers = {name: won for name, (won, _) in wins.items()}
    line = {
        "bench": "transfer",
        "unit": "columns won against up",
        "ours": None,
        "peers": peers,
        "floor": None,
        "memory_mb": None,
    }
    print(json.dumps(line | {"seeds": seeds, "missing": missing}))


def count_wins(record: Mapping[str, Any], ours: str, theirs: str) -> tuple[int, int]:
    """Columns (set and method) in which `ours` has the higher mean top-1, and columns that both have."""
    means = {(row["backbone"], row["set"], row["method"]): row["mean"] for row in record["rows"]}
    pairs = [
        (means[ours, *column], means[theirs, *column])
        for name, *column in means
        if name == ours and (theirs, *column) in means
    ]
    return sum(one > other for one, other in pairs), len(pairs)


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

"""ResNet-RS-50 … 420 and EfficientNet-B0 … B7 at their published sizes, side by side: counted, and timed where this machine can.

    python -m benchmarks.bench_pareto [batch=N] [rounds=3] [gflops=N] [threads=2] [out=runs/bench_pareto]

Counted for each: parameters, FLOPs (2 × multiply-adds), activations (outputs of convolutions), and the bytes that torch keeps in bf16
for the backward pass of 128 images. Timed: a training step and a forward pass of `batch` images (128 on a GPU, in bf16; 4 on a CPU, in
fp32), halved until it fits and then multiplied, as in the paper. On a CPU only networks of up to `gflops` an image (32) are timed, and
all are timed in turns. Writes table.md, pareto.svg and results.json to `out`. Accuracies are the published ones: nothing is trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.pareto import EFFICIENTNET, NETWORKS, PAIRS, RESNET_RS, Counted, Latency, Network, Timer, count
from data.settings import run_command
from pipeline.pages.plots import BEFORE, STUDENTS, TEACHER, accuracy_latency

_BATCH, _GFLOPS = {"cuda": 128, "cpu": 4}, {"cuda": 1000.0, "cpu": 32.0}
_STEP = 128  # images of the paper's step
_HEAD = (
    "network", "top-1, %", "parameters, M", "FLOPs, G", "activations, M", "kept for 128 images, GB", "training step, s",
    "forward pass, s", "V100, s", "TPUv3, s", "TPUv3, GB",
)  # fmt: skip


def bench(
    batch: int = 0, rounds: int = 3, gflops: float = 0.0, threads: int = 2, out: str = "runs/bench_pareto"
) -> None:
    """Count and time all networks; see the module docstring."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, gflops = batch or _BATCH[device], gflops or _GFLOPS[device]
    counted = {network.name: count(network) for network in NETWORKS}
    timed = time_in_turns([n for n in NETWORKS if counted[n.name].flops <= gflops * 1e9], device, batch, rounds)
    lines = [*table(counted, timed), "", *memory_lines(counted), *pair_lines(timed, batch)]
    print("\n".join(lines))
    _write(Path(out), lines, counted, timed, f"seconds, training step (here: {device}, {batch} images)")
    print(json.dumps(record(timed, device, batch)))


def time_in_turns(networks: list[Network], device: str, batch: int, rounds: int) -> dict[str, Latency]:
    """Median latencies by name."""
    timers = {network.name: Timer(network, device, batch) for network in networks}
    for name, timer in timers.items():
        timer.warm_up()
        print(f"ready: {name}", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for timer in timers.values():
            timer.turn()
    return {name: timer.result() for name, timer in timers.items()}


def table(counted: Mapping[str, Counted], timed: Mapping[str, Latency]) -> list[str]:
    """Lines of a Markdown table."""
    rows = [_HEAD, ("---",) * len(_HEAD), *(_row(n, counted[n.name], timed.get(n.name)) for n in NETWORKS)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(network: Network, found: Counted, latency: Latency | None) -> tuple[str, ...]:
    here = ("counted", "counted")
    if latency is not None:
        here = f"{latency.training_s:.3g}", f"{latency.inference_s:.3g}"
    paper = (f"{value:g}" if value else "–" for value in (network.v100_s, network.tpu_s, network.tpu_gb))
    return (
        network.name, f"{network.top1:.1f}", f"{found.parameters / 1e6:.1f}", f"{found.flops / 1e9:.3g}",
        f"{found.activations / 1e6:.1f}", f"{_STEP * found.kept_bytes / 1e9:.1f}", *here, *paper,
    )  # fmt: skip


def memory_lines(counted: Mapping[str, Counted]) -> list[str]:
    """Each pair's memory ratio: published, by activations, and by what torch keeps."""
    known = {network.name: network for network in NETWORKS}
    return [
        f"memory of {ours} ÷ {theirs}: published {known[ours].tpu_gb / known[theirs].tpu_gb:.2f}, "  # type: ignore[operator]
        f"activations {counted[ours].activations / counted[theirs].activations:.2f}, "
        f"kept by torch {counted[ours].kept_bytes / counted[theirs].kept_bytes:.2f}"
        for ours, theirs in PAIRS
        if known[ours].tpu_gb
    ]


def pair_lines(timed: Mapping[str, Latency], batch: int) -> list[str]:
    """Of pairs of about equal accuracy, both timed: which is faster."""
    return [
        f"{batch} images, {theirs} ÷ {ours}: training step {timed[theirs].training_s / timed[ours].training_s:.2f}, "
        f"forward pass {timed[theirs].inference_s / timed[ours].inference_s:.2f} (above 1: ResNet-RS is faster)"
        for ours, theirs in PAIRS
        if ours in timed and theirs in timed
    ]


def record(timed: Mapping[str, Latency], device: str, batch: int) -> dict[str, object]:
    """The last line: the training step of the largest pair that was timed."""
    pair = [pair for pair in PAIRS if all(name in timed for name in pair)][-1:]
    ours, theirs = pair[0] if pair else (None, None)
    return {
        "bench": "pareto", "unit": "s down", "device": device, "batch": batch, "seeds": 1,
        "ours": round(timed[ours].training_s, 4) if ours else None,
        "peers": {f"timm {theirs}": round(timed[theirs].training_s, 4)} if theirs else {},
    }  # fmt: skip


def _write(
    out: Path, lines: list[str], counted: Mapping[str, Counted], timed: Mapping[str, Latency], x_label: str
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    results = {
        name: {**asdict(found), **(asdict(timed[name]) if name in timed else {})} for name, found in counted.items()
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "pareto.svg").write_bytes(accuracy_latency(_series(timed), x_label))


def _series(timed: Mapping[str, Latency]) -> list[tuple[str, str, list[float], list[float]]]:
    """Lines (name, colour, seconds, top-1) of each family: here, and where the paper has latencies."""
    found = []
    for family, color in ((RESNET_RS, STUDENTS[0]), (EFFICIENTNET, TEACHER)):
        networks = [network for network in NETWORKS if network.family == family]
        places = {
            f"{family}, here": (color, {n: timed[n.name].training_s for n in networks if n.name in timed}),
            f"{family}, TPUv3 (paper, 128)": (
                STUDENTS[1 if family == RESNET_RS else 3],
                {n: n.tpu_s for n in networks if n.tpu_s},
            ),
            f"{family}, V100 (paper, 128)": (
                STUDENTS[2] if family == RESNET_RS else BEFORE,
                {n: n.v100_s for n in networks if n.v100_s},
            ),
        }
        found += [(name, color, list(x.values()), [n.top1 for n in x]) for name, (color, x) in places.items() if x]
    return found


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))

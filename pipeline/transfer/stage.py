"""stage=transfer: how well the features of several models serve other data sets (Table 5 of ResNet-RS, arXiv 2103.07579).

    backbone × set ──► features ──► linear probe, nearest neighbours ──► a done-record per cell ──► table, plot, page
                  └──► fine-tuning ─────────────────────────────────┘

Validation images choose every setting. Test images are predicted once, by what was chosen.
"""

from __future__ import annotations

from collections import Counter

from data import storage
from data.settings import UsageError
from data.storage.redact import redacted
from pipeline.core.devices import require_device
from pipeline.core.layout import RESULTS_NAME, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import accept
from pipeline.pages.transfer_table import describe
from pipeline.transfer.backbones import open_backbone
from pipeline.transfer.cells import EXPERIMENT, STAGE, trials_of
from pipeline.transfer.sets import check_set, open_set
from pipeline.transfer.table import PAGE_NAME, PLOT_NAME, results_of, write_results
from pipeline.trials.outlook import describe_remaining
from pipeline.trials.trial import Trial, refuse_others, run_trials

UNIT = "results and sets of features"


def transfer(config: Config, layout: Layout, force: bool = False) -> None:
    """Compute or continue all cells, print the table and write its files; with `force`, first move earlier results aside.

    Raises:
        StageRefusedError: there are results of other settings, weights or sets.
        UsageError: transfer.backbones or transfer.sets are empty, or name what is not there.
        StageError: the splits of a set have different classes.
        ModelError: weights do not fit the model.
        DataError: shards are damaged, have no labels, or an image cannot be decoded.
    """
    trials = _open(config, force)
    accept()
    try:
        run_trials(STAGE, trials, EXPERIMENT, force, UNIT)
    finally:
        record = results_of(config, trials)
        if record["rows"]:
            write_results(layout.transfer, record)
    print(f"\n{describe(record)}\n")
    print(f"written: {storage.join(layout.transfer, RESULTS_NAME)}, {PLOT_NAME}, {PAGE_NAME}")


def _open(config: Config, force: bool = False) -> list[Trial]:
    """All trials, after the checks that need no computing. Raises as `transfer`."""
    for field in ("backbones", "sets"):
        if not getattr(config.transfer, field):
            example = "transfer.backbones.mine=RUN" if field == "backbones" else "transfer.sets.digits=FOLDER"
            raise UsageError(f"transfer.{field} is empty: give one or more, as {example} (docs/transfer.md)")
    require_device(config.resolved_device(), config.ray_address)
    trials = trials_of(config)
    for name in config.transfer.sets:
        check_set(open_set(config, name))
    if not force:
        refuse_others(trials)
    return trials


def plan_transfer(config: Config, layout: Layout) -> None:  # noqa: ARG001 (a study's `plan`)
    """Print backbones and sets, how many results of each method are done, and the expected time of the others. Raises as `transfer`."""
    trials = _open(config)
    for name in config.transfer.backbones:
        found = open_backbone(config, name)
        size = found.preprocessing.image_size
        print(f"backbone {name}: {found.model} at {size} px, {found.kind} {redacted(found.source)}")
    for name in config.transfer.sets:
        data = open_set(config, name)
        images = ", ".join(
            f"{getattr(data, split).num_samples:,} {split}" for split in ("labeled", "validation", "test")
        )
        print(f"set {name}: {data.num_classes} classes; images: {images}")
    methods = [(trial.row.rpartition(", ")[2], trial.result() is not None) for trial in trials]
    counted, done = Counter(method for method, _ in methods), Counter(method for method, is_done in methods if is_done)
    print("transfer: " + "; ".join(f"{method} {done[method]} of {number} done" for method, number in counted.items()))
    print(f"transfer: {describe_remaining(trials, EXPERIMENT, UNIT)}")

"""Pack a folder: scan it, plan which image goes where, pack each split, print a summary. The command is `data.pack`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import storage
from ..errors import DataError
from ..images.held_out_hashes import is_outdated
from ..modalities import MODALITIES, ModalityName, require_decoder
from ..shards.split import HASHES_NAME
from .claim import Claim, is_packed, known_copies, make_claim, read_claim
from .folders import find_classes
from .lines import read_lines
from .packed_shards import remove_records
from .plan import LEFT_OUT, Plan, plan_packing, require_decodable, scan_images
from .screening import SplitJob
from .split_packing import PIECE, pack_split
from .summary import configuration_lines, summary_lines
from .workers import available_cores, workers
from .workspace import workspace


def pack(
    images: str,
    out: str,
    labeled: bool = True,
    validation: float = 0.02,
    samples_per_shard: int = 10000,
    seed: int = 0,
    group: str = "",
    processes: int = 0,
    modality: str = "image",
) -> None:
    """Pack a folder; `data.pack` describes the arguments. `processes=0`: one per core.

    Raises:
        DataError: there is no such folder or no image in it, its class folders are wrong (see `data.packing.folders.find_classes`),
            `out` has other files, or the folder has changed since the packing began.
    """
    if modality not in MODALITIES:
        raise DataError(f"modality={modality}: expected {' or '.join(MODALITIES)}")
    kind = MODALITIES[modality].name
    packing = Packing(images, out, labeled, validation, samples_per_shard, seed, group, kind)

    def tell(done: Packed) -> None:
        for folder in done.packed_before:
            _report_packed(folder)
        print("\n".join([*summary_lines(*done[:2], validation), *configuration_lines(*done[:2], validation)]))

    run_packing(packing, tell, processes)


@dataclass(frozen=True)
class Packing:
    """What to pack, and how; `data.pack` describes the fields."""

    images: str
    out: str
    labeled: bool = True
    validation: float = 0.02
    samples_per_shard: int = 10000
    seed: int = 0
    group: str = ""
    modality: ModalityName = "image"

    @property
    def settings(self) -> dict[str, Any]:
        """What the output records; of images without the modality, as in earlier versions."""
        left_out = ("out", "modality") if self.modality == "image" else ("out",)
        return {name: value for name, value in asdict(self).items() if name not in left_out}


class Packed(NamedTuple):
    """A finished packing.

    Attributes:
        folders: split → folder of its shards.
        packed_before: those that an earlier command had finished.
    """

    plan: Plan
    folders: dict[str, str]
    packed_before: list[str]


def run_packing(packing: Packing, tell: Callable[[Packed], None], processes: int = 0) -> None:
    """Pack a folder, or find that it is packed. Raises as `pack`.

    Args:
        tell: called at the end with the result, of which the list of files is gone later.
    """
    root, out, kind = Path(packing.images), packing.out, "labeled" if packing.labeled else "unlabeled"
    _check(packing, processes)
    _require_outside(root, out, ("labeled", "validation") if packing.labeled else ("unlabeled",))
    claim = read_claim(out, kind, packing.settings)
    with workspace(out, kind, may_be_done=claim.before is not None) as folder:
        plan = _plan(root, folder, claim, packing)
        folders = {name: storage.join(out, name) for name in plan.splits}
        make_claim(claim, plan, folders)
        before = [folder for folder in folders.values() if is_packed(folder)]
        _pack_splits(plan, folders, claim.digest, packing, processes or available_cores())
        tell(Packed(plan, folders, before))


def _check(packing: Packing, processes: int) -> None:
    """Raise DataError for a wrong value."""
    require_decoder(packing.modality)
    if not Path(packing.images).is_dir():
        raise DataError(f"images={packing.images}: no such folder")
    if packing.samples_per_shard < 1:
        raise DataError(f"samples_per_shard={packing.samples_per_shard}: expected 1 or more")
    if processes < 0:
        raise DataError(f"processes={processes}: expected 1 or more, or 0 for one per core")
    if packing.group and not packing.labeled:
        raise DataError(f"group={packing.group}: goes with labeled images, of which some are held out")


def _plan(root: Path, folder: str, claim: Claim, packing: Packing) -> Plan:
    modality = MODALITIES[packing.modality]
    listing, found = scan_images(root, folder, claim.kind == "labeled", modality)
    classes = find_classes(root, found, claim.out) if claim.kind == "labeled" else None
    if not found.num_images:
        first = f"; {found.first_left_out}" if found.first_left_out else ""
        raise DataError(f"images={root}: no {modality.noun}s ({', '.join(modality.extensions)}) below it{first}")
    copies = known_copies(claim, listing)
    return plan_packing(root, listing, found, classes, packing.validation, packing.seed, packing.group, copies)


def _pack_splits(plan: Plan, folders: dict[str, str], settings: str, packing: Packing, processes: int) -> None:
    jobs = [
        SplitJob(
            plan.images, plan.splits[name], plan.labels, folder, name, packing.samples_per_shard, plan.digest + settings,
            plan.images.folder, packing.modality,
        )
        for name, folder in folders.items()
    ]  # fmt: skip
    todo = [job for job in jobs if not is_packed(job.folder)]
    if any(job.name == "labeled" for job in todo):
        require_decodable(plan, MODALITIES[packing.modality])
    processes = min(processes, max((-(-len(job.order) // PIECE) for job in todo), default=1))
    with workers(processes) as executor:
        for job in jobs:
            if job in todo:
                left_out = read_lines(f"{job.scratch}/{LEFT_OUT}") if job is jobs[0] else ()
                pack_split(job, executor, processes, plan.classes, left_out)
            else:
                remove_records(job)  # a run that was killed after it wrote the manifest leaves them


def _report_packed(folder: str) -> None:
    print(f"{folder}: packed already")
    if is_outdated(folder):
        print(
            f"{folder}/{HASHES_NAME} is of an earlier version and cannot be used as data.held_out_hashes; to write it "
            f"anew, remove the folder {folder} and give this command again: it makes the same shards"
        )


def _require_outside(root: Path, out: str, splits: Sequence[str]) -> None:
    """Raise DataError when `out` is inside `images`, where packed files would count as images of the next packing."""
    if not storage.is_local(out):
        return
    images = root.resolve()
    for folder in (out, *(storage.join(out, name) for name in splits)):
        target = storage.local_path(folder).resolve()
        if images in (target, *target.parents):
            raise DataError(
                f"out={out}: {folder} lies inside images={root}, where packed files would count as its files; give an out= outside"
            )

"""Folders of images given to a run instead of shards: packed once into RUN/packed by the code of data.pack, and found there again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data import picture_folders, storage
from data.errors import DataError
from data.json_files import read_json
from data.packing.folders import SplitFoldersError
from data.packing.pack_folder import Packed, Packing, run_packing
from data.packing.summary import summary_lines
from data.picture_folders import folder_of, packed_shards, packing_folder
from data.settings import UsageError
from data.shards.split import MANIFEST_NAME, Manifest
from pipeline.core.schema import Config, DataConfig

NAMES = ("labeled", "validation", "test", "unlabeled")
_HELD_OUT = ("validation", "test")
_FIELD_OF = {
    "train": "labeled",
    "val": "validation",
    "test": "test",
    "unlabeled": "unlabeled",
}  # by the beginning of a folder's name


def pack_folders(config: Config) -> DataConfig:
    """Pack the folders that fields of `data` name, unless it is done, and name their shards instead.

    A folder that is gone after it was packed is not missed: its shards are whole.

    Raises:
        UsageError: a folder holds shards.
        DataError: as `data.packing.pack_folder.pack`: among others, a folder has changed since it was packed.
    """
    for name in NAMES:
        folder = folder_of(getattr(config.data, name))
        if folder is not None and storage.local_path(folder).is_dir():
            _pack(config, name, folder)
    return with_shards(config)


def with_shards(config: Config) -> DataConfig:
    """`config.data` with shards in the place of folders whose shards are complete. Packs nothing.

    Unless they are given, validation images are the held-out share, and held-out hashes those of validation and test images.
    """
    data = config.data
    shards = {name: picture_folders.shards_or_folder(_home(config, name), name, getattr(data, name)) for name in NAMES}
    if data.holds_out:
        shards["validation"] = picture_folders.held_out_share(_home(config, "labeled"))
    packed = [name for name in _HELD_OUT if shards[name] != getattr(data, name)]
    hashes = data.held_out_hashes or [picture_folders.hashes_beside(shards[name][0]) for name in packed]
    return data.model_copy(update={**shards, "held_out_hashes": hashes})


def _home(config: Config, name: str) -> str:
    """The run that keeps the shards of `data.<name>`: with `labels_from`, that run if it has them; nothing is added to it."""
    return config.source_dir if packed_shards(config.source_dir, name) else config.run_dir


def describe_packed(run_dir: str) -> Iterator[str]:
    """Yield a line for each folder that was packed: its images and where they are."""
    for name in NAMES:
        if not (shards := packed_shards(run_dir, name)):
            continue
        folder = storage.parent(shards[0])
        manifest = Manifest.model_validate_json(storage.read_bytes(storage.join(folder, MANIFEST_NAME)))
        claim = f"packing-{'unlabeled' if name == 'unlabeled' else 'labeled'}.json"
        images = read_json(storage.join(packing_folder(run_dir, name), claim), "give another run_dir=")["images"]
        count = sum(shard.num_samples for shard in manifest.shards)
        yield f"data.{name:12}{count:,} images of the folder {images}, packed into {folder}"


def _pack(config: Config, name: str, folder: str) -> None:
    path = storage.local_path(folder).absolute()
    if next(path.glob("*.tar"), None):
        raise UsageError(f"data.{name}={folder}: a folder of shards; give 'data.{name}={folder.rstrip('/')}/*.tar'")
    is_labeled = name != "unlabeled"
    share = config.data.validation_share if name == "labeled" and config.data.holds_out else 0
    group = config.data.group if name == "labeled" else ""
    packing = Packing(
        str(path),
        packing_folder(_home(config, name), name),
        is_labeled,
        share,
        group=group,
        modality=config.data.modality,
    )

    def tell(packed: Packed) -> None:
        if len(packed.packed_before) < len(packed.folders):
            print(f"data.{name}: packed the folder {folder} into {', '.join(packed.folders.values())}")
            print(*summary_lines(packed.plan, packed.folders, share), sep="\n")

    try:
        run_packing(packing, tell)
    except SplitFoldersError as error:
        raise DataError(_name_splits(name, folder, error.names)) from error
    except DataError as error:
        raise DataError(_in_words_of_a_run(str(error), name, folder, path)) from error


def _name_splits(name: str, folder: str, splits: list[str]) -> str:
    """The message about a folder whose folders are splits."""
    fields = {
        split: next((f for begin, f in _FIELD_OF.items() if split.lower().startswith(begin)), "…") for split in splits
    }
    words = " ".join(f"data.{field}={folder.rstrip('/')}/{split}" for split, field in fields.items())
    return f"data.{name}={folder}: {', '.join(splits)} are splits, not classes; give each its field: {words}"


def _in_words_of_a_run(message: str, name: str, folder: str, path: Path) -> str:
    """A message of data.pack, with the fields of a run in the place of its arguments."""
    words = {
        f"images={path}": f"data.{name}={folder}",
        "choose another out=": "give another run_dir=",
        "give an out= outside": "give a run_dir= outside",
        "for unlabeled images say labeled=false": "unlabeled images belong to data.unlabeled",
        "or say labeled=false": "or give the folder as data.unlabeled",
        "group=": "data.group=",
        "another data.pack": "another command",
    }
    for before, after in words.items():
        message = message.replace(before, after)
    return message if message.startswith("data.") else f"data.{name}: {message}"

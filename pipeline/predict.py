"""Predict the classes of images with finished weights.

    python -m pipeline.predict weights=RUN/gen-1/student/weights images=FOLDER|GLOB|SHARDS out=predictions.csv [key=value …]

images: a folder (all images below it), a pattern ('photos/*.jpg', 's3://bucket/photos/**'), or shards ('shards/*.tar').
out: .csv, .jsonl or .parquet, a row for each image: path, label, class name, calibrated confidence, and the next classes with theirs.
Images that cannot be read or decoded are in OUT.rejected.csv, each with the reason. Kill it at any time: the same command continues.

    top_k=5             classes for each image
    device=auto         cpu, cuda, or cuda if there is one
    batch_size=256      images in a forward pass
    threads=0           CPU threads that decode, and of the model; 0: one for each core
    views=1             average over up to 10 mirrored and shifted views
    decoder=fast        pillow: exactly timm's pixels, in twice the time
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import get_args

from data import console, storage
from data.images.clean_view import Decoder
from data.settings import UsageError, run_command
from data.storage.redact import redacted
from pipeline.core import interrupt
from pipeline.core.devices import resolve_device
from pipeline.core.lock import run_lock
from pipeline.inference.stage_weights import load_predictor, read_info, weights_folder
from pipeline.models.external_weights import weights_digest
from pipeline.prediction.inputs import find_images
from pipeline.prediction.parts import Parts
from pipeline.prediction.tables import ending_of, rejects_of, write_predictions, write_rejects
from pipeline.prediction.work import NOTHING_CRASHES, crashing_images_of, predict_pieces
from teacher.labeling.crash_isolation import noting_loss
from teacher.labeling.label_shard import BatchLabeler

_MAX_VIEWS = 10


def predict(
    weights: str,
    images: str,
    out: str,
    top_k: int = 5,
    device: str = "auto",
    batch_size: int = 256,
    threads: int = 0,
    views: int = 1,
    decoder: str = "fast",
) -> None:
    """Predict, and write the table; see the module's text.

    Raises:
        UsageError: a wrong value, or `out` is there already.
        ModelError: there are no weights.
        DataError, StorageError, FileNotFoundError: there are no images, or shards are damaged.
        LockedError: another process makes the same table.
    """
    _check(weights, images, out, top_k, device, batch_size, threads, views, decoder)
    device = resolve_device(device, None)
    info = read_info(weights)
    top_k = min(top_k, info.num_classes)
    parts = Parts(
        out, [weights_digest(weights_folder(weights)), info.model_dump(), top_k, device, batch_size, views, decoder]
    )
    found = find_images(images, parts.index_folder)
    for reason, number in found.passed_over.items():
        print(f"passed over {number:,} file{'s' * (number > 1)}: {reason}")
    with run_lock(parts.folder, "python -m pipeline.predict"):
        todo = [piece for piece in found.pieces if not parts.is_done(piece)]
        if todo:
            threads = threads or os.cpu_count() or 1
            chosen: Decoder = "pillow" if decoder == "pillow" else "fast"
            predictor = load_predictor(weights, device, batch_size, views, chosen, fast=True)
            labeler = BatchLabeler(predictor, top_k, threads, threads)
            with noting_loss(storage.join(parts.folder, "begun")) as was_lost:
                crashing = crashing_images_of(todo, batch_size, predictor.view) if was_lost else NOTHING_CRASHES
                predict_pieces(labeler, batch_size, parts, todo, found.number, crashing)
        bad = write_rejects(out, parts.read(found.pieces))
        write_predictions(out, parts.read(found.pieces), info.class_names, top_k)
    parts.remove()
    print(_last_line(out, found.number, bad))


def _check(
    weights: str,
    images: str,
    out: str,
    top_k: int,
    device: str,
    batch_size: int,
    threads: int,
    views: int,
    decoder: str,
) -> None:
    """Raise UsageError for a wrong value."""
    for name, text in (("weights", weights), ("images", images)):
        if not text:  # as of a variable of the shell that is not set; "" would be the current folder
            raise UsageError(f"{name}= is empty; expected a folder of {name}")
    ending_of(out)
    if storage.exists(out):
        raise UsageError(f"out={redacted(out)}: it is there already; delete it, or give another name")
    for name, word, known in (("device", device, ("auto", "cpu", "cuda")), ("decoder", decoder, get_args(Decoder))):
        if word not in known:
            raise UsageError(f"{name}={word}: expected {' or '.join(known)}")
    for name, value, least, most in (
        ("top_k", top_k, 1, None),
        ("batch_size", batch_size, 1, None),
        ("threads", threads, 0, None),
        ("views", views, 1, _MAX_VIEWS),
    ):
        if value < least or (most and value > most):
            raise UsageError(f"{name}={value}: expected {f'{least} to {most}' if most else f'{least} or more'}")


def _last_line(out: str, number: int, bad: int) -> str:
    text = f"{redacted(out)}: {number - bad:,} images"
    return f"{text}; {bad:,} could not be read or decoded, see {redacted(rejects_of(out))}" if bad else text


def main(words: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    with console.tolerant_output():
        try:
            with interrupt.handled():
                return run_command(predict, words, __doc__ or "")
        except interrupt.Interrupted as stop:
            command = shlex.join(["python", "-m", "pipeline.predict", *words])
            print(f"\nstopped ({stop}). To continue, the same command again:\n  {redacted(command)}", file=sys.stderr)
            return stop.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

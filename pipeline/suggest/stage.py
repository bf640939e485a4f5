"""stage=suggest: unlabeled images whose labels would help most, for people to label: uncertain ones that differ from each other."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from data import storage
from data.shards.image_reader import read_image
from data.shards.samples import image_format
from data.shards.split import urls_by_name
from data.storage.redact import redacted
from pipeline.core.devices import call_on_device
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, done_record, require_done
from pipeline.suggest.candidates import Candidate, find_candidates
from pipeline.suggest.choose import choose_diverse, disagreement
from pipeline.suggest.score import score

LIST_NAME = "suggestions.csv"
FOLDER = "suggestions"  # in the run directory
_MIN_VIEWS = 4  # that vote, where there is one teacher


def suggest(config: Config, layouts: Sequence[Layout]) -> None:
    """Write `suggestions.csv`, and with suggest.format=folder the pictures, into `suggest.out`; print what was chosen.

    Raises:
        StageError: there are no labels or no weights of their teacher, or the folder is not empty.
        DataError: no candidate can be read.
    """
    layout = next((each for each in reversed(layouts) if done_record(each.labels) is not None), layouts[0])
    require_done(layout.labels, "label")
    require_done(layout.teacher, layout.teacher_stage)
    out = config.suggest.out or storage.join(config.run_dir, FOLDER)
    if storage.list_names(out):
        raise StageError(f"{redacted(out)}: there are suggestions already; remove the folder, or give suggest.out=DIR")
    wanted = config.suggest
    candidates = find_candidates(config, layout, wanted.images * wanted.candidates_per_image)
    known = urls_by_name(config.data.unlabeled)
    candidates = [each for each in candidates if each.shard in known]
    urls = [known[each.shard] for each in candidates]
    teachers = [layout.teacher, *config.teacher.ensemble]
    views, device = max(config.label.views, _MIN_VIEWS if len(teachers) == 1 else 1), config.resolved_device()
    scores = call_on_device(
        device,
        config.ray_address,
        score,
        candidates,
        urls,
        teachers,
        views,
        device,
        config.threads,
        config.label.batch_size,
    )
    uncertainty = disagreement(scores.probabilities)
    rows = choose_diverse(uncertainty, scores.features, wanted.images)
    chosen = [(candidates[scores.rows[row]], urls[scores.rows[row]], float(uncertainty[row])) for row in rows]
    _write(out, chosen, _class_names(layout), wanted.format == "folder")
    votes = len(scores.probabilities)
    print(
        f"suggest: {len(chosen)} of {len(candidates):,} uncertain images, by the disagreement of {votes} votes: {redacted(out)}"
    )


def _class_names(layout: Layout) -> list[str] | None:
    names: list[str] | None = require_done(layout.labels, "label")["summary"]["class_names"]
    return names


def _write(out: str, chosen: Sequence[tuple[Candidate, str, float]], names: list[str] | None, pictures: bool) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["rank", "picture", "shard", "ordinal", "key", "guess", "confidence", "disagreement", "class"])
    for rank, (candidate, url, uncertainty) in enumerate(chosen, start=1):
        picture, place = "", candidate.place
        if pictures:
            content = read_image(url, place)
            picture = f"{rank:05d}.{image_format(content) or 'bin'}"
            storage.write_bytes(storage.join(out, picture), content)
        guess = names[candidate.label] if names else str(candidate.label)
        figures = [guess, f"{candidate.confidence:.4f}", f"{uncertainty:.4f}", ""]
        rows.writerow([rank, picture, candidate.shard, place.ordinal, place.key, *figures])
    storage.write_text(storage.join(out, LIST_NAME), text.getvalue())

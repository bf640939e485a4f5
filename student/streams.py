"""The student's streams: labeled and pseudo-labeled images, in exact shares of every batch."""

from __future__ import annotations

from data import storage
from data.labels.exclusions import read_keys
from data.labels.label_files import copies_digests, read_labels_manifest
from data.shards.split import Split, open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import require_done
from pipeline.inputs.streams import StreamSpec, labeled_stream
from pipeline.upstream.stage_inputs import require_labeled_corpus


def mixed_streams(config: Config, layout: Layout, labeled: Split, selection_folder: str) -> tuple[StreamSpec, ...]:
    """The labeled stream and, unless student.unlabeled_ratio=0, the pseudo-labeled one.

    Raises:
        StageError: the unlabeled shards are not those that were labeled.
        DataError: damaged indexes, or no labeled images are left.
    """
    student = config.student
    stream = labeled_stream(labeled, student.labeled_per_step, read_keys(config.data.exclude))
    if student.unlabeled_ratio == 0:
        return (stream,)
    corpus = open_split(config.data.unlabeled, layout.indexes)
    require_labeled_corpus(corpus, require_done(layout.labels, "label"))
    per_step = student.batch_size - student.labeled_per_step
    return (stream, pseudo_labeled_stream(config, layout, corpus, selection_folder, per_step))


def pseudo_labeled_stream(
    config: Config, layout: Layout, corpus: Split, selection_folder: str, images_per_step: int
) -> StreamSpec:
    """The stream of the selected pseudo-labels of `corpus`, with the digests of the committed labels and selection."""
    entries, copies = read_labels_manifest(layout.labels), copies_digests(require_done(selection_folder, "select"))
    names = [shard.name for shard in corpus.shards]
    return StreamSpec(
        name="pseudo_labeled",
        shard_urls=tuple(shard.url for shard in corpus.shards),
        table_urls=tuple(storage.join(layout.labels, f"{name}.parquet") for name in names),
        num_rows=tuple(entries[name].rows for name in names),
        images_per_step=images_per_step,
        copies_urls=tuple(storage.join(selection_folder, f"{name}.parquet") for name in names),
        targets=config.student.pseudo_labels,
        temperature=config.student.pseudo_label_temperature,
        table_digests=tuple(entries[name].sha256 for name in names),
        copies_digests=tuple(copies[name] for name in names),
    )

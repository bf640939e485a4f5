"""Check the unlabeled shards by their indexes, before an image is read: refuse damaged ones, report oddities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.labels.label_files import QUARANTINE_NAME, VALIDATION_NAME, Quarantined
from data.shards.split import Shard, Split, open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, LabelConfig
from pipeline.core.stage import StageError, done_record

_EXAMPLES = 3  # in a message


def check_unlabeled(config: Config, layout: Layout) -> None:
    """Run `check_corpus` on data.unlabeled unless its labels are finished; for commands that train for hours before labeling."""
    if config.data.unlabeled and done_record(layout.labels) is None:
        check_corpus(open_split(config.data.unlabeled, layout.indexes), config.label)


def check_corpus(corpus: Split, config: LabelConfig) -> None:
    """Refuse shards that should not be labeled.

    Raises StageError as `check_shards`, and when the indexes list more unusable images than `label.max_quarantined` allows.
    """
    check_shards(corpus, config)
    bad = count_unusable(corpus, {})
    if bad > config.max_quarantined * corpus.num_samples:
        raise StageError(too_many_unusable(bad, corpus, config, "their indexes say why"))


def check_shards(corpus: Split, config: LabelConfig) -> None:
    """Refuse names that the labels folder uses otherwise, and damaged shards.

    Raises StageError as `check_damage`, and when a shard has the name of another file of the labels.
    """
    for shard in corpus.shards:
        if f"{shard.name}.parquet" in (QUARANTINE_NAME, VALIDATION_NAME):
            raise StageError(f"{shard.url}: the labels folder has another file of this name; rename the shard")
    check_damage(corpus, config)


def check_damage(corpus: Split, config: LabelConfig) -> None:
    """Raise StageError when more shards are damaged than `label.max_damaged_shards`."""
    damaged = [shard for shard in corpus.flawed if shard.findings.damage]
    if len(damaged) > config.max_damaged_shards:
        raise StageError(
            f"{len(damaged)} of {len(corpus.shards)} shards are cut short or damaged, more than label.max_damaged_shards="
            f"{config.max_damaged_shards}, and what they have lost is not known:{_list_damaged(damaged)}\nFetch or pack them again, or "
            f"remove them from data.unlabeled; label.max_damaged_shards={len(damaged)} labels the images before the damage"
        )


def _list_damaged(damaged: Sequence[Shard]) -> str:
    lines = [f"\n  {shard.url}: {shard.findings.damage} of {shard.bytes}" for shard in damaged[:_EXAMPLES]]
    more = [f"\n  and {len(damaged) - _EXAMPLES} more"] if len(damaged) > _EXAMPLES else []
    return "".join(lines + more)


def known_problems(shard: Shard) -> list[Quarantined]:
    """Samples that the index already marks as unusable; they are quarantined without being read."""
    if not shard.findings.problems:
        return []
    columns = [shard.index().column(name).to_pylist() for name in ("key", "offset", "problem")]
    rows = enumerate(zip(*columns, strict=True))
    return [Quarantined(shard.name, ordinal, *row) for ordinal, row in rows if row[-1]]


def count_unusable(corpus: Split, quarantined: Mapping[str, int]) -> int:
    """Count the images without a label: quarantined in finished shards, marked unusable in the indexes of the others, and strays.

    Args:
        quarantined: number of quarantined images of each finished shard, by name.
    """
    known = sum(shard.findings.problems for shard in corpus.flawed if shard.name not in quarantined)
    return sum(quarantined.values()) + known + sum(shard.findings.stray for shard in corpus.flawed)


def too_many_unusable(bad: int, corpus: Split, config: LabelConfig, where: str) -> str:
    """The error message: the number, where they are listed, and a few examples from the indexes."""
    rows = [s for s in corpus.flawed if s.findings.problems][:_EXAMPLES]
    strays = [s for s in corpus.flawed if s.findings.stray][:_EXAMPLES]
    lines = [f"\n  {s.url}: {s.findings.problems:,} samples, the first: {s.findings.problem}" for s in rows]
    lines += [
        f"\n  {s.url}: {s.findings.stray:,} images that lie beside the image of a sample ({s.findings.ignored_fields}), as the first "
        "dot of a name ends its key; rename the files, or pack their folder with data.pack"
        for s in strays
    ]
    return (
        f"{bad} of {corpus.num_samples} images could not be used, more than label.max_quarantined={config.max_quarantined}; "
        f"{where}: repair the shards or raise the limit{''.join(lines)}"
    )


def report_oddities(corpus: Split) -> None:
    """Print a line each about duplicate or unwritable keys, damaged shards, and images ignored beside another of their sample."""
    odd = [shard for shard in corpus.shards if shard.odd_keys]
    if odd:
        examples = ", ".join(f"{shard.odd_key!r} in {shard.name}.tar" for shard in odd[:_EXAMPLES])
        count = sum(shard.odd_keys for shard in odd)
        print(
            f"label: {count} samples in {len(odd)} shards have keys that occur twice there or could not be written ({examples}); they "
            "are labeled by shard and ordinal"
        )
    if damaged := [shard for shard in corpus.flawed if shard.findings.damage]:
        print(f"label: {len(damaged)} damaged shards are labeled up to the damage:{_list_damaged(damaged)}")
    beside = [shard for shard in corpus.flawed if shard.findings.ignored]
    if beside:
        examples = ", ".join(f"{shard.findings.ignored_fields} in {shard.name}.tar" for shard in beside[:_EXAMPLES])
        count = sum(shard.findings.ignored for shard in beside)
        print(
            f"label: {count:,} images in {len(beside)} shards are not labeled, as they lie beside the image of a sample ({examples})"
        )

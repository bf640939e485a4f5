"""Code for each consumer, as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WEBDATASET = 'dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")'
_HUGGING_FACE = 'dataset = load_dataset("webdataset", data_files=urls, split="train", streaming=True)'
_RAY = "dataset = ray.data.read_parquet(urls)"
_TIMM = 'dataset = timm.data.create_dataset("wds/", root="{url}", split="train", is_training=True)'


def examples(url: str, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(consumer, code) for what is served at `url`; those that need an export's files, for an export alone."""
    shards: Sequence[Mapping[str, Any]] = manifest["shards"]
    if not shards:
        return []
    tar, parquet = f"{url}/{shards[0]['url']}", f"{url}/{shards[0]['labels_url']}"
    query = "?min_confidence=0.8" if manifest["kind"] == "joined" else ""
    every = [
        ("curl", f"curl --remote-name --continue-at - {tar}\ncurl '{url}/manifest.json{query}'"),
        ("PseudoLabels", f'from data.labels import PseudoLabels\n\nlabels = PseudoLabels("{url}")'),
        ("webdataset", f"import webdataset\n\n{_urls(url)}\n{_WEBDATASET}"),
        ("Hugging Face", f"from datasets import load_dataset\n\n{_urls(url)}\n{_HUGGING_FACE}"),
        ("Ray Data", f"import ray\n\n{_urls(url, 'labels_url')}\n{_RAY}"),
        ("DuckDB", f"SELECT label, count(*), avg(confidence) FROM '{parquet}' GROUP BY label ORDER BY label"),
    ]
    if manifest["kind"] == "joined":
        return every
    return [
        *every,
        ("wids", f'import wids\n\ndataset = wids.ShardListDataset("{url}/wids.json")'),
        ("timm", f"import timm\n\n{_TIMM.format(url=url)}"),
    ]


def _urls(url: str, field: str = "url") -> str:
    return (
        "import json, urllib.request\n\n"
        f'manifest = json.load(urllib.request.urlopen("{url}/manifest.json"))\n'
        f'urls = ["{url}/" + shard["{field}"] for shard in manifest["shards"]]'
    )

"""Code for each consumer, as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WEBDATASET = 'dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")'
_HUGGING_FACE = 'dataset = load_dataset("webdataset", data_files=urls, split="train", streaming=True)'
_RAY = "dataset = ray.data.read_parquet(urls)"
_TIMM = 'dataset = timm.data.create_dataset("wds/", root="{url}", split="train", is_training=True)'
_BEARER = '--header "Authorization: Bearer $TOKEN"'  # a shell's: no token is written down
_WITH_TOKEN = """\
import json, os, urllib.request

headers = {{"Authorization": "Bearer " + os.environ["TOKEN"]}}
request = urllib.request.Request("{url}/manifest.json", headers=headers)
manifest = json.load(urllib.request.urlopen(request))
fetch = 'pipe:curl --fail --silent --header "Authorization: Bearer $TOKEN" {url}/'
urls = [fetch + shard["url"] for shard in manifest["shards"]]"""
_OTHERS = "webdataset, Hugging Face, wids, timm, Ray Data and DuckDB read the files that curl has fetched."


def examples(url: str, manifest: Mapping[str, Any], needs_token: bool = False) -> list[tuple[str, str]]:
    """(consumer, code) for what is served at `url`; those that need an export's files, for an export alone.

    Args:
        needs_token: those that can send it, which is in the environment variable TOKEN.
    """
    shards: Sequence[Mapping[str, Any]] = manifest["shards"]
    if not shards:
        return []
    tar, query = f"{url}/{shards[0]['url']}", "?min_confidence=0.8" if manifest["kind"] == "joined" else ""
    if needs_token:
        return _with_token(url, tar, query)
    parquet = f"{url}/{shards[0]['labels_url']}"
    every = [
        ("curl", _curl(url, tar, query)),
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


def _with_token(url: str, tar: str, query: str) -> list[tuple[str, str]]:
    labels = f'labels = PseudoLabels("{url}", token=os.environ["TOKEN"])'
    return [
        ("curl", _curl(url, tar, query, f"{_BEARER} ")),
        ("PseudoLabels", f"import os\n\nfrom data.labels import PseudoLabels\n\n{labels}"),
        ("webdataset", f"import webdataset\n\n{_WITH_TOKEN.format(url=url)}\n{_WEBDATASET}"),
        ("Others", _OTHERS),
    ]


def _curl(url: str, tar: str, query: str, option: str = "") -> str:
    return f"curl {option}--remote-name --continue-at - {tar}\ncurl {option}'{url}/manifest.json{query}'"


def _urls(url: str, field: str = "url") -> str:
    return (
        "import json, urllib.request\n\n"
        f'manifest = json.load(urllib.request.urlopen("{url}/manifest.json"))\n'
        f'urls = ["{url}/" + shard["{field}"] for shard in manifest["shards"]]'
    )

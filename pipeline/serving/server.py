"""stage=serve: pseudo-labels over HTTP, read-only: a run's labels joined to its images while they are sent, or an exported version."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from data import storage
from data.labels.label_files import COPIES_REMEDY
from data.labels.sources.archives import LATEST_NAME
from data.names import check_base_name, read_pointer
from pipeline.core import interrupt
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, done_record, require_done
from pipeline.serving.catalog import Catalog
from pipeline.serving.credentials import check_host, read_token
from pipeline.serving.exported import open_version
from pipeline.serving.joined import JoinedRun
from pipeline.serving.listening import Settings, serve_until
from pipeline.upstream.overlay import open_overlay


def serve(config: Config, layouts: Sequence[Layout]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UsageError: an address that others can reach, without a token; or a token that is none.
        StageError: there is nothing to serve.
        OSError: the address cannot be listened on.
        Interrupted: when it was stopped.
    """
    fields = config.serve
    token = read_token(fields.token_file, os.environ)
    check_host(fields.host, token, fields.open_to_all)
    catalog = open_catalog(config, layouts)
    settings = Settings(fields.host, fields.port, token, fields.open_to_all, fields.max_connections, fields.grace_s)

    def say(words: str) -> None:
        print(f"serve: {catalog.title}: {words}" if words.startswith("http") else f"serve: {words}", flush=True)

    with interrupt.deferred():  # a signal is seen by `pending`, and raised when the block ends
        asyncio.run(serve_until(catalog, settings, interrupt.pending, say))


def open_catalog(config: Config, layouts: Sequence[Layout]) -> Catalog:
    """What serve.source names.

    Raises:
        StageError: it is not done; labels, selection and shards are not of each other.
    """
    if config.serve.source == "run":
        return _joined(config, layouts)
    out = config.export.out or layouts[0].exports
    folder = storage.join(out, _version(out, config.serve.source))
    summary = require_done(folder, "export")["summary"]
    selections = Layout(config.run_dir, summary["generation"]).selections
    selection = check_base_name(summary["selection"], storage.join(folder, "done.json"))
    return open_version(folder, _class_counts(storage.join(selections, selection)))


def _joined(config: Config, layouts: Sequence[Layout]) -> Catalog:
    """The labels of the last generation in which something was selected."""
    layout = next((layout for layout in reversed(layouts) if layout.current_selection()), layouts[0])
    overlay, labels, _ = open_overlay(config, layout)
    title = f"generation {layout.generation}, selection {storage.base_name(overlay.selection_dir)}"
    return JoinedRun(overlay, labels["summary"]["num_classes"], title, _class_counts(overlay.selection_dir))


def _version(out: str, source: str) -> str:
    if source != "latest":
        return source
    pointer = storage.join(out, LATEST_NAME)
    if not storage.exists(pointer):
        raise StageError(f"{out}: no export yet; run stage=export, or serve.source=run needs none")
    return read_pointer(pointer)


def _class_counts(selection: str) -> list[Mapping[str, Any]]:
    """As selection.json has them; none where it is gone."""
    if not storage.exists(storage.join(selection, "selection.json")):
        return []
    content = read_output_json(selection, "selection.json", done_record(selection), COPIES_REMEDY, _Selection)
    return list(content["classes"])


class _Selection(BaseModel):
    """What is shown of `selection.json`."""

    classes: list[dict[str, Any]]

"""The report's sections on how the run came about: digests, commands, configuration, versions."""

from __future__ import annotations

import platform
import re
import shlex
from importlib.metadata import version

from data import storage
from pipeline.pages.html import code, folded, heading, paragraph, section, table
from pipeline.report.facts import Facts, Record
from pipeline.stages import find

_LIBRARIES = ("torch", "torchvision", "timm", "ray", "numpy", "pyarrow", "pillow")


def provenance_section(facts: Facts) -> str:
    """Where everything came from, and how to do it again."""
    settings = facts.settings
    run_dir = str(settings.get("run_dir") or "RUN")
    words = [str(word) for word in settings.get("command_line", [])]
    again = shlex.join(["python", "-m", "pipeline.run", "stage=all", f"run_dir={run_dir}", *words])
    config = f"config={storage.join(run_dir, 'config.yaml')}"
    anew = shlex.join(["python", "-m", "pipeline.run", "stage=all", config, "run_dir=NEW"])
    versions = [["python", platform.python_version()], *([name, version(name)] for name in _LIBRARIES)]
    return section(
        "Provenance",
        table(
            ["stage", "digests (SHA-256, 16 digits) of what it made, and of what it was made from"],
            _digests(facts),
            css="texts",
        ),
        heading("Commands"),
        paragraph("Continue or check this run (config.yaml in its directory holds the rest):", "soft"),
        code(again),
        paragraph("The same run anew, into an empty directory (secrets in URLs have to be filled in again):", "soft"),
        code(anew),
        folded("Versions of the libraries that wrote this report", table(["", "version"], versions)),
        folded("Configuration (config.yaml)", code(facts.written_config)),
    )


def _digests(facts: Facts) -> list[list[str]]:
    """A row per stage: what it made, and from what."""
    rows = []
    for generation in facts.generations:
        number = generation.layout.generation
        for stage, record in generation.records.items():
            if not (find(stage).only_first and number > 1):
                rows.append([f"{stage} {number}" if len(facts.generations) > 1 else stage, _origin(record)])
    return rows


def _origin(record: Record) -> str:
    weights = [entry["sha256"][:16] for file, entry in record["outputs"].items() if file.endswith(".safetensors")]
    fields = record["fingerprint"]["config"]
    words = [f"output {record['digest']}", *(f"weights {digest}" for digest in weights)]
    sources = [f"{name} {_digest(value)}" for name, value in record["fingerprint"]["inputs"].items()]
    sources += [f"{name} {fields[name]}" for name in ("seed", "device", "threads") if name in fields]
    return "; ".join([*words, "from " + ", ".join(sources)])


def _digest(value: str) -> str:
    """A digest as it is; the place of weights trained elsewhere may hold credentials, and config.yaml has it without."""
    return value if re.fullmatch(r"[0-9a-f]{16}|none", value) else "(see the configuration)"

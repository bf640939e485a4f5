"""Section on how the run came about: digests, commands, configuration, versions."""

from __future__ import annotations

import platform
import re
import shlex
from importlib.metadata import version

from data import storage
from pipeline.pages.render import Section
from pipeline.report.facts import Facts, Record
from pipeline.stages import find

_LIBRARIES = ("torch", "torchvision", "timm", "ray", "numpy", "pyarrow", "pillow")


def provenance_section(facts: Facts) -> Section:
    """Show what each stage made, and from what; and how to run it again."""
    settings = facts.settings
    run_dir = str(settings.get("run_dir") or "RUN")
    words = [str(word) for word in settings.get("command_line", [])]
    command = ["python", "-m", "pipeline.run", "stage=all"]
    values = {
        "digests": _digests(facts),
        "command": shlex.join([*command, f"run_dir={run_dir}", *words]),
        "command_anew": shlex.join([*command, f"config={storage.join(run_dir, 'config.yaml')}", "run_dir=NEW"]),
        "versions": [["python", platform.python_version()], *([name, version(name)] for name in _LIBRARIES)],
        "config": facts.written_config,
    }
    return Section("provenance.html", values)


def _digests(facts: Facts) -> list[list[str]]:
    """A row per stage: its output, and what that was made from. A student that became a teacher has one row."""
    return [
        [facts.stage_name(number, stage), _origin(record)]
        for number, records in ((entry.layout.generation, entry.records) for entry in facts.generations)
        for stage, record in records.items()
        if not (find(stage).only_first and number > 1)
    ]


def _origin(record: Record) -> str:
    weights = [entry["sha256"][:16] for file, entry in record["outputs"].items() if file.endswith(".safetensors")]
    fields = record["fingerprint"]["config"]
    words = [f"output {record['digest']}", *(f"weights {digest}" for digest in weights)]
    sources = [f"{name} {_digest(value)}" for name, value in record["fingerprint"]["inputs"].items()]
    sources += [f"{name} {fields[name]}" for name in ("seed", "device", "threads") if name in fields]
    return "; ".join([*words, "from " + ", ".join(sources)])


def _digest(value: str) -> str:
    """Return a digest as it is. The URL of weights trained elsewhere may hold credentials; config.yaml has it without them."""
    return value if re.fullmatch(r"[0-9a-f]{16}|none", value) else "(see the configuration)"

"""The words of a command: which stages, which options, and which overrides of the configuration."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from data import storage
from data.run_names import CONFIG_NAME
from data.settings import UsageError, nearest
from pipeline import stages

USAGE = "python -m pipeline.run stage=STAGE [recipe=NAME] [config=NAME|FILE] [run_dir=DIR] [key=value …]"
OPTIONS_HELP = """\
The same command again continues where it stopped. Further words:
    plan=true     print what would run, and run nothing
    force=true    start the one named stage over and move its output aside; with several generations, in the first that refuses,
                  else in the last that has output
    verify=true   with stage=label: check all digests of a finished run's labels, that no image is lost or labeled twice, and that no
                  shard has changed since (reads the headers of shards, and packed shards whole)
    generations=auto   add generations while the student beats its teacher on the validation images by more than a standard error
    before=1 after=2   with stage=diff: generations, selections as in before=1/9f3a, or exports as in before=v1
    runs=[runs/a,runs/b]   with stage=compare: run directories or patterns (runs=runs/*), each compared with the first; a run_dir=
                  comes before them"""
_OPTIONS = ("runs", "stage", "config", "plan", "force", "verify", "watch", "before", "after")


@dataclass(frozen=True)
class Command:
    """A command that makes sense by itself.

    Attributes:
        text: the command line, for people to repeat.
        stages: names, in the order of the table.
        is_all: they were given as `all`.
        config: name or file of the configuration, None when not given.
        overrides: `key=value` words of the configuration.
        forced: the stage to start over, if any.
        before, after: sides of stage=diff.
        runs: run directories and patterns of stage=compare.
    """

    text: str
    stages: tuple[str, ...]
    config: str | None
    overrides: tuple[str, ...]
    forced: str | None = None
    plan: bool = False
    verify: bool = False
    watch: bool = False
    before: str | None = None
    after: str | None = None
    is_all: bool = False
    runs: tuple[str, ...] = ()

    def compared(self, stage: str) -> tuple[Any, ...]:
        """What a comparison is told to compare."""
        return (self.runs,) if stage == "compare" else (self.before, self.after)

    def with_config(self, config: Any) -> Command:
        """With `stage=all`, the stages that run for this configuration; with `labels_from`, a student's selection too."""
        wanted = {row.name for row in stages.STAGES if self.is_all and row.is_in_all(config)} | {*self.stages}
        if config.labels_from and "student" in wanted:
            wanted.add("select")
        return replace(self, stages=tuple(row.name for row in stages.STAGES if row.name in wanted))


def command_text(words: Sequence[str]) -> str:
    """The command line that has these words."""
    return shlex.join(["python", "-m", "pipeline.run", *words])


def parse_command(words: Sequence[str]) -> Command:
    """Raises UsageError for an unknown stage, and for options that do not go together."""
    pairs = [word.partition("=") for word in words]
    options = {key: value for key, equals, value in pairs if equals and key in _OPTIONS}
    overrides = tuple(word for word, (key, _, _) in zip(words, pairs, strict=True) if key not in options)
    names = _parse_stages(options.get("stage"))
    _require_stage(options, names, "diff", "before= and after= go", "before" in options or "after" in options)
    _require_stage(options, names, "status", "watch=true goes", _flag(options, "watch"))
    _require_stage(options, names, "compare", "runs= goes", "runs" in options)
    runs = _parse_runs(options.get("runs", ""))
    if "compare" in names and not any(word.startswith("run_dir=") for word in overrides):
        if not runs:
            raise UsageError("stage=compare needs runs=[DIR,DIR] or runs='DIR/*': the runs to put side by side")
        overrides += (f"run_dir={_first_run(runs)}",)
    forced, verify = _forced_stage(options), _flag(options, "verify")
    if verify and (options["stage"] != "label" or forced):
        raise UsageError("verify=true goes with stage=label alone, without force=true")
    return Command(
        command_text(words),
        tuple(names),
        options.get("config"),
        overrides,
        forced,
        _flag(options, "plan"),
        verify,
        _flag(options, "watch"),
        options.get("before"),
        options.get("after"),
        options["stage"] == "all",
        runs,
    )


def _parse_runs(text: str) -> tuple[str, ...]:
    """`[runs/a, runs/{b,c}]` → `runs/a`, `runs/{b,c}`."""
    parts = re.findall(r"(?:\{[^}]*\}|[^,{])+", text.strip().removeprefix("[").removesuffix("]"))
    return tuple(part.strip().strip("'\"") for part in parts if part.strip())


def _first_run(runs: Sequence[str]) -> str:
    """The run directory that the first of `runs` names; of a pattern, its first match."""
    with suppress(storage.MissingError):
        return storage.parent(storage.expand(storage.join(runs[0], CONFIG_NAME))[0])
    raise UsageError(f"runs={runs[0]}: no run there ({CONFIG_NAME} is missing); check the path")


def _require_stage(options: dict[str, str], names: Sequence[str], stage: str, words: str, is_given: bool) -> None:
    if is_given and stage not in names:
        raise UsageError(f"{words} with stage={stage}, not with stage={options['stage']}")


def _flag(options: dict[str, str], name: str) -> bool:
    value = options.get(name, "false").lower()
    if value not in ("true", "false"):
        raise UsageError(f"{name}={options[name]}: expected true or false")
    return value == "true"


def _forced_stage(options: dict[str, str]) -> str | None:
    """The stage that force=true starts over: exactly one, so that a word too many does not move days of work aside."""
    if not _flag(options, "force"):
        return None
    if options["stage"] not in stages.names_of("generation", "study"):
        raise UsageError(
            f"force=true with stage={options['stage']}: name the one stage to start over, as in stage=teacher force=true; "
            "the stages after it then say what they need"
        )
    return options["stage"]


def _parse_stages(text: str | None) -> list[str]:
    """Stage names in the order of the table."""
    known = stages.names_of()
    if text is None:
        raise UsageError(f"stage=… is missing; expected all, or some of {', '.join(known)} (--help explains them)")
    given = [row.name for row in stages.STAGES if not row.only_named] if text == "all" else text.split(",")
    for name in given:
        if name not in known:
            raise UsageError(
                f"stage={name}: no such stage; expected all, or some of {', '.join(known)}{nearest(name, known)}"
            )
    wanted = {*given, *(stages.find(name).followed_by for name in given)}
    return [name for name in known if name in wanted]

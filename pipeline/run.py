"""Noisy Student training: turn a mountain of unlabeled images into a better, faster image classifier.

    python -m pipeline.run stage=STAGE [config=NAME|FILE] [run_dir=DIR] [key=value …]

Stages, in order (stage=all runs them; stage=teacher,label runs two):
    teacher    train on the labeled images, or take teacher.weights=FILE
    label      the teacher labels every unlabeled image (on Ray), then selects
    select     choose pseudo-labels again, with another threshold or quota; images are looked at once
    student    train a noised, larger model on labeled and pseudo-labeled images
    evaluate   teacher and student on the test images
    report     write RUN/report.html
    export     pseudo-labels for other projects: WebDataset shards, or labels alone (only when named)
    serve      the same over HTTP, without a copy: labels are joined to the images as they are sent (only when named)
    status     what is done, how far the rest is, what stopped it last (watch=true: until all is done)
    diff       what changed between two generations, selections or exports (before=… after=…; by default the last two)
    ablate     a study, one change a row, several seeds (ablate.study=resnet_rs|weight_decay: of the teacher's recipe;
               noisy_student: of teacher, labels and student)

The same command again continues where it stopped. Further words:
    plan=true     say what would run, and run nothing
    force=true    start the one stage that is named over, its output moved aside; in one generation: the first that refuses,
                  else the last
    verify=true   with stage=label: check a finished run's labels, all digests, nothing lost or twice, and whether shards
                  have changed since it was made (reads their headers, and all of packed ones)
    generations=auto   further rounds while the student beats its teacher on the validation images by more than a standard error
    before=1 after=2   with stage=diff: generations, selections as in before=1/9f3a, or exports as in before=v1
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any

from data import storage
from data.settings import UsageError, nearest
from data.shards.split import open_split
from data.storage.redact import redacted
from pipeline.core import console as output
from pipeline.core import interrupt
from pipeline.core.config import CONFIG_NAME, Loaded, config_names, describe_fields, load
from pipeline.core.layout import Layout
from pipeline.core.lock import run_lock
from pipeline.core.schema import Config
from pipeline.core.stage import (
    StageRefusedError,
    WorkerError,
    add_effort,
    done_record,
    on_acceptance,
    refuse_other_config,
)
from pipeline.core.timing import Clock
from pipeline.evaluation.generations import all_layouts, describe_best, known_layouts, summarize
from pipeline.evaluation.summary import write_summary
from pipeline.planning.status import last_begun, note_stop, print_status, watch_status
from pipeline.upstream.changed_shards import reindex, verify_splits
from pipeline.upstream.labeled_splits import check_splits, splits_to_check
from pipeline.upstream.required_files import require_inputs
from pipeline.upstream.stage_inputs import require_test
from teacher.diff import diff
from teacher.selection.stage import select

OPTIONS = ("stage", "config", "plan", "force", "verify", "watch", "before", "after")


def _later(name: str) -> Callable[..., Any]:
    """A function that is imported when it is called: torch and Ray take seconds and most of a gigabyte, which selection, status and
    comparison do without."""
    return lambda *arguments: resolve_name(name)(*arguments)


STAGES: dict[str, Callable[[Config, Layout, bool], Any]] = {
    "teacher": _later("teacher.train:train_teacher"),
    "label": _later("teacher.labeling.stage:label"),
    "select": select,
    "student": _later("student.train:train_student"),
    "evaluate": _later("pipeline.evaluation.stage:evaluate"),
    "export": _later("pipeline.export.stage:export"),
}
ASKED_FOR = ("export",)  # by name alone: a second copy of the images
ABLATE = "ablate"  # of no generation
FOLLOWED_BY = {"label": ["select"]}  # labels are of no use before something is selected
READERS: dict[str, Callable[[Config, Sequence[Layout]], None]] = {
    "report": _later("pipeline.report.build:write_report"),
    "status": print_status,
    "serve": _later("pipeline.serving.server:serve"),
}
_verify_labels = _later("teacher.labeling.verify:verify_labels")
_decide = _later("pipeline.evaluation.decide:decide")
_print_plan = _later("pipeline.planning.plan:print_plan")
_plan_study = _later("pipeline.studies.stage:plan_study")
_open_study = _later("pipeline.studies.stage:open_study")
_ablate = _later("pipeline.studies.stage:ablate")
_check_unlabeled = _later("teacher.labeling.corpus:check_unlabeled")
_require_beginning = _later("student.warm_start:require_warm_start")


def main(words: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    with output.forgiving():
        return _main(words)


def _main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(
            __doc__,
            "Configurations: " + ", ".join(config_names()),
            "",
            "Fields and defaults:",
            *describe_fields(),
            sep="\n",
        )
        return 0
    try:
        with interrupt.handled():
            run(words)
    except interrupt.Interrupted as stop:
        print(f"\nstopped ({stop}). To continue, the same command again:\n  {_command(words)}", file=sys.stderr)
        return stop.exit_code
    except WorkerError as error:  # a bug, elsewhere: its traceback says where, this process's does not
        print(redacted(str(error)), file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # of the user's or the machine's making; others are bugs: traceback
        advice = "; make room, then the same command continues" if storage.is_out_of_room(error) else ""
        print(f"error: {redacted(str(error))}{advice}", file=sys.stderr)
        return 2
    finally:
        if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
            ray.shutdown()
    return 0


def run(words: Sequence[str]) -> None:
    """Run the stages that the command names, each from what the ones before it committed."""
    options, overrides = _split(words)
    stages = _parse_stages(options.get("stage"))
    loaded = load(options.get("config"), overrides)
    try:
        _run(loaded, options, overrides, stages, _command(words))
    except StageRefusedError as refusal:
        raise StageRefusedError("\n".join([str(refusal), *map(loaded.origin, refusal.fields)])) from None


def _run(loaded: Loaded, options: dict[str, str], overrides: list[str], stages: Sequence[str], command: str) -> None:
    config = loaded.config
    if not config.run_dir:
        raise UsageError("run_dir=DIR is needed: where labels, weights and the report go")
    if storage.is_local(config.run_dir) and storage.local_path(config.run_dir).is_file():
        raise UsageError(f"run_dir={config.run_dir}: a file is there; give a folder")
    if ("before" in options or "after" in options) and "diff" not in stages:
        raise UsageError(f"before= and after= go with stage=diff, not with stage={options['stage']}")
    if _flag(options, "watch") and "status" not in stages:
        raise UsageError(f"watch=true goes with stage=status, not with stage={options['stage']}")
    layouts = known_layouts(config)
    forced = _forced_stage(options)
    if loaded.remembered and any(stage in (*STAGES, ABLATE) for stage in stages):
        print(_describe_remembered(loaded, options["config"]))
    if _flag(options, "plan"):
        _print_plan(config, layouts, stages, forced)
        if ABLATE in stages:
            _plan_study(config, layouts[0])
        return
    if _flag(options, "verify"):
        _verify(config, layouts, options.get("stage"), forced)
        return
    if any(stage in STAGES for stage in stages):
        with run_lock(config.run_dir, command):
            _refuse_early(loaded, layouts, stages, forced)
            with on_acceptance(lambda: loaded.write(overrides)):
                _run_stages(config, layouts, stages, forced)
    if ABLATE in stages:
        with run_lock(config.run_dir, command):
            require_inputs(loaded, [ABLATE])
            if forced == ABLATE:
                reindex(config, layouts[0], ABLATE)
            _open_study(config, layouts[0], forced == ABLATE)  # refuses before config.yaml takes the new values
            loaded.write(overrides)
            _ablate(config, layouts[0], forced == ABLATE)
    for stage in stages:
        if stage == "status" and _flag(options, "watch"):
            watch_status(config)
        elif stage in READERS:
            READERS[stage](config, known_layouts(config))
        elif stage == "diff":
            diff(config, known_layouts(config), options.get("before"), options.get("after"))


def _verify(config: Config, layouts: Sequence[Layout], stage: str | None, forced: str | None) -> None:
    if stage != "label" or forced:
        raise UsageError("verify=true goes with stage=label alone, without force=true")
    with run_lock(config.run_dir, "verify"):
        for layout in layouts:
            if done_record(layout.labels) is not None or layout.generation == 1:
                _verify_labels(config, layout)
        verify_splits(config, layouts)


def _run_stages(config: Config, layouts: Sequence[Layout], stages: Sequence[str], forced: str | None) -> None:
    """`forced` names a stage to start over, in one of `layouts`, the generations that are certain before anything runs."""
    last = last_begun(layouts, forced) if forced else None
    for layout in all_layouts(config):
        if layout.generation > 1 and done_record(layout.teacher) is None:
            print(
                f"generation {layout.generation} begins when generation {layout.generation - 1} has a student (stage=student)"
            )
            return
        for stage in stages:
            if stage == forced:
                forced = None if _run_or_force(config, layout, stage, layout == last) else forced
            elif stage in STAGES:
                _run_stage(config, layout, stage, False)
        goes_on = config.generations != "auto" or _goes_on(config, layout)
        write_summary(config, layout)
        if not goes_on:
            return


def _goes_on(config: Config, layout: Layout) -> bool:
    """generations=auto: decide about the next one, and say why; at the end, say which is the best."""
    if done_record(layout.student) is None:
        return True
    decision = _decide(config, layout)
    print(decision.describe(layout.generation, config.max_generations), flush=True)
    is_last = not decision.goes_on or layout.generation == config.max_generations
    if is_last and (found := summarize(all_layouts(config)[: layout.generation])):
        print(describe_best(found))
    return not is_last


def _run_or_force(config: Config, layout: Layout, stage: str, here: bool) -> bool:
    """Start a stage over, here or where it refuses; returns whether that was done."""
    if not here:
        try:
            _run_stage(config, layout, stage, False)
            return False
        except StageRefusedError as refusal:
            print(refusal)
    _run_stage(config, layout, stage, True)
    return True


def _run_stage(config: Config, layout: Layout, stage: str, force: bool) -> None:
    """Run a stage; time spent in vain counts too, and what stopped it can be read in the run's status."""
    clock = Clock()
    try:
        if force:
            reindex(config, layout, stage)
        STAGES[stage](config, layout, force)
        note_stop(layout.run_dir, stage, None)
    except BaseException as error:
        note_stop(layout.run_dir, stage, error)
        if (folder := _long_stages(layout).get(stage)) is not None:
            with suppress(OSError, storage.StorageError):  # what stopped the stage is what matters
                add_effort(folder, clock)
        raise


def _long_stages(layout: Layout) -> dict[str, str]:
    """Stages with a folder of their own in which work may be half done."""
    teacher = {"teacher": layout.teacher} if layout.generation == 1 else {}
    return teacher | {"label": layout.labels, "student": layout.student}


def _describe_remembered(loaded: Loaded, config: str) -> str:
    """What a run directory remembers and wins with."""
    words, url = "\n  ".join(loaded.remembered.values()), storage.join(redacted(loaded.config.run_dir), CONFIG_NAME)
    return (
        f"remembered in {url}, so that it wins over {config}:\n  {words}\n"
        "To change one, give it again with this command; to have the file's value, remove the line there (command_line)"
    )


def _refuse_early(loaded: Loaded, layouts: Sequence[Layout], stages: Sequence[str], forced: str | None) -> None:
    """Before hours of work, and before config.yaml takes the new values: would a later stage refuse them, or miss a file?"""
    config = loaded.config
    if "evaluate" in stages:
        require_test(config)
    require_inputs(loaded, stages)
    indexes = layouts[0].indexes
    checked = {
        name: open_split(getattr(config.data, name), indexes) for name in splits_to_check(config, layouts, stages)
    }
    for note in check_splits(config, checked):
        print(note)
    if {"teacher", "student"} <= set(stages):
        _require_beginning(config.student, config.teacher.model, config.teacher.model_args)
    for layout in () if forced else layouts:
        for stage, folder in _long_stages(layout).items():
            if stage in stages:
                refuse_other_config(folder, stage, config.stage_fields(stage))
                if done_record(folder) is None:
                    config.require_trainable(stage)
    if {"teacher", "label"} <= set(stages):
        _check_unlabeled(config, layouts[0])


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Words of the command itself, and overrides of the configuration."""
    pairs = [word.partition("=") for word in words]
    options = {key: value for key, equals, value in pairs if equals and key in OPTIONS}
    return options, [word for word, (key, _, _) in zip(words, pairs, strict=True) if key not in options]


def _flag(options: dict[str, str], name: str) -> bool:
    value = options.get(name, "false").lower()
    if value not in ("true", "false"):
        raise UsageError(f"{name}={options[name]}: expected true or false")
    return value == "true"


def _forced_stage(options: dict[str, str]) -> str | None:
    """The stage that force=true starts over: one, named, so that a word too many does not move days of work aside."""
    if not _flag(options, "force"):
        return None
    if options["stage"] not in (*STAGES, ABLATE):
        raise UsageError(
            f"force=true with stage={options['stage']}: name the one stage to start over, as in stage=teacher force=true; "
            "the stages after it then say what they need"
        )
    return options["stage"]


def _parse_stages(text: str | None) -> list[str]:
    """Stage names in the order in which they run."""
    known = [*STAGES, *READERS, "diff", ABLATE]
    if text is None:
        raise UsageError(f"stage=… is missing; expected all, or some of {', '.join(known)} (--help explains them)")
    everything = [*(name for name in STAGES if name not in ASKED_FOR), "report"]
    names = everything if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise UsageError(
                f"stage={name}: no such stage; expected all, or some of {', '.join(known)}{nearest(name, known)}"
            )
    wanted = {step for name in names for step in (name, *FOLLOWED_BY.get(name, ()))}
    return [name for name in known if name in wanted]


def _command(words: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "pipeline.run", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

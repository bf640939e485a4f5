"""Noisy Student training: turn a mountain of unlabeled images into a better, faster image classifier.

`run` is the story of a command: parse its words, load the configuration, refuse early, run the stages of each generation in the order
of the table in pipeline/stages.py, each from what the ones before it committed; then studies, readers and comparisons.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter
from pkgutil import resolve_name
from typing import Any

from data import console, storage
from data.picture_folders import folder_of
from data.settings import UsageError, wants_help
from data.shards.split import open_split
from data.storage.redact import redacted
from pipeline import stages
from pipeline.core import interrupt
from pipeline.core.command import OPTIONS_HELP, USAGE, Command, command_text, parse_command
from pipeline.core.config import CONFIG_NAME, Loaded, config_names, load
from pipeline.core.layout import Layout
from pipeline.core.lock import run_lock
from pipeline.core.model_rules import follow_models
from pipeline.core.recipes.recipe import describe_recipe, recipe_names
from pipeline.core.reference import describe_fields
from pipeline.core.schema import Config
from pipeline.core.stage import (
    StageRefusedError,
    WorkerError,
    done_record,
    on_acceptance,
    record_stopped_run,
    refuse_other_config,
)
from pipeline.core.timing import Clock
from pipeline.evaluation.generations import all_layouts, describe_best, known_layouts, summarize
from pipeline.evaluation.outcome import print_student
from pipeline.evaluation.summary import write_summary
from pipeline.planning.status import last_begun, note_stop, watch_status
from pipeline.upstream.changed_shards import reindex, verify_splits
from pipeline.upstream.labeled_splits import check_splits, splits_to_check
from pipeline.upstream.required_files import require_inputs
from pipeline.upstream.stage_inputs import require_test


def main(words: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    with console.tolerant_output():
        return _main(words)


def _main(words: Sequence[str]) -> int:
    if not words or wants_help(words):
        print_help()
        return 0
    try:
        with interrupt.handled():
            run(words)
    except interrupt.Interrupted as stop:
        print(f"\nstopped ({stop}). To continue, the same command again:\n  {command_text(words)}", file=sys.stderr)
        return stop.exit_code
    except WorkerError as error:  # a bug in a worker: the message is the worker's traceback
        print(redacted(str(error)), file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # the user's or the machine's fault; a bug keeps its traceback
        advice = "; make room, then the same command continues" if storage.is_out_of_room(error) else ""
        print(f"error: {redacted(str(error))}{advice}", file=sys.stderr)
        return 2
    finally:
        if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
            ray.shutdown()
    return 0


def print_help() -> None:
    """Print how a command is written, its stages, its options, and all fields of the configuration."""
    title = (__doc__ or "").partition("\n")[0]
    print(title, "", f"    {USAGE}", "", *stages.describe_stages(), "", OPTIONS_HELP, "", sep="\n")
    print("Recipes: " + ", ".join(recipe_names()))
    print("Configurations: " + ", ".join(config_names()), "", "Fields and defaults:", *describe_fields(), sep="\n")


def run(words: Sequence[str]) -> None:
    """Run the stages that the command names, each from what the ones before it committed."""
    command = parse_command(words)
    loaded = load(command.config, command.overrides)
    try:
        _run(loaded, command.with_config(loaded.config))
    except StageRefusedError as refusal:
        raise StageRefusedError("\n".join([str(refusal), *map(loaded.origin, refusal.fields)])) from None


def _run(loaded: Loaded, command: Command) -> None:
    _require_run_dir(loaded.config.run_dir)
    layouts = known_layouts(loaded.config)
    loaded = _follow_weights(_follow_sizes(_with_shards(loaded, layouts, command), command), command)
    loaded, lines = follow_models(loaded)
    print(*lines, sep="\n", end="\n" * bool(lines))
    config = loaded.config
    of_generation, studies, readers, comparisons = (
        [stage for stage in command.stages if stages.find(stage).kind == kind]
        for kind in ("generation", "study", "reader", "comparison")
    )
    if loaded.remembered and (of_generation or studies):
        print(_describe_remembered(loaded, command.config or ""))
    if command.plan:
        _plan(config, layouts, command)
        return
    if command.verify:
        _verify(config, layouts, command.text)
        return
    if of_generation:
        with run_lock(config.run_dir, command.text):
            _refuse_early(loaded, layouts, command)
            with on_acceptance(lambda: loaded.write(command.overrides)):
                _run_stages(config, layouts, of_generation, command.forced)
    if "evaluate" in of_generation and "report" not in readers:
        _later("pipeline.report.build:print_results", config, known_layouts(config))
    for study in studies:
        _run_study(loaded, layouts[0], study, command)
    for stage in readers:
        if command.watch and stage == "status":
            watch_status(config)
        else:
            stages.function_of(stage)(config, known_layouts(config))
    for stage in comparisons:
        stages.function_of(stage)(config, known_layouts(config), *command.compared(stage))


def _require_run_dir(run_dir: str) -> None:
    if not run_dir:
        raise UsageError("run_dir=DIR is needed: where labels, weights and the report go")
    if storage.is_local(run_dir) and storage.local_path(run_dir).is_file():
        raise UsageError(f"run_dir={run_dir}: a file is there; give a folder")


def _later(name: str, *arguments: Any) -> Any:
    """Import a function that needs torch or Ray, and call it."""
    return resolve_name(name)(*arguments)


def _with_shards(loaded: Loaded, layouts: Sequence[Layout], command: Command) -> Loaded:
    """Name the shards made of folders of images; a command that reads images makes them first, once.

    Packing may take hours, so what can be refused without shards is refused before.
    """
    if not any(folder_of(attrgetter(field)(loaded.config)) for field in stages.SPLIT_FIELDS):
        return loaded
    packed = loaded.with_data(_later("pipeline.upstream.picture_folders:with_shards", loaded.config))
    if not {*command.stages} & {*stages.names_of("generation", "study")}:
        return packed
    _require_named(packed, layouts, command)
    return loaded.with_data(_later("pipeline.upstream.picture_folders:pack_folders", loaded.config))


def _follow_sizes(loaded: Loaded, command: Command) -> Loaded:
    """With recipe=, let its fields follow the sizes of the data, once per run directory; print them, and what changed since."""
    recipe = loaded.recipe
    if recipe is None or not {*command.stages} & {*stages.names_of("generation", "study")}:
        return loaded
    found = _later("pipeline.upstream.recipe_sizes:follow_sizes", loaded, command.stages)
    if found.recipe is not recipe or command.plan:
        print(*describe_recipe(found.recipe, found.config, command.stages), sep="\n")
    return found


def _follow_weights(loaded: Loaded, command: Command) -> Loaded:
    """With teacher.init or student.init, give fields that nobody has set the preprocessing of those weights."""
    trains = set(command.stages) & {"teacher", "student", *stages.names_of("study")}
    if not (trains or {"label", "evaluate"} & set(command.stages)):
        return loaded
    if loaded.config.teacher.init is None and loaded.config.student.init is None:
        return loaded
    try:
        followed, lines = _later("pipeline.inference.follow_weights:follow_weights", loaded)
    except (ValueError, OSError):
        if trains:
            raise
        return loaded  # the weights are gone, and only a count of GPU memory would want them
    print(*lines, sep="\n", end="\n" * bool(lines))
    return followed


def _plan(config: Config, layouts: Sequence[Layout], command: Command) -> None:
    _later("pipeline.planning.plan:print_plan", config, layouts, command.stages, command.forced)
    for stage in command.stages:
        if function := stages.find(stage).plan:
            _later(function, config, layouts[0])


def _verify(config: Config, layouts: Sequence[Layout], text: str) -> None:
    if config.labels_from:
        raise UsageError(
            f"verify=true: the labels are those of labels_from; give run_dir={redacted(config.labels_from)}"
        )
    with run_lock(config.run_dir, text):
        for layout in layouts:
            if done_record(layout.labels) is not None or layout.generation == 1:
                _later("teacher.labeling.verify:verify_labels", config, layout)
        verify_splits(config, layouts)


def _run_study(loaded: Loaded, layout: Layout, study: str, command: Command) -> None:
    config, force = loaded.config, command.forced == study
    with run_lock(config.run_dir, command.text):
        require_inputs(loaded, [study])
        if force:
            reindex(config, layout, study)
        with on_acceptance(lambda: loaded.write(command.overrides)):
            stages.function_of(study)(config, layout, force)


def _run_stages(config: Config, layouts: Sequence[Layout], names: Sequence[str], forced: str | None) -> None:
    """Run the stages `names` of every generation.

    Args:
        layouts: the generations that are certain before anything runs.
        forced: a stage to start over, in one of `layouts`.
    """
    last = last_begun(layouts, forced) if forced else None
    for layout in all_layouts(config):
        if layout.generation > 1 and done_record(layout.teacher) is None:
            print(
                f"generation {layout.generation} begins when generation {layout.generation - 1} has a student (stage=student)"
            )
            return
        for stage in (name for name in names if layout.generation == 1 or not stages.find(name).once):
            if layout.takes(stage):
                print(f"{stage}: taken from {layout.folder_of(stage)}")
            elif stage == forced:
                forced = None if _run_or_force(config, layout, stage, layout == last) else forced
            else:
                _run_stage(config, layout, stage, False)
        goes_on = config.generations != "auto" or _goes_on(config, layout)
        write_summary(config, layout)
        if not goes_on:
            return


def _goes_on(config: Config, layout: Layout) -> bool:
    """generations=auto: decide about the next one, and say why; at the end, say which is the best."""
    if done_record(layout.student) is None:
        return True
    decision = _later("pipeline.evaluation.decide:decide", config, layout)
    print(decision.describe(layout.generation, config.max_generations), flush=True)
    is_last = not decision.goes_on or layout.generation == config.max_generations
    if is_last and (found := summarize(all_layouts(config)[: layout.generation])):
        print(describe_best(found))
    return not is_last


def _run_or_force(config: Config, layout: Layout, stage: str, here: bool) -> bool:
    """With `here`, start the stage over; else run it, and start it over only if it refuses. Return whether it was started over."""
    if not here:
        try:
            _run_stage(config, layout, stage, False)
            return False
        except StageRefusedError as refusal:
            print(refusal)
    _run_stage(config, layout, stage, True)
    return True


def _run_stage(config: Config, layout: Layout, stage: str, force: bool) -> None:
    """Run a stage; record its time and what stopped it, for stage=status."""
    clock = Clock()
    try:
        if force:
            reindex(config, layout, stage)
        stages.function_of(stage)(config, layout, force)
        note_stop(layout.run_dir, stage, None)
        if stage == "student":
            print_student(config, layout)
    except BaseException as error:
        note_stop(layout.run_dir, stage, error)
        if stage in _long_stages(layout):
            with suppress(OSError, storage.StorageError):  # the error that stopped the stage is the one to show
                record_stopped_run(layout.folder_of(stage), clock)
        raise


def _long_stages(layout: Layout) -> list[str]:
    """Stages of this generation whose folder may hold half-done work."""
    return [row.name for row in stages.with_folder(layout.generation) if row.is_long]


def _describe_remembered(loaded: Loaded, config: str) -> str:
    """The words that a run directory remembers and that win over the named file."""
    words, url = "\n  ".join(loaded.remembered.values()), storage.join(redacted(loaded.config.run_dir), CONFIG_NAME)
    return (
        f"remembered in {url}, so that it wins over {config}:\n  {words}\n"
        "To change one, give it again with this command; to have the file's value, remove the line there (command_line)"
    )


def _require_named(loaded: Loaded, layouts: Sequence[Layout], command: Command) -> None:
    """Are the files and models there that the configuration names? Opens no shard."""
    if "evaluate" in command.stages:
        require_test(loaded.config)
    require_inputs(loaded, command.stages)
    if {"teacher", "student"} & set(command.stages):
        _later(
            "pipeline.inference.follow_weights:require_models", loaded.config, layouts, command.stages, command.forced
        )


def _refuse_to_change_source(config: Config, layout: Layout, forced: str | None) -> None:
    """With `labels_from`: raise UsageError when a stage of that run is to start over, or its labels are not done."""
    if not config.labels_from:
        return
    there = redacted(config.labels_from)
    if forced and layout.takes(forced):
        raise UsageError(
            f"stage={forced} force=true: labels_from={there} made it; start it over there, with run_dir={there}"
        )
    if done_record(layout.labels) is None:
        raise UsageError(
            f"labels_from={there}: its labels are not done; finish them there: stage=teacher,label run_dir={there}"
        )


def _refuse_early(loaded: Loaded, layouts: Sequence[Layout], command: Command) -> None:
    """Before hours of work, and before config.yaml takes the new values: would a later stage refuse them, or miss a file?"""
    config, names = loaded.config, command.stages
    _refuse_to_change_source(config, layouts[0], command.forced)
    _require_named(loaded, layouts, command)
    indexes = layouts[0].indexes
    checked = {
        name: open_split(getattr(config.data, name), indexes) for name in splits_to_check(config, layouts, names)
    }
    for note in check_splits(config, checked):
        print(note)
    if {"pretrain", "teacher", "label", "student", "evaluate"} & set(names):
        _later("pipeline.planning.gpu_fit:require_memory", config, layouts, names, checked)
    if {"teacher", "student"} <= set(names):
        _later("student.warm_start:require_warm_start", config.student, config.teacher.model, config.teacher.model_args)
    for layout in () if command.forced else layouts:
        for stage in _long_stages(layout):
            if stage in names:
                folder = layout.folder_of(stage)
                refuse_other_config(folder, stage, config.stage_fields(stage))
                if done_record(folder) is None:
                    config.require_trainable(stage)
    if {"teacher", "label"} <= set(names):
        _later("teacher.labeling.corpus:check_unlabeled", config, layouts[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The README.md of a folder of weights: a model card on how to load them, which pixels they expect, how good they are, and limits.

    python -m pipeline.inference.weights_card weights=RUN/gen-1/student/weights

It is written for people (and Hugging Face, which reads the YAML at its top). No digest covers it, so it can be written again; the
command does so for a run that was finished by an earlier version.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from data import storage
from data.settings import run_command
from pipeline.core.stage import done_record
from pipeline.models.weights import WeightsInfo, load_info
from pipeline.pages.render import MAX_CLASS_ROWS
from pipeline.pages.text import markdown_templates
from pipeline.stages import find

CARD_NAME = "README.md"


def write_weights_card(folder: str, info: WeightsInfo, test: Mapping[str, Any] | None = None) -> None:
    """Write the card of the weights in a folder, unless it is there as it should be.

    Args:
        test: the model's figures in the summary of `evaluate`; None before.
    """
    url, text = storage.join(folder, CARD_NAME), render_weights_card(info, test)
    if storage.read_text_if_there(url) != text:
        storage.write_text(url, text)


def render_weights_card(info: WeightsInfo, test: Mapping[str, Any] | None) -> str:
    """Render the card as Markdown, below the YAML fields that Hugging Face reads."""
    fields, inputs = (info.provenance.get(part, {}) for part in ("config", "inputs"))
    section = next((name.partition(".")[0] for name in fields if name.endswith(".model")), "")
    results = [
        (f"{images} images", value)
        for images, value in (("test", test["top1"] if test else None), ("validation", info.validation_top1))
        if value is not None
    ]
    return (
        markdown_templates("pipeline.inference")
        .get_template("weights_card.md")
        .render(
            info=info,
            test=test,
            results=results,
            inputs=inputs,
            recipe={
                name.removeprefix(f"{section}."): value for name, value in fields.items() if name in _recipe_of(section)
            },
            max_classes=MAX_CLASS_ROWS,
        )
    )


def _recipe_of(section: str) -> list[str]:
    """The fields of a training that a card names; `config.json` has all."""
    names = ("weights", "epochs", "batch_size", "lr", "ema_decay", "dropout", "stochastic_depth", "unlabeled_ratio")
    return [f"{section}.{name}" for name in names]


def write_again(weights: str) -> None:
    """Write the card of finished weights, with the figures of the run that they lie in.

    Raises ModelError as `load_info`.
    """
    write_weights_card(weights, load_info(weights), _test_figures(weights))
    print(storage.join(weights, CARD_NAME))


def _test_figures(weights: str) -> Mapping[str, Any] | None:
    """What the `evaluate` of the same generation found for these very weights; None if nothing."""
    stage = storage.parent(weights.rstrip("/"))
    model = done_record(stage)
    evaluation = done_record(storage.join(storage.parent(stage), find("evaluate").folder))
    if model is None or evaluation is None:
        return None
    inputs: Mapping[str, str] = evaluation["fingerprint"]["inputs"]
    role = next((role for role, digest in inputs.items() if digest == model["digest"]), "")
    figures: Mapping[str, Any] | None = evaluation["summary"].get(role)
    return figures


if __name__ == "__main__":
    sys.exit(run_command(write_again, sys.argv[1:], __doc__ or ""))

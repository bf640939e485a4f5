"""The README.md of a folder of weights: a model card on how to load them, which pixels they expect, how good they are, and limits.

It is written for people (and Hugging Face, which reads the YAML at its top). No digest covers it, so it can be written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data import storage
from pipeline.models.weights import WeightsInfo
from pipeline.pages.render import MAX_CLASS_ROWS
from pipeline.pages.text import markdown_templates

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

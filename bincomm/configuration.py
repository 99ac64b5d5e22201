"""Configurations of runs from keys: those given, before those of a recipe, before the defaults."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bincomm.config import KEYS_OF_METHODS, KEYS_OF_MOVING_TEACHERS, PretrainConfig
from bincomm.data.addresses import is_address, redacted
from bincomm.data.presets import PRESETS
from bincomm.logs import printable_name
from bincomm.parsing import check_keys, recipe_for
from bincomm.recipes import read_recipe


def configure(recipe: str | None = None, **keys: Any) -> PretrainConfig:
    """The configuration of a run: the keys given, before those of a recipe, before the defaults. Without an
    output among them it is runs/RECIPE, or runs/DATA-RECIPE for other data than the recipe's.

    Args:
        recipe: a name in `bincomm.recipes.recipe_names()`, or a YAML file; None: the one that fits the
            images.
        keys: of `PretrainConfig`.

    Raises:
        ValueError: an unknown recipe or key, or a value that does not fit; the message names it. Also for
            minutes along with epochs or max_steps.
        OSError: the recipe cannot be read.
    """
    keys = check_keys(keys)
    recipe = recipe or recipe_for(keys)
    values = check_keys(read_recipe(recipe), f"recipe {recipe}: ")
    if "data" not in keys:
        refuse_addresses(recipe, values.get("data"))
    values = with_keys_of_teacher(values, keys)
    refuse_names_of_weights(recipe, values.get("teacher", ()))
    if keys.get("backbone", values.get("backbone")) != values.get("backbone"):
        values.pop("backbone_args", None)  # those of the recipe's own
    values = with_keys_of_method(values, keys)
    values = with_keys_of_preset(values, keys)
    values = without_other_lengths(values, keys)
    if "batch_size" in keys:
        values.pop("fewest_steps", None)  # it would change the batch
    return PretrainConfig(**{"output": f"runs/{run_name(recipe, values, keys)}", **values, **keys})


def refuse_addresses(recipe: str, data: Any) -> None:
    """Raise ValueError for addresses among a recipe's data: it may be someone else's, such as the config.yaml
    of a run, and only what the user types is fetched."""
    for source in data if isinstance(data, dict) else [data]:
        if isinstance(source, str) and is_address(source):
            shown = printable_name(redacted(source))
            raise ValueError(
                f"data: recipe {recipe} names an address, {shown}, and what a file names is not "
                "fetched; if you want its images, give them yourself (--data)"
            )


def refuse_names_of_weights(recipe: str, teachers: Sequence[str]) -> None:
    """Raise ValueError for weights among a recipe's teachers that are no file here: timm would fetch them,
    and only what the user types is fetched."""
    for weights in teachers:
        if not os.path.exists(os.path.expanduser(weights)):
            shown = printable_name(weights)
            raise ValueError(
                f"teacher: recipe {recipe} names {shown}, which is no file or folder here, and what a file "
                f"names is not fetched; if you want it, give it yourself (--teacher {shown})"
            )


def with_keys_of_teacher(values: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values, without those that a frozen teacher that is given, or its messages, replaces."""
    if not (keys.get("teacher") or keys.get("messages")):
        return values
    if not (values.get("teacher") or values.get("messages")):
        values = {key: value for key, value in values.items() if key not in KEYS_OF_MOVING_TEACHERS}
    # A batch that is halved would be another one than that of the messages.
    left_out = {"teacher", "messages", *(["fewest_steps"] if keys.get("messages") else [])}
    return {key: value for key, value in values.items() if key not in left_out}


def run_name(recipe: str, values: dict[str, Any], keys: dict[str, Any]) -> str:
    """The name of a run that is given none: that of its data, where they are not the recipe's own, and of its
    recipe."""
    name, data = Path(recipe).stem, keys.get("data")
    if data in (None, values.get("data", "digits")):
        return name
    stems = [
        Path(os.path.abspath(source)).name.partition(".")[0]
        for source in ([data] if isinstance(data, str) else data)
    ]
    words = [re.sub(r"\W*\{.*|[^\w.-]+", "_", stem).strip("_-") for stem in stems]
    return "-".join([*filter(None, words), name])


def with_keys_of_method(values: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with what the method brings: before the recipe's, if that is for another method."""
    of_recipe = values.get("method", PretrainConfig.method)
    method = keys.get("method", of_recipe)
    own = KEYS_OF_METHODS[method]
    return {**own, **values} if method == of_recipe else {**values, **own}


def with_keys_of_preset(values: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with those of the preset of augmentations: before the recipe's, but behind them where
    the recipe names the preset itself, as a run's config.yaml does. Where it names another one, its values of
    that one's keys are left out."""
    of_recipe = values.get("augment", PretrainConfig.augment)
    augment = keys.get("augment", of_recipe)
    for name in (of_recipe, augment):
        if name not in PRESETS:  # null, which the types of keys let pass
            raise ValueError(f"augment: expected one of {', '.join(PRESETS)}, got {name}")
    if augment == of_recipe:
        return {**PRESETS[augment], **values}
    return {**without_keys_of_presets(values, of_recipe), **PRESETS[augment]}


def without_keys_of_presets(values: dict[str, Any], *presets: str) -> dict[str, Any]:
    """Values without those of the keys that any of these presets sets; a name that is none sets none."""
    left_out = {key for name, keys in PRESETS.items() if name in presets for key in keys}
    return {key: value for key, value in values.items() if key not in left_out}


def without_other_lengths(values: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values, of which those that determine the length of a run give way to the keys given."""
    given = [key for key in ("epochs", "max_steps") if keys.get(key) is not None]
    by_minutes = keys.get("minutes") is not None
    if by_minutes and given:
        raise ValueError(f"minutes: expected without epochs and max_steps, got also {' and '.join(given)}")
    # With minutes in a recipe, such as a run's config.yaml, its max_steps is what they came to.
    if by_minutes or given == ["epochs"] or (given and values.get("minutes") is not None):
        return {key: value for key, value in values.items() if key not in ("minutes", "max_steps")}
    return values


def configure_comparison(recipe: str | None = None, **keys: Any) -> PretrainConfig:
    """As `configure`, for `bincomm.comparison.compare`: without an output among the keys it is
    runs/compare-DATA-RECIPE, whatever the recipe says.

    Raises:
        ValueError: the key method is given, or as `configure`.
    """
    keys = check_keys(keys)
    if keys.get("method") is not None:
        raise ValueError(
            "method: compare trains several methods; name them in methods, for example bits-reset,dino"
        )
    recipe = recipe or recipe_for(keys)
    values = read_recipe(recipe)
    return configure(recipe, **{"output": f"runs/compare-{run_name(recipe, values, keys)}", **keys})

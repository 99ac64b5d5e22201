"""Configurations of runs from keys: those given, before those of a recipe, before the defaults."""

from pathlib import Path
from typing import Any

from bincomm.config import PretrainConfig
from bincomm.parsing import check_keys
from bincomm.recipes import choose_recipe, read_recipe


def configure(recipe: str | None = None, **keys: Any) -> PretrainConfig:
    """The configuration of a run: the keys given, before those of a recipe, before the defaults.

    Args:
        recipe: a name in `bincomm.recipes.recipe_names()`, or a YAML file; None: the one that fits the
            images.
        keys: of `PretrainConfig`.

    Raises:
        ValueError: an unknown recipe or key, or a value that does not fit; the message names it.
        OSError: the recipe cannot be read.
    """
    keys = check_keys(keys)
    recipe = recipe or choose_recipe(keys.get("data", "digits"))
    values = check_keys(read_recipe(recipe), f"recipe {recipe}: ")
    if keys.get("backbone", values.get("backbone")) != values.get("backbone"):
        values.pop("backbone_args", None)  # those of the recipe's own
    return PretrainConfig(**{"output": f"runs/{Path(recipe).stem}", **values, **keys})


def configure_comparison(recipe: str | None = None, **keys: Any) -> PretrainConfig:
    """As `configure`, for `bincomm.comparison.compare`: without an output among the keys it is
    runs/compare-RECIPE, whatever the recipe says.

    Raises:
        ValueError: the key method is given, or as `configure`.
    """
    keys = check_keys(keys)
    if keys.get("method") is not None:
        raise ValueError(
            "method: compare trains several methods; name them in methods, for example bits-reset,dino"
        )
    recipe = recipe or choose_recipe(keys.get("data", "digits"))
    return configure(recipe, **{"output": f"runs/compare-{Path(recipe).stem}", **keys})

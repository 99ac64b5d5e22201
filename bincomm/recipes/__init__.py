"""Recipes: one YAML file for each kind of run that is known to work well, and the choice among them."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from bincomm.files import expand_home, read_yaml
from bincomm.logs import did_you_mean

SMALL = 64  # pixels: images up to this length of the shorter side are small


def recipe_names() -> list[str]:
    """Names of the recipes that come with bincomm."""
    return sorted(
        f.name.removesuffix(".yaml") for f in files("bincomm.recipes").iterdir() if f.name.endswith(".yaml")
    )


def recipe_path(recipe: str) -> Path:
    """The file of a recipe, given its name or the path of a YAML file."""
    if recipe.endswith((".yaml", ".yml")):
        path = expand_home(recipe)
        if not path.is_file():
            raise ValueError(f"recipe: there is no file {recipe}")
        return path
    names = recipe_names()
    if recipe not in names:
        raise ValueError(
            f"recipe: there is no recipe {recipe!r}{did_you_mean(recipe, names)} Recipes: {', '.join(names)}"
        )
    return Path(str(files("bincomm.recipes") / f"{recipe}.yaml"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """The keys of a recipe, given its name or the path of a YAML file, unchecked.

    Raises:
        ValueError: there is no such recipe, or it holds no keys.
        OSError: it cannot be read.
    """
    path = recipe_path(recipe)
    try:
        keys = read_yaml(path)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"recipe: {path} is no YAML file: {error}") from error
    if not keys:
        raise ValueError(f"recipe: {path} is empty")
    if not isinstance(keys, dict):
        raise ValueError(f"recipe: expected keys and values in {path}, such as epochs: 40, got {keys!r}")
    return keys


def choose_recipe(
    data: str | dict[str, float], channels: int = 3, pixel_range: tuple[float, float] | None = None
) -> str:
    """Name of the recipe that fits images: digits for the digits, else by the size of a few of the images.

    Images of up to 64 pixels get a ResNet, larger ones a small ViT; without a GPU, both get a small network
    that learns something in minutes.
    """
    if data == "digits":
        return "digits"
    import torch

    from bincomm.data.images import UnusableImageError, load, read
    from bincomm.data.sources import open_source
    from bincomm.data.values import decode_values

    images = open_source(data).images
    sizes = []
    for index in range(0, len(images), max(1, len(images) // 16)):
        try:
            if channels == 3 and pixel_range is None:
                sizes.append(min(load(images, index)[1]))
            else:
                sizes.append(min(decode_values(read(images, index), channels, pixel_range).shape[:2]))
        except UnusableImageError:
            continue  # the loader reports it
    small = bool(sizes) and sorted(sizes)[len(sizes) // 2] <= SMALL
    if torch.cuda.is_available():
        return "small_images" if small else "vit_small_in1k"
    return "small_images_cpu" if small else "photos_cpu"

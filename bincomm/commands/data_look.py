"""Draw the crops of the images that a run begins with into a contact sheet, one row per image."""

import argparse
from typing import TYPE_CHECKING

from bincomm.commands.arguments import names, positive, stem
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.data.presets import PRESETS
from bincomm.logs import did_you_mean, printable_name
from bincomm.parsing import add_keys, add_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: "ArgumentParser") -> None:
    """The sheet, and the keys of a run."""
    parser.add_argument("--sheet", default="look.png", metavar="FILE", help="PNG file to write")
    parser.add_argument("--images", type=positive, default=8, metavar="N", help="number of images")
    parser.add_argument(
        "--augment",
        type=names,
        metavar="PRESETS",
        help=f"{', '.join(PRESETS)}, or several of them, or all: an image has a row for each",
    )
    add_recipe(parser)
    add_keys(parser, leave_out=["augment"])


def configuration(options: argparse.Namespace) -> PretrainConfig:
    """The configuration of the run; `options.recipes` becomes the crops of each preset."""
    presets = options.keys.pop("augment", None)
    if presets is None:
        config = configure(options.recipe, **options.keys)
        options.recipes = {config.augment: config.crops}
        return config
    presets = list(PRESETS) if presets == ["all"] else presets
    for name in presets:
        if name not in PRESETS:
            raise ValueError(
                f"augment: expected all or some of {', '.join(PRESETS)}, got {name!r}"
                f"{did_you_mean(name, [*PRESETS, 'all'])}"
            )
    configs = {name: configure(options.recipe, **options.keys, augment=name) for name in presets}
    options.recipes = {name: config.crops for name, config in configs.items()}
    return configs[presets[0]]


def run(options: argparse.Namespace) -> None:
    """Write the sheet, and print the names of its images."""
    from bincomm.data.contact_sheet import contact_sheet, shown
    from bincomm.data.sources import open_source
    from bincomm.files import check_file, write_file

    config = options.config
    path = check_file("sheet", options.sheet)
    sheet, image_names = contact_sheet(
        open_source(config.data), options.recipes, seed=config.seed, images=options.images
    )
    write_file(path, lambda file: sheet.save(file, format="png"))
    print(f"recipe {stem(options.recipe)}, data {config.data}")
    print("\n".join(map(printable_name, image_names)))
    rows = "a row each" if len(options.recipes) == 1 else f"each a row for {', '.join(options.recipes)}"
    channels = shown(config.crops)
    print(f"in {path}, {rows}" + (f"; {channels}" if channels else ""))

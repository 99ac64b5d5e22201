"""Draw the crops of the images that a run begins with into a contact sheet, one row per image."""

import argparse
from typing import TYPE_CHECKING

from bincomm.commands.arguments import positive, stem
from bincomm.logs import printable_name
from bincomm.parsing import add_keys, add_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: "ArgumentParser") -> None:
    """The sheet, and the keys of a run."""
    parser.add_argument("--sheet", default="look.png", metavar="FILE", help="PNG file to write")
    parser.add_argument("--images", type=positive, default=8, metavar="N", help="number of images")
    add_recipe(parser)
    add_keys(parser)


def run(options: argparse.Namespace) -> None:
    """Write the sheet, and print the names of its images."""
    from bincomm.data.contact_sheet import contact_sheet
    from bincomm.data.sources import open_source
    from bincomm.files import check_file, write_file

    config = options.config
    path = check_file("sheet", options.sheet)
    sheet, image_names = contact_sheet(
        open_source(config.data), config.crops, seed=config.seed, images=options.images
    )
    write_file(path, lambda file: sheet.save(file, format="png"))
    print(f"recipe {stem(options.recipe)}, data {config.data}")
    print("\n".join(map(printable_name, image_names)))
    print(f"in {path}, a row each")

"""Measure mean and standard deviation of the channels of images, and write them into a recipe."""

import argparse
from typing import TYPE_CHECKING, Any

from bincomm.commands.arguments import add_pixels, add_source, positive
from bincomm.data.crops import LIMITS, Crops, reading
from bincomm.logs import printable_name
from bincomm.parsing import parse_data, recipe_for
from bincomm.recipes import read_recipe

if TYPE_CHECKING:
    from bincomm.data.statistics import Statistics

UNUSABLE_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images, and the recipe."""
    add_source(parser)
    add_pixels(parser)
    parser.add_argument(
        "--images",
        type=positive,
        default=10_000,
        metavar="N",
        help="images to read at most, spread evenly over the data",
    )
    parser.add_argument("--recipe", help="the recipe that the file begins with; default: the one that fits")
    parser.add_argument(
        "--output", metavar="FILE", help="YAML file for the recipe with what was measured; none: print it"
    )


def run(options: argparse.Namespace) -> None:
    """Measure, and write the recipe."""
    from bincomm.data.sources import open_source
    from bincomm.data.statistics import measure
    from bincomm.files import check_file, write_text

    crops = reading(options.channels, options.pixel_range)
    path = None
    if options.output is not None:
        if not options.output.endswith((".yaml", ".yml")):
            raise ValueError(
                f"output: expected a file that ends in .yaml, as recipes do, got {options.output}"
            )
        path = check_file("output", options.output)
    data = parse_data(options.data)
    source = open_source(data, options.split)
    source.announce()
    unusable: list[tuple[str, str]] = []
    found = measure(
        source,
        crops,
        most=options.images,
        threads=options.threads,
        report=lambda name, reason: unusable.append((name, reason)),
    )
    sample = f"{found.images} of {len(source.images)} images, {found.pixels} pixels"
    print(sample + (f"; {len(unusable)} cannot be used" if unusable else ""))
    for name, reason in unusable[:UNUSABLE_SHOWN]:
        print(f"  {printable_name(name)}: {printable_name(reason)}")
    print("channel      mean       std  smallest   largest   (0 and 1 are the ends of the range)")
    for number, row in enumerate(zip(found.mean, found.std, found.smallest, found.largest, strict=True)):
        print(f"{number + 1:7} " + " ".join(f"{value:9.5f}" for value in row))
    constant = [str(number + 1) for number, std in enumerate(found.std) if std < LIMITS["std"][0]]
    if constant:
        print(f"constant, so that the recipe has 1 as their std: {', '.join(constant)}")
    keys = {"channels": crops.channels, "pixel_range": crops.pixel_range}
    text = recipe(options.recipe or recipe_for({"data": data, **keys}), data, crops, found, sample)
    if path is None:
        print(text, end="")
    else:
        write_text(path, text)
        print(f"in {path}; next: bincomm pretrain --recipe {path}")


def recipe(name: str, data: Any, crops: Crops, found: "Statistics", sample: str) -> str:
    """A recipe, by its name, with the data, and what was measured of them."""
    import yaml

    keys = read_recipe(name) | {
        "data": data,
        "channels": crops.channels,
        "pixel_range": None if crops.pixel_range is None else list(crops.pixel_range),
        "mean": [float(f"{value:.6g}") for value in found.mean],
        "std": [float(f"{value:.6g}") if value >= LIMITS["std"][0] else 1.0 for value in found.std],
    }
    about = f"# The recipe {name}, with mean and std as measured by `bincomm data stats` on {sample}.\n"
    return about + yaml.safe_dump(keys, sort_keys=False, default_flow_style=None, width=120)

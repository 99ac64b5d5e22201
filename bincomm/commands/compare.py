"""Train several methods on the same images, steps and seeds, and measure them alike. The same command goes on
with what is unfinished."""

import argparse
import logging
from typing import TYPE_CHECKING

from bincomm.commands.arguments import names, stem, whole_numbers
from bincomm.config import PretrainConfig, configure_comparison
from bincomm.parsing import add_keys, add_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

logger = logging.getLogger(__name__)

# Written out, for importing bincomm.comparison takes seconds; tests/test_cli.py compares them.
METHODS = "bits-reset, bits-fixed, bits-soft, bits-cosine, simdino, simdino-expa0, dino"
DEFAULT_METHODS = "bits-reset,bits-fixed,simdino,dino"


def add_arguments(parser: "ArgumentParser") -> None:
    """Methods and seeds, and the keys that all runs share."""
    parser.epilog = (
        "The keys hold for every run. Where --reset_every is 0, bits-reset takes 10. Finished runs of other "
        "methods in the folder are in the table, too."
    )
    parser.add_argument(
        "--methods", type=names, metavar="NAMES", help=f"of {METHODS}; default {DEFAULT_METHODS}"
    )
    parser.add_argument(
        "--seeds",
        type=whole_numbers,
        metavar="N,N,...",
        help="a run of each method for each; default --seed",
    )
    parser.add_argument(
        "--prototypes",
        type=int,
        metavar="N",
        help="of dino; default the power of two from a twentieth of the number of images on, at most 65536",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="of the runs and the table; default runs/compare-RECIPE"
    )
    parser.add_argument("--method", help=argparse.SUPPRESS)  # refused with a reason
    add_recipe(parser)
    add_keys(parser, leave_out=("prototypes", "output", "method"))


def configuration(options: argparse.Namespace) -> PretrainConfig:
    """What all runs share."""
    return configure_comparison(options.recipe, **options.keys)


def run(options: argparse.Namespace) -> None:
    """Compare, and print the table."""
    from bincomm.comparison import DEFAULT_METHODS, as_markdown, compare

    config = options.config
    logger.info("recipe %s, data %s, output %s", stem(options.recipe), config.data, config.output)
    methods = options.methods or DEFAULT_METHODS
    table = compare(config, methods, options.seeds, options.keys.get("prototypes"))
    print(f"\n{as_markdown(table)}\nin {config.output}: table.md, table.json, plot.png, and every run")

"""Train several methods on the same images, steps and seeds, and evaluate all in the same way. Run the same
command again to resume what is unfinished."""

import argparse
import logging
from typing import TYPE_CHECKING

from bincomm.commands.arguments import integers, names, stem
from bincomm.config import PretrainConfig
from bincomm.configuration import configure_comparison
from bincomm.parsing import add_keys, add_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

logger = logging.getLogger(__name__)

# Written out, because importing bincomm.comparison takes seconds; tests/test_cli.py compares them.
METHODS = "bits-reset, bits-fixed, bits-soft, bits-cosine, simdino, simdino-expa0, dino"
DEFAULT_METHODS = "bits-reset,bits-fixed,simdino,dino"


def add_arguments(parser: "ArgumentParser") -> None:
    """Methods and seeds, and the keys that all runs share."""
    parser.epilog = (
        "The keys apply to every run, also in place of a method's own: without them, simdino and dino have "
        "clip, min_lr and freeze_last_layer of their own. If --reset_every is 0, bits-reset takes 10, if "
        "auto a tenth of the epochs. The table includes finished runs of other methods in the folder."
    )
    parser.add_argument(
        "--methods",
        type=names,
        metavar="NAMES",
        help=f"methods to train, of {METHODS}; default {DEFAULT_METHODS}",
    )
    parser.add_argument(
        "--seeds",
        type=integers,
        metavar="N,N,...",
        help="each method has a run for each seed; default --seed",
    )
    parser.add_argument(
        "--prototypes",
        type=int,
        metavar="N",
        help="prototypes of dino; default: the smallest power of two of at least a twentieth of the number "
        "of images, at most 65536",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder for the runs and the table; default runs/compare-DATA-RECIPE",
    )
    parser.add_argument("--method", help=argparse.SUPPRESS)  # refused with a reason
    add_recipe(parser)
    add_keys(parser, leave_out=("prototypes", "output", "method"))


def configuration(options: argparse.Namespace) -> PretrainConfig:
    """The configuration that all runs share."""
    return configure_comparison(options.recipe, **options.keys)


def run(options: argparse.Namespace) -> None:
    """Compare, and print the table."""
    from bincomm.comparison import DEFAULT_METHODS, as_markdown, compare

    config = options.config
    logger.info("recipe %s, data %s, output %s", stem(options.recipe), config.data, config.output)
    methods = options.methods or DEFAULT_METHODS
    table = compare(config, methods, options.seeds, options.keys.get("prototypes"), options.keys)
    print(f"\n{as_markdown(table)}\nin {config.output}: table.md, table.json, plot.png, and every run")

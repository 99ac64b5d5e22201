"""Continue to train a pretrained backbone, under a new head, on unlabeled images of another domain."""

import argparse
import logging
from typing import TYPE_CHECKING

from bincomm.config import PretrainConfig
from bincomm.parsing import DATA_HELP, add_keys, add_recipe, read_data

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

logger = logging.getLogger(__name__)


def add_arguments(parser: "ArgumentParser") -> None:
    """The pretrained weights, and the keys of a run."""
    parser.epilog = (
        "Keys that are neither options nor in the recipe are taken from the run that --from names; the "
        "backbone and its mean and std always are."
    )
    parser.add_argument(
        "--from",
        required=True,
        metavar="WEIGHTS",
        help="a run's directory, a .safetensors file, or the name of a timm model with pretrained weights",
    )
    parser.add_argument("--data", required=True, type=read_data, help=DATA_HELP)
    add_recipe(parser, default="adapt")
    parser.add_argument("--init_from", help=argparse.SUPPRESS)  # refused with a reason
    add_keys(parser, leave_out=("data", "init_from"))


def configuration(options: argparse.Namespace) -> PretrainConfig:
    """The configuration of the run."""
    from bincomm.adaptation import configure

    return configure(getattr(options, "from"), options.recipe, **options.keys)


def run(options: argparse.Namespace) -> None:
    """Adapt, and print the result."""
    from bincomm.adaptation import adapt, summary

    config = options.config
    logger.info("from %s, data %s, output %s", config.init_from, config.data, config.output)
    result = adapt(config)
    if result is not None:
        print(summary(result, config.output))

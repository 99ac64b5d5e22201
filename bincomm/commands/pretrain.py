"""Pretrain a backbone on images without labels. Run the same command again to resume an unfinished run."""

import argparse
import logging
from typing import TYPE_CHECKING

from bincomm.commands.arguments import stem
from bincomm.parsing import add_keys, add_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

logger = logging.getLogger(__name__)


def add_arguments(parser: "ArgumentParser") -> None:
    """The keys of a run."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the configuration and the time, memory and disk that the run would take; write nothing",
    )
    add_recipe(parser)
    add_keys(parser)


def run(options: argparse.Namespace) -> None:
    """Pretrain, and print the result."""
    from bincomm.dry_run import describe, dry_run
    from bincomm.evaluation.run import summary
    from bincomm.pretraining import pretrain

    config = options.config
    logger.info("recipe %s, data %s, output %s", stem(options.recipe), config.data, config.output)
    if options.dry_run:
        forecast = dry_run(config)
        if forecast is not None:
            print(describe(forecast))
        return
    result = pretrain(config)
    if result is not None:
        print(summary(result, config.output))

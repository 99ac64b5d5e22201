"""Write what a frozen teacher says of all global crops of a run, to pretrain from with --messages. Run the
same command again to write the files that are missing, also under torchrun."""

import argparse
import logging
from typing import TYPE_CHECKING

from bincomm.config import PretrainConfig
from bincomm.parsing import TEACHER_HELP, add_keys, add_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

logger = logging.getLogger(__name__)


def add_arguments(parser: "ArgumentParser") -> None:
    """The teacher's weights, and the keys of the runs that the messages are for."""
    parser.epilog = (
        "The keys are those of the runs that the messages are for: seed, data, crops, batch_size and bits "
        "must be the same there, --output is the folder of the messages, and a student's keys do not matter."
    )
    parser.add_argument("weights", type=str, nargs="+", metavar="WEIGHTS", help=TEACHER_HELP)
    add_recipe(parser)
    add_keys(parser, leave_out=("teacher", "messages"))


def configuration(options: argparse.Namespace) -> PretrainConfig:
    """The configuration of the runs."""
    from bincomm.messages import configure

    return configure(options.weights, options.recipe, **options.keys)


def run(options: argparse.Namespace) -> None:
    """Encode, and print what was written."""
    from bincomm.messages import summary, write_messages

    config = options.config
    logger.info("teacher %s, data %s, output %s", ", ".join(config.teacher), config.data, config.output)
    written = write_messages(config)
    if written is not None:
        print(summary(written, config.output))

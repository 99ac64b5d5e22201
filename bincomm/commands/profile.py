"""Show where the time of a training step goes, and how well the machine is used."""

import argparse
from typing import TYPE_CHECKING

from bincomm.commands.arguments import positive, stem
from bincomm.parsing import add_keys, add_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: "ArgumentParser") -> None:
    """The number of steps, and the keys of a run."""
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="number of steps to measure")
    add_recipe(parser)
    add_keys(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, and print where the time goes."""
    from bincomm.profiling import describe, profile

    config = options.config
    print(f"recipe {stem(options.recipe)}, data {config.data}, batches of {config.batch_size}", flush=True)
    print(describe(profile(config, options.steps)))

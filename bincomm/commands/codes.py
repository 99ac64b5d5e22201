"""Write a page about a code: what its bits carry, with example images."""

import argparse

from bincomm.commands.arguments import (
    add_split,
    add_weights,
    integers,
    path_or_name,
    preprocessing,
    two_names,
)
from bincomm.parsing import parse_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Weights, images, and the content of the page."""
    add_weights(parser)
    parser.add_argument("--data", required=True, type=path_or_name, help="images, as in `bincomm pretrain`")
    add_split(parser)
    parser.add_argument(
        "--output",
        required=True,
        type=path_or_name,
        metavar="FOLDER",
        help="for codes.html, to be opened in a browser, and codes.json",
    )
    parser.add_argument(
        "--attributes",
        metavar="FILE",
        help="CSV file: its first column names images, the others are attributes",
    )
    parser.add_argument(
        "--classes",
        type=two_names,
        metavar="A,B",
        help="two classes to compare; default: the two most similar",
    )
    parser.add_argument(
        "--bits", type=integers, metavar="N,N,...", help="bits to illustrate; default: the most informative"
    )
    parser.add_argument(
        "--other", metavar="WEIGHTS", help="the same run before or after a reset of its head, to compare with"
    )


def run(options: argparse.Namespace) -> None:
    """Write the page."""
    from bincomm.api import report

    report(
        options.weights,
        parse_data(options.data),
        options.output,
        split=options.split,
        attributes=options.attributes,
        classes=options.classes,
        bits=options.bits,
        other=options.other,
        device=options.device,
        **preprocessing(options),
    )
    print(f"in {options.output}: codes.html, codes.json")

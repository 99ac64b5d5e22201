"""A page about the code: what its bits carry, and images that show it."""

import argparse

from bincomm.commands.arguments import add_weights, path_or_name, shown, two_names, whole_numbers
from bincomm.parsing import parse_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Weights, images, and what the page is to show."""
    add_weights(parser)
    parser.add_argument("--data", required=True, type=path_or_name, help="images, as in `bincomm pretrain`")
    parser.add_argument(
        "--output",
        required=True,
        type=path_or_name,
        metavar="FOLDER",
        help="for codes.html, which a browser opens, and codes.json",
    )
    parser.add_argument(
        "--attributes", metavar="FILE", help="CSV: its first column names images, the others are attributes"
    )
    parser.add_argument(
        "--classes", type=two_names, metavar="A,B", help="to tell apart; without it the two most alike"
    )
    parser.add_argument(
        "--bits", type=whole_numbers, metavar="N,N,...", help="shown with images; without it the most telling"
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
        attributes=options.attributes,
        classes=options.classes,
        bits=options.bits,
        other=options.other,
        device=options.device,
        **shown(options),
    )
    print(f"in {options.output}: codes.html, codes.json")

"""Report what is built, detected and used on this machine."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The form of the report."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> None:
    """Print the report."""
    from bincomm.diagnosis import describe, doctor

    report = doctor()
    print(json.dumps(report, indent=2) if options.json else describe(report))

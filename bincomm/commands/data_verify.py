"""Read and decode every image, and list those that cannot be used, with the reason. The exit status is 1 if
there are such images, or files that were skipped."""

import argparse

from bincomm.commands.arguments import add_pixels, add_source
from bincomm.data.crops import reading
from bincomm.parsing import parse_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images, and the list."""
    add_source(parser)
    add_pixels(parser)
    parser.add_argument("--output", default="unusable.txt", metavar="FILE", help="text file for the list")


def run(options: argparse.Namespace) -> int:
    """Verify, and print how many images cannot be used."""
    from bincomm.data.export import verify, write_unusable
    from bincomm.data.sources import open_source
    from bincomm.files import check_file

    output = check_file("output", options.output)
    source = open_source(parse_data(options.data), options.split)
    source.announce()
    crops = reading(options.channels, options.pixel_range)
    unusable = verify(source, crops, threads=options.threads)
    write_unusable(output, unusable)
    print(f"{len(source.images)} images, {len(unusable)} cannot be used, listed in {output}")
    return 1 if unusable or source.notes else 0

"""Write images into tar shards in WebDataset's layout, in random order."""

import argparse

from bincomm.commands.arguments import add_pixels, add_source, positive
from bincomm.data.crops import reading
from bincomm.logs import printable_name
from bincomm.parsing import parse_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images, and the shards."""
    add_source(parser)
    add_pixels(parser)
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="a new folder for data-00000.tar, ..."
    )
    parser.add_argument(
        "--size", type=positive, default=256, metavar="MIB", help="approximate size of a shard"
    )


def run(options: argparse.Namespace) -> None:
    """Write the shards, and print which images were left out."""
    from bincomm.data.export import write_shards
    from bincomm.data.sources import open_source

    source = open_source(parse_data(options.data), options.split)
    source.announce()
    crops = reading(options.channels, options.pixel_range)
    left_out = write_shards(
        source, options.output, crops, shard_bytes=options.size << 20, threads=options.threads
    )
    for name, reason in left_out:
        print(f"left out: {printable_name(name)}: {printable_name(reason)}")
    print(f"{len(source.images) - len(left_out)} images, {len(left_out)} left out, in {options.output}")

"""Write the codes of images into a folder of Parquet files. Run the same command again to write the files
that are missing, also under torchrun."""

import argparse

from bincomm.commands.arguments import add_split, add_weights, path_or_name, preprocessing
from bincomm.parsing import parse_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Weights, images, and what to write."""
    add_weights(parser)
    parser.add_argument("--data", required=True, type=path_or_name, help="images, as in `bincomm pretrain`")
    add_split(parser)
    parser.add_argument(
        "--output", required=True, type=path_or_name, metavar="FOLDER", help="for part-00000.parquet, ..."
    )
    parser.add_argument("--features", action="store_true", help="also write the backbone's features")
    parser.add_argument("--index", action="store_true", help="also write index.faiss, a flat binary index")


def run(options: argparse.Namespace) -> None:
    """Encode, and print the numbers of codes, bits and files."""
    from bincomm.api import encode

    result = encode(
        options.weights,
        parse_data(options.data),
        options.output,
        split=options.split,
        features=options.features,
        index=options.index,
        device=options.device,
        **preprocessing(options),
    )
    if result is None:
        return
    print(f"{result.codes} codes of {result.bits} bits in {result.parts} files in {options.output}")
    if result.unusable:
        print(f"{len(result.unusable)} images cannot be used, listed in unusable.txt there")
    if options.index:
        print(f"index: {options.output}/index.faiss")

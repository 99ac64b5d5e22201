"""Find the images of an encoded folder whose codes are nearest to that of an image."""

import argparse

from bincomm.commands.arguments import positive
from bincomm.logs import printable_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, the image, and what to write."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of codes, written by `bincomm encode`")
    parser.add_argument("--query", required=True, metavar="IMAGE", help="image file")
    parser.add_argument("--weights", help="weights that gave the codes; default: those that the folder names")
    parser.add_argument("--k", type=positive, default=20, metavar="N", help="number of images")
    parser.add_argument(
        "--root",
        metavar="FOLDER",
        help="images below this folder are shown, others only named; default: the working directory",
    )
    parser.add_argument("--sheet", default="nearest.png", metavar="FILE", help="PNG file to write")


def run(options: argparse.Namespace) -> None:
    """Search, and print distances and names."""
    from bincomm.api import search
    from bincomm.codes.search import MAX_SHOWN

    neighbors = search(
        options.folder,
        options.query,
        options.k,
        weights=options.weights,
        sheet=options.sheet,
        root=options.root,
    )
    print(" bits  image")
    shown = neighbors[: MAX_SHOWN - 1]
    for neighbor in shown:
        label = f"  ({printable_name(neighbor.label)})" if neighbor.label else ""
        print(f"{neighbor.distance:5}  {printable_name(neighbor.path)}{label}")
    if len(shown) < len(neighbors):
        print(f"and {len(neighbors) - len(shown)} more, which bincomm.api.search returns")
    print(f"in {options.sheet}: the query and these")

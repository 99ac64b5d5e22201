"""Write a backbone as an ONNX file, which runs without PyTorch. Before it is written, ONNX Runtime must
compute with it what PyTorch does."""

import argparse

from bincomm.commands.arguments import path_or_name, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Weights, the file, and what is in it."""
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        type=path_or_name,
        help="a run's directory, a checkpoint, a .safetensors file, or a timm model with pretrained weights",
    )
    parser.add_argument("--onnx", required=True, type=path_or_name, metavar="FILE", help="file to write")
    parser.add_argument(
        "--codes", action="store_true", help="the bits of the code are an output, too; needs a head"
    )
    parser.add_argument(
        "--global_size",
        type=positive,
        metavar="PIXELS",
        help="side of the images; default: that of training",
    )
    parser.add_argument(
        "--backbone", help="timm's name of the backbone, for a .safetensors file that does not name it"
    )


def run(options: argparse.Namespace) -> None:
    """Export, and print the shapes and the difference."""
    from bincomm.api import export

    size = {} if options.global_size is None else {"global_size": options.global_size}
    exported = export(
        options.weights, onnx=options.onnx, codes=options.codes, backbone=options.backbone, **size
    )
    outputs = f"features (n, {exported.features})"
    if exported.bits is not None:
        outputs += f", bits (n, {exported.bits})"
    print(f"{options.onnx}: images (n, {exported.channels}, {exported.size}, {exported.size}) -> {outputs}")
    print(f"ONNX Runtime differs from PyTorch by at most {exported.difference:.1g} of the largest feature")

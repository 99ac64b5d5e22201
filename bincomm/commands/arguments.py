"""Arguments that several commands share, and the kinds of values that arguments have."""

import argparse
import json
from pathlib import Path
from typing import Any

SHOWN = ("backbone", "global_size", "eval_crop", "batch_size", "threads")


class HelpFormatter(argparse.HelpFormatter):
    """Help with the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        value, text = action.default, action.help or ""
        if not action.option_strings or value in (None, {}, argparse.SUPPRESS) or value is False:
            return text
        return f"{text.rstrip('.')}; default {value if isinstance(value, str) else json.dumps(value)}"


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """How much a command says of what it does."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="warnings only, and no bars")
    group.add_argument("--verbose", action="store_true", help="also what helps to find an error")


def add_weights(parser: argparse.ArgumentParser, head: bool = True) -> None:
    """Weights, with a head or not, and how images are shown to them; see `shown`."""
    kinds = "a run's directory, or a checkpoint"
    if not head:
        kinds += "; or, without a head, a .safetensors file, or a timm model with pretrained weights"
        parser.add_argument("--backbone", help="timm's name of it, for a .safetensors file that does not say")
    parser.add_argument("weights", metavar="WEIGHTS", type=path_or_name, help=kinds)
    parser.add_argument("--global_size", type=positive, metavar="PIXELS", help="side of the center crop")
    parser.add_argument("--eval_crop", type=float, metavar="SHARE", help="of the resized image's side")
    parser.add_argument("--batch_size", type=positive, metavar="N", help="images at a time, 256 at most")
    parser.add_argument("--threads", type=positive, metavar="N", help="that read images")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU when there is one"
    )


def shown(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_weights` that are given; what is not given is as in training."""
    return {name: value for name in SHOWN if (value := getattr(options, name, None)) is not None}


def add_source(parser: argparse.ArgumentParser) -> None:
    """A source of images that is worked on as a whole."""
    parser.add_argument("--data", required=True, help="images, as in `bincomm pretrain`")
    parser.add_argument("--threads", type=positive, default=4, metavar="N", help="CPU threads")


def path_or_name(text: str) -> str:
    """What is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path or a name, got an empty string")
    return text


# A parser of jsonargparse calls these with what they returned, too.


def positive(value: str | int) -> int:
    """A whole number of at least 1."""
    text = str(value)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def names(value: str | list[str]) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def two_names(text: str) -> tuple[str, str]:
    """Two names with a comma between."""
    pair = names(text)
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"expected two names with a comma between, got {text!r}")
    return pair[0], pair[1]


def whole_numbers(value: str | list[int]) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(number) for number in value.split(",")] if isinstance(value, str) else value
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas between them, such as 0,1,2, got {value!r}"
        ) from error


def stem(recipe: str) -> str:
    """The name of a recipe that may be a file."""
    return Path(recipe).stem

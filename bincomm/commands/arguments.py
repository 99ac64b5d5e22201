"""Arguments that several commands share, and the types of their values."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from bincomm.config import LIMITS

PREPROCESSING = ("global_size", "eval_crop", "batch_size", "threads")


class HelpFormatter(argparse.HelpFormatter):
    """Help with the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        value, text = action.default, action.help or ""
        if not action.option_strings or value in (None, {}, argparse.SUPPRESS) or value is False:
            return text
        return f"{text.rstrip('.')}; default {value if isinstance(value, str) else json.dumps(value)}"


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add the options for how much a command reports."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="warnings only, and no bars")
    group.add_argument("--verbose", action="store_true", help="also details that help to find an error")


def add_weights(parser: argparse.ArgumentParser, head: bool = True) -> None:
    """Add weights, which may lack a head unless `head`, and how images are preprocessed for them."""
    kinds = "a run's directory, or a checkpoint"
    if not head:
        kinds += "; or, without a head, a .safetensors file, or a timm model with pretrained weights"
        parser.add_argument(
            "--backbone", help="timm's name of the backbone, for a .safetensors file that does not name it"
        )
    parser.add_argument("weights", metavar="WEIGHTS", type=path_or_name, help=kinds)
    parser.add_argument("--global_size", type=positive, metavar="PIXELS", help="side of the center crop")
    parser.add_argument(
        "--eval_crop",
        type=number,
        metavar="SHARE",
        help="side of the center crop, as a share of the resized image's side",
    )
    parser.add_argument("--batch_size", type=positive, metavar="N", help="images at a time, 256 at most")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads that read images")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )


def preprocessing(options: argparse.Namespace) -> dict[str, Any]:
    """The preprocessing keys given, which replace those of training."""
    return {name: value for name in PREPROCESSING if (value := getattr(options, name)) is not None}


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add a source of images, and the threads that read them."""
    parser.add_argument("--data", required=True, help="images, as in `bincomm pretrain`")
    add_split(parser)
    parser.add_argument("--threads", type=thread_count, default=4, metavar="N", help="CPU threads")


def add_pixels(parser: argparse.ArgumentParser) -> None:
    """Add how images are read, as the keys of a run say."""
    parser.add_argument("--channels", type=positive, default=3, metavar="N", help="channels of an image")
    parser.add_argument(
        "--pixel_range",
        type=two_numbers,
        metavar="'[LOW, HIGH]'",
        help="values of a pixel that become 0 and 1; none: the full scale of 8 or 16 bits",
    )


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add a choice among the parts of the data."""
    parser.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        default="all",
        help="a part of the data, where it has folders, or shards, of these names or the usual others",
    )


def path_or_name(text: str) -> str:
    """Any text but an empty one, which an unset variable of a shell would give."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path or a name, got an empty string")
    return text


# jsonargparse also calls the following functions with values that they have returned.


def positive(value: str | int, largest: int = 2**31 - 1) -> int:
    """An integer of at least 1."""
    text = str(value)
    if not (re.fullmatch(r"0*[1-9]\d{0,9}", text, re.ASCII) and int(text) <= largest):
        limits = "of at least 1" if largest >= 2**31 - 1 else f"from 1 to {largest}"
        raise argparse.ArgumentTypeError(f"expected an integer {limits}, got {text[:30]!r}")
    return int(text)


def number(text: str) -> float:
    """A number, of which the configuration knows the limits."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, such as 0.875, got {text!r}") from error


def thread_count(value: str) -> int:
    """A number of threads that a process may have, as the key threads of a run."""
    return positive(value, int(LIMITS["threads"][1]))


def names(value: str | list[str]) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def two_names(text: str) -> tuple[str, str]:
    """Two names separated by a comma."""
    pair = names(text)
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"expected two names separated by a comma, got {text!r}")
    return pair[0], pair[1]


def two_numbers(text: str) -> tuple[float, float]:
    """Two numbers in brackets, as the key pixel_range is written."""
    try:
        low, high = map(float, json.loads(text))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected two numbers, such as '[0, 65535]', got {text!r}"
        ) from error
    return low, high


def integers(value: str | list[int]) -> list[int]:
    """Integers separated by commas."""
    try:
        return [int(number) for number in value.split(",")] if isinstance(value, str) else value
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected integers separated by commas, such as 0,1,2, got {value!r}"
        ) from error


def stem(recipe: str) -> str:
    """The name of a recipe, which may be a file."""
    return Path(recipe).stem

"""Keys of a configuration as options of a command line and as values from Python, checked alike.

jsonargparse takes the types from `PretrainConfig`. It is imported only where keys are parsed, so that
`PretrainConfig` and `bincomm doctor` work without it.
"""

import argparse
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from bincomm.backbone_arguments import check_backbone_arguments
from bincomm.config import PretrainConfig
from bincomm.files import parse_yaml
from bincomm.logs import did_you_mean
from bincomm.recipes import choose_recipe, recipe_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

KEYS = {f.name: f.default for f in fields(PretrainConfig)}
DATA_HELP = (
    "images: a folder, tar shards (data-{000..127}.tar), Parquet files, a .txt file of paths, a standard set "
    "(cifar10), or digits; or several with weights, the shares of an epoch's images: "
    '{"photos": 3, "cifar10": 1}'
)
BACKBONE_ARGS_HELP = (
    'further arguments of timm.create_model that describe the network: {"layers": [1, 1, 1, 1]}'
)
TEACHER_HELP = (
    "weights of a teacher that does not move, or of several, which share the bits: runs' directories, "
    ".safetensors files that bincomm wrote, or names of timm models with pretrained weights"
)
EXAMPLES = {
    "teacher": ["runs/large"], "messages": "messages/large",
    "max_steps": 1000, "minutes": 10, "init_from": "resnet18", "backbone_args": {"layers": [1, 1, 1, 1]},
    "pixel_range": [0, 65535], "low_resolution_sizes": [112, 48],
}  # fmt: skip
LIST_EXAMPLE = "--blur='[1, 0.1, 0.5]'"


def key_parser(**options: Any) -> "ArgumentParser":
    """A parser for options with keys."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)


def add_recipe(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the option --recipe; without a default the images decide."""
    names = ", ".join(recipe_names())
    usual = "; default: the one that fits the images" if default is None else ""
    parser.add_argument("--recipe", default=default, help=f"one of {names}, or a YAML file{usual}")


def add_keys(parser: "ArgumentParser", leave_out: Collection[str] = ()) -> None:
    """Make all keys options, except those that a command defines in its own way."""
    if "data" not in leave_out:
        parser.add_argument("--data", type=read_data, default=KEYS["data"], help=DATA_HELP)
    if "backbone_args" not in leave_out:
        parser.add_argument("--backbone_args", type=read_backbone_args, default={}, help=BACKBONE_ARGS_HELP)
    if "teacher" not in leave_out:
        parser.add_argument(
            "--teacher", type=str, nargs="+", default=[], metavar="WEIGHTS", help=TEACHER_HELP
        )
    parser.add_class_arguments(PretrainConfig, skip={"data", "backbone_args", "teacher", *leave_out})


def read_backbone_args(value: Any) -> dict[str, Any]:
    """The key backbone_args from an option, which is text, or from a recipe or Python. jsonargparse's own
    reading would call what a mapping with a class_path names."""
    try:
        value = parse_yaml(value) if isinstance(value, str) else value
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"backbone_args: {error}") from error
    try:
        check_backbone_arguments(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return dict(value)


def read_data(value: Any) -> Any:
    """The key data from an option, which is text, or from a recipe or Python, where it may be a mapping."""
    if isinstance(value, Mapping):
        for name, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise argparse.ArgumentTypeError(
                    f"data: expected a mapping of sources to weights, got {weight!r} for {name}"
                )
        return dict(value)
    try:
        return parse_data(value) if isinstance(value, str) else value
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_data(text: str) -> str | dict[str, float]:
    """The key data from text: a mapping of sources to weights in JSON, or one source, whatever its name.

    Raises:
        ValueError: it begins like a mapping but is not one.
    """
    if not text.startswith("{") or text.endswith((".tar", ".parquet")) or os.path.exists(text):
        return text
    try:
        return {name: float(weight) for name, weight in json.loads(text).items()}
    except (TypeError, ValueError) as error:
        reason = f": {error}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(
            f'data: expected one source or a mapping like {{"photos": 3, "cifar10": 1}}, got {text}{reason}'
        ) from error


def parse_options(parser: "ArgumentParser", arguments: list[str]) -> argparse.Namespace:
    """The options of a command line, with the defaults of those that are not given. The keys of a
    configuration that are given are the dict `keys`; all others are left to the recipe. If no recipe is
    given, `recipe` is the one that fits the images.

    Raises:
        ValueError: an unknown option, a value of another type, or no images.
    """
    for argument in arguments:
        if match := re.match(r"--(\w+)\.(\w+)", argument):
            raise ValueError(
                f"{match[1]}: expected all of it, got a part, {argument}; for example "
                f"--{match[1]}='{{\"{match[2]}\": 1}}'"
            )
    try:
        given = parser.parse_args(arguments, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), options_of(parser))) from error
    own = {name: value for name, value in parser.get_defaults().as_dict().items() if name not in KEYS}
    keys = {name: given.pop(name) for name in KEYS if name in given}
    options = argparse.Namespace(**{**own, **given}, keys=keys)
    options.recipe = options.recipe or recipe_for(keys)
    return options


def recipe_for(keys: Mapping[str, Any]) -> str:
    """Name of the recipe that fits the images that keys name; see `bincomm.recipes.choose_recipe`."""
    return choose_recipe(*(keys.get(key, KEYS[key]) for key in ("data", "channels", "pixel_range")))


def check_keys(keys: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
    """Values of keys as `PretrainConfig` takes them: of the right types, tuples for lists, text for paths.

    Raises:
        ValueError: an unknown key, or a value of another type; the message begins with `origin`.
    """
    for key in keys:
        if key not in KEYS:
            raise ValueError(f"{origin}there is no key {key!r}{did_you_mean(str(key), KEYS)}")
    values = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in keys.items()}
    if "teacher" in values:
        teachers = values["teacher"]
        teachers = [teachers] if isinstance(teachers, str) else teachers
        values["teacher"] = [os.fspath(v) if isinstance(v, os.PathLike) else v for v in teachers or ()]
    try:
        return checking_parser().parse_object(values, defaults=False).as_dict()
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        raise ValueError(origin + explain(str(error))) from error


@cache
def checking_parser() -> "ArgumentParser":
    """A parser of all keys, for values that do not come from a command line."""
    parser = key_parser()
    add_keys(parser)
    return parser


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The options that a parser's help names."""
    return re.findall(r"^ +(--\w+)", parser.format_help(), re.MULTILINE)


def explain(error: str, options: Iterable[str] = ()) -> str:
    """An error of argparse or jsonargparse as one line for the user: what was given, what is expected, and an
    example."""
    if match := re.match(r'Parser key "(\w+)', error):
        key, values = match[1], re.findall(r"(?:Got|Given) value: (.*)", error)
        if key in KEYS and values:
            return f"{key}: expected {expected(key)}, got {values[-1]}; for example {example(key, options)}"
    elif match := re.match(r"unrecognized arguments: ([^\s=]*)", error):
        if match[1].startswith("-"):
            return f"there is no option {match[1]}{did_you_mean(match[1], options)}"
        return f"unexpected {match[1]!r}; lists are written as in {LIST_EXAMPLE}"
    elif match := re.match(r"argument --(\w+): invalid choice: (.*) \(choose from (.*)\)", error):
        return f"{match[1]}: expected one of {match[3]}, got {match[2]}".replace("'", "")
    elif match := re.match(r"argument --(\w+): (.*)", error, re.DOTALL):
        return match[2] if match[2].startswith(f"{match[1]}: ") else f"{match[1]}: {match[2]}"
    elif match := re.match(r"the following arguments are required: (.*)", error):
        missing = (name.strip() for name in match[1].split(","))
        return "expected also " + ", ".join(n if n[0] == "-" or n.isupper() else f"--{n}" for n in missing)
    return error


def expected(key: str) -> str:
    """What kind of value a key takes."""
    return kind(typing.get_type_hints(PretrainConfig)[key])


def kind(hint: Any) -> str:
    """A type in words."""
    simple = {
        int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"
    }  # fmt: skip
    arguments = typing.get_args(hint)
    if hint in simple:
        return simple[hint]
    if typing.get_origin(hint) is tuple:
        if ... not in arguments:
            return f"{len(arguments)} numbers"
        return "a list of texts" if str in arguments else "a list of numbers"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(kind, arguments))
    return "a mapping"


def choices(key: str) -> list[str]:
    """The words that a key takes, none for one that takes any, or numbers alone."""
    hints = [typing.get_type_hints(PretrainConfig)[key]]
    words = ["true", "false"] if bool in hints else []
    while hints:
        hint = hints.pop()
        if typing.get_origin(hint) is Literal:
            words += map(str, typing.get_args(hint))
        elif typing.get_origin(hint) in (typing.Union, types.UnionType):
            hints += typing.get_args(hint)
    return words


def example(key: str, options: Iterable[str]) -> str:
    """A value that a key may have, as an option where there are options."""
    value = in_json(EXAMPLES.get(key, KEYS[key]))
    if not options:
        return f"{key}: {value}"
    return f"--{key}={value}" if value.isalnum() else f"--{key}='{value}'"


def in_json(value: Any) -> str:
    """A value as it is typed on a command line, and as it is written in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)

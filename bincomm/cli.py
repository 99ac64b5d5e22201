"""The command line: `bincomm pretrain | data | doctor`. Everything it does can be called from Python."""

import argparse
import difflib
import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

USAGE = """usage: bincomm COMMAND [OPTIONS]

  pretrain   pretrain a backbone on images without labels, or go on with an unfinished run
  data       look at crops, find images that cannot be used, write tar shards
  doctor     tell what is built, found and used on this machine

`bincomm COMMAND --help` lists a command's options."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 failed, 2 bad arguments, 128 + n ended by signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be of any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    commands = {"pretrain": run_pretrain, "data": run_data, "doctor": run_doctor}
    try:
        return dispatch(arguments, commands, USAGE)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was saved", file=sys.stderr)
        return 128 + signal.SIGINT


def dispatch(
    arguments: list[str], commands: dict[str, Callable[[list[str]], int]], usage: str, of: str = ""
) -> int:
    """Run the command that the arguments begin with; an error about it begins with `of`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        near = difflib.get_close_matches(arguments[0], commands, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return fail(f"{of}there is no command {arguments[0]!r}{hint}")
    return commands[arguments[0]](arguments[1:])


def run_pretrain(arguments: list[str]) -> int:
    """`bincomm pretrain`."""
    try:
        from bincomm.config import parse
        from bincomm.data.loader import TooManyUnusableError
        from bincomm.pretrain import Interrupted, TrainingError, pretrain
    except ImportError as error:
        return fail(f"training needs more packages ({error}): pip install 'bincomm[train]'", status=1)
    try:
        config, recipe = parse(arguments)
    except (ValueError, OSError) as error:
        return fail(str(error))
    print(f"recipe {recipe}, data {config.data}, output {config.output}", flush=True)
    try:
        result = pretrain(config)
    except (TrainingError, TooManyUnusableError, OSError) as error:
        return fail(str(error), status=1)
    except ValueError as error:
        return fail(str(error))
    except Interrupted as error:
        number = signal.Signals(error.args[0])
        print(
            f"\n{number.name}: saved in {config.output}; the same command goes on from here", file=sys.stderr
        )
        return 128 + number
    except KeyboardInterrupt:
        if not (Path(config.output) / "last.ckpt").exists():
            raise
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    print(summary(result, config.output))
    return 0


def summary(result: dict[str, Any], output: str) -> str:
    """What a finished run has to say."""
    metrics, lines = result["last_metrics"], []
    if result["knn"]:
        knn = result["knn"]
        lines.append(
            f"\nk-NN accuracy, k={knn['k']}, {knn['query_images']} queries in {knn['gallery_images']} images"
        )
        names = {
            "teacher": "teacher's backbone",
            "codes": "its codes, Hamming",
            "random_initialisation": "before training",
        }
        for key, name in {**names, "pixels": "raw pixels"}.items():
            lines.append(f"  {name:20} {knn[key]:7.2%}")
        if not knn["queries_held_out"]:
            lines.append("  (the queries' images, not their labels, were seen in training)")
    else:
        lines.append("\nno k-NN: the data has no usable images with labels (folders named after classes)")
    entropy, least = metrics["bit_entropy"], metrics["bit_entropy_min"]
    gain = metrics["bit_agreement"] - metrics["bit_majority"]
    lines.append(
        f"channel: bit entropy {entropy:.3f} (least {least:.3f}), {metrics['dead_bits']:.1%} dead bits,"
    )
    lines.append(
        f"  {metrics['bit_agreement']:.1%} of bits agree, {gain:+.1%} over always sending the commoner value"
    )
    lines.append(
        f"in {output}: backbone.safetensors, curves.png, metrics.jsonl, result.json, config.yaml, last.ckpt"
    )
    return "\n".join(lines)


DATA_USAGE = """usage: bincomm data COMMAND [OPTIONS]

  look     a contact sheet of the crops of a few images, as the network will see them
  verify   find the images of a source that cannot be used, and why
  shard    write the images of a source into tar shards

`bincomm data COMMAND --help` lists a command's options."""


def run_data(arguments: list[str]) -> int:
    """`bincomm data look | verify | shard`."""
    commands = {"look": look, "verify": verify, "shard": shard}
    try:
        return dispatch(arguments, commands, DATA_USAGE, of="data: ")
    except ImportError as error:
        return fail(f"data needs more packages ({error}): pip install 'bincomm[train]'", status=1)
    except ValueError as error:
        return fail(str(error))
    except (RuntimeError, OSError) as error:
        return fail(str(error), status=1)


def look(arguments: list[str]) -> int:
    """`bincomm data look`."""
    from bincomm.config import parse
    from bincomm.data.look import contact_sheet
    from bincomm.data.sources import open_source
    from bincomm.engine.run import write_whole

    parser = argparse.ArgumentParser(
        prog="bincomm data look",
        allow_abbrev=False,
        description="A contact sheet of the crops of the images that a run begins with, a row for an image.",
        epilog="All options of `bincomm pretrain` are options here too: --data, --recipe, --global_scale ...",
    )
    parser.add_argument("--sheet", default="look.png", metavar="FILE", help="PNG to write, default look.png")
    parser.add_argument("--images", type=positive, default=8, metavar="N", help="rows, default 8")
    own, rest = parser.parse_known_args(arguments)
    config, recipe = parse(rest)
    sheet, names = contact_sheet(open_source(config.data), config.crops, seed=config.seed, images=own.images)
    write_whole(Path(own.sheet), lambda file: sheet.save(file, format="png"))
    lines = [f"recipe {recipe}, data {config.data}", *names, f"in {own.sheet}, a row each"]
    print("\n".join(lines))
    return 0


def verify(arguments: list[str]) -> int:
    """`bincomm data verify`; status 1 where images cannot be used, or were not taken."""
    from bincomm.config import parse_data
    from bincomm.data.export import verify, write_unusable
    from bincomm.data.sources import open_source

    parser = data_parser(
        "verify", "Read and decode every image, and list those that cannot be used, with the reason."
    )
    parser.add_argument(
        "--output", default="unusable.txt", metavar="FILE", help="list to write, default unusable.txt"
    )
    options = parser.parse_args(arguments)
    if not Path(options.output).absolute().parent.is_dir():
        raise ValueError(f"output: the folder of {options.output} does not exist")
    source = open_source(parse_data(options.data))
    for note in source.notes:
        print(f"note: {note}")
    unusable = verify(source, threads=options.threads)
    write_unusable(Path(options.output), unusable)
    print(f"{len(source.images)} images, {len(unusable)} cannot be used, listed in {options.output}")
    return 1 if unusable or source.notes else 0


def shard(arguments: list[str]) -> int:
    """`bincomm data shard`."""
    from bincomm.config import parse_data
    from bincomm.data.export import write_shards
    from bincomm.data.sources import open_source

    parser = data_parser("shard", "Write images into tar shards in WebDataset's layout, in random order.")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="a new folder for data-00000.tar, ..."
    )
    parser.add_argument(
        "--size", type=positive, default=256, metavar="MIB", help="of a shard, about, default 256"
    )
    options = parser.parse_args(arguments)
    source = open_source(parse_data(options.data))
    left_out = write_shards(source, options.output, shard_bytes=options.size << 20, threads=options.threads)
    for name, why in left_out:
        print(f"left out: {name}: {why}")
    print(f"{len(source.images) - len(left_out)} images, {len(left_out)} left out, in {options.output}")
    return 0


def data_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Options that verify and shard share."""
    parser = argparse.ArgumentParser(prog=f"bincomm data {name}", description=description, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="as in `bincomm pretrain`")
    parser.add_argument("--threads", type=positive, default=4, metavar="N", help="CPU threads, default 4")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def run_doctor(arguments: list[str]) -> int:
    """`bincomm doctor [--json]`."""
    from bincomm.diagnosis import describe, doctor

    if arguments in (["-h"], ["--help"]):
        print("usage: bincomm doctor [--json]\n\nTell what is built, found and used on this machine.")
        return 0
    if arguments not in ([], ["--json"]):
        return fail(f"doctor: unknown arguments {' '.join(arguments)}; there is --json alone")
    report = doctor()
    print(json.dumps(report, indent=2) if arguments else describe(report))
    return 0


def fail(message: str, status: int = 2) -> int:
    """Print an error and return the exit status."""
    print(f"bincomm: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

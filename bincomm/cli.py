"""The command line: `bincomm pretrain | doctor`. Everything it does can be called from Python."""

import difflib
import json
import signal
import sys
from pathlib import Path
from typing import Any

USAGE = """usage: bincomm COMMAND [OPTIONS]

  pretrain   pretrain a backbone on images without labels, or go on with an unfinished run
  doctor     tell what is built, found and used on this machine

`bincomm COMMAND --help` lists a command's options."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 failed, 2 bad arguments, 128 + n ended by signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"pretrain": run_pretrain, "doctor": run_doctor}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        near = difflib.get_close_matches(arguments[0], commands, n=1)
        return fail(f"there is no command {arguments[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was saved", file=sys.stderr)
        return 128 + signal.SIGINT


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
        lines.append("\nno k-NN: the data has no labels (folders named after classes)")
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

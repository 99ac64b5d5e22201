"""The command line, `bincomm COMMAND`: finds the command, and turns every error into a message and a status.

0: done; 1: failed; 2: wrong arguments or data; SAVED: a signal ended a run once it was saved, and the same
command goes on; 130: interrupted; 141: what read the output ended first.
"""

import argparse
import importlib
import io
import logging
import os
import signal
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from bincomm import __version__, logs
from bincomm.commands.arguments import HelpFormatter, add_verbosity
from bincomm.logs import did_you_mean
from bincomm.parsing import explain, key_parser, options_of, parse_options

logger = logging.getLogger("bincomm.cli")  # also where this is __main__

SAVED = 75  # EX_TEMPFAIL


class Command(NamedTuple):
    """A command, whose module in `bincomm.commands` bears its name."""

    summary: str
    extra: str | None = None  # of the packages that it needs
    keys: bool = False  # whether the keys of a run are options, too
    alone: bool = False  # whether it is for one process
    interrupted: str | None = None  # what an interruption leaves


COMMANDS = {
    "pretrain": Command(
        "pretrain a backbone on images without labels, or go on with an unfinished run", "train", keys=True
    ),
    "adapt": Command(
        "go on training a pretrained backbone on unlabeled images of another domain", "train", keys=True
    ),
    "compare": Command(
        "train several methods with the same budget, and put them into one table",
        "train",
        keys=True,
        alone=True,
    ),
    "evaluate": Command("measure what was pretrained on labeled images", "eval"),
    "encode": Command(
        "write the codes of images into a folder",
        "eval",
        interrupted="the same command goes on with the files that are missing",
    ),
    "search": Command("the images of such a folder nearest to one", "eval", alone=True),
    "codes": Command("a page about what the bits mean", "eval", alone=True),
    "profile": Command("where the time of a training step goes", "train", keys=True, alone=True),
    "data look": Command(
        "a contact sheet of the crops of a few images, as the network will see them", "train", keys=True
    ),
    "data verify": Command("find the images of a source that cannot be used, and why", "train"),
    "data shard": Command("write the images of a source into tar shards", "train"),
    "doctor": Command("tell what is built, found and used on this machine"),
}


@dataclass
class Call:
    """A command, and how far it has come."""

    name: str = ""
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    configured: bool = False  # whether its arguments were right, so that what follows is its work

    @property
    def command(self) -> Command:
        """What is known of the command."""
        return COMMANDS.get(self.name, Command(""))


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are like all others of a command."""

    def error(self, message: str) -> NoReturn:
        """Print an error once for all ranks, and end."""
        sys.exit(fail(explain(message, options_of(self)), once=True))


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be of any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    call = Call()
    try:
        status = run(call, sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        status = status_of(error, call)
    if "torch.distributed" in sys.modules and ranks() > 1:
        # DistributedDataParallel keeps threads of the process group alive, with which the interpreter takes
        # long to end, or aborts, although its work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def run(call: Call, arguments: list[str]) -> int:
    """Find the command that the arguments begin with, parse the others, and run it."""
    if arguments[:1] == ["--version"]:
        print(f"bincomm {__version__}")
        return 0
    words = 2 if arguments[:1] == ["data"] else 1
    name, group = " ".join(arguments[:words]), "data " if words == 2 else ""
    if len(arguments) < words or arguments[words - 1] in ("-h", "--help"):
        print(usage(group))
        return 0 if len(arguments) == words else 2
    if name not in COMMANDS:
        names = [other.removeprefix(group).split()[0] for other in COMMANDS if other.startswith(group)]
        word = arguments[words - 1]
        raise ValueError(f"{group.replace(' ', ': ')}there is no command {word!r}{did_you_mean(word, names)}")
    call.name = name
    if call.command.alone and ranks() > 1:
        raise ValueError(f"{name}: expected one process; start it without torchrun")
    module = importlib.import_module(f"bincomm.commands.{name.replace(' ', '_')}")
    options = call.options = parse(call, module, arguments[words:])
    level = logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO
    with logs.showing(level):
        try:
            if call.command.keys:
                options.config = configuration(module, options)
            call.configured = True
            return module.run(options) or 0
        except Exception:
            logger.debug("%s ended early", name, exc_info=True)
            raise


def parse(call: Call, module: ModuleType, arguments: list[str]) -> argparse.Namespace:
    """A command's options; with the keys of a run, see `bincomm.parsing.parse_options`."""
    about: dict[str, Any] = {
        "prog": f"bincomm {call.name}",
        "description": " ".join(str(module.__doc__).split()),
        "formatter_class": HelpFormatter,
    }
    if call.command.keys:
        with_keys = key_parser(usage=f"bincomm {call.name} [OPTIONS]", **about)
        add_verbosity(with_keys)
        module.add_arguments(with_keys)
        return parse_options(with_keys, arguments)
    parser = CommandParser(allow_abbrev=False, **about)
    add_verbosity(parser)
    module.add_arguments(parser)
    return parser.parse_args(arguments)


def configuration(module: ModuleType, options: argparse.Namespace) -> Any:
    """The configuration of a command with the keys of a run, which may have a way of its own."""
    from bincomm.config import configure

    if hasattr(module, "configuration"):
        return module.configuration(options)
    return configure(options.recipe, **options.keys)


def usage(group: str = "") -> str:
    """The commands, or those of a group."""
    lines = {name: command.summary for name, command in COMMANDS.items() if name.startswith(group)}
    if not group:
        lines = {name: summary for name, summary in lines.items() if not name.startswith("data ")}
        lines["data"] = "look at crops, find images that cannot be used, write tar shards"
        lines["doctor"] = lines.pop("doctor")  # the last
    return "\n".join(
        [
            f"usage: bincomm {group}COMMAND [OPTIONS]\n",
            *(f"  {name.removeprefix(group):10} {summary}" for name, summary in lines.items()),
            f"\n`bincomm {group}COMMAND --help` lists a command's options.",
        ]
    )


def status_of(error: BaseException, call: Call) -> int:
    """Put an error into words on standard error; returns the exit status.

    Errors that all ranks meet alike, those in the arguments, are printed by the first rank alone. Errors that
    are not expected are raised again, with their traceback.
    """
    from torch import OutOfMemoryError

    from bincomm.distributed.ranks import FirstRankError
    from bincomm.engine.signals import Interrupted

    command = call.command
    if isinstance(error, KeyboardInterrupt):
        print(f"\ninterrupted; {interruption_outcome(call)}", file=sys.stderr)
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):  # what reads the output, head for example, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, FirstRankError):  # rank 0 prints what it was
        return 1
    if isinstance(error, Interrupted):
        if rank() == 0:
            name, output = signal.Signals(error.args[0]).name, call.options.config.output
            print(f"\n{name}: saved in {output}; the same command goes on from here", file=sys.stderr)
        return SAVED
    if isinstance(error, ImportError) and command.extra:
        packages = f"pip install 'bincomm[{command.extra}]'"
        return fail(f"{call.name} needs more packages ({error}): {packages}", status=1)
    if isinstance(error, ValueError) or (isinstance(error, OSError) and not call.configured):
        return fail(str(error), once=not (call.configured and command.keys))
    own = isinstance(error, RuntimeError) and type(error).__module__.startswith("bincomm.")
    if own or isinstance(error, (OSError, OutOfMemoryError)):
        return fail(str(error), status=1)
    if ranks() == 1:
        raise error
    traceback.print_exception(error)
    return 1


def interruption_outcome(call: Call) -> str:
    """What an interruption leaves."""
    if call.configured and call.command.interrupted:
        return call.command.interrupted
    trains = call.configured and call.command.keys
    if trains and any(Path(call.options.config.output).glob("**/checkpoints/*.ckpt")):
        return "the same command goes on from the last checkpoint"
    return "nothing was saved"


def fail(message: str, status: int = 2, once: bool = False) -> int:
    """Print an error, `once` of all ranks that meet it, and return the exit status."""
    where = f"rank {rank()}: " if rank() else ""
    if not (once and rank()):
        print(f"bincomm: error: {where}{message}", file=sys.stderr, flush=True)
    return status


def rank() -> int:
    """This process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    sys.exit(main())

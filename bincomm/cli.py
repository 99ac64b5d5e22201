"""The command line, `bincomm COMMAND`: finds the command, and turns every error into a message and a status.

Exit statuses: 0: done; 1: failed; 2: wrong arguments or data; 75 (SAVED): a signal ended a run after it was
saved, and the same command resumes it; 130: interrupted, or 128 and the number of another signal; 141: broken
pipe (the reader closed it).
"""

import argparse
import importlib
import io
import logging
import os
import re
import signal
import sys
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from bincomm import __version__, logs
from bincomm.backbone_arguments import backbone_names
from bincomm.commands.arguments import HelpFormatter, add_verbosity
from bincomm.configuration import configure
from bincomm.interruption import interruptible
from bincomm.logs import did_you_mean, printable_name, tell
from bincomm.memory import check_limit, is_out_of_memory
from bincomm.parsing import KEYS, choices, explain, key_parser, options_of, parse_options
from bincomm.recipes import recipe_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser as KeyParser

logger = logging.getLogger("bincomm.cli")  # also where this is __main__

SAVED = 75  # EX_TEMPFAIL of sysexits.h
# Errors by their modules, which are not imported here: a bare install lacks some, and others take seconds.
FIRST_RANK_ERROR = {"bincomm.distributed.ranks": "FirstRankError"}
INTERRUPTED = {"bincomm.engine.signals": "Interrupted"}
# Those whose message says all that the user needs.
RUN_ERRORS = {
    "bincomm.engine.guard": "TrainingError",
    "bincomm.data.loader": "TooManyUnusableError",
    "bincomm.data.remote": "UnreachableError",
    "torch": "OutOfMemoryError",
}


class Command(NamedTuple):
    """A command; the module of the same name in `bincomm.commands` carries it out.

    Attributes:
        summary: its line in the list of commands.
        extra: the extra of the package, `bincomm[extra]`, without which it cannot run; None: it always can.
        takes_run_keys: whether it configures a run: its options then include the keys of `PretrainConfig`.
        single_process: whether it refuses to run under torchrun with several processes.
        on_interrupt: what Ctrl-C leaves and how to continue, for a command without the keys of a run.
    """

    summary: str
    extra: str | None = None
    takes_run_keys: bool = False
    single_process: bool = False
    on_interrupt: str | None = None


COMMANDS = {
    "pretrain": Command(
        "pretrain a backbone on images without labels, or resume an unfinished run",
        "train",
        takes_run_keys=True,
    ),
    "adapt": Command(
        "continue to train a pretrained backbone on unlabeled images of another domain",
        "train",
        takes_run_keys=True,
    ),
    "messages": Command(
        "write a frozen teacher's messages of all crops of a run, to pretrain from",
        "train",
        takes_run_keys=True,
        on_interrupt="run the same command again to write the files that are missing",
    ),
    "compare": Command(
        "train several methods with the same budget, and compare them in a table",
        "train",
        takes_run_keys=True,
        single_process=True,
    ),
    "evaluate": Command("evaluate a pretrained backbone on labeled images", "eval"),
    "encode": Command(
        "write the codes of images into a folder",
        "eval",
        on_interrupt="run the same command again to write the files that are missing",
    ),
    "search": Command(
        "find the images of such a folder that are nearest to an image", "eval", single_process=True
    ),
    "codes": Command("write a page about what the bits mean", "eval", single_process=True),
    "export": Command("write a backbone as an ONNX file", "export", single_process=True),
    "profile": Command(
        "show where the time of a training step goes", "train", takes_run_keys=True, single_process=True
    ),
    "data look": Command(
        "draw the crops of a few images, as the network will see them",
        "train",
        takes_run_keys=True,
        single_process=True,
    ),
    "data verify": Command(
        "list the images of a source that cannot be used, and why", "train", single_process=True
    ),
    "data stats": Command(
        "measure mean and deviation of the channels of images, and write a recipe with them",
        "train",
        single_process=True,
    ),
    "data shard": Command("write the images of a source into tar shards", "train", single_process=True),
    "doctor": Command("report what is built, detected and used on this machine"),
}


@dataclass
class Call:
    """A call of a command, and its progress."""

    name: str = ""  # empty until the command is found
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    configured: bool = False  # whether all arguments were valid, so that later errors are those of its work

    @property
    def command(self) -> Command:
        """The command that is called; an empty one until it is found."""
        return COMMANDS.get(self.name, Command(""))


class CommandParser(argparse.ArgumentParser):
    """A parser that reports its errors as all other errors of a command are reported."""

    def error(self, message: str) -> NoReturn:
        """Print an error once for all ranks, and exit."""
        sys.exit(fail(explain(message, options_of(self)), once=True))


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: else the next file opened takes its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may contain any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("MPLBACKEND", "").startswith("module://"):
        # That of a notebook whose shell runs this. Matplotlib refuses one that this environment lacks, and
        # commands draw into files only.
        del os.environ["MPLBACKEND"]
    if "_ARGCOMPLETE" in os.environ:
        complete()
    call = Call()
    # Several processes have a launcher that ends them, and may wait for each other where no handler runs.
    with interruptible() if ranks() == 1 else nullcontext():
        try:
            status = run(call, sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            status = status_of(error, call)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # on a full disk; Python must not try again at exit, for that changes the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "torch.distributed" in sys.modules and ranks() > 1:
        # DistributedDataParallel keeps threads of the process group alive. With them the interpreter takes
        # long to exit, or aborts, although its work is done.
        os._exit(status)
    return status


def run(call: Call, arguments: list[str]) -> int:
    """Find the command that the arguments begin with, parse the other arguments, and run it."""
    arguments = [expand_argument(argument) for argument in arguments]
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
    if call.command.single_process and ranks() > 1:
        raise ValueError(f"{name}: expected one process; start it without torchrun")
    if call.command.extra:
        check_limit()
    module, parser, given = module_of(name), create_parser(name), arguments[words:]
    options = parser.parse_args(given) if isinstance(parser, CommandParser) else parse_options(parser, given)
    call.options = options
    level = logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO
    with logs.showing(level):
        try:
            if call.command.takes_run_keys:
                options.config = configuration(module, options)
            call.configured = True
            return module.run(options) or 0
        except Exception:
            logger.debug("%s ended early", name, exc_info=True)
            raise


def expand_argument(argument: str) -> str:
    """An argument with the home directory in place of ~/ at the start of its value, as `--output=~/x` has it:
    shells expand it in words of its own only."""
    option, equals, value = argument.partition("=")
    if equals and re.fullmatch(r"--\w+", option) and value.startswith("~/"):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(argument) if argument.startswith("~/") else argument


def module_of(name: str) -> ModuleType:
    """The module that carries out a command."""
    return importlib.import_module(f"bincomm.commands.{name.replace(' ', '_')}")


def create_parser(name: str) -> "CommandParser | KeyParser":
    """The parser of a command's options; for a command with the keys of a run see
    `bincomm.parsing.parse_options`."""
    module = module_of(name)
    about: dict[str, Any] = {
        "prog": f"bincomm {name}",
        "description": " ".join(str(module.__doc__).split()),
        "formatter_class": HelpFormatter,
    }
    parser: CommandParser | KeyParser
    if COMMANDS[name].takes_run_keys:
        parser = key_parser(usage=f"bincomm {name} [OPTIONS]", **about)
    else:
        parser = CommandParser(allow_abbrev=False, **about)
    add_verbosity(parser)
    module.add_arguments(parser)
    return parser


def complete() -> NoReturn:
    """Answer a shell that completes a command line, by the protocol of argcomplete: the line is in COMP_LINE,
    the answer goes to file descriptor 8. Where there is none, the shell offers files."""
    import argcomplete

    line, start = os.environ["COMP_LINE"], int(os.environ["_ARGCOMPLETE"])  # the words that call bincomm
    words = argcomplete.split_line(line, int(os.environ["COMP_POINT"]))[3][start:]  # before the cursor's
    group = "data " if words[:1] == ["data"] else ""
    count = 2 if group else 1
    if (name := " ".join(words[:count])) in COMMANDS:
        os.environ["_ARGCOMPLETE"] = str(start + count)
        parser = create_parser(name)
        for action in parser._actions:
            if action.dest in (*KEYS, "recipe"):
                action.completer = lambda key=action.dest, **_: values_of(key)  # type: ignore[attr-defined]
        if not isinstance(parser, CommandParser):
            parser.parse_args([])  # jsonargparse calls argcomplete itself
    else:
        os.environ["_ARGCOMPLETE"] = str(start + count - 1)
        parser = CommandParser()
        commands = parser.add_subparsers()
        for each, summary in summaries(group).items():
            commands.add_parser(each, help=summary)
    argcomplete.autocomplete(parser)
    sys.exit(1)  # not reached: autocomplete ends the process


def values_of(key: str) -> list[str]:
    """Values that a shell offers for a key, or for --recipe."""
    names = {"recipe": recipe_names, "backbone": backbone_names}
    return names[key]() if key in names else choices(key)


def configuration(module: ModuleType, options: argparse.Namespace) -> Any:
    """The configuration of a command with the keys of a run; its module may have a function for that."""
    if hasattr(module, "configuration"):
        return module.configuration(options)
    return configure(options.recipe, **options.keys)


def summaries(group: str = "") -> dict[str, str]:
    """The commands, or those of a group, and what each does."""
    lines = {name: command.summary for name, command in COMMANDS.items() if name.startswith(group)}
    if not group:
        lines = {name: summary for name, summary in lines.items() if not name.startswith("data ")}
        lines["data"] = "draw crops, list unusable images, measure means, write tar shards"
        lines["doctor"] = lines.pop("doctor")  # at the end
    return {name.removeprefix(group): summary for name, summary in lines.items()}


def usage(group: str = "") -> str:
    """The list of all commands, or of those of a group."""
    return "\n".join(
        [
            f"usage: bincomm {group}COMMAND [OPTIONS]\n",
            *(f"  {name:10} {summary}" for name, summary in summaries(group).items()),
            f"\n`bincomm {group}COMMAND --help` lists a command's options.",
        ]
    )


def status_of(error: BaseException, call: Call) -> int:
    """Print an error on standard error, and return the exit status.

    Unexpected errors are raised again, with their traceback; under torchrun the traceback is printed.
    """
    command = call.command
    if isinstance(error, KeyboardInterrupt):
        tell(f"\ninterrupted; {interruption_outcome(call)}")
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    if isinstance(error, BrokenPipeError):
        # The reader of the output, `head` for example, closed the pipe: Python must not write to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, imported(FIRST_RANK_ERROR)):  # rank 0 prints its error itself
        return 1
    if isinstance(error, imported(INTERRUPTED)):
        if rank() == 0:
            name, output = signal.Signals(error.args[0]).name, call.options.config.output
            tell(f"\n{name}: saved in {output}; run the same command again to resume")
        return SAVED
    if is_out_of_memory(error):
        logger.debug("too little memory", exc_info=error)
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        smaller = "lower batch_size, global_size or threads"
        if command.takes_run_keys:
            smaller += ", raise accumulate (by which batch_size must be divisible)"
        return fail(f"memory: most likely there is too little ({reason}); {smaller}, or free some", status=1)
    if isinstance(error, ImportError) and command.extra:
        packages = f"pip install 'bincomm[{command.extra}]'"
        return fail(f"{call.name} needs more packages ({error}): {packages}", status=1)
    if isinstance(error, ValueError) or (isinstance(error, OSError) and not call.configured):
        # All ranks meet the same error in the arguments, so the first rank prints it for all. During a run
        # each rank works with its own device and images, so an error may be that of one rank alone, and every
        # rank prints its own.
        during_run = call.configured and command.takes_run_keys
        return fail(printable_name(str(error)), once=not during_run)
    if isinstance(error, OSError):
        return fail(printable_name(str(error)), status=1)
    if isinstance(error, imported(RUN_ERRORS)):
        return fail(str(error), status=1)
    if ranks() == 1:
        raise error
    traceback.print_exception(error)
    return 1


def imported(errors: dict[str, str]) -> tuple[type[Exception], ...]:
    """The classes of errors whose modules are imported; the others cannot have been raised."""
    classes = (getattr(sys.modules.get(module), name, None) for module, name in errors.items())
    return tuple(each for each in classes if each is not None)


def interruption_outcome(call: Call) -> str:
    """What an interruption leaves, and how to continue."""
    if call.configured and call.command.on_interrupt:
        return call.command.on_interrupt
    during_run = call.configured and call.command.takes_run_keys
    if during_run and any(Path(call.options.config.output).glob("**/checkpoints/*.ckpt")):
        return "run the same command again to resume from the last checkpoint"
    return "nothing was saved"


def fail(message: str, status: int = 2, once: bool = False) -> int:
    """Print an error, `once` by the first rank alone, and return the exit status."""
    where = f"rank {rank()}: " if rank() else ""
    if not (once and rank()):
        tell(f"bincomm: error: {where}{message}")
    return status


def rank() -> int:
    """The rank of this process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    """The number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    sys.exit(main())

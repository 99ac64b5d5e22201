"""Messages on the terminal: every module has a logger of its name, and commands show what it logs.

Progress, notes and warnings go to standard error, above any bar; results go to standard output. From Python
nothing is shown but warnings until `logging` is set up, by `bincomm.logs.show()` or in any other way.
"""

import difflib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

ROOT = logging.getLogger("bincomm")
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class TerminalHandler(logging.Handler):
    """Writes to standard error, above the bars of tqdm, what the terminal can show."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; its rank stands before it where it is not the first one's."""
        try:
            rank = int(os.environ.get("RANK", 0))
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            text = f"{f'rank {rank}: ' if rank else ''}{level}{self.format(record)}"
            tqdm = sys.modules.get("tqdm")  # without it there are no bars
            write = print if tqdm is None else tqdm.tqdm.write
            write(printable(text), file=sys.stderr)
        except OSError:  # its disk is full, or its terminal or reader gone: that ends no work
            pass
        except Exception:
            self.handleError(record)


def only_first_rank(record: logging.LogRecord) -> bool:
    """Whether a record is to be shown: those of other ranks only where they are logged with
    `extra={"every_rank": True}`, for all ranks log the same."""
    return int(os.environ.get("RANK", 0)) == 0 or getattr(record, "every_rank", False)


def show(level: int = logging.INFO) -> None:
    """Show on the terminal what bincomm logs from a level on, and bars if that is INFO or lower."""
    handler = TerminalHandler()
    handler.addFilter(only_first_rank)
    ROOT.handlers = [handler]
    ROOT.setLevel(level)
    ROOT.propagate = False


@contextmanager
def showing(level: int) -> Iterator[None]:
    """As `show`, and at the end as it was before."""
    handlers, level_before, propagate = ROOT.handlers, ROOT.level, ROOT.propagate
    show(level)
    try:
        yield
    finally:
        ROOT.handlers, ROOT.propagate = handlers, propagate
        ROOT.setLevel(level_before)


def progress_bar(**options: Any) -> "tqdm":
    """A bar of tqdm on standard error, where that is a terminal, unless only warnings are to be shown."""
    from tqdm import tqdm

    hidden = options.pop("disable", False) or ROOT.level > logging.INFO
    return tqdm(dynamic_ncols=True, disable=True if hidden else None, **options)


def tell(text: str) -> None:
    """Print on standard error, if it takes it."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text that the terminal takes and shows, for names of files may be of any bytes: a control character,
    which could move its cursor or set its title, becomes its number. Lines and tabs stay."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return text.translate(CONTROLS).encode(encoding, "backslashreplace").decode(encoding)


def printable_name(name: str) -> str:
    """As `printable`, in one line, so that no part of a name looks like a line of ours."""
    return printable(name).replace("\n", "\\n")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one there is; empty where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""

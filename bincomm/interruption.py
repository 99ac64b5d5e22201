"""Signals by which a shell, a user or a scheduler ends a process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# A closed terminal or lost connection; Slurm's --signal, SGE's and LSF's warnings; a limit of processor time.
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def interrupt(number: int, frame: Any) -> NoReturn:
    """A handler: end as after Ctrl-C, so that unfinished files are removed; the argument is the number."""
    raise KeyboardInterrupt(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the signals of `ENDING` interrupt, but for those that are ignored, as under nohup, or handled."""
    in_main = threading.current_thread() is threading.main_thread()  # no other thread may
    changed = [number for number in ENDING if in_main and signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in changed:
            signal.signal(number, interrupt)
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)

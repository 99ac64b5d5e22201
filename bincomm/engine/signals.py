"""Signals that end a run where it can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bincomm.engine.checkpoints import Checkpoints
from bincomm.interruption import ENDING, interrupt


class Interrupted(Exception):
    """A signal ended the run, and its last step is saved; the signal's number is the argument."""


class Signals:
    """While this context is open, SIGINT and the signals of schedulers and closed terminals end the run where
    it can be resumed. One that is ignored stays so, as SIGHUP under nohup; and so does a handler of the
    program around, but for those of SIGINT and SIGTERM.

    Inside `deferred()` they are only remembered, and a second SIGINT interrupts at once. Outside they raise:
    `Interrupted` where the run has a checkpoint, because nothing is lost then, else KeyboardInterrupt.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: Path):
        self.checkpoints = Checkpoints(run / "checkpoints", keep=1)
        self.received: int | None = None  # the number of the last signal
        self._defer = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other thread may
            for number in (signal.SIGINT, *ENDING):
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, interrupt) or (
                    number in (signal.SIGINT, signal.SIGTERM) and before is not signal.SIG_IGN
                ):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # else it was not set from Python
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Remember signals for the end of the step."""
        self._defer = True
        try:
            yield
        finally:
            self._defer = False

    def _handle(self, number: int, frame: Any) -> None:
        again = self.received is not None
        self.received = number
        if self._defer and not (again and number == signal.SIGINT):
            return
        if not self._defer and self.checkpoints.steps():
            raise Interrupted(number)
        raise KeyboardInterrupt(number)

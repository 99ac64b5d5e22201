"""Python processes that begin at once: forked from one that has imported what they need.

Importing torch, timm and DALI takes a processor some four seconds, and the tests start dozens of processes.
"""

import multiprocessing
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection

FORKS = multiprocessing.get_context("forkserver")
# Imports alone: a thread or a device opened before the fork would be missing after it.
FORKS.set_forkserver_preload(["bincomm.commands.pretrain", "bincomm.pretraining"])

COMMAND = "import sys; from bincomm.cli import main; sys.exit(main())"  # as `python -m bincomm.cli`


class ForkedProcess:
    """`python -c program arguments...`, with what tests use of `subprocess.Popen`.

    What it prints as errors is in `stdout` too.
    """

    def __init__(self, program: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        reader, writer = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_run, args=(program, arguments, dict(environment), writer))
        self._process.start()
        writer.close()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._reading.start()

    def _read(self, reader: Connection) -> None:
        with open(os.dup(reader.fileno())) as text:
            for line in text:
                self._lines.put(line)
        reader.close()
        self._lines.put("")

    def _next_line(self) -> str:
        line = self._lines.get()
        if not line:
            self._lines.put("")  # for whoever reads on
        return line

    @property
    def stdout(self) -> Iterator[str]:
        return iter(self._next_line, "")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._reading.join(timeout)
        self.wait(timeout)
        return "".join(self.stdout), None

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(program: str, arguments: list[str], environment: dict[str, str], writer: Connection) -> None:
    import quick_runs  # noqa: F401  # in a process that is forked: the first one does not find tests

    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    writer.close()
    # As the interpreter opens them where the output is a pipe.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "-c", "exec"), {"__name__": "__main__"})

"""Signs of life between the ranks, so that none waits for one that is gone."""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from bincomm.distributed.rendezvous import first_line

BEAT_SECONDS = 2.0  # seconds between two signs of life of a rank
SILENCE_SECONDS = 20.0  # seconds without any after which a rank counts as gone
LEFT = "left"  # what a rank that has ended in order writes in place of its count


class SilenceTimer:
    """For how long a value has stayed the same, not counting time in which this process stood still."""

    def __init__(self) -> None:
        self.value: Any = None
        self.changed = self.checked = time.monotonic()

    def seconds(self, value: Any) -> float:
        """Seconds without a change of `value`; to be called every BEAT_SECONDS."""
        now = time.monotonic()
        # If this process was stopped and continued, so were the others.
        if value != self.value or now - self.checked > 3 * BEAT_SECONDS:
            self.value, self.changed = value, now
        self.checked = now
        return now - self.changed


class Heartbeat:
    """Tells the other ranks that this one lives, and ends this process when one of them is gone.

    Every rank watches its neighbor; the first to miss one tells all. Without this a rank that waits inside a
    collective operation would wait for one that was killed until that operation's own limit, half an hour.

    Args:
        rank, world: this process among the others.
        name: of the rendezvous, as `rendezvous` returns it.
    """

    def __init__(self, rank: int, world: int, name: str):
        # A connection of its own, because the main thread may be waiting on the other one.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=SILENCE_SECONDS),
        )
        self.store = dist.PrefixStore(f"bincomm/{name}/heartbeat", store)
        self.rank, self.world = rank, world
        self.failure = ""  # of this rank
        self.beats = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._live, name="bincomm-heartbeat", daemon=True)
        self.thread.start()
        threading.Thread(target=self._watch_store, name="bincomm-heartbeat-watch", daemon=True).start()

    def stop(self, failure: str = "") -> None:
        """Stop watching; a failure is told to the other ranks, which end too."""
        self.failure = failure
        self.ended.set()
        # Only that thread waits for the store, and forever where the store's machine has vanished.
        self.thread.join(SILENCE_SECONDS + BEAT_SECONDS)

    def _live(self) -> None:
        reason = ""
        try:
            reason = self._beat()
            if reason:
                self._print_end(reason)
            self._leave(reason or self.failure)
        except RuntimeError as error:
            if not reason and not self.ended.is_set():
                gone = "the meeting point of the ranks is gone, with rank 0 or its launcher"
                reason = f"{gone} ({first_line(error)})"
                self._print_end(reason)
        if reason:
            os._exit(1)  # the main thread may be inside an operation that never returns

    def _beat(self) -> str:
        """Beat until this rank ends by itself; returns why it must end, if it must."""
        neighbor = str((self.rank + 1) % self.world)
        silence = SilenceTimer()
        while not self.ended.wait(BEAT_SECONDS):
            self.store.set(str(self.rank), str(self.beats))
            if self.store.check(["failure"]):
                reason = self.store.get("failure").decode()
                return "" if self.ended.is_set() else reason
            beat = self.store.get(neighbor).decode() if self.store.check([neighbor]) else ""
            if silence.seconds(beat) > SILENCE_SECONDS and beat != LEFT:
                return f"rank {neighbor} is gone: no sign of life for {SILENCE_SECONDS:.0f} seconds"
            self.beats += 1
        return ""

    def _leave(self, failure: str) -> None:
        """Say that this rank leaves, and stay while others need it."""
        if failure:
            self.store.compare_set("failure", "", failure)  # only the first: others follow from it
        self.store.set(str(self.rank), LEFT)
        self.store.add("number that left", 1)
        # With rank 0 the store may go. After a failure every rank stays: the others would report its broken
        # connections instead of the reason.
        stay = 2 * BEAT_SECONDS if failure else SILENCE_SECONDS if self.rank == 0 else 0
        until = time.monotonic() + stay
        while time.monotonic() < until and self.store.add("number that left", 0) < self.world:
            time.sleep(0.1)

    def _watch_store(self) -> None:
        """End this process where the other thread waits for a store whose machine has vanished."""
        silence = SilenceTimer()
        while not self.ended.wait(BEAT_SECONDS):
            if silence.seconds(self.beats) > SILENCE_SECONDS and not self.ended.is_set():
                self._print_end(
                    f"the meeting point of the ranks answers no more, for {SILENCE_SECONDS:.0f} seconds"
                )
                os._exit(1)

    def _print_end(self, reason: str) -> None:
        # Not by logging: this process ends at once, and every rank has its own reason.
        text = f"bincomm: error: rank {self.rank} ends, because {reason}"
        with contextlib.suppress(OSError):  # on a full disk
            print(text, file=sys.stderr, flush=True)

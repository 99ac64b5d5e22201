"""Signs of life between the ranks, so that none waits for one that is gone."""

import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from bincomm.distributed.rendezvous import first_line

BEAT_SECONDS = 2.0  # seconds between two signs of life of a rank
SILENCE_SECONDS = 20.0  # seconds without any after which a rank counts as gone
LEFT = b"left"  # in place of a count of beats


class SilenceTimer:
    """For how long a value has been the same, not counting time in which this process itself stood still."""

    def __init__(self):
        self.value: Any = None
        self.since = self.looked = time.monotonic()

    def seconds(self, value: Any) -> float:
        """To be called every BEAT_SECONDS seconds."""
        now = time.monotonic()
        if (
            value != self.value or now - self.looked > 3 * BEAT_SECONDS
        ):  # stopped, and continued: so were the others
            self.value, self.since = value, now
        self.looked = now
        return now - self.since


class Heartbeat:
    """Tells the other ranks that this one lives, and ends this process when one of them is gone.

    Every rank watches its neighbor; the first to miss one tells all. Without this a rank that waits inside a
    collective operation would wait for one that was killed until that operation's own limit, half an hour.
    """

    def __init__(self, rank: int, world: int, name: str):
        # A connection of its own, for one that the main thread waits on is not to be had meanwhile.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=SILENCE_SECONDS),
        )
        self.store = dist.PrefixStore(f"bincomm/{name}/pulse", store)
        self.rank, self.world = rank, world
        self.failure = ""  # of this rank
        self.rounds = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._live, name="bincomm-pulse", daemon=True)
        self.thread.start()
        threading.Thread(target=self._watch, name="bincomm-pulse-watch", daemon=True).start()

    def stop(self, failure: str = "") -> None:
        """End the watch; a failure is told to the other ranks, which end too."""
        self.failure = failure
        self.ended.set()
        # All that waits for the store is in that thread, and for ever where the store's machine vanished.
        self.thread.join(SILENCE_SECONDS + BEAT_SECONDS)

    def _live(self) -> None:
        why = ""
        try:
            why = self._beat()
            if why:
                self._say(why)
            self._part(why or self.failure)
        except RuntimeError as error:
            if not why and not self.ended.is_set():
                gone = "the meeting point of the ranks is gone, with rank 0 or its launcher"
                why = f"{gone} ({first_line(error)})"
                self._say(why)
        if why:
            os._exit(1)  # the main thread may be inside an operation that never returns

    def _beat(self) -> str:
        """Until this rank ends by itself; or returns why it must."""
        neighbor = str((self.rank + 1) % self.world)
        quiet = SilenceTimer()
        while not self.ended.wait(BEAT_SECONDS):
            self.store.set(str(self.rank), str(self.rounds))
            if self.store.check(["failure"]):
                why = self.store.get("failure").decode()
                return "" if self.ended.is_set() else why
            heard = self.store.get(neighbor) if self.store.check([neighbor]) else b""
            if quiet.seconds(heard) > SILENCE_SECONDS and heard != LEFT:
                return f"rank {neighbor} is gone: no sign of life for {SILENCE_SECONDS:.0f} seconds"
            self.rounds += 1
        return ""

    def _part(self, failure: str) -> None:
        """Say that this rank leaves, and stay while others need it."""
        if failure:
            self.store.compare_set("failure", "", failure)  # the first alone: others follow from it
        self.store.set(str(self.rank), LEFT)
        self.store.add("number that left", 1)
        # With rank 0 the store may go. After a failure every rank stays, for with its connections broken the
        # others would meet, and report, that instead of the reason.
        stay = 2 * BEAT_SECONDS if failure else SILENCE_SECONDS if self.rank == 0 else 0
        until = time.monotonic() + stay
        while time.monotonic() < until and self.store.add("number that left", 0) < self.world:
            time.sleep(0.1)

    def _watch(self) -> None:
        """End this process where the other thread waits for a store whose machine vanished."""
        quiet = SilenceTimer()
        while not self.ended.wait(BEAT_SECONDS):
            if quiet.seconds(self.rounds) > SILENCE_SECONDS and not self.ended.is_set():
                self._say(
                    f"the meeting point of the ranks answers no more, for {SILENCE_SECONDS:.0f} seconds"
                )
                os._exit(1)

    def _say(self, why: str) -> None:
        print(f"bincomm: error: rank {self.rank} ends, for {why}", flush=True)

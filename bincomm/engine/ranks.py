"""The processes of a job: which one this is, what they do together, and that none waits for a lost one."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")

BEAT = 2.0  # seconds between two signs of life of a rank
SILENCE = 20.0  # seconds without any after which a rank counts as gone
MEETING = 300.0  # seconds in which all ranks must have started: imports over a network differ by minutes
SLOW = timedelta(minutes=30)  # that ranks wait for one that lives: it may be listing images, or compiling
LEFT = b"left"  # in place of a count of beats


class ToldByAnotherRank(Exception):
    """An error that rank 0 met for all of them, and that it tells."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job; a process on its own is rank 0 of 1."""

    rank: int
    world: int
    local_rank: int  # among those on this machine
    device: torch.device
    leave: Callable[[], None] = lambda: None  # leave the others: from here on nothing is done together

    def first(self, function: Callable[[], T]) -> T:
        """What a function returns on rank 0, which alone calls it, on all ranks.

        Raises:
            ToldByAnotherRank: on the others, where it raises on rank 0.
        """
        if self.world == 1:
            return function()
        outcome: list[Any] = [None, None]  # whether it returned, and what, or the text of the error
        error = None
        if self.rank == 0:
            try:
                outcome = [True, function()]
            except Exception as caught:
                error, outcome = caught, [False, str(caught)]
        dist.broadcast_object_list(outcome)
        if error is not None:
            raise error
        returned, value = outcome
        if not returned:
            raise ToldByAnotherRank(value)
        return value

    def leaders_first(self, function: Callable[[], T]) -> T:
        """Call a function on all ranks, on the first of every machine before the others: what it fetches or
        lists is then in that machine's cache."""
        leads = self.local_rank == 0
        found = function() if leads else None
        if self.world > 1:
            dist.barrier()
        return found if leads else function()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on all of them."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun, or another launcher that sets its variables, made; every rank
    takes the GPU of its number on its machine. While the group exists no rank outlives another by much.

    Args:
        device: "auto" (a GPU where there is one), "cuda" or "cpu".

    Raises:
        ValueError: there is no GPU for this rank, or the launcher's variables are incomplete.
        OSError: the ranks did not all come to their meeting point.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank, _take_device(device, local_rank))
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks(0, 1, 0, _take_device(device, local_rank))
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"ranks: WORLD_SIZE is set, but {', '.join(missing)} is not; start with torchrun")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, name = meet(rank, world)  # the store may live in rank 0: it is held here, to the very end
    pulse = Pulse(rank, world, name)

    def leave() -> None:
        if not pulse.ended.is_set():
            pulse.stop()
            if dist.is_initialized():
                dist.destroy_process_group()

    try:
        chosen = _take_device(device, local_rank)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        # Under the meeting's name, for a launcher that starts the ranks again may keep its store, and in it
        # the addresses of the last time.
        meeting = dist.PrefixStore(f"bincomm/{name}/group", store)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=world, timeout=SLOW)
        yield Ranks(rank, world, local_rank, chosen, leave)
    except BaseException as error:
        if not pulse.ended.is_set():  # else it has left, and what happens to it is nothing to the others
            pulse.stop(f"rank {rank} ended: {error or type(error).__name__}")
        if isinstance(error, ToldByAnotherRank):
            # torchrun ends all ranks once one has ended, and rank 0 is to have told it by then.
            time.sleep(BEAT)
        raise
    leave()


def meet(rank: int, world: int) -> tuple[dist.Store, str]:
    """Wait for all ranks at the address that the launcher gave; returns the store there and a name for this
    meeting, the same on all ranks.

    The store may be of a launcher that started these ranks before, on some machines more often than on
    others, so nothing in it tells what is of this time. Rank 0 writes down a new name, the others answer
    under whatever name they find until rank 0 has welcomed them: each by a name of its own, which no earlier
    rank 0 can have known.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    limit = timedelta(seconds=MEETING)
    own, deadline = uuid4().hex, time.monotonic() + MEETING
    if not hosts:
        _await_host(address, port, deadline)
    try:
        tcp = dist.TCPStore(address, port, is_master=hosts, timeout=limit, wait_for_workers=False)
        store = dist.PrefixStore("bincomm/meeting", tcp)
        if rank == 0:
            store.set("name", own)
            answers = [f"{own}/{other}" for other in range(1, world)]
            while not store.check(answers):
                if time.monotonic() > deadline:
                    absent = [key.rpartition("/")[2] for key in answers if not store.check([key])]
                    raise TimeoutError(
                        f"ranks: rank {', '.join(absent)} of {world} did not start: {MEETING:.0f} s"
                    )
                time.sleep(0.1)
            for answer in answers:
                store.set(f"{store.get(answer).decode()}/welcome", own)
            name = own
        else:
            while not store.check([f"{own}/welcome"]):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"ranks: not all of {world} were at {address}:{port} in {MEETING:.0f} s"
                    )
                if store.check(["name"]):
                    store.set(f"{store.get('name').decode()}/{rank}", own)
                time.sleep(0.1)
            name = store.get(f"{own}/welcome").decode()
    except RuntimeError as error:
        raise ConnectionError(f"ranks: cannot meet at {address}:{port}: {_first_line(error)}") from error
    tcp.set_timeout(SLOW)  # NCCL's ranks find each other through it in their first collective operation
    return tcp, name


def _await_host(address: str, port: int, deadline: float) -> None:
    """Until something listens there; a TCPStore's own tries last a multiple of its limit, and cannot be
    interrupted."""
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"ranks: rank 0 was not at {address}:{port} in {MEETING:.0f} s ({error})"
                ) from error
        time.sleep(0.2)


class Quiet:
    """For how long a value has been the same, not counting time in which this process itself stood still."""

    def __init__(self):
        self.value: Any = None
        self.since = self.looked = time.monotonic()

    def seconds(self, value: Any) -> float:
        """To be called every BEAT seconds."""
        now = time.monotonic()
        if value != self.value or now - self.looked > 3 * BEAT:  # stopped, and continued: so were the others
            self.value, self.since = value, now
        self.looked = now
        return now - self.since


class Pulse:
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
            timeout=timedelta(seconds=SILENCE),
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
        self.thread.join(SILENCE + BEAT)

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
                why = f"{gone} ({_first_line(error)})"
                self._say(why)
        if why:
            os._exit(1)  # the main thread may be inside an operation that never returns

    def _beat(self) -> str:
        """Until this rank ends by itself; or returns why it must."""
        neighbor = str((self.rank + 1) % self.world)
        quiet = Quiet()
        while not self.ended.wait(BEAT):
            self.store.set(str(self.rank), str(self.rounds))
            if self.store.check(["failure"]):
                why = self.store.get("failure").decode()
                return "" if self.ended.is_set() else why
            heard = self.store.get(neighbor) if self.store.check([neighbor]) else b""
            if quiet.seconds(heard) > SILENCE and heard != LEFT:
                return f"rank {neighbor} is gone: no sign of life for {SILENCE:.0f} seconds"
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
        stay = 2 * BEAT if failure else SILENCE if self.rank == 0 else 0
        until = time.monotonic() + stay
        while time.monotonic() < until and self.store.add("number that left", 0) < self.world:
            time.sleep(0.1)

    def _watch(self) -> None:
        """End this process where the other thread waits for a store whose machine vanished."""
        quiet = Quiet()
        while not self.ended.wait(BEAT):
            if quiet.seconds(self.rounds) > SILENCE and not self.ended.is_set():
                self._say(f"the meeting point of the ranks answers no more, for {SILENCE:.0f} seconds")
                os._exit(1)

    def _say(self, why: str) -> None:
        print(f"bincomm: error: rank {self.rank} ends, for {why}", flush=True)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]  # the rest is a trace of PyTorch's functions


def _take_device(name: str, local_rank: int) -> torch.device:
    device = _choose_device(name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _choose_device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but this torch finds no GPU")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a GPU for each rank of this machine, got {torch.cuda.device_count()} for rank "
            f"{local_rank} of it; start fewer (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank)


# ---- Parameters that are split over the ranks (FSDP2)


def shard(network: nn.Module, ranks: Ranks) -> None:
    """Split a network's parameters over all ranks, block by block where its backbone has blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in getattr(network.backbone, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tree: Any, keep: bool = True) -> Any:
    """A copy on the CPU of nested values, their tensors put together from all ranks, which all must call.
    Ranks that do not keep it get None for every tensor: where one writes, the others spare the memory."""

    def copy(tensor: Tensor) -> Tensor | None:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.detach().to("cpu", copy=True) if keep else None

    return tree_map_only(Tensor, copy, tree)


def split_like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor that all ranks have, split over them as another one is."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)

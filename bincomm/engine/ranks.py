"""The processes of a job: which one this is, what they do together, and that none waits for a lost one."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")

BEAT = 2.0  # seconds between two signs of life of a rank
SILENCE = 20.0  # seconds without any after which a rank counts as gone
SLOW = timedelta(minutes=30)  # that ranks wait for one that lives: it may be listing images, or compiling


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
        outcome: list[Any] = [None, None]
        error = None
        if self.rank == 0:
            try:
                outcome = [function(), ""]
            except Exception as caught:
                error, outcome = caught, [None, str(caught)]
        dist.broadcast_object_list(outcome)
        if error is not None:
            raise error
        if outcome[1]:
            raise ToldByAnotherRank(outcome[1])
        return outcome[0]

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
        ValueError: there is no GPU for this rank.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if launched:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=SLOW)
    if not dist.is_initialized():
        yield Ranks(0, 1, 0, chosen)
        return
    rank, world = dist.get_rank(), dist.get_world_size()
    if not launched:
        yield Ranks(rank, world, local_rank, chosen)
        return
    pulse = Pulse(rank, world)

    def leave() -> None:
        if not pulse.ended.is_set():
            pulse.stop()
            dist.destroy_process_group()

    try:
        yield Ranks(rank, world, local_rank, chosen, leave)
    except BaseException as error:
        if not pulse.ended.is_set():  # else it has left, and what happens to it is nothing to the others
            pulse.stop(f"rank {rank} ended: {error or type(error).__name__}")
        raise
    leave()


class Pulse:
    """Tells the other ranks that this one lives, and ends this process when one of them is gone.

    Every rank watches its neighbour; the first to miss one tells all. Without this a rank that waits inside a
    collective operation would wait for one that was killed until that operation's own limit, half an hour.
    """

    def __init__(self, rank: int, world: int):
        # A connection of its own, for one that the main thread waits on is not to be had meanwhile.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=SILENCE),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"bincomm/pulse/{attempt}", store)
        self.rank, self.world = rank, world
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="bincomm-pulse", daemon=True)
        self.thread.start()

    def stop(self, failure: str = "") -> None:
        """End the watch; a failure is told to the other ranks, which end too."""
        self.ended.set()
        self.thread.join()
        try:
            if failure:
                self.store.set("failure", failure)
            self.store.set(str(self.rank), "done")
        except RuntimeError:  # the store went with rank 0: nobody is left to be told
            pass

    def _beat(self) -> None:
        neighbour = str((self.rank + 1) % self.world)
        beats, heard, since = 0, b"", time.monotonic()
        while not self.ended.wait(BEAT):
            try:
                beats += 1
                self.store.set(str(self.rank), str(beats))
                if self.store.check(["failure"]):
                    self._end(self.store.get("failure").decode())
                now = self.store.get(neighbour) if self.store.check([neighbour]) else b""
            except RuntimeError as error:
                self._end(f"the meeting point of the ranks is gone, with rank 0 or its launcher ({error})")
            if now != heard:
                heard, since = now, time.monotonic()
            elif time.monotonic() - since > SILENCE and heard != b"done":
                failure = f"rank {neighbour} is gone: no sign of life for {SILENCE:.0f} seconds"
                self.store.set("failure", failure)
                self._end(failure)

    def _end(self, why: str) -> None:
        if self.ended.is_set():  # this rank is ending by itself
            return
        print(f"bincomm: error: rank {self.rank} ends, for {why}", flush=True)
        os._exit(1)  # the main thread may be inside an operation that never returns


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


def whole(tree: Any) -> Any:
    """A copy on the CPU of nested values, their tensors put together from all ranks, which all must call."""

    def copy(tensor: Tensor) -> Tensor:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.detach().to("cpu", copy=True)

    return tree_map_only(Tensor, copy, tree)


def split_like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor that all ranks have, split over them as another one is."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)

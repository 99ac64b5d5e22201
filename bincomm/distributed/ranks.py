"""The processes of a job: which one this is, what they do together, and that none waits for a lost one."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bincomm.distributed.heartbeat import BEAT_SECONDS, Heartbeat
from bincomm.distributed.rendezvous import COLLECTIVE_TIMEOUT, rendezvous

T = TypeVar("T")


class FirstRankError(Exception):
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
            FirstRankError: on the others, where it raises on rank 0.
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
            raise FirstRankError(value)
        return value

    def leaders_first(self, function: Callable[[], T]) -> T:
        """Call a function on all ranks, on the first of every machine before the others: what it fetches or
        lists is then in that machine's cache."""
        if self.local_rank > 0:
            dist.barrier()
            return function()
        value = function()
        if self.world > 1:
            dist.barrier()
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun, or another launcher that sets its variables, made; every rank
    takes the GPU of its number on its machine, or the only one that it can see. While the group exists, no
    rank outlives another by much.

    Args:
        device: "auto" (a GPU where there is one), "cuda" or "cpu".

    Raises:
        ValueError: there is no GPU for this rank, or the launcher's variables are missing or incomplete.
        OSError: not all ranks came to their meeting point.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank, _take_device(device, local_rank))
        return
    if "WORLD_SIZE" not in os.environ:
        refuse_unnamed_ranks()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks(0, 1, 0, _take_device(device, local_rank))
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"ranks: WORLD_SIZE is set, but {', '.join(missing)} is not; start with torchrun, or set them"
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, name = rendezvous(rank, world)  # the store may live in rank 0: it is held here, to the very end
    heartbeat = Heartbeat(rank, world, name)

    def leave() -> None:
        if not heartbeat.ended.is_set():
            heartbeat.stop()
            if dist.is_initialized():
                dist.destroy_process_group()

    try:
        torch_device = _take_device(device, local_rank)
        backend = "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo"
        # Under the rendezvous' name: a launcher that starts the ranks again may keep its store, which holds
        # the addresses of the last time.
        meeting = dist.PrefixStore(f"bincomm/{name}/group", store)
        dist.init_process_group(
            backend, store=meeting, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
        )
        ranks = Ranks(rank, world, local_rank, torch_device, leave)
        if torch_device.type == "cuda":
            refuse_shared_devices(ranks.gather(_identify(torch_device)))
        yield ranks
    except BaseException as error:
        if not heartbeat.ended.is_set():  # else it has left, and the others no longer depend on it
            heartbeat.stop(f"rank {rank} ended: {error or type(error).__name__}")
        if isinstance(error, FirstRankError):
            # torchrun ends all ranks once one has ended; rank 0 has reported the error by then.
            time.sleep(BEAT_SECONDS)
        raise
    leave()


# Launchers that tell their processes about each other in other variables than torchrun: the variables of the
# number of processes, of this one's number, and of its number on its machine.
LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


def refuse_unnamed_ranks() -> None:
    """Raise ValueError where a launcher has started several processes that do not know of each other: they
    would all do the same work in the same folder."""
    for launcher, (world, rank, local_rank) in LAUNCHERS.items():
        count = os.environ.get(world, "1")
        if count.isdecimal() and int(count) > 1:
            raise ValueError(
                f"ranks: {launcher} has started {count} processes, but WORLD_SIZE is not set; start them by "
                f"{launcher} ... bash -c 'export WORLD_SIZE=${world} RANK=${rank} LOCAL_RANK=${local_rank} "
                "MASTER_ADDR=HOST MASTER_PORT=29500; exec bincomm ...', HOST being the machine of the first; "
                "WORLD_SIZE=1 makes each a job of its own"
            )


def refuse_shared_devices(devices: Sequence[tuple[str, ...]]) -> None:
    """Raise ValueError where two ranks have the same device: NCCL cannot have that, and does not say it."""
    for rank, device in enumerate(devices):
        first = devices.index(device)
        if first < rank:
            raise ValueError(
                f"device: expected a GPU for each rank, got the same one for ranks {first} and {rank}, on "
                f"{device[0]}; start fewer (torchrun --nproc-per-node), or set LOCAL_RANK to a rank's number "
                "on its machine"
            )


def _identify(device: torch.device) -> tuple[str, ...]:
    """A GPU: its machine, and what tells it from others there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return socket.gethostname(), visible, str(device), str(torch.cuda.get_device_properties(device).uuid)


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
    if torch.cuda.device_count() == 1:  # the launcher may have given each rank one, which is number 0 to it
        return torch.device("cuda", 0)
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a GPU for each rank of this machine, got {torch.cuda.device_count()} for rank "
            f"{local_rank} of it; start fewer (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank)

"""How the ranks of a job meet."""

import os
import socket
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

# In which all ranks must have started: imports over a network differ by minutes.
RENDEZVOUS_SECONDS = 300.0
# That ranks wait for one that lives: it may be listing images, or compiling.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def rendezvous(rank: int, world: int) -> tuple[dist.Store, str]:
    """Wait for all ranks at the address that the launcher gave; returns the store there and a name for this
    meeting, the same on all ranks.

    The store may belong to a launcher that started these ranks before, on some machines more often than on
    others, so nothing in it tells which start it is from. Rank 0 writes a new name; the others answer under
    whatever name they find until rank 0 has welcomed them, each by a name of its own, which no earlier rank 0
    can have known.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    limit = timedelta(seconds=RENDEZVOUS_SECONDS)
    own, deadline = uuid4().hex, time.monotonic() + RENDEZVOUS_SECONDS
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
                    absent_ranks = ", ".join(absent)
                    raise TimeoutError(
                        f"ranks: rank {absent_ranks} of {world} did not start in {RENDEZVOUS_SECONDS:.0f} s"
                    )
                time.sleep(0.1)
            for answer in answers:
                store.set(f"{store.get(answer).decode()}/welcome", own)
            name = own
        else:
            while not store.check([f"{own}/welcome"]):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"ranks: not all of {world} were at {address}:{port} in {RENDEZVOUS_SECONDS:.0f} s"
                    )
                if store.check(["name"]):
                    store.set(f"{store.get('name').decode()}/{rank}", own)
                time.sleep(0.1)
            name = store.get(f"{own}/welcome").decode()
    except RuntimeError as error:
        raise ConnectionError(f"ranks: cannot meet at {address}:{port}: {first_line(error)}") from error
    # NCCL's ranks find each other through it in their first collective operation.
    tcp.set_timeout(COLLECTIVE_TIMEOUT)
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
                    f"ranks: rank 0 was not at {address}:{port} in {RENDEZVOUS_SECONDS:.0f} s ({error})"
                ) from error
        time.sleep(0.2)


def first_line(error: Exception) -> str:
    """The first line of an error's message, else its type."""
    return (str(error) or type(error).__name__).splitlines()[0]  # the rest is a trace of PyTorch's functions

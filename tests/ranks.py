"""Running a function on several processes that form a process group."""

import os
from collections.abc import Callable
from pathlib import Path

import forked  # noqa: F401  # which chooses what is imported before a process is forked
import torch


def run_on_ranks(function: Callable, world: int, folder: Path) -> None:
    """Call `function(rank, world, folder)` on `world` processes joined by gloo; an error there shows here."""
    arguments = function, world, str(folder)
    torch.multiprocessing.start_processes(_on_rank, arguments, nprocs=world, start_method="forkserver")


def _on_rank(rank: int, function: Callable, world: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    function(rank, world, folder)
    torch.distributed.destroy_process_group()
    # DistributedDataParallel keeps the process group, and gloo's threads, beyond destroy_process_group:
    # a thread still alive while the interpreter is taken down can abort the process, its work long done.
    os._exit(0)

"""Benchmarks of the operations: every contender of a table runs in the same session, on the same tensors.

A contender is timed only after its value and its gradient agree with the fp64 reference. On a CPU a time is
pytest-benchmark's; on a GPU it is CUDA events around a step that starts with a flushed second-level cache and
an idle GPU, so that launching counts, and again around the replay of a CUDA graph of the step.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measuring import GPU, check, copy_bandwidth, directions, time_it, value_and_gradient
from bincomm import __version__
from bincomm.diagnosis import doctor

ROUNDS = 40


def pytest_benchmark_update_machine_info(config, machine_info):
    """The machine, published beside the figures."""
    machine_info["bincomm"] = {
        "bincomm": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction_set": doctor()["extension"].get("instruction_set", "bincomm._C is missing"),
        "device": torch.cuda.get_device_name() if GPU else "CPU",
        "copy_bandwidth": copy_bandwidth() if GPU else None,
    }


@pytest.fixture
def device():
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def measure(benchmark):
    """Time one direction of a scalar function of logits, after comparing value and gradient with fp64.

    What it returns takes the function, its logits, `truth` from `value_and_gradient` in fp64, the direction
    ("forward", "backward" or "both"), the labels for the table (table, shape, dtype, contender), and the
    bytes that this direction has to read and write.
    """

    def run(
        function: Callable[[Tensor], Tensor],
        logits: Tensor,
        truth: tuple[Tensor, Tensor],
        direction: str,
        labels: dict[str, Any],
        moved: int | None = None,
    ) -> None:
        logits = logits.detach().requires_grad_()
        error = check(value_and_gradient(function, logits), truth, labels["contender"] == "bincomm")

        step, prepare = directions(function, logits)[direction]
        labels |= {"direction": direction, "error": error, "elements": logits.numel()}
        time_it(benchmark, step, prepare, ROUNDS, labels, moved)

    return run


@pytest.fixture
def measure_plain(benchmark):
    """Time a function without gradient, which the caller has checked."""

    def run(step: Callable[[], Any], labels: dict[str, Any], rounds: int = ROUNDS) -> None:
        time_it(benchmark, step, tuple, rounds, labels, None)

    return run

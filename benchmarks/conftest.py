"""Benchmarks of the operations: every contender of a group runs in the same session, on the same tensors.

A contender is timed only after its value and its gradient agree with the fp64 reference.
"""

import pytest
import torch

from bincomm import __version__
from bincomm.diagnosis import doctor


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a figure needs beside it."""
    machine_info["bincomm"] = {
        "bincomm": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction_set": doctor()["extension"].get("instruction_set", "bincomm._C is missing"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def measure(benchmark):
    """Time forward and backward of a scalar function of logits, after checking both against fp64."""

    def run(function, logits, truth, group, contender):
        logits = logits.detach().requires_grad_()

        def step():
            logits.grad = None
            function(logits).backward()
            if logits.is_cuda:
                torch.cuda.synchronize()

        step()
        exact = logits.detach().double().requires_grad_()
        value = truth(exact)
        value.backward()
        found = function(logits).detach().double()
        torch.testing.assert_close(found, value.detach(), rtol=1e-4, atol=1e-6)
        error = ((logits.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
        # Ours to its own promise; a peer only has to be right enough for its time to mean something.
        limit = max(1e-4, torch.finfo(logits.dtype).eps) if contender == "bincomm" else 1e-2
        assert error < limit, f"gradient is off by {error:.1e}"
        benchmark.extra_info["error"] = error

        benchmark.group = group
        benchmark.extra_info["contender"] = contender
        benchmark.pedantic(step, warmup_rounds=5, rounds=40)

    return run

"""What the Triton kernels compile to, without a GPU: budgets that a change must not exceed unseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

ARCHITECTURES = (80, 90, 100)
REGISTERS = 64  # a thread: 64 k registers then hold 1024 threads, half of what an SM can run
PER_ELEMENT = (
    34  # machine instructions in the loop over views; above it the kernel is bound by issue, not bandwidth
)
ELEMENTS = 8  # a thread's share of a tile


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """{architecture: {kernel: cost}}, compiled by one process each."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("compile_for.py")
    processes = {
        architecture: subprocess.Popen(
            [sys.executable, script, str(architecture)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for architecture in ARCHITECTURES
    }
    found = {architecture: process.communicate()[0] for architecture, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values())
    return {architecture: json.loads(text) for architecture, text in found.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_few_registers(costs, architecture):
    assert len(costs[architecture]) == 23
    for name, cost in costs[architecture].items():
        assert cost["spilled"] == 0, name
        assert cost["registers"] <= REGISTERS, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_move_128_bits_at_a_time(costs, architecture):
    for name, cost in costs[architecture].items():
        loads = [i for i in cost["instructions"] if i.startswith("LDG")]
        stores = [i for i in cost["instructions"] if i.startswith("STG")]
        if name.startswith("backward"):
            assert any(".128" in store for store in stores), name
            assert all(".128" in store for store in stores), name
        if name.startswith(("forward", "backward", "pack")):
            assert any(".128" in load for load in loads), name
            # What is narrower is a byte of a message, or the gradient of the loss.
            narrow = [load for load in loads if ".128" not in load and ".U8" not in load]
            assert len(narrow) == name.startswith("backward"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_per_element(costs, architecture):
    counted = 0
    for name, cost in costs[architecture].items():
        if "cross" in name:
            per_element = len(cost["loop"]) / ELEMENTS
            assert 10 < per_element <= PER_ELEMENT, name
            counted += 1
    assert counted == 9

"""What the Triton kernels compile to, without a GPU: budgets that no change may exceed unnoticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bincomm.kernels import hamming

pytestmark = [pytest.mark.kernels, pytest.mark.slow]

ARCHITECTURES = (80, 90, 100)
REGISTERS = 64  # per thread: 64 k registers then hold 1024 threads, half of what an SM can run
# Machine instructions per logit in the loop over views, at most, on these architectures; `pytest -rP` prints
# the count. Up to 17 forward and 30 backward on 16-bit logits, memory limits an H200, not instructions.
BUDGETS = {
    "forward fp32": (11, 11, 10),
    "forward fp16": (11, 11, 9.5),
    "forward bf16": (11.5, 11.5, 10),
    "backward fp32": (9, 9, 9),
    "backward fp16": (8.5, 8.5, 8.5),
    "backward bf16": (9, 9, 9),
}
# All instructions that a warp executes, per logit, with 12 views of which 2 are a teacher's own. Reading the
# teachers and their own views costs as much as half of the loop.
EXECUTED = {
    "forward fp32": 20.5,
    "forward fp16": 16,
    "forward bf16": 16.5,
    "backward fp32": 11.5,
    "backward fp16": 11,
    "backward bf16": 11.5,
}


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """{architecture: {kernel: cost}}; one process compiles for one architecture."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "benchmarks.model.compiled"]
    processes = {
        architecture: subprocess.Popen(
            [*command, str(architecture)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for architecture in ARCHITECTURES
    }
    outputs = {architecture: process.communicate()[0] for architecture, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values())
    return {architecture: json.loads(text) for architecture, text in outputs.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_few_registers(costs, architecture):
    assert len(costs[architecture]) == 28
    for name, cost in costs[architecture].items():
        assert cost["spilled"] == 0, name
        # A program that selects has its counts, a bin for every distance, in registers.
        assert cost["registers"] <= (128 if name == "select" else REGISTERS), name


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
            # Narrower loads are of a byte of a message, or of the loss's gradient.
            narrow = [load for load in loads if ".128" not in load and ".U8" not in load]
            assert len(narrow) == name.startswith("backward"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bits_are_counted_in_one_instruction(costs, architecture):
    loop = costs[architecture]["hamming"]["loop"]
    pairs = hamming.ROWS * hamming.COLUMNS // (32 * hamming.WARPS)  # per thread
    assert sum(instruction.startswith("POPC") for instruction in loop) == pairs
    assert len(loop) / pairs < 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_of_several_views_are_in_flight(costs, architecture):
    """They are issued before the first of them is waited for, and each into registers of its own."""
    for name, cost in costs[architecture].items():
        if "cross" in name:
            fewest = 3 if name.startswith("forward") else 2
            assert cost["loads_in_flight"] >= fewest, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_per_logit(costs, architecture, record_property):
    counted = 0
    for name, cost in costs[architecture].items():
        if "cross" in name:
            kernel, dtype, *_ = name.split()
            width = 4 if dtype == "fp32" else 8  # logits of a load
            loads = sum(i.startswith("LDG") and ".128" in i for i in cost["loop"])
            in_loop = len(cost["loop"]) / (loads * width)
            in_all = cost["executed"] / (12 * width)
            print(
                f"sm_{architecture} {name}: {in_loop:.2f} per logit in the loop, {in_all:.2f} in all, "
                f"{cost['registers']} registers"
            )
            record_property(name, in_all)
            budget = BUDGETS[f"{kernel} {dtype}"][ARCHITECTURES.index(architecture)]
            assert 5 < in_loop <= budget, f"{name}: {in_loop:.2f}"
            assert in_loop < in_all <= EXECUTED[f"{kernel} {dtype}"], f"{name}: {in_all:.2f}"
            counted += 1
    assert counted == 9

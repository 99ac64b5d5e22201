"""The model of the kernels: what it reads from machine code, and that no kernel became slower by it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bincomm
from benchmarks.model import __main__ as report
from benchmarks.model import sass
from benchmarks.model.machine import H100, H200, LAUNCH, Launch, busy_cycles, latency, microseconds
from benchmarks.model.sweep import maker, sweep_cycles

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
EXTENSION = bincomm.doctor()["extension"]


def encode(stall=1, written=7, read=7, waits=()):
    """The upper 64 bits of an instruction, of which bits 41 and up control its execution."""
    mask = sum(1 << number for number in waits)
    return (stall | written << 5 | read << 8 | mask << 11) << 41


def listing(*lines, labels=None):
    """What a disassembler prints: (instruction, how `encode` is called) each."""
    text = ""
    for number, (instruction, control) in enumerate(lines):
        address = 16 * number
        text += f".L_x_{labels[address]}:\n" if labels and address in labels else ""
        text += f"        /*{address:04x}*/   {instruction} ;   /* 0x{number:016x} */\n"
        text += f"                                          /* 0x{encode(**control):016x} */\n"
    return text


LOOP = (  # two loops in turn, the second of which may be left out, and a way out in its middle
    ("MOV R1, RZ", {}),
    ("LDG.E.128 R4, desc[UR4][R2.64]", {"written": 2, "read": 0}),
    ("@P0 BRA `(.L_x_1)", {}),
    ("@!P1 BRA `(.L_x_3)", {}),
    ("FADD R5, R4, R5", {"waits": (2,)}),
    ("BRA.U UP0, `(.L_x_2)", {}),
    ("EXIT", {}),
)
LABELS = {16: 1, 64: 2, 96: 3}


def test_instructions_and_what_they_wait_for():
    text = listing(
        ("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", {"stall": 5, "written": 2, "read": 0}),
        ("FADD R5, R4, R5", {"stall": 12, "waits": (0, 2)}),
        ("@P1 BRA 0x10", {}),
    )
    load, add, branch = sass.parse(text)
    assert (load.predicate, load.operation, load.name) == ("@!P0", "LDG.E.128", "LDG")
    assert (load.stall, load.when_written, load.when_read, load.waits) == (5, 2, 0, ())
    assert (add.stall, add.when_written, add.when_read, add.waits) == (12, None, None, (0, 2))
    assert (branch.address, branch.target) == (32, 16)
    assert sass.loops([load, add, branch]) == [(16, 32)]


@pytest.mark.parametrize(
    ("trips", "names"),
    [
        ({0: 3, 1: 2}, "MOV LDG BRA LDG BRA LDG BRA BRA FADD BRA FADD BRA EXIT"),
        ({0: 1, 1: 0}, "MOV LDG BRA BRA EXIT"),
    ],
)
def test_the_path_of_a_warp(trips, names):
    instructions = sass.parse(listing(*LOOP, labels=LABELS))
    assert [i.name for i in sass.path(instructions, trips)] == names.split()


def test_a_path_ends_at_the_branch_that_pads_the_code():
    text = listing(("@P0 EXIT", {}), ("MOV R1, RZ", {}), ("BRA 0x0", {}), ("BRA 0x30", {}))
    assert [i.name for i in sass.path(sass.parse(text), {0: 2})] == ["EXIT", "MOV", "BRA"] * 2 + ["BRA"]


def test_a_warp_stays_together():
    text = listing(("BRA.DIV UR8, 0x20", {}), ("FADD R5, R4, R5", {}), ("EXIT", {}))
    assert [i.name for i in sass.path(sass.parse(text), {})] == ["BRA", "FADD", "EXIT"]


def test_loops_are_known_by_what_they_contain():
    inner = [("FFMA R1, R2, R3, R1", {}), ("@P0 BRA 0x10", {})]
    text = listing(("MOV R1, RZ", {}), *inner, ("@P1 BRA 0x0", {}), ("FFMA R1, R2, R3, R1", {}), ("EXIT", {}))
    code = sass.parse(text)
    assert sass.innermost_loops(code, "FFMA", 1) == [(16, 32)]
    assert sass.innermost_loops(code, "FFMA", 2) == sass.innermost_loops(code, "LDS", 1) == []
    assert sass.around(code, (16, 32)) == (0, 48)
    assert [i.name for i in sass.within(code, (16, 32))] == ["FFMA", "BRA"]


def test_latency_is_that_of_what_is_waited_for():
    load, other = ("LDG.E R4, desc[UR4][R2.64]", {"written": 1}), ("FADD R5, R6, R6", {"stall": 4})
    waiting = ("FADD R5, R4, R4", {"waits": (1,), "stall": 4})
    alone = latency(sass.parse(listing(load, waiting)))
    assert 600 < alone < 610
    assert latency(sass.parse(listing(load, load, waiting))) == alone + 1  # both are in flight
    assert latency(sass.parse(listing(load, waiting, load, waiting))) == 2 * alone
    assert latency(sass.parse(listing(*[other] * 10))) == 40


def test_the_longest_of_memory_units_and_latency_counts():
    path = sass.parse(listing(*[("MUFU.EX2 R1, R1", {})] * 1000))
    assert busy_cycles(path) == (8000, 1000)
    wave = H200.multiprocessors * 16  # blocks of 4 warps with 32 registers that are there at once
    small, full = (Launch(blocks, 4, 32, 0, 0) for blocks in (1, wave))
    cycle = 1e-3 / H200.clock
    assert microseconds(path, small, H200) == pytest.approx(LAUNCH + 8000 * cycle)
    assert microseconds(path, full, H200) == pytest.approx(LAUNCH + 16 * 8000 * cycle)
    moving = Launch(1, 4, 32, 0, 10**9)
    assert microseconds(path, moving, H100) == pytest.approx(LAUNCH + 1e15 / H100.bandwidth)
    waiting = sass.parse(listing(("LDG.E R4, [R2]", {"written": 1}), ("MOV R1, R4", {"waits": (1,)})))
    twice = Launch(2 * wave, 4, 32, 0, 0)
    assert microseconds(waiting, twice, H200) == pytest.approx(LAUNCH + 2 * latency(waiting) * cycle)


def test_loads_that_lanes_do_in_pairs_take_half_as_long():
    path = sass.parse(listing(*[("LDS.128 R4, [R2]", {})] * 10))
    assert busy_cycles(path) == (160, 10)
    assert busy_cycles(path, paired=4) == (128, 10)
    assert busy_cycles(path, paired=10) == (80, 10)


def test_the_page_states_what_is_stored():
    """The sums, too: it was written from these rows."""
    stored = json.loads((RESULTS / "model.json").read_text())
    assert report.page(stored["rows"], stored["versions"]) == (RESULTS / "model.md").read_text()


def test_blocks_that_compute_panels_own_their_tiles():
    """Of step k, (i, k) or (k, i): tiles are stored where the row is not less than the column."""
    assert maker(5, 2, 2) == (1, 0)
    assert maker(2, 5, 2) == (1, 0)
    assert maker(30, 9, 4) == (2, 1)


def test_other_code_of_the_inversion_is_refused():
    with pytest.raises(SystemExit, match="no longer fits"):
        sweep_cycles(sass.parse(listing(*[("UCGABAR_WAIT", {})] * 3, ("EXIT", {}))), 8, 2)


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.skipif(
    "9.0" not in (EXTENSION.get("cuda_architectures") or ""), reason="bincomm._C has no code for sm_90"
)
def test_no_kernel_is_slower_than_in_the_table(tmp_path):
    """By more than a tenth, but for the one that a changed table has faster, which is named."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    stored = json.loads((RESULTS / "model.json").read_text())
    stored["rows"][0]["us"]["H200"] /= 1.5
    (tmp_path / "model.json").write_text(json.dumps(stored))
    command = [sys.executable, "-m", "benchmarks.model", str(tmp_path / "model"), "--check"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1
    slower = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in slower] == ["sign_bce forward (12, 2, 256, 256) fp32"], slower

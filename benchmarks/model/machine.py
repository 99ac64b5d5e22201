"""Throughputs and latencies of the GPUs that the model knows, and how long a warp's path takes on them.

What is assumed, and from where:

- multiprocessors, clock, registers and shared memory: NVIDIA's data sheets; the clock is the one that they
  run at under load, 1.755 GHz;
- bandwidth: that of a large copy, read and write together, 4.3 TB/s measured on an H200, 90 % of the data
  sheet for the H100;
- instructions a cycle of each of the four parts of a multiprocessor: the table of arithmetic throughput in
  NVIDIA's programming guide for compute capability 9.0;
- latencies: usual values of published microbenchmarks, to 20 %;
- lanes that read the same: NVIDIA's engineers say in its forum, of compute capability 7, that shared memory
  returns 128 bytes a cycle, and twice as much where all lanes n and n ^ 1, or all n and n ^ 2, read the same;
- clusters: published microbenchmarks of Hopper, about 200 cycles to another block's shared memory, 2.7 TB/s
  of all multiprocessors together in clusters of four, and 670 cycles for a barrier with its fences; what a
  block sends to several others is counted as often. These three are the least certain.

Left out are caches, bank conflicts, and what kernels share that run at once.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.model.sass import Instruction

# Cycles that an instruction of a warp keeps a unit of its part of the multiprocessor busy: unit and cycles.
# One that is not listed takes the integer unit.
UNITS = {
    **dict.fromkeys(("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"), ("multiply", 1)),
    **dict.fromkeys(("IMAD", "IDP"), ("multiply", 2)),
    **dict.fromkeys(("MUFU", "POPC", "I2F", "F2I", "F2F", "FLO", "BREV", "I2FP"), ("special", 8)),
    **dict.fromkeys(("LDG", "STG", "LDS", "STS", "LDSM", "ATOMS", "SHFL", "LDGSTS"), ("memory", 4)),
    **dict.fromkeys(("DADD", "DFMA", "DMUL"), ("double", 2)),
}
WIDE = 4  # times as long for 128-bit accesses to shared memory
LATENCY = {
    **{"LDG": 600, "LDS": 30, "MUFU": 24, "SHFL": 26, "POPC": 24, "LDC": 40, "S2R": 24, "ATOMS": 60},
    "LD": 200,  # only another block's shared memory is read by it
}
OTHER_LATENCY = 20  # of what releases a scoreboard
BARRIER = 30
CLUSTER_BARRIER = 670
REMOTE_BYTES = 12  # a cycle, from or to a multiprocessor's shared memory
LAUNCH = 1.0  # µs from the end of a kernel to the begin of the next one in a CUDA graph
PARTS = 4  # of a multiprocessor, each issues an instruction a cycle


@dataclass(frozen=True)
class Machine:
    """A GPU."""

    name: str
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # bytes a second

    registers: int = 65536  # of a multiprocessor
    shared: int = 227 << 10
    warps: int = 64
    blocks: int = 32


H100 = Machine("H100", 132, 1.755, 3.0e12)
H200 = Machine("H200", 132, 1.755, 4.3e12)


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel."""

    blocks: int
    warps: int  # of a block
    registers: int  # of a thread
    shared: int  # bytes of a block
    moved: int  # bytes between it and the device's memory
    paired: int = 0  # 128-bit loads of a warp from shared memory that lanes do in pairs


def busy_cycles(path: Iterable[Instruction], paired: int = 0) -> tuple[int, int]:
    """Of a warp's path: cycles of the unit that is busy longest, issuing among them, and the number of
    instructions. So many 128-bit loads, by lanes that read in pairs the same, take half as long."""
    units: Counter[str] = Counter(memory=-paired * UNITS["LDS"][1] * WIDE // 2)
    for instruction in path:
        unit, cycles = UNITS.get(instruction.name, ("integer", 2))
        if instruction.operation.startswith("U"):
            unit, cycles = "uniform", 2
        if instruction.name in ("LDS", "STS") and ".128" in instruction.operation:
            cycles *= WIDE
        units[unit] += cycles
        units["issue"] += 1
    return max(units.values()), units["issue"]


def latency(path: Iterable[Instruction]) -> int:
    """Cycles from the first to the last instruction of a warp that has the multiprocessor to itself."""
    now, ready = 0, dict.fromkeys(range(6), 0)
    for instruction in path:
        now = max(now, *(ready[number] for number in instruction.waits), 0)
        if instruction.name == "BAR":
            now += BARRIER
        after = now + LATENCY.get(instruction.name, OTHER_LATENCY)
        for number, when in ((instruction.when_written, after), (instruction.when_read, now + OTHER_LATENCY)):
            if number is not None:
                ready[number] = max(ready[number], when)
        now += max(1, instruction.stall)
    return now


def microseconds(path: list[Instruction], launch: Launch, machine: Machine) -> float:
    """Of a launch whose warps all take this path: the longest of moving the bytes, of the busiest unit, and
    of the latency of as many blocks, one after another, as a multiprocessor gets."""
    resident = min(
        machine.blocks,
        machine.warps // launch.warps,
        machine.registers // (-(-launch.registers // 8) * 8 * 32 * launch.warps),
        machine.shared // launch.shared if launch.shared else machine.blocks,
    )
    per_multiprocessor = -(-launch.blocks // machine.multiprocessors)
    rounds = -(-per_multiprocessor // resident)
    busy, _ = busy_cycles(path, launch.paired)
    cycles = max(per_multiprocessor * launch.warps / PARTS * busy, rounds * latency(path))
    return elapsed(cycles, launch, machine)


def elapsed(cycles: float, launch: Launch, machine: Machine) -> float:
    """Microseconds of a launch that takes so many cycles, and at least as long as its bytes."""
    return LAUNCH + max(cycles / (1e3 * machine.clock), 1e6 * launch.moved / machine.bandwidth)

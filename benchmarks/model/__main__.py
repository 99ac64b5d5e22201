"""Times of the kernels on GPUs that are not there, by a model: python -m benchmarks.model RESULTS

Writes RESULTS.json and RESULTS.md. --check compares with what RESULTS.json holds, and fails where a kernel
has become slower by more than a tenth.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.model import sass
from benchmarks.model.compiled import TEACHERS, TOOLS, TRIPS, VIEWS, compile_all
from benchmarks.model.machine import H100, H200, Launch, busy_cycles, latency, microseconds
from bincomm.files import write_json, write_text
from bincomm.kernels import hamming, sign_bce  # type: ignore[attr-defined]

CAPABILITY = 90
MACHINES = (H100, H200)
SLOWER = 1.1
WIDTHS = {"fp32": 4, "bf16": 2}  # bytes of a logit
SIGN_BCE = ((256, 256), (4096, 1024))  # n, K
SEARCH = (10_000, 100_000, 256)  # queries, messages, bits
CODING_RATE = ((2, 256, 256), (12, 256, 256), (12, 1024, 1024))  # V, n, K
TILE = 32
PRODUCT_WARPS = 8
# Of the loops for a tile: four times a quarter of the product, twice half of the rows, four at a time.
FFMA_OF_A_QUARTER, LOADS_OF_A_HALF = 256, 4

Case = tuple[str, list[sass.Instruction], Launch]


def main() -> int:
    """Write the table, or check it; 1 where a kernel became slower."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results are written to this name .json and .md")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args()
    path = options.results.with_suffix(".json")
    rows = [row(*case) for case in cases()]
    if not options.check:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        write_json(path, {"versions": versions, "rows": rows})
        write_text(options.results.with_suffix(".md"), page(rows, versions))
        print(page(rows, versions))
        return 0
    before = {each["kernel"]: each for each in json.loads(path.read_text())["rows"]}
    if before.keys() != {each["kernel"] for each in rows}:
        print(f"other kernels than in {path}; write it anew")
        return 1
    slower = [
        f"{each['kernel']}: {each['us'][name]:.1f} µs on {name}, before {was:.1f}"
        for each in rows
        for name, was in before[each["kernel"]]["us"].items()
        if each["us"][name] > SLOWER * was
    ]
    print("\n".join(slower) or "no kernel is slower")
    return int(bool(slower))


def row(name: str, path: list[sass.Instruction], launch: Launch) -> dict[str, Any]:
    """The figures of a launch."""
    busy, issued = busy_cycles(path)
    return {
        "kernel": name,
        "blocks": launch.blocks,
        "registers": launch.registers,
        "executed": issued,
        "busy_cycles": busy,
        "latency_cycles": latency(path),
        "floor_us": {m.name: 1e6 * launch.moved / m.bandwidth for m in MACHINES},
        "us": {m.name: microseconds(path, launch, m) for m in MACHINES},
    }


def cases() -> Iterator[Case]:
    """All launches: their names, the path of a warp, and their sizes."""
    yield from sign_bce_cases()
    yield from search_cases()
    yield from coding_rate_cases()


def sign_bce_cases() -> Iterator[Case]:
    """sign_bce with VIEWS and TEACHERS, all pairs of different views."""
    for n, bits in SIGN_BCE:
        names = [f"{direction} {dtype} cross" for direction in ("forward", "backward") for dtype in WIDTHS]
        for name, (usage, code) in compile_all(CAPABILITY, bits, names.__contains__).items():
            direction, dtype, _ = name.split()
            logits = n * bits * WIDTHS[dtype]
            messages = TEACHERS * n * bits // 8
            read = VIEWS * logits + messages
            moved = read + TEACHERS * logits if direction == "forward" else read + VIEWS * logits
            programs, _, warps = sign_bce._programs(n, bits // 32, getattr(torch, LONG[dtype]))
            launch = Launch(programs, warps, usage["registers"], 0, moved)
            title = f"sign_bce {direction} ({VIEWS}, {TEACHERS}, {n}, {bits}) {dtype}"
            yield title, list(sass.path(code, TRIPS[direction])), launch


LONG = {"fp32": "float32", "bf16": "bfloat16"}


def search_cases() -> Iterator[Case]:
    """The two kernels of hamming_topk, for all queries."""
    queries, size, bits = SEARCH
    code = compile_all(CAPABILITY, bits, lambda name: name in ("hamming", "select"))
    stored = 2 * queries * size
    usage, instructions = code["hamming"]
    blocks = -(-queries // hamming.ROWS) * -(-size // hamming.COLUMNS)
    launch = Launch(blocks, hamming.WARPS, usage["registers"], 0, stored)
    title = f"({queries}, {size}) of {bits} bits"
    yield f"hamming_topk distances {title}", list(sass.path(instructions, {0: bits // 32})), launch
    usage, instructions = code["select"]
    # Few steps of the second pass have a message that is near enough. One of the others, which only reads, is
    # counted as one of the first pass, which counts, too.
    steps = -(-size // hamming.SELECT_COLUMNS)
    path = list(sass.path(instructions, {0: 2 * steps, 1: 1}))
    launch = Launch(queries, hamming.WARPS, usage["registers"], 0, 2 * stored)
    yield f"hamming_topk selection {title}", path, launch


def coding_rate_cases() -> Iterator[Case]:
    """The products of coding_rate, of whose work nearly all is done in steps of one tile: filling two and
    multiplying them. The inversion between them is not modelled."""
    functions = extension_code()
    for views, n, bits in CODING_RATE:
        side, depth = (n, bits) if n < bits else (bits, n)
        tiles = -(-side // TILE)
        warps = min(PRODUCT_WARPS, -(-depth // TILE))
        blocks = {
            "gram": views * tiles * (tiles + 1) // 2,
            "direction": views * -(-n // TILE) * -(-bits // TILE),
        }
        for kernel, count in blocks.items():
            code, registers = functions[kernel, n < bits]
            terms = depth if kernel == "gram" else side
            steps = -(-terms // (TILE * min(PRODUCT_WARPS, -(-terms // TILE))))
            moved = 4 * views * (n * bits + side * side)
            launch = Launch(count, warps, registers, 2 * warps * 4 * TILE * TILE, moved)
            path = steps * step_of(code)
            yield f"coding_rate {kernel} ({views}, {n}, {bits}) fp32", path, launch


def step_of(code: list[sass.Instruction]) -> list[sass.Instruction]:
    """What a warp does for a tile of both factors: the loops that fill them 16 bytes at a time, the product.

    They are known by what they contain: the code around them is for sizes that are no multiples of a tile.
    """
    loops = sass.loops(code)
    bodies = [
        [i for i in code if first <= i.address <= last]
        for first, last in loops
        if not any(first <= other and end < last for other, end in loops)
    ]
    products = [b for b in bodies if sum(i.name == "FFMA" for i in b) == FFMA_OF_A_QUARTER]
    fills = [b for b in bodies if sum(i.operation.startswith("LDG.E.128") for i in b) == LOADS_OF_A_HALF]
    if len(products) != 1 or len(fills) not in (1, 2):
        raise SystemExit("the model no longer fits the code of coding_rate's products")
    # Where there is one, the other is unrolled, and as long.
    return 2 * fills[0] + 2 * fills[-1] + 4 * products[0]


def extension_code() -> dict[tuple[str, bool], tuple[list[sass.Instruction], int]]:
    """Of the products in `bincomm._C`, fp32: (kernel, of images) -> instructions and registers."""
    found = importlib.util.find_spec("bincomm._C")
    if found is None or found.origin is None:
        raise SystemExit("bincomm._C is not built")

    extension = found.origin

    def dump(option: str) -> str:
        command = [str(TOOLS / "cuobjdump"), option, "-arch", f"sm_{CAPABILITY}", extension]
        return subprocess.check_output(command, text=True)

    name = r"coding_rate_(gram|direction)_kernelIfLb([01])E"
    registers = {
        (match[1], match[2] == "1"): int(match[3])
        for match in re.finditer(rf"Function \S*{name}\S*:\s+REG:(\d+)", dump("-res-usage"))
    }
    code = {}
    for part in dump("-sass").split("Function : ")[1:]:
        if match := re.match(rf"\S*{name}", part):
            kernel = match[1], match[2] == "1"
            code[kernel] = sass.parse(part), registers[kernel]
    return code


def page(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The Markdown page."""
    head = ["kernel", "blocks", "registers", "executed by a warp", "busy cycles", "latency, cycles"]
    head += [f"{m.name}: floor of memory, µs" for m in MACHINES] + [f"{m.name}: µs" for m in MACHINES]
    lines = [
        "# Kernels by a model, not measured",
        "",
        f"`python -m benchmarks.model benchmarks/results/model`, machine code for sm_{CAPABILITY}, triton "
        f"{versions['triton']}, torch {versions['torch']}. **Nothing here was measured.** The error is "
        "unknown until it is compared with figures of a GPU; what is assumed is said in "
        "[machine.py](../model/machine.py). coding_rate's inversion and its kernels of norms and gradients "
        "are not modelled.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for each in rows:
        counts = [each[key] for key in ("blocks", "registers", "executed", "busy_cycles", "latency_cycles")]
        floors = [f"{each['floor_us'][m.name]:.1f}" for m in MACHINES]
        times = [f"{each['us'][m.name]:.1f}" for m in MACHINES]
        lines.append(f"| {' | '.join([each['kernel'], *map(str, counts), *floors, *times])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

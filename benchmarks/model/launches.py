"""The launches that are modelled, and their figures."""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.model import sass
from benchmarks.model.compiled import TEACHERS, TOOLS, TRIPS, VIEWS, compile_all
from benchmarks.model.machine import H100, H200, Launch, busy_cycles, elapsed, latency, microseconds
from benchmarks.model.sweep import ALL_PAIRED, FFMA_OF_A_QUARTER, QUARTERS, WARPS, sweep_cycles
from bincomm.kernels import discrete_communication as objective  # type: ignore[attr-defined]
from bincomm.kernels import hamming, sign_bce  # type: ignore[attr-defined]

CAPABILITY = 90
MACHINES = (H100, H200)
WIDTHS = {"fp32": 4, "bf16": 2}  # bytes of a logit
LONG = {"fp32": "float32", "bf16": "bfloat16"}
SIGN_BCE = ((256, 256), (4096, 1024))  # n, K
SEARCH = (10_000, 100_000, 256)  # queries, messages, bits
CODING_RATE = ((2, 256, 256), (12, 256, 256), (12, 512, 512), (12, 1024, 1024))  # V, n, K
TILE = 32
PRODUCT_WARPS = 8
ROW_WARPS = 8  # of a block of the kernels that give a row to a warp
LOADS_OF_A_HALF = 4  # of the loop that fills half of a tile's rows
PART = 256  # side of what is swept at once
WIDE, WIDE_WARPS = 64, 4  # side of what a block computes if there are enough blocks, and its warps
ENOUGH = 2  # blocks for each multiprocessor

Row = dict[str, Any]


def all_rows() -> Iterator[Row]:
    """The figures of all launches."""
    yield from sign_bce_rows()
    yield from objective_rows()
    yield from search_rows()
    yield from coding_rate_rows()


def row(name: str, path: list[sass.Instruction], launch: Launch) -> Row:
    """The figures of a launch whose warps all take this path."""
    busy, issued = busy_cycles(path, launch.paired)
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


def sign_bce_rows() -> Iterator[Row]:
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
            yield row(title, list(sass.path(code, TRIPS[direction])), launch)


def objective_rows() -> Iterator[Row]:
    """What adds up sign_bce's partial sums: its own kernel, or that of the objective, which also weighs the
    rate, by the counts of another one."""
    for n, bits in SIGN_BCE:
        code = compile_all(CAPABILITY, bits, lambda name: name in ("reduce", "count fp32", "weigh"))
        sums, _, _ = sign_bce._programs(n, bits // 32, torch.float32)
        steps = -(-sums // sign_bce.REDUCE_BLOCK)
        usage, instructions = code["reduce"]
        launch = Launch(1, sign_bce.REDUCE_WARPS, usage["registers"], 0, 4 * sums)
        yield row(f"sign_bce reduce, {sums} partial sums", list(sass.path(instructions, {0: steps})), launch)
        usage, instructions = code["count fp32"]
        parts = -(-TEACHERS * n // objective.ROWS)
        blocks = parts * -(-bits // objective.COLUMNS)
        launch = Launch(blocks, 4, usage["registers"], 0, WIDTHS["fp32"] * TEACHERS * n * bits)
        title = f"({TEACHERS}, {n}, {bits})"
        yield row(f"count_ones {title} fp32", list(sass.path(instructions, {})), launch)
        usage, instructions = code["weigh"]
        trips = {0: steps, 1: -(-parts // objective.PARTS_AT_ONCE), 2: -(-bits // objective.BITS_AT_ONCE)}
        launch = Launch(1, objective.WEIGH_WARPS, usage["registers"], 0, 4 * (sums + parts * bits))
        yield row(f"weigh_rate {title}", list(sass.path(instructions, trips)), launch)


def search_rows() -> Iterator[Row]:
    """The two kernels of hamming_topk, for all queries."""
    queries, size, bits = SEARCH
    code = compile_all(CAPABILITY, bits, lambda name: name in ("hamming", "select"))
    stored = 2 * queries * size
    usage, instructions = code["hamming"]
    blocks = -(-queries // hamming.ROWS) * -(-size // hamming.COLUMNS)
    launch = Launch(blocks, hamming.WARPS, usage["registers"], 0, stored)
    title = f"({queries}, {size}) of {bits} bits"
    yield row(f"hamming_topk distances {title}", list(sass.path(instructions, {0: bits // 32})), launch)
    usage, instructions = code["select"]
    # Few steps of the second pass have a message that is near enough. One of the others, which only reads, is
    # counted as one of the first pass, which counts, too.
    steps = -(-size // hamming.SELECT_COLUMNS)
    path = list(sass.path(instructions, {0: 2 * steps, 1: 1}))
    launch = Launch(queries, hamming.WARPS, usage["registers"], 0, 2 * stored)
    yield row(f"hamming_topk selection {title}", path, launch)


def coding_rate_rows() -> Iterator[Row]:
    """The kernels of coding_rate for fp32, in the order of their launches."""
    functions = extension_code()
    for views, n, bits in CODING_RATE:
        of_images = int(n < bits)
        title = f"({views}, {n}, {bits}) fp32"
        side, logits = min(n, bits), 4 * views * n * bits
        products_move = logits + 4 * views * side**2
        code, registers = functions[("reciprocal_norms",)]
        launch = Launch(-(-views * n // ROW_WARPS), ROW_WARPS, registers, 0, logits)
        yield row(f"coding_rate reciprocal_norms {title}", norms_path(code, bits), launch)

        wide = [views * pairs(-(-side // WIDE)), views * -(-n // WIDE) * -(-bits // WIDE)]
        narrow = [views * pairs(-(-side // TILE)), views * -(-n // TILE) * -(-bits // TILE)]
        is_wide = [blocks >= ENOUGH * H100.multiprocessors for blocks in wide]
        blocks = [wide[i] if is_wide[i] else narrow[i] for i in range(2)]
        kernel = functions["gram", of_images, int(is_wide[0])]
        terms = max(n, bits)
        yield product_row(f"gram {title}", kernel, blocks[0], terms, products_move, is_wide[0])
        yield sweep_row(f"coding_rate sweep {title}", functions, views, side)
        if side > PART:
            yield from part_rows(title, functions, views, side)
        kernel = functions["direction", of_images, int(is_wide[1])]
        yield product_row(f"direction {title}", kernel, blocks[1], side, products_move, is_wide[1])

        # A lane adds up at most one part of g.z, for a tile, and has 8 of its bits at once.
        trips = {0: 1, 1: 0, 2: bits // (8 * TILE)}
        for adds in (0, 1) if views == TEACHERS else (0,):
            code, registers = functions["gradient", adds]
            launch = Launch(-(-views * n // ROW_WARPS), ROW_WARPS, registers, 0, (3 + adds) * logits)
            name = "gradient, added" if adds else "gradient"
            yield row(f"coding_rate {name} {title}", list(sass.path(code, trips)), launch)


Function = tuple[list[sass.Instruction], int]  # and registers
Functions = dict[tuple[str | int, ...], Function]


def pairs(number: int) -> int:
    """Of indices i >= j."""
    return number * (number + 1) // 2


def product_row(name: str, kernel: Function, blocks: int, terms: int, moved: int, is_wide: bool) -> Row:
    """Of a product that sums over so many terms. Nearly all its work is done in steps of one tile."""
    code, registers = kernel
    if is_wide:
        return wide_row(name, step_of(code, is_wide), registers, blocks, -(-terms // TILE), moved)
    warps = min(PRODUCT_WARPS, -(-terms // TILE))
    steps = -(-terms // (TILE * warps))
    launch = Launch(blocks, warps, registers, 2 * warps * 4 * TILE * TILE, moved, steps * ALL_PAIRED)
    return row(f"coding_rate {name}", steps * step_of(code, is_wide), launch)


def wide_row(
    name: str, step: list[sass.Instruction], registers: int, blocks: int, steps: int, moved: int
) -> Row:
    """Of blocks that compute 2 x 2 tiles each, in so many steps."""
    launch = Launch(blocks, WIDE_WARPS, registers, 8 * 4 * TILE * TILE, moved, steps * ALL_PAIRED)
    return row(f"coding_rate {name}", steps * step, launch)


def part_rows(title: str, functions: "Functions", views: int, side: int) -> Iterator[Row]:
    """The two products after the sweep of a part, which leave out what is zero: the mean of all blocks.

    What they fill from has no loop that is found; it is as long as that of `direction`.
    """
    step = step_of(functions["direction", 0, 1][0], True)
    inside, outside, tiles = PART // WIDE, (side - PART) // WIDE, PART // TILE
    factor_steps = [tiles - 2 * i for i in range(inside)]  # W has zeros in the others
    blocks = outside * inside
    steps = -(-sum(factor_steps) // inside)
    matrix, panel = 4 * views * side**2, 4 * views * side * PART
    registers = functions[("panel",)][1]
    yield wide_row(f"panel {title}", step, registers, views * blocks, steps, 2 * panel)
    total = pairs(outside) * tiles + blocks * steps + sum((i + 1) * s for i, s in enumerate(factor_steps))
    blocks += pairs(outside) + pairs(inside)
    registers = functions[("update",)][1]
    yield wide_row(
        f"update {title}", step, registers, views * blocks, -(-total // blocks), 3 * matrix // 2 + panel
    )


def step_of(code: list[sass.Instruction], is_wide: bool) -> list[sass.Instruction]:
    """What a warp does for a tile of both factors: the loops that fill them 16 bytes at a time, the product.
    A warp of four that share their tiles fills one, and waits for the others.

    They are known by what they contain: the code around them is for sizes that are no multiples of a tile.
    """
    products = sass.innermost_loops(code, "FFMA", FFMA_OF_A_QUARTER)
    fills = sass.innermost_loops(code, "LDG.E.128", LOADS_OF_A_HALF)
    if len(products) != 1 or len(fills) not in (1, 2):
        raise SystemExit("the model no longer fits the code of coding_rate's products")
    if is_wide:
        barrier = [i for i in code if i.name == "BAR"][:1]
        filling = [i for _ in range(2) for i in sass.within(code, fills[0])]
        return filling + barrier + QUARTERS * sass.within(code, products[0])
    # Where there is one loop that fills, the other is unrolled, and as long.
    loops = 2 * [fills[0]] + 2 * [fills[-1]] + QUARTERS * products
    return [instruction for loop in loops for instruction in sass.within(code, loop)]


def norms_path(code: list[sass.Instruction], bits: int) -> list[sass.Instruction]:
    """Loads of a row's bits, 16 at a time; without the code for fewer, which follows."""
    (_, end), last = sass.loops(code)[1], max(i.address for i in code if i.name == "LDG")
    needed = [i for i in code if not end < i.address <= last]
    return list(sass.path(needed, {0: 0, 1: -(-bits // (16 * TILE))}))


def sweep_row(name: str, functions: "Functions", views: int, side: int) -> Row:
    """Of the inversion, or of a part of a larger matrix: a cluster of blocks for each matrix, and a
    multiprocessor for each block."""
    along, swept = 2, min(side, PART)
    code, registers = functions["sweep", along, int(side > PART)]
    parts = sweep_cycles(code, -(-swept // TILE), along)
    cycles = round(sum(parts.values()))
    launch = Launch(views * along**2, WARPS, registers, 0, 8 * views * swept**2)
    rounds = {m.name: -(-views // (m.multiprocessors // along**2)) for m in MACHINES}
    return {
        "kernel": name,
        "blocks": launch.blocks,
        "registers": registers,
        "executed": None,
        "busy_cycles": None,
        "latency_cycles": cycles,
        "floor_us": {m.name: 1e6 * launch.moved / m.bandwidth for m in MACHINES},
        "us": {m.name: elapsed(rounds[m.name] * cycles, launch, m) for m in MACHINES},
        "parts": {part: round(count) for part, count in parts.items()},
    }


def extension_code() -> Functions:
    """Of coding_rate's kernels in `bincomm._C`, fp32, by name and numbers among a template's arguments."""
    found = importlib.util.find_spec("bincomm._C")
    if found is None or found.origin is None:
        raise SystemExit("bincomm._C is not built")
    extension = found.origin

    def dump(option: str) -> str:
        command = [str(TOOLS / "cuobjdump"), option, "-arch", f"sm_{CAPABILITY}", extension]
        return subprocess.check_output(command, text=True)

    def key(match: re.Match[str]) -> tuple[str | int, ...]:
        return match[1], *map(int, re.findall(r"L[bi](\d)E", match[2] or ""))

    name = r"coding_rate_(\w+?)_kernel(?:If?((?:L[bi]\dE)*)E|E)"
    registers = {
        key(match): int(match[3])
        for match in re.finditer(rf"Function \S*{name}\S*:\s+REG:(\d+)", dump("-res-usage"))
    }
    return {
        key(match): (sass.parse(part), registers[key(match)])
        for part in dump("-sass").split("Function : ")[1:]
        if (match := re.match(rf"\S*?{name}", part))
    }

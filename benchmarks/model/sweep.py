"""Cycles of coding_rate's inversion, whose blocks wait for each other: part after part, the slowest counts.

The parts of the code are known by what they contain: loops, and barriers between the blocks. A warp that does
something alone is counted as if the others did not disturb it.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping

from benchmarks.model import sass
from benchmarks.model.machine import BARRIER, CLUSTER_BARRIER, PARTS, REMOTE_BYTES, busy_cycles, latency
from benchmarks.model.sass import Range, around, innermost_loops, within

Code = list[sass.Instruction]

WARPS = 16  # of a block
TILE_BYTES = 4 * 32 * 32
FILLS = 4  # of a tile, 8 rows each
# Of the loop for a product of two tiles: it runs four times, and lanes read in pairs by 8 of its 24 loads,
# with the lanes of the other kernels by all.
QUARTERS, FFMA_OF_A_QUARTER, PAIRED, ALL_PAIRED = 4, 256, 32, 96


def sweep_cycles(code: Code, tiles: int, side: int) -> dict[str, float]:
    """For a matrix of tiles x tiles by a cluster of side x side blocks, side > 1: {part: cycles}."""
    try:
        return _cycles(code, tiles, side)
    except (IndexError, KeyError, ValueError) as error:
        raise SystemExit("the model no longer fits the code of coding_rate's inversion") from error


def _cycles(code: Code, tiles: int, side: int) -> dict[str, float]:
    end = code[-1].address
    # Two barriers between blocks are in the loop over the diagonal's tiles, the third is after it.
    first, second, last = (i.address for i in code if i.name == "UCGABAR_WAIT")
    steps = around(code, (first, second))
    opening, closing = within(code, (0, steps[0] - 1)), within(code, (last, end))
    panels, updates = within(code, (first, second)), within(code, (second, steps[1]))

    # What a warp does for a tile, for a panel's tile, and where another warp has the tile.
    load = around(opening, innermost_loops(opening, "LDG", 8)[0])
    panel = around(panels, innermost_loops(panels, "FFMA", FFMA_OF_A_QUARTER)[0])
    ahead, product = innermost_loops(updates, "FFMA", FFMA_OF_A_QUARTER)
    update = around(updates, product)
    fetch = around(updates, innermost_loops(updates, "LD.E", 4)[0])
    load_tile = warp_path(opening, load, {0: FILLS, 1: 1})
    panel_tile = warp_path(panels, panel, {0: QUARTERS, 1: 0, 2: 1})
    update_tile = warp_path(updates, update, {0: QUARTERS, 1: 1})
    passing = latency(warp_path(updates, update, {0: 0, 1: 1}))
    # What one warp does alone: the next tile of the diagonal, while others update theirs.
    first_factor = latency(warp_path(opening, (last_barrier(opening, steps[0]), steps[0]), {}))
    begin = last_barrier(updates, ahead[0])
    whole = innermost_loops(closing, "STG", 16)
    if not whole:  # a part, of which W is stored first, two rows of each tile by a warp
        stored = innermost_loops(updates, "STG", 2)[0]
        store_rows = warp_path(updates, stored, {0: 1})
        begin = around(updates, stored)[1] + 1
    before_others = begin, around(updates, update)[0] - 1
    factor = latency(warp_path(updates, before_others, {0: QUARTERS}))

    owned = Counter((i % side, j % side) for i in range(tiles) for j in range(i + 1))
    most = max(owned.values())
    update_all = shared_out(update_tile, most, PAIRED) + most * passing
    cycles: defaultdict[str, float] = defaultdict(float)
    cycles["load and store"] = shared_out(load_tile, most)
    rest = last
    if whole:
        store = around(closing, whole[0])
        cycles["load and store"] += shared_out(warp_path(closing, store, {0: FILLS, 1: 1}), most)
        rest = around(closing, store)[1] + 1
    cycles["load and store"] += latency(warp_path(closing, (rest, end), {0: tiles // 4, 1: 0}))
    cycles["factor"] = first_factor
    cycles["barriers"] = tiles * 2 * (CLUSTER_BARRIER + BARRIER) + CLUSTER_BARRIER
    # W goes from its block to those that have tiles of its row or column.
    cycles["W"] = tiles * max(latency(one_load(panels)), 2 * (side - 1) * TILE_BYTES / REMOTE_BYTES)
    for k in range(tiles):
        makers = {i: maker(i, k, side) for i in range(tiles) if i != k}
        moves = [
            (source, reader)
            for reader in itertools.product(range(side), repeat=2)
            for i, source in makers.items()
            if i % side in reader and source != reader
        ]
        sent, received = (max(Counter(blocks).values()) for blocks in zip(*moves, strict=True))
        made = max(Counter(makers.values()).values())
        cycles["panels"] += shared_out(panel_tile, made, PAIRED)
        if not whole:
            cycles["load and store"] += made * latency(store_rows)
        one_by_one = received * latency(one_load(within(updates, fetch)))
        cycles["fetch"] += max(one_by_one, max(sent, received) * TILE_BYTES / REMOTE_BYTES)
        if k + 1 < tiles and factor > update_all:
            cycles["factor"] += factor
        else:
            cycles["updates"] += update_all
    return dict(cycles)


def maker(i: int, k: int, side: int) -> tuple[int, int]:
    """The block that computes the panel's tile i at step k."""
    return (i % side, k % side) if i > k else (k % side, i % side)


def shared_out(path: Code, tiles: int, paired: int = 0) -> float:
    """Cycles of a block whose warps take this path for each of its tiles."""
    return max(-(-tiles // WARPS) * latency(path), tiles * busy_cycles(path, paired)[0] / PARTS)


def warp_path(code: Code, addresses: Range, trips: Mapping[int, int]) -> Code:
    """`sass.path` through a part."""
    return list(sass.path(within(code, addresses), trips))


def last_barrier(code: Code, before: int) -> int:
    """The address of a block's last barrier."""
    return [i.address for i in code if i.name == "BAR" and i.address < before][-1]


def one_load(code: Code) -> Code:
    """From the start past what waits for a load from another block: others, for larger tiles, follow it."""
    second = [place for place, i in enumerate(code) if i.name == "LD"][1]
    return code[:second]

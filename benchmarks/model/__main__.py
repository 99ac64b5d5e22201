"""Times of the kernels on GPUs that are not there, by a model: python -m benchmarks.model RESULTS

Writes RESULTS.json and RESULTS.md. --check compares with what RESULTS.json holds, and fails where a kernel
has become slower by more than a tenth.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from benchmarks.model.launches import CAPABILITY, MACHINES, PART, Row, all_rows
from bincomm.files import write_json, write_text

SLOWER = 1.1
COLUMNS = ("blocks", "registers", "executed", "busy_cycles", "latency_cycles")
SWEEP_PARTS = ("load and store", "barriers", "W", "panels", "fetch", "factor", "updates")


def main() -> int:
    """Write the table, or check it; 1 where a kernel became slower."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results are written to this name .json and .md")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args()
    path = options.results.with_suffix(".json")
    rows = list(all_rows())
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


def page(rows: list[Row], versions: dict[str, str]) -> str:
    """The Markdown page."""
    names = [m.name for m in MACHINES]
    head = ["kernel", "blocks", "registers", "executed by a warp", "busy cycles", "latency, cycles"]
    head += [f"{name}: floor of memory, µs" for name in names] + [f"{name}: µs" for name in names]
    kernels = [
        [each["kernel"]]
        + ["–" if each[key] is None else str(each[key]) for key in COLUMNS]
        + [f"{each[key][name]:.1f}" for key in ("floor_us", "us") for name in names]
        for each in rows
    ]
    us = {each["kernel"]: each["us"] for each in rows}
    sums = []
    for title, added, goal in totals():
        times = [sum(us[kernel][name] for kernel in added) for name in names]
        aim = ["–", "–"] if goal is None else [str(goal), "yes" if max(times) <= goal else "no"]
        sums.append([title, str(len(added)), *(f"{time:.0f}" for time in times), *aim])
    sweeps = [each for each in rows if "parts" in each]
    parts = [[each["kernel"], *(str(each["parts"].get(part, 0)) for part in SWEEP_PARTS)] for each in sweeps]
    return f"""# Kernels by a model, not measured

`python -m benchmarks.model benchmarks/results/model`, machine code for sm_{CAPABILITY}, triton \
{versions["triton"]}, torch {versions["torch"]}. **Nothing here was measured.** The error is unknown until \
it is compared with figures of a GPU; what is assumed is said in [machine.py](../model/machine.py).

{table(head, kernels)}
## Sums

Forward and backward with the gaps between launches in a CUDA graph, fp32, and what is aimed at.

{table(["", "kernels", *(f"{name}: µs" for name in names), "goal, µs", "met by the model"], sums)}
## The inversion

Cycles of a matrix, or of a part of 256 of its diagonal if it is larger. It has a cluster of 4 blocks; the \
GPUs hold 33 of them at once. W and the panels that are fetched come from other blocks. One warp factors the \
next tile of the diagonal while the others update theirs; the longer of both is counted, step by step.

{table(["", *SWEEP_PARTS], parts)}"""


def totals() -> Iterator[tuple[str, list[str], int | None]]:
    """What is summed up: title, kernels, and in µs what is aimed at."""

    def rate(size: str, *kernels: str) -> list[str]:
        return [f"coding_rate {kernel} {size} fp32" for kernel in kernels]

    both = ("reciprocal_norms", "gram", "sweep", "direction", "gradient")
    yield "coding_rate (12, 256, 256)", rate("(12, 256, 256)", *both), 100
    yield "coding_rate (2, 256, 256)", rate("(2, 256, 256)", *both), 70
    in_parts = ("sweep", "panel", "update")
    larger = [kernel for kernel in both if kernel != "sweep"]
    for side in (512, 1024):
        size = f"(12, {side}, {side})"
        yield f"coding_rate {size}", rate(size, *larger, *(side // PART * in_parts)), None
    yield f"coding_rate inversion {size}", rate(size, *(side // PART * in_parts)), 500
    for kernel in ("gram", "direction"):
        yield f"coding_rate {kernel} {size}", rate(size, kernel), 600
    objective = [f"sign_bce {direction} (12, 2, 256, 256) fp32" for direction in ("forward", "backward")]
    objective += ["count_ones (2, 256, 256) fp32", "weigh_rate (2, 256, 256)"]
    objective += rate("(2, 256, 256)", *both[:-1], "gradient, added")
    yield "the objective (12, 2, 256, 256)", objective, None


def table(head: list[str], lines: list[list[str]]) -> str:
    """In Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


if __name__ == "__main__":
    sys.exit(main())

"""Make results/NAME.json, .md and .png of pytest-benchmark's file: python report.py RAW.json results/NAME"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

DIRECTIONS = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward + backward",
    "search": "search",
}
AXES = ("V", "n", "K")  # of the scaling benchmark


def record_of(result: dict) -> dict:
    """One figure: its labels, and its times in ms as 20, 50 and 80 % of the rounds."""
    extra = dict(result["extra_info"])
    rounds = sorted(1e3 * t for t in result["stats"]["data"])
    at = lambda share: rounds[min(len(rounds) - 1, int(share * len(rounds)))]  # noqa: E731
    wall = {"p20": at(0.2), "p50": 1e3 * result["stats"]["median"], "p80": at(0.8)}
    eager, graph = extra.pop("eager", None), extra.pop("graph", None)
    return {**extra, "wall_ms": wall, "eager_ms": eager, "graph_ms": graph, "rounds": len(rounds)}


def milliseconds(record: dict) -> float:
    """The median in a table: by CUDA events if there are any, else by the clock."""
    return (record["eager_ms"] or record["wall_ms"])["p50"]


def page(results: dict, name: str) -> str:
    """The Markdown page."""
    m = results["machine"]
    lines = [
        "# Operations, measured",
        "",
        f"`make {'bench' if m['device'] == 'CPU' else 'gpu-tables'}` on {results['date']}: {m['device']}, "
        f"{m['cpu']}, {m['threads']} threads, {m['instruction_set']}, Python {m['python']}, "
        f"torch {m['torch']}, bincomm {m['bincomm']}.",
        "Medians in milliseconds, bincomm's with 20 % and 80 % of the rounds, a peer's also as a multiple of "
        "it; a table was measured in one session, each result compared with fp64 before it was timed.",
        f"All figures, with errors and rounds: [{name}.json]({name}.json).",
    ]
    if m["device"] == "CPU":
        lines.append(
            "The allocator keeps freed memory; otherwise every new large tensor costs page faults, "
            "bincomm's and a peer's."
        )
    else:
        lines.append(
            "Times are CUDA events from an idle GPU with its second-level cache flushed; copy bandwidth of "
            f"the session {m['copy_bandwidth'] / 1e12:.2f} TB/s, read and write together."
        )
    lines += ["", f"![Times over sizes, and how they grow]({name}.png)"]
    tables: dict[tuple, dict[tuple, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for record in results["records"]:
        title = (record["table"], record["dtype"], record["direction"])
        tables[title][tuple(record["shape"])][record["contender"]] = record
    for (table, dtype, direction), rows in tables.items():
        if table.endswith("scaling"):
            continue
        lines += ["", f"## {table}, {dtype}, {DIRECTIONS[direction]}", ""]
        contenders = list(dict.fromkeys(contender for row in rows.values() for contender in row))
        extra = ["CUDA graph", "share of copy bandwidth, graph"] if m["copy_bandwidth"] else []
        header = ["shape", *contenders[:1], *extra, *contenders[1:]]
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for shape, row in rows.items():
            cells = [" × ".join(map(str, shape))]
            for contender in contenders:
                record = row.get(contender)
                cells.append(time_of(record, row["bincomm"]) if record else "")
                if record and contender == "bincomm" and extra:
                    cells += graph_of(record, m["copy_bandwidth"])
            lines.append(f"| {' | '.join(cells)} |")
        if direction == "both":
            lines += ["", "Most memory held at once, in sizes of the gradient:", ""]
            lines += [f"| shape | {' | '.join(contenders)} |", "|---" * (len(contenders) + 1) + "|"]
            width = 2 if dtype == "bf16" else 4
            for shape, row in rows.items():
                shares = [
                    f"{row[c]['peak_memory'] / (width * row[c]['elements']):.2f}" if c in row else ""
                    for c in contenders
                ]
                lines.append(f"| {' × '.join(map(str, shape))} | {' | '.join(shares)} |")
    lines += scaling_table(results["records"])
    return "\n".join(lines) + "\n"


def time_of(record: dict, bincomm: dict) -> str:
    """A cell of a table."""
    if record is bincomm:
        times = record["eager_ms"] or record["wall_ms"]
        return f"{times['p50']:.3g} ({times['p20']:.3g} – {times['p80']:.3g})"
    return f"{milliseconds(record):.3g} · {milliseconds(record) / milliseconds(bincomm):.1f}×"


def graph_of(record: dict, bandwidth: float) -> list[str]:
    """Two cells: time of a graph's replay, and the share of the bandwidth of a copy that it reaches."""
    if not isinstance(record["graph_ms"], dict):
        return [record["graph_ms"] or "", ""]
    took = record["graph_ms"]["p50"]
    share = f"{record['moved'] / (took / 1e3) / bandwidth:.0%}" if record["moved"] else ""
    return [f"{took:.3g}", share]


def scaling(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """For V, n and K: pairs of size and time."""
    points = defaultdict(list)
    for record in (r for r in records if r["table"].endswith("scaling")):
        views, _, n, bits = record["shape"]
        size = {"V": views, "n": n, "K": bits}
        others = {"V": (16, 256), "n": (8, 256), "K": (8, 16)}
        for axis in AXES:
            if tuple(size[other] for other in AXES if other != axis) == others[axis]:
                points[axis].append((size[axis], milliseconds(record)))
    return {axis: sorted(points[axis]) for axis in points}


def scaling_table(records: list[dict]) -> list[str]:
    """Time against size, as the exponent between the neighboring sizes of the last two decades."""
    points = scaling(records)
    if not points:
        return []
    lines = ["", "## sign_bce, fp32, forward + backward: growth", ""]
    lines += ["From 8 × 2 × 16 × 256 over three decades; exponent e of time ∝ sizeᵉ between two sizes.", ""]
    for axis in AXES:
        steps = [
            f"{a} → {b}: {math.log(t / s) / math.log(b / a):.2f}"
            for (a, s), (b, t) in zip(points[axis], points[axis][1:], strict=False)
        ]
        lines.append(f"- {axis}: {', '.join(steps)}")
    return lines


def plot(records: list[dict], target: Path) -> None:
    """Times of all contenders over sizes, and bincomm's over V, n and K."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    peers, growth = figure.subplots(1, 2)
    lines = defaultdict(list)
    for record in records:
        if (record["table"], record["dtype"], record["direction"]) == ("sign_bce", "fp32", "both"):
            lines[record["contender"]].append((record["elements"], milliseconds(record)))
    for contender, points in lines.items():
        peers.plot(*zip(*sorted(points), strict=True), "o-", label=contender)
    peers.set(title="sign_bce, fp32, forward + backward", xlabel="logits V·n·K", ylabel="ms")
    for axis, points in scaling(records).items():
        growth.plot(*zip(*points, strict=True), "o-", label=f"over {axis}")
    growth.set(title="sign_bce over V, n and K, from 8 × 2 × 16 × 256", xlabel="size", ylabel="ms")
    for axes in (peers, growth):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    raw = json.loads(source.read_text())
    info = raw["machine_info"]
    machine = {**info["bincomm"], "cpu": info["cpu"].get("brand_raw", "unknown CPU")}
    machine["python"] = info["python_version"]
    results = {
        "machine": machine,
        "date": raw["datetime"][:10],
        "records": [record_of(result) for result in raw["benchmarks"]],
    }
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    target.with_suffix(".md").write_text(page(results, target.name))
    plot(results["records"], target.with_suffix(".png"))
    print(target.with_suffix(".md").read_text())

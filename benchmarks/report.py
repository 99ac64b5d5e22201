"""Make the page kept in results/ of pytest-benchmark's JSON: python report.py RAW.json results/cpu.md"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def table(raw: dict, target: Path) -> str:
    """The Markdown page of one session's figures; times are medians and quartiles of the rounds, in ms."""
    info = raw["machine_info"]
    facts = info["bincomm"]
    cpu = info["cpu"].get("brand_raw", "unknown CPU")
    command = "make gpu-bench" if target.stem == "gpu" else "make bench"
    lines = [
        "# Operations, measured",
        "",
        f"`{command}` on {raw['datetime'][:10]}: {facts['device']}, {cpu}, {facts['threads']} threads, "
        f"{facts['instruction_set']}, Python {info['python_version']}, torch {facts['torch']}, "
        f"bincomm {facts['bincomm']}. Medians of 40 rounds after 5 to warm up; all contenders of a table "
        "ran in one session. *Error* is the gradient's against fp64, checked before the timing.",
    ]
    groups = defaultdict(list)
    for result in raw["benchmarks"]:
        groups[result["group"]].append(result)
    for group, results in groups.items():
        ours = next(r["stats"]["median"] for r in results if r["extra_info"]["contender"] == "bincomm")
        lines += [
            "",
            f"## {group}",
            "",
            "| | ms | quartiles | times bincomm | error |",
            "|---|---|---|---|---|",
        ]
        for result in results:
            s = result["stats"]
            lines.append(
                f"| {result['extra_info']['contender']} | {1e3 * s['median']:.3f} "
                f"| {1e3 * s['q1']:.3f} – {1e3 * s['q3']:.3f} | {s['median'] / ours:.1f} "
                f"| {result['extra_info']['error']:.0e} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    page = table(json.loads(source.read_text()), target)
    target.parent.mkdir(exist_ok=True)
    target.write_text(page)
    print(page)

"""What a machine with a GPU has to tell, in less than ten minutes: python -m benchmarks.gpu RESULTS

Stages follow one another, each in a process of its own with a limit of time; one that fails or runs out of
time does not stop the next. Every figure becomes a line of RESULTS.jsonl as soon as it is measured.
RESULTS.md, the page of these lines, is written after every stage, and so by what was interrupted, too. Of a
stage that was run several times the page has the last.

--dry rehearses without a GPU: every stage starts, does what can be done without one, and has as much time as
it needs; its page is build/gpu/rehearsal.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bincomm.files import write_text

Line = dict[str, Any]

SECONDS = {"ceilings": 30, "build": 90, "tests": 150, "operations": 100, "sanitizer": 50, "step": 90}
LOGS = Path("build", "gpu")  # what the stages print
TITLE = "# On a GPU, measured"
TAIL = 15  # lines of it that are kept of a stage that failed


def main() -> int:
    """Run the stages; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results are written to this name .jsonl and .md")
    parser.add_argument(
        "--stages", default=",".join(SECONDS), help="of these, by commas; default: %(default)s"
    )
    parser.add_argument("--dry", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args()
    stages = [stage for stage in options.stages.split(",") if stage]
    if unknown := sorted(set(stages) - SECONDS.keys()):
        parser.error(f"--stages: expected some of {', '.join(SECONDS)}, got {', '.join(unknown)}")
    results = LOGS / "rehearsal" if options.dry else options.results
    results.parent.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    lines = Lines(results.with_suffix(".jsonl"))
    failed = False
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for stage in stages:
            status = run(stage, lines, options.dry)
            failed |= status != "passed"
            write(results, lines)
    finally:
        signal.signal(signal.SIGTERM, before)
        write(results, lines)
        print(results.with_suffix(".md").read_text())
    return int(failed)


class Lines:
    """The figures of a file, one JSON object a line; each is on the disk when `add` returns."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, stage: str, **figures: Any) -> None:
        """Append a line."""
        line = {"stage": stage, "time": datetime.now().isoformat(timespec="seconds"), **figures}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> dict[str, list[Line]]:
        """The lines of the last run of every stage; a line that was cut off is left out."""
        last: dict[str, list[Line]] = defaultdict(list)
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line.get("what") == "begin":
                last[line["stage"]] = []
            last[line["stage"]].append(line)
        return {stage: last[stage] for stage in SECONDS if stage in last}


def run(stage: str, lines: Lines, dry: bool) -> str:
    """Run a stage to its end, or to that of its time; returns how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu_stages", stage, str(lines.path)]
    command += ["--dry"] if dry else []
    log = LOGS / f"{stage}.log"
    limit = None if dry else SECONDS[stage]
    print(f"{stage} ... ({'' if dry else f'at most {limit} s; '}{log})", flush=True)
    lines.add(stage, what="begin", dry=dry)
    started = time.perf_counter()
    status = "interrupted"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            status = "ran out of time"
        finally:  # a signal that ends this program, too
            stop(process)
            took = time.perf_counter() - started
            end: Line = {"what": "end", "status": status, "seconds": round(took, 1)}
            if status != "passed":
                end["tail"] = log.read_text(errors="replace").splitlines()[-TAIL:]
            lines.add(stage, **end)
    print(f"{stage} {status}, {took:.0f} s", flush=True)
    return status


def stop(process: subprocess.Popen) -> None:
    """End a stage with everything that it has started."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def write(results: Path, lines: Lines) -> None:
    """Write the page."""
    write_text(results.with_suffix(".md"), page(results.name, lines.read()))


def page(name: str, stages: dict[str, list[Line]]) -> str:
    """The Markdown page of the lines of every stage."""
    if not stages:
        return f"{TITLE}\n\nNot measured yet. `make gpu` on a machine with a GPU writes this page.\n"
    machines = dict.fromkeys(
        line["words"] for lines in stages.values() for line in lines if line["what"] == "machine"
    )
    dates = sorted({line["time"][:10] for lines in stages.values() for line in lines})
    text = [
        TITLE,
        "",
        f"`make gpu` on {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: "
        f"{'; '.join(machines) or 'no stage began'}. All figures: [{name}.jsonl]({name}.jsonl).",
        "",
        "| stage | result | seconds |",
        "|---|---|---|",
    ]
    for stage in SECONDS:
        lines = stages.get(stage, [])
        end = next((line for line in lines if line["what"] == "end"), None)
        dry = " (a rehearsal without a GPU)" if any(line.get("dry") for line in lines) else ""
        if not lines:
            text.append(f"| {stage} | not measured |  |")
        else:
            status = end["status"] if end else "did not end"
            text.append(f"| {stage} | {status}{dry} | {end['seconds'] if end else ''} |")
    for stage, lines in stages.items():
        figures = [line for line in lines if line["what"] not in ("begin", "machine", "end")]
        section = SECTIONS.get(stage, plain_section)(figures, stages)
        tail = [each for line in lines for each in line.get("tail", ())]
        if section or tail:
            text += ["", f"## {stage.capitalize()}", "", *section]
        if tail:
            text += [*([""] if section else []), "```text", *tail, "```"]
    return "\n".join(text) + "\n"


def plain_section(figures: Sequence[Line], stages: dict[str, list[Line]]) -> list[str]:
    """A list of the figures."""
    return [f"- {line['what']}: {line['words']}" for line in figures]


def tests_section(figures: Sequence[Line], stages: dict[str, list[Line]]) -> list[str]:
    """How many tests passed, and those that did not."""
    outcomes: dict[str, list[Line]] = defaultdict(list)
    for line in figures:
        outcomes[line["outcome"]].append(line)
    if not outcomes:
        return []
    counts = ", ".join(f"{len(lines)} {outcome}" for outcome, lines in outcomes.items())
    failures = [f"- {line['what']}: {line['reason']}" for line in outcomes["failed"]]
    reasons = dict.fromkeys(line["reason"] for line in outcomes["skipped"])
    return [
        f"{counts}.",
        *(["", "Failed:", "", *failures] if failures else []),
        *(["", "Skipped:", "", *(f"- {reason}" for reason in reasons)] if reasons else []),
    ]


def operations_section(figures: Sequence[Line], stages: dict[str, list[Line]]) -> list[str]:
    """Microseconds of the replay of a CUDA graph, ours beside the peers'."""
    copy = next((x["bytes_per_second"] for x in stages.get("ceilings", ()) if x["what"] == "copy"), None)
    rows: dict[tuple[str, str], dict[str, Line]] = defaultdict(dict)
    text = []
    for line in figures:
        if "graph_us" in line or "error" in line:
            rows[line["what"], line["direction"]][line["contender"]] = line
        else:
            text.append(f"- {line['what']}: {line['words']}")
    if not rows:
        return text
    if copy:
        intro = f"copy bandwidth {copy / 1e12:.2f} TB/s, read and write together"
    else:
        intro = "copy bandwidth not measured"
    text += [
        *([""] if text else []),
        "Replay of a CUDA graph, second-level cache flushed before each; medians in µs, in brackets 20 % and "
        f"80 %; each compared with fp64 before it was timed; {intro}. Peers are eager PyTorch, captured "
        "alike.",
        "",
        "| operation | direction | bincomm | share of copy | peers |",
        "|---|---|---|---|---|",
    ]
    for (what, direction), contenders in rows.items():
        ours = contenders.get("bincomm")
        peers = "; ".join(
            f"{name}: {time_of(line)}{factor(line, ours)}"
            for name, line in contenders.items()
            if name != "bincomm"
        )
        share = ""
        if ours and copy and ours.get("moved") and isinstance(ours.get("graph_us"), dict):
            share = f"{ours['moved'] / (ours['graph_us']['p50'] * 1e-6) / copy:.0%}"
        text.append(f"| {what} | {direction} | {time_of(ours)} | {share} | {peers} |")
    return text


def time_of(line: Line | None) -> str:
    """A cell: µs, or why there are none."""
    if line is None:
        return "not measured"
    if "error" in line:
        return line["error"]
    if not isinstance(line["graph_us"], dict):  # it cannot be captured
        return f"no graph: {line['graph_us']}"
    p20, p50, p80 = (line["graph_us"][key] for key in ("p20", "p50", "p80"))
    return f"{p50:.3g} ({p20:.3g} – {p80:.3g})"


def factor(line: Line, ours: Line | None) -> str:
    """How many times as long as ours a peer takes."""
    took, own = (each.get("graph_us") if each else None for each in (line, ours))
    if not isinstance(took, dict) or not isinstance(own, dict):
        return ""
    return f" · {took['p50'] / own['p50']:.1f}×"


SECTIONS = {"tests": tests_section, "operations": operations_section}


if __name__ == "__main__":
    raise SystemExit(main())

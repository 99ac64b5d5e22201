"""Benchmarks of many runs, which can be interrupted: what a run gave is stored as soon as it ends."""

import argparse
import json
import re
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from benchmarks.measuring import in_words, machine
from bincomm.evaluation.evaluate import figure
from bincomm.files import write_file, write_json, write_text
from bincomm.pretraining import Interrupted

Records = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One measurement, of one run or two.

    `keys` is all that determines it, of JSON's types and without paths; `measure` takes a folder for its
    runs and returns its figures, and `line` says them in a few words.
    """

    name: str
    keys: dict[str, Any]
    measure: Callable[[Path], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]


def create_parser(description: str | None, sources: int | str) -> argparse.ArgumentParser:
    """A parser of the arguments of every such benchmark, with so many sources of images, NAME=PATH each."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results are written to this name .json and .md")
    parser.add_argument("--only", metavar="REGEX", default="", help="measure the cells whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of the cells; measure nothing")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a key of all runs, such as device=cuda or recipe=photos_cpu; may be repeated",
    )
    parser.add_argument(
        "sources", metavar="NAME=PATH", help="images: anything that --data of bincomm takes", nargs=sources
    )
    return parser


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as a dict.

    Raises:
        SystemExit: an argument is not of this form.
    """
    for argument in arguments:
        if not re.match(r"\w+=.", argument):
            raise SystemExit(f"expected NAME=VALUE, got {argument!r}")
    return dict(argument.split("=", 1) for argument in arguments)


def given_keys(options: argparse.Namespace) -> dict[str, Any]:
    """The keys that --set gives."""
    return {key: yaml.safe_load(value) for key, value in pairs(options.set).items()}


class Session:
    """Measures cells that are not in the results yet, and writes the results after each of them.

    A stored cell is measured again only if its keys have changed, or if it failed and --retry is given.

    Args:
        module: the benchmark's name for `python -m`.
        options: of `create_parser`.
        page: the Markdown page of the records, which are in the order of the cells.
        plot: a figure of them; None before there is anything to draw.
    """

    def __init__(
        self,
        module: str,
        options: argparse.Namespace,
        page: Callable[[Records], str],
        plot: Callable[[Records], Figure | None] = lambda records: None,
    ):
        self.module, self.options, self.page, self.plot = module, options, page, plot
        self.only = re.compile(options.only)
        self.path = options.results
        self.order: list[str] = []
        stored = self.path.with_suffix(".json")
        self.records: Records = json.loads(stored.read_text())["records"] if stored.exists() else {}

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure these cells. `records` then has, for each by its name, its keys, what measured it and
        "figures", or "error" for one that failed.

        Raises:
            SystemExit: a signal came; the run it interrupted is resumed by the same command.
        """
        self.order += [cell.name for cell in cells]
        for cell in cells:
            if not self.only.search(cell.name):
                continue
            if self.options.list:
                print(cell.name)
            elif not self.is_stored(cell):
                self.records[cell.name] = self.measure(cell)
                self.write()

    def is_stored(self, cell: Cell) -> bool:
        """Whether there is nothing to do for a cell."""
        stored = self.records.get(cell.name)
        if stored is None or stored["keys"] != as_json(cell.keys):
            return False
        return not ("error" in stored and self.options.retry)

    def figures(self, cell: Cell) -> dict[str, Any] | None:
        """What is stored of a cell; None where it is not measured, or failed."""
        return self.records[cell.name].get("figures") if self.is_stored(cell) else None

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell. Its folder, which an interrupted run is resumed in, is removed."""
        folder = self.folder(cell.name, cell.keys)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "keys": as_json(cell.keys),
            "date": date.today().isoformat(),
            "machine": machine("bincomm", "torch", "timm"),
            "command": self.command(),
        }
        started = time.perf_counter()
        try:
            figures = cell.measure(folder)
            record["figures"] = as_json(figures)
            words = cell.line(figures)
        except Interrupted:
            raise SystemExit(f"{cell.name}: interrupted; the same command goes on with it") from None
        except Exception as error:  # whatever it is, the other cells shall be measured
            record["error"] = words = f"{type(error).__name__}: {error}"
        record["seconds_in_all"] = time.perf_counter() - started
        shutil.rmtree(folder)
        print(f"{cell.name}: {words} ({record['seconds_in_all']:.0f} s)", flush=True)
        return record

    def folder(self, name: str, keys: dict[str, Any]) -> Path:
        """A folder for what is determined by the keys."""
        digest = zlib.crc32(json.dumps(keys, sort_keys=True).encode())
        return Path("build", self.path.name, f"{re.sub('[^A-Za-z0-9.]+', '-', name)}-{digest:08x}")

    def command(self) -> str:
        """This command without what only chooses among the cells."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--only")
        parser.add_argument("--retry", action="store_true")
        return f"python -m {self.module} {shlex.join(parser.parse_known_args(sys.argv[1:])[1])}"

    def write(self) -> None:
        """Write all results there are."""
        self.records = {name: self.records[name] for name in sorted(self.records, key=self._place)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path.with_suffix(".json"), {"records": self.records})
        write_text(self.path.with_suffix(".md"), self.page(self.records))
        figure = self.plot(self.records)
        if figure is not None:
            write_file(
                self.path.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=110)
            )

    def end(self) -> int:
        """Name the cells that failed; returns the exit status."""
        failed = [name for name in self.order if "error" in self.records.get(name, {})]
        if failed and not self.options.list:
            print(f"failed: {'; '.join(failed)}. --retry measures them again.")
            return 1
        return 0

    def _place(self, name: str) -> int:
        return self.order.index(name) if name in self.order else len(self.order)


def knn_and_linear(figures: dict[str, Any]) -> str:
    """A line for the terminal."""
    return f"k-NN {figure(figures, 'knn', '20'):.1%}, linear probe {figures['linear']['accuracy']:.1%}"


def as_json(value: Any) -> Any:
    """A value as it is read from JSON."""
    return json.loads(json.dumps(value))


def origin(records: Records) -> list[str]:
    """For a page: the commands, dates and machines that measured its cells."""
    several = records.values()
    dates = sorted({record["date"] for record in several})
    machines = dict.fromkeys(in_words(record["machine"]) for record in several)
    commands = dict.fromkeys(f"`{record['command']}`" for record in several)
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return [f"{', '.join(commands)}, {span}, on {'; '.join(machines)}."]


def failures(records: Records) -> list[str]:
    """For a page: the cells that failed."""
    failed = [f"- {name}: {record['error']}" for name, record in records.items() if "error" in record]
    return ["", "## Failed", "", *failed] if failed else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; nothing without rows."""
    if not rows:
        return []
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]

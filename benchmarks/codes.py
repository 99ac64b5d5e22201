"""Measure codes at rest, a million of 256 bits: python -m benchmarks.codes RESULTS

Writes RESULTS.json and RESULTS.md: the size of the files, and the time to write them, to build an index for
faiss, and to search for 1 000 codes in three ways, which have to give the same distances.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.measuring import in_words, machine
from bincomm import hamming_topk
from bincomm.codes.search import build_index, search
from bincomm.codes.storage import read_codes, to_messages, write_part
from bincomm.files import write_json, write_text

CODES, BITS, QUERIES, K = 1_000_000, 256, 1000, 20
ROWS = 1 << 16  # of a file
ROUNDS = 5


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results are written to this name .json and .md")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (CODES, BITS // 8), dtype=np.uint8)
    queries = rng.integers(0, 256, (QUERIES, BITS // 8), dtype=np.uint8)
    result: dict[str, Any] = {
        "machine": machine("torch", "faiss-cpu", "pyarrow", "bincomm"),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names, labels = names_and_labels()
        result["path_megabytes"] = sum(map(len, names)) / 1e6
        result["write_s"], _ = clocked(lambda: write(folder, names, labels, codes), rounds=1)
        result["megabytes"] = sum(part.stat().st_size for part in folder.glob("*.parquet")) / 1e6
        result["index_s"], index_path = clocked(lambda: build_index(folder), rounds=1)
        index = faiss.read_index_binary(str(index_path))
        messages, query_messages = to_messages(read_codes(folder)[0]), to_messages(queries)
        result["search_s"], from_files = clocked(lambda: search(folder, queries, K))
        result["topk_s"], in_memory = clocked(lambda: hamming_topk(query_messages, messages, K))
        result["faiss_s"], of_faiss = clocked(lambda: index.search(queries, K))
    for distances in (in_memory[0].numpy(), of_faiss[0]):
        assert np.array_equal(from_files[0], distances)
    options.results.parent.mkdir(exist_ok=True)
    write_json(options.results.with_suffix(".json"), result)
    write_text(options.results.with_suffix(".md"), page(result))
    print(page(result))


def names_and_labels() -> tuple[list[str], list[str]]:
    """Paths and labels like ImageNet's: 1 300 images of a class, whose numbers have gaps, in their order."""
    numbers = np.random.default_rng(1).integers(1, 20000, CODES)
    labels = [f"n{row // 1300:08}" for row in range(CODES)]
    pairs = zip(labels, numbers.tolist(), strict=True)
    return sorted(f"/data/train/{label}/{label}_{number}.JPEG" for label, number in pairs), labels


def write(folder: Path, names: list[str], labels: list[str], codes: np.ndarray) -> None:
    """Files of the codes."""
    metadata = {"format": 1, "weights": "none", "identity": "", "bits": BITS}
    for part, first in enumerate(range(0, CODES, ROWS)):
        rows = slice(first, first + ROWS)
        write_part(folder / f"part-{part:05}.parquet", names[rows], labels[rows], codes[rows], metadata)


def clocked(call: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, Any]:
    """Seconds of a call, the median of several rounds, and what it returned."""
    seconds, result = list[float](), None
    for _ in range(rounds):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    measured = f"{in_words(result['machine'])}; {result['threads']} threads"
    return f"""# Codes at rest, measured

`make bench-codes` on {result["date"]}: {measured}. {CODES:,} random codes of {BITS} bits under paths of
{result["path_megabytes"]:.1f} MB as text; {QUERIES:,} queries, k = {K}. Searches are medians of {ROUNDS}
rounds, and all gave the same distances.

| | |
|---|---|
| Parquet files, paths and labels included | {result["megabytes"]:.1f} MB |
| writing them | {result["write_s"]:.2f} s |
| building the index for faiss | {result["index_s"]:.2f} s |
| `bincomm.codes.search.search`, reading included | {result["search_s"]:.2f} s |
| `bincomm.hamming_topk`, in memory | {result["topk_s"]:.2f} s |
| `faiss.IndexBinaryFlat`, in memory | {result["faiss_s"]:.2f} s |
"""


if __name__ == "__main__":
    main()

"""Is a larger network a better teacher than oneself? python -m benchmarks.messages RESULTS cifar10=FOLDER

FOLDER has train and test, and in them a folder for each class. Writes RESULTS.json and RESULTS.md: with every
seed, a larger network is trained, its messages are stored, and a student is trained from them; then another
student by itself, for as many minutes as that one took. What was measured is not measured again.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.domains import FIGURES, evaluate, raw_pixels, untrained
from benchmarks.resumable import (
    Cell,
    Records,
    Session,
    create_parser,
    failures,
    given_keys,
    knn_and_linear,
    origin,
    pairs,
)
from bincomm.comparison import (
    BEFORE,
    PIXELS,
    last_transmitted_bits,
    rows_as_markdown,
    table_row,
    trained_network,
    training_seconds,
)
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.evaluation.pretrained import Pretrained, evaluation_device
from bincomm.messages import configure as configure_messages
from bincomm.messages import write_messages
from bincomm.pretraining import pretrain
from bincomm.recipes import choose_recipe

TEACHER_EPOCHS, EPOCHS = 40, 20
SEEDS = 1
# Twice as wide as the network of the recipes for CPUs.
LARGER = ("backbone_args={layers: [1, 1, 1, 1], channels: [64, 128, 256, 512], stem_chs: 64}",)
FROM_MESSAGES, BY_ITSELF, TEACHER = "from stored messages", "by itself", "the larger network"


def main() -> int:
    """Measure and write the results."""
    parser = create_parser(__doc__, sources=1)
    for name, default, of in (
        ("--teacher_epochs", TEACHER_EPOCHS, "of the larger network"),
        ("--epochs", EPOCHS, "of the student, whose messages are stored"),
        ("--seeds", SEEDS, "number of seeds"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{of}; default: {default}")
    parser.add_argument(
        "--larger",
        metavar="KEY=VALUE",
        nargs="+",
        default=LARGER,
        help=f"keys of the larger network; default: {LARGER[0]}",
    )
    options = parser.parse_args()
    ((source, data),) = pairs(options.sources).items()
    given = {"recipe": choose_recipe(data), **given_keys(options)}
    larger = {key: yaml.safe_load(value) for key, value in pairs(options.larger).items()}
    epochs = {"teacher_epochs": options.teacher_epochs, "epochs": options.epochs}
    session = Session("benchmarks.messages", options, page)
    session.run(reference_cells(source, data, given))
    for seed in range(options.seeds):
        keys = {**given, "seed": seed}
        record = {
            "source": source,
            "way": FROM_MESSAGES,
            "seed": seed,
            "run": keys,
            "larger": larger,
            **epochs,
        }
        measure = partial(from_messages, data, keys, larger, options.teacher_epochs, options.epochs)
        first = Cell(f"{FROM_MESSAGES}, seed {seed}", record, measure, knn_and_linear)
        session.run([first])
        figures = {"seconds": 0.0} if options.list else session.figures(first)
        if figures is None:
            print(f"{BY_ITSELF}, seed {seed}: left out, how long it may take has not been measured")
            continue
        minutes = round(figures["seconds"] / 60, 2)
        record = {"source": source, "way": BY_ITSELF, "seed": seed, "run": keys, "minutes": minutes}
        measure = partial(by_itself, data, keys, minutes)
        session.run([Cell(f"{BY_ITSELF}, seed {seed}", record, measure, knn_and_linear)])
    return session.end()


def reference_cells(source: str, data: str, given: dict[str, Any]) -> list[Cell]:
    """Raw pixels, and the student before training."""
    ways = {PIXELS: raw_pixels, BEFORE: untrained}
    return [
        Cell(
            way,
            {"source": source, "way": way, "seed": 0, "run": given},
            partial(measure, data, {**given, "seed": 0}),
            knn_and_linear,
        )
        for way, measure in ways.items()
    ]


def from_messages(
    data: str, keys: dict[str, Any], larger: dict[str, Any], teacher_epochs: int, epochs: int, folder: Path
) -> dict[str, Any]:
    """The larger network, its messages, and the student, whose figures these are; seconds of each."""
    own = {**keys, "data": data}
    teacher = configure(**{**own, **larger, "epochs": teacher_epochs, "output": str(folder / "larger")})
    pretrain(teacher)
    stored = str(folder / "messages")
    started = time.perf_counter()
    write_messages(configure_messages(teacher.output, **{**own, "epochs": epochs, "output": stored}))
    encoding = time.perf_counter() - started
    student = configure(**{**own, "epochs": epochs, "messages": stored, "output": str(folder / "student")})
    pretrain(student)
    return {
        **measured(student),
        "seconds": training_seconds(student),
        "encoding_seconds": encoding,
        "teacher_seconds": training_seconds(teacher),
        "teacher": measured(teacher),
    }


def by_itself(data: str, keys: dict[str, Any], minutes: float, folder: Path) -> dict[str, Any]:
    """The same network under its own moving average."""
    own = {key: value for key, value in keys.items() if key not in ("epochs", "max_steps")}
    config = configure(**{**own, "data": data, "minutes": max(minutes, 1e-3), "output": str(folder / "run")})
    pretrain(config)
    return {**measured(config), "seconds": training_seconds(config)}


def measured(config: PretrainConfig) -> dict[str, Any]:
    """k-NN and linear probe of a finished run, and the bits that it transmits."""
    device = evaluation_device(config)
    model = Pretrained.of(trained_network(config, device), config, device)
    return {**evaluate(model, config), **last_transmitted_bits(config)}


def page(records: Records) -> str:
    """The Markdown page."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        if "figures" in record:
            ways.setdefault(record["keys"]["way"], []).append(record["figures"])
    students = ways.get(FROM_MESSAGES, [])
    if students:
        ways[TEACHER] = [figures["teacher"] for figures in students]
    rows = [table_row(way, figures) for way, figures in ways.items()]
    lines = ["# From another network's messages", "", *origin(records), ""]
    if rows:
        lines += rows_as_markdown(rows, FIGURES)
    lines += [
        f"\n`{FROM_MESSAGES}` trained for {figures['seconds']:.0f} s, as `{BY_ITSELF}` did, after "
        f"{figures['teacher_seconds']:.0f} s of the larger network and {figures['encoding_seconds']:.0f} s "
        "of writing its messages, which any number of students can share."
        for figures in students
    ]
    return "\n".join([*lines, *failures(records)]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())

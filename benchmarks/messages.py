"""Is a larger network a better teacher than oneself? python -m benchmarks.messages RESULTS cifar10=FOLDER

FOLDER has train and test, and in them a folder for each class. Writes RESULTS.json and RESULTS.md: a larger
network is trained; with every seed its messages are stored and a student is trained from them, without local
crops, and others by themselves, without them and with those of the recipe, for as many steps as take the same
time by speeds that are measured by turns. What was measured is not measured again.
"""

import time
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
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
from benchmarks.speed import SPEED, in_words, length, seconds_by_turns
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
from bincomm.data.sources import open_source
from bincomm.engine.stored_messages import layout_of
from bincomm.evaluation.evaluate import figure
from bincomm.evaluation.pretrained import Pretrained, evaluation_device
from bincomm.files import read_json_lines
from bincomm.messages import configure as configure_messages
from bincomm.messages import write_messages
from bincomm.pretraining import pretrain
from bincomm.recipes import choose_recipe

TEACHER_EPOCHS, EPOCHS = 40, 20
SEEDS = 3
# Half as wide again as the network of the recipes for CPUs, and without local crops, as its students.
LARGER = (
    "backbone_args={layers: [1, 1, 1, 1], channels: [48, 96, 192, 384], stem_chs: 48}",
    "local_crops=0",
)
TEACHER, FROM_MESSAGES = "the larger network", "from stored messages"
BY_ITSELF, WITH_LOCAL = "by itself", "by itself, local crops"
KEYS: dict[str, dict[str, Any]] = {
    FROM_MESSAGES: {"local_crops": 0},
    BY_ITSELF: {"local_crops": 0},
    WITH_LOCAL: {},
}


def main() -> int:
    """Measure and write the results."""
    parser = create_parser(__doc__, sources=1)
    for name, default, of in (
        ("--teacher_epochs", TEACHER_EPOCHS, "of the larger network"),
        ("--epochs", EPOCHS, "of the student, whose messages are stored"),
        ("--seeds", SEEDS, "number of seeds of the students"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{of}; default: {default}")
    parser.add_argument(
        "--larger",
        metavar="KEY=VALUE",
        nargs="+",
        default=LARGER,
        help=f"keys of the larger network; default: {' '.join(LARGER)}",
    )
    options = parser.parse_args()
    ((source, data),) = pairs(options.sources).items()
    given = {"recipe": choose_recipe(data), **given_keys(options)}
    larger = {key: yaml.safe_load(value) for key, value in pairs(options.larger).items()}
    session = Session("benchmarks.messages", options, page)

    record = {"source": source, "larger": larger, "teacher_epochs": options.teacher_epochs, "run": given}
    # Beside the folders of the cells, as all students learn from it. It is finished once.
    output = str(session.folder("larger", record))
    teacher = configure(
        **{**given, "data": data, **larger, "epochs": options.teacher_epochs, "seed": 0, "output": output}
    )
    # The same whatever the larger network has learned.
    own: dict[str, Any] = {"source": source, "way": SPEED, "run": given}
    speed = Cell(SPEED, own, partial(speeds, teacher, data, given), in_words)
    session.run(
        [
            *reference_cells(source, data, given),
            Cell(TEACHER, {**record, "way": TEACHER, "seed": 0}, partial(finished, teacher), knn_and_linear),
            speed,
        ]
    )
    seconds, steps = session.figures(speed), {}
    if options.list:
        steps = {BY_ITSELF: 0, WITH_LOCAL: 0}
    elif seconds is not None:
        steps = steps_by_themselves(data, given, options.epochs, seconds)
    else:
        print("students by themselves are left out, how many steps they may take has not been measured")
    for seed in range(options.seeds):
        keys = {**given, **KEYS[FROM_MESSAGES], "seed": seed}
        own = {**record, "way": FROM_MESSAGES, "seed": seed, "run": keys, "epochs": options.epochs}
        measure = partial(from_messages, teacher, data, keys, options.epochs)
        session.run([Cell(f"{FROM_MESSAGES}, seed {seed}", own, measure, knn_and_linear)])
        for way, count in steps.items():
            keys = {**given, **KEYS[way], "seed": seed}
            own = {"source": source, "way": way, "seed": seed, "run": keys, "steps": count}
            measure = partial(by_itself, data, keys, count)
            session.run([Cell(f"{way}, seed {seed}", own, measure, knn_and_linear)])
    return session.end()


def steps_by_themselves(
    data: str, keys: dict[str, Any], epochs: int, seconds: dict[str, list[float]]
) -> dict[str, int]:
    """How many steps students by themselves take while the one from messages has so many epochs."""
    config = configure(**{**keys, "data": data, "epochs": epochs})
    took = config.steps(len(open_source(data).images) // config.batch_size) * median(seconds[FROM_MESSAGES])
    return {way: max(1, int(took / median(seconds[way]))) for way in (BY_ITSELF, WITH_LOCAL)}


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


def finished(config: PretrainConfig, folder: Path) -> dict[str, Any]:
    """The figures of a run, which is trained or resumed if it is not finished. It has a folder of its own."""
    pretrain(config)
    return measured(config)


def speeds(teacher: PretrainConfig, data: str, keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of a step of the students, of each round."""
    pretrain(teacher)
    own, stored = {**keys, "data": data, "epochs": 1}, str(folder / "messages")
    write_messages(configure_messages(teacher.output, **{**own, **KEYS[FROM_MESSAGES], "output": stored}))
    students = {way: {**own, **keys, "output": str(folder / way)} for way, keys in KEYS.items()}
    students[FROM_MESSAGES]["messages"] = stored
    return seconds_by_turns({way: configure(**student) for way, student in students.items()})


def from_messages(
    teacher: PretrainConfig, data: str, keys: dict[str, Any], epochs: int, folder: Path
) -> dict[str, Any]:
    """Store the larger network's messages, and train the student, whose figures these are, from them."""
    pretrain(teacher)
    own, stored = {**keys, "data": data, "epochs": epochs}, str(folder / "messages")
    config = configure_messages(teacher.output, **{**own, "output": stored})
    started = time.perf_counter()
    written = write_messages(config)
    assert written is not None  # there is one rank
    encoding = time.perf_counter() - started
    student = configure(**{**own, "messages": stored, "output": str(folder / "student")})
    pretrain(student)
    return {
        **measured(student),
        "encoding_seconds": encoding,
        "bytes": written.size,
        "computed_bytes": written.epochs * layout_of(config, open_source(data)).epoch_bytes(),
    }


def by_itself(data: str, keys: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """The same network under its own moving average."""
    config = configure(**{**keys, "data": data, **length(steps), "output": str(folder / "run")})
    pretrain(config)
    return measured(config)


def measured(config: PretrainConfig) -> dict[str, Any]:
    """k-NN and linear probe of a finished run, and the bits that it transmits."""
    device = evaluation_device(config)
    model = Pretrained.of(trained_network(config, device), config, device)
    steps = read_json_lines(Path(config.output) / "metrics.jsonl")[-1]["step"]
    own = {"steps": steps, "images": steps * config.batch_size, "seconds": training_seconds(config)}
    return {**evaluate(model, config), **last_transmitted_bits(config), **own}


def page(records: Records) -> str:
    """The Markdown page."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        if "figures" in record:
            ways.setdefault(record["keys"]["way"], []).append(record["figures"])
    seconds = ways.pop(SPEED, [])
    lines = ["# From another network's messages", "", *origin(records), ""]
    if ways:
        lines += rows_as_markdown([table_row(way, figures) for way, figures in ways.items()], FIGURES)
    return "\n".join([*lines, *notes(ways, seconds), *failures(records)]) + "\n"


def notes(ways: dict[str, list[dict[str, Any]]], seconds: list[dict[str, list[float]]]) -> list[str]:
    """What the figures are of."""
    students = ways.get(FROM_MESSAGES, [])
    lines = [
        "",
        "Mean ± standard deviation over seeds of the students; one larger network teaches them all. Students "
        f"have no local crops, but `{WITH_LOCAL}` those of the recipe.",
        "",
    ]
    for way in (BY_ITSELF, WITH_LOCAL):
        alone = ways.get(way, [])
        if len(alone) != len(students) or not alone:
            continue
        for name, path in (("k-NN", ("knn", "20")), ("linear probe", ("linear", "accuracy"))):
            points = [
                100 * (figure(a, *path) - figure(b, *path)) for a, b in zip(students, alone, strict=True)
            ]
            deviation = f" ± {stdev(points):.1f}" if len(points) > 1 else ""
            lines.append(f"- {name} {FROM_MESSAGES} minus {way}: {mean(points):+.1f}{deviation} points")
    for each in seconds:
        lines.append(f"- {SPEED}, by turns, median of {len(each[BY_ITSELF])} rounds: {in_words(each)}")
        for way in (BY_ITSELF, WITH_LOCAL):
            ratio = median(each[way]) / median(each[FROM_MESSAGES])
            lines.append(f"- images a second: {ratio:.2f} times as many {FROM_MESSAGES} as {way}")
    for way, runs in ways.items():
        if "steps" in runs[0]:
            lines.append(f"- {way}: {runs[0]['steps']} steps, {runs[0]['images']} images shown")
    for run in students[:1]:
        lines.append(
            f"- messages of a seed: {run['bytes'] / 1e6:.2f} MB, computed {run['computed_bytes'] / 1e6:.2f} "
            f"MB before; written in {median(run['encoding_seconds'] for run in students):.0f} s"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())

"""The page about a run: whether it works, in one HTML file that needs nothing else."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from bincomm.config import PretrainConfig
from bincomm.data.contact_sheet import first_crops
from bincomm.data.sources import Source
from bincomm.engine.curves import draw_accuracies, draw_progress
from bincomm.engine.signals import Interrupted
from bincomm.evaluation.advice import judge
from bincomm.evaluation.model_card import last_part
from bincomm.evaluation.neighbors import NEIGHBORS, PICTURE_SIZE, Query, Shown, find_neighbors
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.report_curves import curves_section
from bincomm.evaluation.run import REPORT_FILE, accuracies, trained_figures
from bincomm.files import read_json_lines, write_text
from bincomm.page.elements import (
    add_legend,
    details,
    document,
    escape,
    name_tag,
    picture_tag,
    plot,
    section,
    table,
)

logger = logging.getLogger(__name__)

IMAGES, CROPS = 6, 8  # shown of those trained on, and of the crops of each
# Keys of which the page shows the last part alone.
PATHS = ("data", "output", "init_from", "teacher", "messages")


def report_run(run: Path, *parts: Any) -> None:
    """As `write_report`; a failure is told, and changes nothing of the run."""
    try:
        write_report(run, *parts)
    except Interrupted:
        raise
    except Exception as error:
        logger.warning("no %s in %s: %s", REPORT_FILE, run, error)
        logger.debug("%s", REPORT_FILE, exc_info=True)


def write_report(
    run: Path,
    config: PretrainConfig,
    source: Source,
    result: dict[str, Any] | None = None,
    model: Pretrained | None = None,
    labeled: tuple[Source, Source, bool] | None = None,
) -> None:
    """Write report.html into a run's directory: less than two megabytes, however many images and steps.

    Args:
        run: the directory.
        config: of the run.
        source: the images that it is trained on.
        result: what its result.json holds; None: the run was interrupted, and the page shows its curves.
        model: what the run ends with.
        labeled: gallery, queries, and whether these were held out; None: without labels.
    """
    records = read_json_lines(run / "metrics.jsonl")
    evaluation = None if result is None else result["evaluation"]
    sections = [_findings_section(config, records, len(source.images), evaluation)]
    if model is not None:
        sections.append(_images_section(config, source))
    if result is not None:
        sections.append(_knn_section(run, result))
    sections += [_channel_section(config, records), curves_section(config, records)]
    if model is not None:
        gallery, queries = (source, None) if labeled is None else labeled[:2]
        sections.append(_neighbors_section(find_neighbors(model, gallery, queries), queries is None))
    sections.append(_settings_section(config, len(source.images), records, result))
    name = f"Run {escape(os.path.basename(os.path.abspath(config.output)))}"
    body = _summary(config, len(source.images), records, result)
    write_text(run / REPORT_FILE, document(name, f"{body}\n{''.join(sections)}"))


def _summary(
    config: PretrainConfig, images: int, records: list[dict[str, float]], result: dict[str, Any] | None
) -> str:
    last = records[-1] if records else {}
    tiles = [(f"{images:,}", "images"), (f"{last.get('step', 0):,}", f"steps of {config.batch_size} images")]
    if result is not None:
        tiles += [(f"{share:.1%}", f"k-NN, {name}") for name, share in accuracies(result)]
    if "transmitted_bits" in last:
        tiles.append((f"{last['transmitted_bits']:.1f}", f"bits transmitted, of {config.bits}"))
    if "bit_entropy" in last:
        tiles.append((f"{last['bit_entropy']:.2f}", "bits of entropy in a bit, of 1"))
        tiles.append((f"{last['dead_bits']:.0%}", "of the bits are dead"))
    text = f"<p>{escape(config.backbone)}, trained without labels on {_data(config)}.</p>"
    if result is None:
        text += (
            "<p class=note>The run was interrupted. The same command resumes it; what can be measured at the "
            "end alone is left out here.</p>"
        )
    boxes = "".join(f"<div class=tile><b>{value}</b><span>{what}</span></div>" for value, what in tiles)
    return f"{text}<div class=tiles>{boxes}</div>"


def _data(config: PretrainConfig) -> str:
    names = [config.data] if isinstance(config.data, str) else list(config.data)
    return ", ".join(name_tag(last_part(name)) for name in names)


def _teacher(config: PretrainConfig, records: list[dict[str, float]]) -> str:
    if config.messages is not None:
        return f"frozen, its messages stored in {last_part(config.messages)}"
    if config.teacher:
        return f"frozen, {', '.join(map(last_part, config.teacher))}"
    momentum = min((record["momentum"] for record in records), default=1)
    return f"the student's moving average, of momentum {momentum:.3g} at first"


def _findings_section(
    config: PretrainConfig,
    records: list[dict[str, float]],
    images: int,
    evaluation: dict[str, Any] | None,
) -> str:
    items = ""
    findings = judge(config, records, images, evaluation)
    for good, fact, advice in findings:
        following = f" <b>Try next:</b> {escape(advice)}" if advice else ""
        kind, mark = {True: ("good", "✓"), False: ("bad", "✗"), None: ("open", "–")}[good]
        items += f"<li class={kind}><b>{mark}</b> <span>{escape(fact)}{following}</span></li>"
    if not findings:
        items = "<li><span>There are no figures yet that could tell.</span></li>"
    return section("Is it working?", "", f"<ul class=findings>{items}</ul>")


def _images_section(config: PretrainConfig, source: Source) -> str:
    pictures, names = first_crops(source, config.crops, config.seed, IMAGES, PICTURE_SIZE)
    strips = ""
    for crops, name in zip(pictures, names, strict=True):
        tags = "".join(
            picture_tag(crop, f"{'global' if number < 2 else 'local'} crop of {os.path.basename(name)}")
            for number, crop in enumerate(crops[:CROPS])
        )
        strips += f"<div class=pictures>{tags}</div>"
    return section(
        "What was it trained on?",
        "<p>Crops of the first images of the run, a row for each image: two global ones, then local ones, "
        "which the student alone sees. <b>Good:</b> what is in the image can be recognized in most crops, "
        "and crops of one image have something in common. <b>Bad:</b> nothing can be made out, or nobody "
        "could tell which crops belong together: milder crops help.</p>",
        strips,
    )


def _knn_section(run: Path, result: dict[str, Any]) -> str:
    evaluation = result["evaluation"]
    title = "Are the features better than before?"
    if evaluation is None:
        reason = result.get("no_evaluation", "no image with a label can be used")
        return section(
            title,
            f"<p>Not measured, because there are no labels: {escape(reason)}. The nearest neighbors below "
            "show what the features hold alike.</p>",
            "",
        )
    shares, (_, trained) = accuracies(result), trained_figures(evaluation)
    text = (
        f"<p>k-NN gives an image the class of those nearest to it: {trained['query_images']:,} queries in "
        f"{trained['gallery_images']:,} images of {trained['classes']} classes. <b>Good:</b> the backbone is "
        "clearly above the same network before training, and above raw pixels; its codes are near the "
        "backbone. <b>Bad:</b> it is at or below either of them.</p>"
    )
    if not evaluation["queries_held_out"]:
        text += "<p class=small>The queries' images, not their labels, were used in training.</p>"
    alt = "k-NN accuracies: " + ", ".join(f"{name} {share:.1%}" for name, share in shares)
    body = plot(lambda axes: draw_accuracies(axes, shares), alt, height=1.9)
    progress = read_json_lines(run / "progress.jsonl")
    if progress:

        def draw(axes: Axes) -> None:
            draw_progress(axes, progress, [])
            add_legend(axes)

        body += plot(
            draw, f"k-NN on a part of the images while training, at the end {progress[-1]['knn']:.1%}"
        )
    return section(title, text, body)


def _channel_section(config: PretrainConfig, records: list[dict[str, float]]) -> str:
    last = records[-1] if records else {}
    if "transmitted_bits" not in last:
        return ""
    heard, majority, right = last["transmitted_bits"], last["bit_majority"], last["bit_accuracy"]
    return section(
        "What is transmitted?",
        f"<p>The teacher sends a message of {config.bits} bits about one crop of an image; the student "
        f"predicts it from another crop. Of each message {heard:.1f} bits reach it: that much less "
        "surprising are the bits to it than to someone who knows only how often each is 1. It gets "
        f"{right:.1%} of the bits right; always guessing the more frequent value would get {majority:.1%}. "
        "Bits that repeat each other all count. <b>Good:</b> the number has grown while training. "
        "<b>Bad:</b> it is near 0: the crops have nothing in common for the network, or the bits are "
        "dead.</p>",
        "",
    )


def _neighbors_section(queries: list[Query], of_itself: bool) -> str:
    body = ""
    for query in queries:
        rows = ""
        for name, shown in (("features", query.by_features), ("codes", query.by_codes)):
            same = ""
            if query.image.label is not None:
                count = sum(one.label == query.image.label for one in shown)
                same = f": {count} of {len(shown)} of its class"
            tags = "".join(_picture(one) for one in shown)
            rows += f"<p class=small>by {name}{same}</p><div class=pictures>{tags}</div>"
        label = "" if query.image.label is None else f"<span>{name_tag(query.image.label)}</span>"
        body += f"<div class=query><div>{_picture(query.image)}{label}</div><div>{rows}</div></div>"
    where = "among the images trained on" if of_itself else "in the gallery"
    return section(
        "What does it find alike?",
        f"<p>A few images, and for each the {NEIGHBORS} nearest {where}: by the cosine of their features, "
        "and by the number of equal bits of their codes. <b>Good:</b> neighbors show the same thing. "
        "<b>Bad:</b> they have the same background or brightness alone, or are the same for all images.</p>",
        body or "<p>No image can be used.</p>",
    )


def _picture(shown: Shown) -> str:
    name = os.path.basename(shown.name)
    return picture_tag(shown.picture, name if shown.label is None else f"{shown.label}, {name}")


def _settings_section(
    config: PretrainConfig, images: int, records: list[dict[str, float]], result: dict[str, Any] | None
) -> str:
    steps = config.steps(max(1, images // config.batch_size))
    at_first = ""
    if config.low_resolution:
        at_first = "; in the first {:.0%} of the steps {} and {}".format(
            config.low_resolution, *config.low_sizes
        )
    rows = [
        ["method", config.method],
        ["backbone", config.backbone],
        ["images", f"{images:,}"],
        [
            "steps",
            f"{steps:,} of {config.batch_size} images, {steps * config.batch_size / images:.1f} epochs",
        ],
        ["bits of a message", str(config.bits)],
        ["beta", str(config.beta)],
        ["learning rate", f"{max((record['lr'] for record in records), default=0):.3g} at its peak"],
        ["teacher", _teacher(config, records)],
        ["crops", f"2 of {config.global_size} pixels, {config.local_crops} of {config.local_size}{at_first}"],
        ["augmentations", config.augment],
        ["precision", config.precision],
        ["seed", str(config.seed)],
    ]
    if result is not None:
        rows.append(
            ["versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())]
        )
    shown = config.as_dict()
    for key in PATHS:
        if isinstance(shown[key], str):
            shown[key] = last_part(shown[key])
        elif isinstance(shown[key], list):
            shown[key] = [last_part(path) for path in shown[key]]
        elif isinstance(shown[key], dict):
            shown[key] = {last_part(name): weight for name, weight in shown[key].items()}
    every = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in shown.items()]
    return section(
        "With which settings?",
        "",
        table(["what", "value"], rows) + details("All keys", table(["key", "value"], every)),
    )

"""Measure what bits carry of known factors of simple scenes: python -m benchmarks.factors RESULTS

Writes RESULTS.json and RESULTS.md. Three short runs on the same scenes, which lack two shapes and two
colors, differ in their augmentation alone, so that what it makes a code forget can be seen; an untrained
network stands beside them.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import GPU, in_words, machine
from bincomm.building import create_networks
from bincomm.codes.factors import dci, disentanglement, keeps_meaning, recover
from bincomm.codes.information import (
    entropy,
    largest_by_chance,
    mutual_information,
    mutual_information_gap,
)
from bincomm.config import PretrainConfig
from bincomm.configuration import configure
from bincomm.data.sources import open_source
from bincomm.evaluation.features import extract_features
from bincomm.evaluation.pretrained import Pretrained, load_pretrained
from bincomm.files import write_json, write_text
from bincomm.pretraining import pretrain
from tests.scenes import FACTORS, read_factors, write_scenes

TRAIN, TEST, SEED = 6000, 4000, 0
NAMES = list(FACTORS)
# What no training scene shows. Of the test scenes 2/9 each are then new in shape alone and in color alone,
# and 4/9, in two halves, in nothing.
UNSEEN = {"shape": ("star", "ring"), "color": ("yellow", "magenta")}
# The digits' recipe, its channel and its optimizer: β 0.1 and head_std 0.06. Scenes are 64 pixels a side and
# crops half of that; brightness and contrast are jittered a little, hue and saturation are left alone.
OPTIONS: dict[str, Any] = {
    "recipe": "digits",
    "epochs": 8,
    "reset_every": 0,
    "global_size": 32,
    "global_scale": [0.6, 1],
    "local_size": 24,
    "local_scale": [0.4, 0.8],
    "flip": 0.5,
    "jitter": [0.2, 0.2, 0, 0],
    "log_every": 31,
    "save_every": 10_000,
}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "gentle": {},
    "hue jitter": {"jitter": [0.2, 0.2, 0.4, 0.5], "jitter_p": 1},
    "small crops": {"global_scale": [0.3, 1], "local_scale": [0.1, 0.4]},
}
IGNORED = {"hue jitter": "color", "small crops": "place"}  # what each is meant to make a code forget
UNTRAINED = "untrained"
CARRIED = 0.1  # how far above chance a factor is recovered that bits are said to carry


def main() -> None:
    """Train, measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results are written to this name .json and .md")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "machine": machine("torch", "timm", "scikit-learn", "bincomm"),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.factors {options.results}",
        "scenes": {"train": TRAIN, "test": TEST, "seed": SEED, "unseen": UNSEEN},
        "options": OPTIONS,
        "augmentations": AUGMENTATIONS,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        results |= measure(Path(folder))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.results.with_suffix(".json"), results)
    write_text(options.results.with_suffix(".md"), page(results))
    print(page(results))


def measure(folder: Path) -> dict[str, Any]:
    """Everything that is measured, of the untrained network and of all runs."""
    scenes = folder / "scenes"
    without = [{factor: value} for factor, values in UNSEEN.items() for value in values]
    write_scenes(scenes, TRAIN, SEED, test_count=TEST, without=without)
    source = open_source(str(scenes / "test"))
    known = read_factors(scenes)
    factors = torch.tensor([known[str(Path(name).relative_to(scenes))] for name in source.images.names()])
    device = torch.device("cuda" if GPU else "cpu")
    results: dict[str, Any] = {"networks": {}, "channel": {}, "seconds": {}}
    for augmentation, changes in AUGMENTATIONS.items():
        run = folder / augmentation.replace(" ", "_")
        config = configuration(scenes, run, changes)
        if not results["networks"]:
            untrained = Pretrained.of(create_networks(config, device)[1], config, device)
            extracted = extract_features(untrained, source)
            pixels = extract_features(Pretrained.of_pixels(config, device), source)
            results["entropy"] = entropy(factors).tolist()
            results["networks"][UNTRAINED] = of_network(extracted, factors)
            results["pixels"] = in_halves(pixels["features"], factors[pixels["indices"]])
        started = time.perf_counter()
        result = pretrain(config)
        assert result is not None  # there is one rank
        results["seconds"][augmentation] = time.perf_counter() - started
        results["channel"][augmentation] = result["last_metrics"]
        results["networks"][augmentation] = of_network(
            extract_features(load_pretrained(str(run), device), source), factors
        )
    return results


def configuration(scenes: Path, run: Path, changes: dict[str, Any]) -> PretrainConfig:
    """Of one run."""
    options = {**OPTIONS, **changes, "data": scenes / "train", "output": run}
    return configure(**options)


def of_network(extracted: dict[str, Tensor], factors: Tensor) -> dict[str, Any]:
    """Every measure of a network's bits and features of the test scenes, by factor in the order of NAMES."""
    factors = factors[extracted["indices"]]
    bits = extracted["signs"] > 0
    information = mutual_information(bits, factors)
    by_chance = torch.tensor([largest_by_chance(bits, factor) for factor in factors.T])
    gap = mutual_information_gap(bits, factors)
    gallery, queries = halves(len(bits))
    recovered = in_halves(bits, factors)
    pairs = zip(recovered["accuracy"], recovered["chance"], strict=True)
    carried = torch.tensor([accuracy - chance > CARRIED for accuracy, chance in pairs])
    parts = dci(bits[gallery], factors[gallery], bits[queries], factors[queries])
    of_carried = disentanglement(parts.importance[:, carried])[0] if carried.sum() > 1 else None
    shape, color = (is_unseen(factor, factors) for factor in ("shape", "color"))
    neither = ~shape & ~color
    groups = {"seen": queries & neither, "unseen shapes": shape & ~color, "unseen colors": color & ~shape}
    known = gallery & neither
    meanings = {
        name: meaning_of(bits[known], factors[known], bits[group], factors[group])
        for name, group in groups.items()
    }
    return {
        "bit_entropy": entropy(bits).mean().item(),
        "bits": recovered,
        "features": in_halves(extracted["features"], factors),
        "most_information": information.corrected.amax(0).tolist(),
        "significant": (information.plug_in > by_chance).sum(0).tolist(),
        "mig": {"gap": gap.gap.tolist(), "ceiling": gap.ceiling.tolist()},
        "dci": {
            "disentanglement": parts.disentanglement,
            "disentanglement of factors carried": of_carried,
            "completeness": parts.completeness,
            "informativeness": parts.informativeness,
            "by_factor": parts.by_factor.tolist(),
            "accuracy": parts.accuracy.tolist(),
        },
        "meaning": meanings,
    }


def is_unseen(factor: str, factors: Tensor) -> Tensor:
    """(n,) bool, of the scenes with these factors (n, F)."""
    values = [FACTORS[factor].index(value) for value in UNSEEN[factor]]
    return torch.isin(factors[:, NAMES.index(factor)], torch.tensor(values))


def meaning_of(bits: Tensor, factors: Tensor, new_bits: Tensor, new_factors: Tensor) -> dict[str, Any]:
    """What becomes of the bits' meaning on new scenes, by factor; None where it is not defined."""
    names = ("correlation", "accuracy", "accuracy_chance", "deviation")
    kept = keeps_meaning(bits, factors, new_bits, new_factors)
    result = {
        name: [x if math.isfinite(x) else None for x in value.tolist()]  # JSON has no NaN
        for name, value in zip(names, (*kept.by_factor(), kept.deviation), strict=True)
    }
    return {**result, "images": len(new_bits)}


def in_halves(values: Tensor, factors: Tensor) -> dict[str, list[float]]:
    """Recovery by a linear classifier trained on one half of the test scenes, tested on the other."""
    gallery, queries = halves(len(values))
    recovery = recover(values[gallery], factors[gallery], values[queries], factors[queries])
    return {"accuracy": recovery.accuracy.tolist(), "chance": recovery.chance.tolist()}


def halves(images: int) -> tuple[Tensor, Tensor]:
    """Every other image, (n,) bool, and the others; images are sorted by shape, so each half has all."""
    even = torch.arange(images) % 2 == 0
    return even, ~even


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    options, scenes = results["options"], results["scenes"]
    seconds = ", ".join(f"{duration:.0f} s ({name})" for name, duration in results["seconds"].items())
    changes = "; ".join(f"`{name}` {json.dumps(change)}" for name, change in results["augmentations"].items())
    sections = (channel, recovery, information, pairing, meaning, discussion)
    unseen = ", ".join(value for values in scenes["unseen"].values() for value in values)
    lines = [
        "# What bits carry of known factors",
        "",
        f"`{results['command']}` on {results['date']}: {in_words(results['machine'])}; threads: "
        f"{results['threads']}.",
        "",
        f"{scenes['train']} training scenes (`tests/scenes.py`, seed {scenes['seed']}) without {unseen}; "
        f"{scenes['test']} test scenes with all. One run for each augmentation: {seconds}. Options of all: "
        f"`{json.dumps(options)}`; besides: {changes}.",
    ]
    for section in sections:
        lines += ["", *section(results)]
    return "\n".join(lines) + "\n"


def channel(results: dict[str, Any]) -> list[str]:
    """Whether anything is transmitted."""
    lines = [
        "## The channel, at the end of training",
        "",
        "| augmentation | equal bits | by sending the more frequent value | bit entropy |",
        "|---|---|---|---|",
    ]
    entropy = results["networks"][UNTRAINED]["bit_entropy"]
    lines.append(row([UNTRAINED, "", "", f"{entropy:.3f}"]))
    for name, last in results["channel"].items():
        shares = (f"{last[key]:.1%}" for key in ("bit_accuracy", "bit_majority"))
        lines.append(row([name, *shares, f"{last['bit_entropy']:.3f}"]))
    return lines


def recovery(results: dict[str, Any]) -> list[str]:
    """Of all networks, from features and from bits."""
    networks = results["networks"]
    return [
        "## How well a linear classifier reads each factor",
        "",
        f"Share of {results['scenes']['test'] // 2} test scenes, %; trained on as many others. "
        f"Two standard errors are at most {200 * standard_error(results):.1f}.",
        "",
        *head(),
        line("chance", networks[UNTRAINED]["bits"]["chance"], 100, 1),
        line("pixels, 16 × 16", results["pixels"]["accuracy"], 100, 1),
        *(
            line(f"{what}, {name}", network[what]["accuracy"], 100, 1)
            for what in ("features", "bits")
            for name, network in networks.items()
        ),
    ]


def information(results: dict[str, Any]) -> list[str]:
    """Of the most telling bits."""
    return [
        "## What one bit says about each factor",
        "",
        "The most that one bit carries, in bits, corrected for chance; in brackets how many bits carry more "
        "than the best of all has by chance in 19 of 20 cases.",
        "",
        *head(),
        line("entropy of the factor", results["entropy"], 1, 2),
        *(
            line(name, network["most_information"], 1, 3, network["significant"], 0)
            for name, network in results["networks"].items()
        ),
    ]


def pairing(results: dict[str, Any]) -> list[str]:
    """MIG and DCI."""
    networks = results["networks"]
    gaps = {"ceiling": networks[UNTRAINED]["mig"]["ceiling"]}
    gaps |= {name: network["mig"]["gap"] for name, network in networks.items()}
    parts = ("disentanglement", "disentanglement of factors carried", "completeness", "informativeness")
    return [
        "## One factor, one bit?",
        "",
        "MIG by factor, and its mean; a factor of more than two values has a ceiling below 1.",
        "",
        *head("mean"),
        *(line(name, [*values, sum(values) / len(values)], 1, 3) for name, values in gaps.items()),
        "",
        "DCI by gradient-boosted trees; informativeness is the share of scenes whose factor they predict, in "
        "the mean over factors. A factor that bits do not carry is spread over all of them by chance, which "
        "lowers disentanglement: beside it stands that of the factors recovered more than "
        f"{100 * CARRIED:.0f} points above chance.",
        "",
        row(["", *parts]),
        "|---" * (1 + len(parts)) + "|",
        *(line(name, [network["dci"][part] for part in parts], 1, 3) for name, network in networks.items()),
    ]


def meaning(results: dict[str, Any]) -> list[str]:
    """On other scenes of seen shapes and colors, and on unseen ones."""
    correlations, gains = [], []
    for name, network in results["networks"].items():
        for group, of in network["meaning"].items():
            correlations.append(line(f"{name}, {group}", of["correlation"], 1, 2, of["deviation"], 2))
            pairs = zip(of["accuracy"], of["accuracy_chance"], strict=True)
            gain = [None if by_value is None else by_value - by_all for by_value, by_all in pairs]
            gains.append(line(f"{name}, {group}", gain, 100, 1))
    groups = results["networks"][UNTRAINED]["meaning"].items()
    counts = ", ".join(f"{group} ({of['images']} scenes)" for group, of in groups)
    return [
        "## Do bits keep their meaning on shapes and colors never seen?",
        "",
        "Correlation of how often a bit is 1 for each value of a factor, between scenes of seen shapes and "
        f"colors, and others: {counts}; "
        "mean over bits, weighted by how much they say about the factor. By chance, if the values' meanings "
        "were permuted, it is 0 with the deviation in brackets, the larger the fewer values there are "
        "and the more alike the bits. A value that was never seen cannot be compared.",
        "",
        *head(),
        *correlations,
        "",
        "The same as accuracy: by how many points the more frequent bit of a factor's value predicts the "
        "bits of these scenes better than the more frequent bit of all.",
        "",
        *head(),
        *gains,
    ]


def discussion(results: dict[str, Any]) -> list[str]:
    """Sentences that the numbers decide; differences within two standard errors count as none."""
    networks = results["networks"]
    trained = {name: network for name, network in networks.items() if name != UNTRAINED}
    chance = dict(zip(NAMES, networks[UNTRAINED]["bits"]["chance"], strict=True))
    noise = 2 * math.sqrt(2) * standard_error(results)  # of a difference
    accuracy = {name: dict(zip(NAMES, of["bits"]["accuracy"], strict=True)) for name, of in networks.items()}
    gentle, untrained = accuracy["gentle"], accuracy[UNTRAINED]

    def change(name: str, other: str, factors: list[str]) -> str:
        pairs = (f"{f} {100 * accuracy[name][f]:.0f} → {100 * accuracy[other][f]:.0f} %" for f in factors)
        return ", ".join(pairs) or "none"

    gained = [f for f in NAMES if gentle[f] - untrained[f] > noise]
    lost = [f for f in NAMES if untrained[f] - gentle[f] > noise]
    mute = [f for f in NAMES if gentle[f] - chance[f] <= noise]
    lines = [
        "## What the numbers say",
        "",
        f"Differences of less than {100 * noise:.1f} points count as none. One seed each: what another would "
        "change is not measured.",
        "",
        f"- By training (`gentle`) bits gain {change(UNTRAINED, 'gentle', gained)}; they lose "
        f"{change(UNTRAINED, 'gentle', lost)}. Still at chance: {', '.join(mute) or 'none'}.",
    ]
    for name, factor in IGNORED.items():
        fall, above = gentle[factor] - accuracy[name][factor], gentle[factor] - chance[factor]
        verdict = "is not less" if fall <= noise else f"is less by {100 * fall / above:.0f} %"
        others = [f for f in NAMES if f != factor and abs(accuracy[name][f] - gentle[f]) > noise]
        lines.append(
            f"- `{name}` is meant to make a code ignore {factor}. What bits have of it above chance "
            f"({100 * chance[factor]:.0f} %) {verdict}: {change('gentle', name, [factor])}. Other factors "
            f"that change: {change('gentle', name, others)}."
        )
    for name, network in networks.items():
        carried = [f for f in NAMES if accuracy[name][f] - chance[f] > CARRIED]
        correlations = {
            group: dict(zip(NAMES, of["correlation"], strict=True))
            for group, of in network["meaning"].items()
        }
        changes = {
            new: ", ".join(
                f"{f} {correlations['seen'][f]:.2f} → {correlations[new][f]:.2f}"
                for f in carried
                if correlations[new][f] is not None
            )
            for new in ("unseen shapes", "unseen colors")
        }
        lines.append(
            f"- `{name}`: correlation of meanings of factors recovered {100 * CARRIED:.0f} points above "
            "chance, on seen → on "
            + "; on ".join(f"{new}: {change or 'there are none'}" for new, change in changes.items())
            + "."
        )
    unnoticed = [f for f in UNSEEN if max(accuracy[name][f] - chance[f] for name in trained) <= CARRIED]
    if unnoticed:
        lines.append(
            f"- None of these codes says much about {' or '.join(unnoticed)} (at most {100 * CARRIED:.0f} "
            "points above chance): new values of it are hardly noticed, so meanings kept there show little."
        )
    scores = {
        name: score
        for name, network in networks.items()
        if (score := network["dci"]["disentanglement of factors carried"]) is not None
    }
    if trained.keys() & scores.keys():
        best = max(trained.keys() & scores.keys(), key=lambda name: scores[name])
        verdict = (
            "most bits are about several factors" if scores[best] < 0.5 else "most bits are about one factor"
        )
        beside = f"; untrained {scores[UNTRAINED]:.2f}" if UNTRAINED in scores else ""
        lines.append(
            f"- Disentanglement of the factors carried is {scores[best]:.2f} at the most (`{best}`{beside}): "
            f"{verdict}."
        )
    return lines


def standard_error(results: dict[str, Any]) -> float:
    """The largest of a share of the queries."""
    return 0.5 / math.sqrt(results["scenes"]["test"] // 2)


def head(*more: str) -> list[str]:
    """Of a table with a column a factor."""
    cells = ["", *NAMES, *more]
    return [row(cells), "|---" * len(cells) + "|"]


def line(
    name: str,
    values: list[float | None],
    scale: float,
    digits: int,
    beside: list[float | None] | None = None,
    beside_digits: int = 0,
) -> str:
    """A row of a table, with others in brackets; None is left empty."""
    cells = ["" if value is None else f"{scale * value:.{digits}f}" for value in values]
    for column, value in enumerate(beside or []):
        if value is not None:
            cells[column] += f" ({value:.{beside_digits}f})"
    return row([name, *cells])


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

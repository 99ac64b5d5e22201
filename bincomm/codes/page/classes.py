"""Sections about classes and attributes: distances, retrieval, information, and two classes compared."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from bincomm.codes.classes import MIN_CLASS_IMAGES
from bincomm.page.elements import (
    add_legend,
    details,
    label_bit_counts,
    name_tag,
    plot,
    section,
    shorten,
    table,
    use_integer_ticks,
)
from bincomm.page.style import BLUE, GRAY, ORANGE


def distances_section(result: dict[str, Any]) -> str:
    """Histograms of distances."""
    distances, size = result["distances"], result["bits"]
    of_classes = distances["within"] is not None

    def draw(axes: Axes) -> None:
        parts = [("between", "of two classes", BLUE), ("within", "of one class", ORANGE)]
        for name, label, color in parts if of_classes else [("all", "all pairs", BLUE)]:
            counts = np.array(distances[name], float)
            if counts.sum():
                axes.stairs(
                    counts / counts.sum(), np.arange(size + 2) - 0.5, fill=True, alpha=0.45, color=color
                )
                axes.stairs(counts / counts.sum(), np.arange(size + 2) - 0.5, color=color, label=label)
        axes.axvline(size / 2, color=GRAY, linewidth=1, linestyle="--", label="random codes, on average")
        last = int(np.flatnonzero(distances["all"]).max(initial=0))
        axes.set(xlabel="bits in which two images differ", ylabel="share of the pairs")
        axes.set_xlim(-0.5, min(size, max(last, size // 2) + 1) + 0.5)
        use_integer_ticks(axes.xaxis)
        add_legend(axes)

    text = (
        "<p>In how many bits the codes of two images differ: for random codes in about "
        f"{size / 2:g} ± {size**0.5 / 2:.1f} of the {size}. "
    )
    if of_classes:
        text += "<b>Good:</b> images of one class are nearer than those of two, and few pairs are at 0. "
        if "separation" in distances:
            text += (
                f"A pair of one class is nearer than a pair of two in {distances['separation']:.1%} of the "
                "cases; 50 % is chance. "
            )
    else:
        text += "<b>Good:</b> a wide peak around the half, with a tail to the left: similar images. "
    text += (
        "<b>Bad:</b> everything at 0 (all codes the same), or a peak as narrow as that of random codes (no "
        "image is near another)."
    )
    pairs = "A random sample of the pairs." if distances["sampled"] else "All pairs are counted."
    mean = np.average(np.arange(size + 1), weights=distances["all"])
    return section(
        "How far apart are images?",
        f"{text}</p><p class=small>{pairs}</p>",
        plot(draw, f"Histogram of Hamming distances, mean {mean:.1f} of {size} bits"),
    )


def retrieval_section(result: dict[str, Any]) -> str:
    """mAP by number of bits; "" where it was not measured."""
    if "retrieval" not in result:
        return ""
    subsets = sorted(result["retrieval"]["by_bits"], key=lambda subset: subset["bits"])
    chance = result["retrieval"]["by_chance"]
    bits, values = ([subset[name] for subset in subsets] for name in ("bits", "precision"))

    def draw(axes: Axes) -> None:
        least, largest = ([subset[name] for subset in subsets] for name in ("least", "largest"))
        axes.fill_between(bits, least, largest, color=BLUE, alpha=0.25, label="of several draws of bits")
        axes.plot(bits, values, "o-", color=BLUE, markersize=4)
        axes.axhline(chance, color=GRAY, linewidth=1, linestyle="--", label="chance")
        axes.set_xscale("log", base=2)
        axes.set_xticks(bits, [str(count) for count in bits])
        axes.minorticks_off()
        axes.set(xlabel="bits used", ylabel="mAP", ylim=(0, 1.1 * max(chance, *largest)))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        add_legend(axes)

    rows = [
        [
            str(subset["bits"]),
            f"{subset['precision']:.2%}",
            f"± {subset['deviation']:.2%}" if subset["draws"] > 1 else "",
        ]
        for subset in subsets
    ]
    return section(
        "How many bits are needed to find images of the same class?",
        "<p>Query images are compared with the others by the distance of their codes; mAP is 100 % when all "
        f"images of the query's class come first, and {chance:.1%} in a random order. Then only some of the "
        "bits, drawn at random, are used. <b>Good:</b> half of the bits do nearly as well as all: what a "
        "class is about is spread over the code. <b>Bad:</b> hardly above chance. Published with 256 / 128 / "
        "64 / 32 bits: 47.59 / 45.97 / 43.73 / 40.35 %, on ImageNet's 1000 classes; chance is 0.1 %.</p>"
        "<p class=small>The spread is that between draws of bits; up to 500 images are queries, the others "
        "the gallery.</p>",
        plot(draw, f"mAP by bits used, from {values[0]:.1%} to {values[-1]:.1%}")
        + details("As a table", table(["bits", "mAP", "deviation"], rows)),
    )


def information_section(result: dict[str, Any]) -> str:
    """Information about the class, and classes that share a bit; "" without labels."""
    if "information" not in result:
        return ""
    information, majority = result["information"], result["majority_classes"]
    corrected, significant = np.array(information["corrected"]), np.array(information["significant"])
    classes = sum(count > 0 for count in result["class_images"])

    def draw(axes: Axes) -> None:
        order = np.argsort(-corrected, kind="stable")
        beyond = significant[order]
        for group, color, label in ((beyond, BLUE, "beyond chance"), (~beyond, ORANGE, "as by chance")):
            if group.any():
                axes.bar(np.flatnonzero(group), corrected[order][group], width=1.0, color=color, label=label)
        axes.set(xlabel="bits, the most informative first", ylabel="bits about the class")
        use_integer_ticks(axes.xaxis)
        add_legend(axes)

    def draw_majority(axes: Axes) -> None:
        step = 1 + classes // 50  # a bar of less is too thin to be seen
        bins = np.arange(0, classes + 1 + step, step) - 0.5
        axes.hist(majority["ones"], bins=bins.tolist(), color=BLUE)
        axes.set(xlabel="classes in which a bit is mostly 1")
        use_integer_ticks(axes.xaxis)
        label_bit_counts(axes)

    return section(
        "What do bits say about the class?",
        f"<p>How much one bit alone says about the class, of {information['entropy']:.2f} bits in all; a bit "
        f"can say 1 at most. {significant.sum()} of {len(corrected)} bits say more than chance would. On "
        f"average a bit says {corrected.mean():.3f}, the best {corrected.max():.3f}. "
        "<b>Good:</b> most bits say a little; as training saw no labels, none needs to say much. "
        "<b>Bad:</b> no bit is beyond chance, or a few say everything and the others nothing.</p>"
        "<p class=small>What chance alone would give is subtracted; a bit is beyond chance if it says more "
        "than the best of all bits in 19 of 20 permutations of the classes. No published figure.</p>",
        plot(draw, f"Information of each bit about the class, mean {corrected.mean():.3f} bits")
        + "<p>How many classes share a bit, those in which it is significantly more often 1 than 0. "
        "<b>Good:</b> some, neither none nor all: bits are about traits that several classes have.</p>"
        + plot(
            draw_majority, f"Histogram of the number of classes that share a bit, of {classes}", height=2.2
        ),
    )


def attributes_section(result: dict[str, Any]) -> str:
    """Information about the attributes; "" without any."""
    if not result.get("attributes"):
        return ""
    rows = []
    for name, information in result["attributes"].items():
        best = int(np.argmax(information["corrected"]))
        values = ", ".join(map(shorten, information["values"][:4]))
        rows.append(
            [
                shorten(name),
                f"{information['corrected'][best]:.3f}",
                f"{information['entropy']:.2f}",
                str(best),
                str(sum(information["significant"])),
                str(information["known"]),
                values + (", …" if len(information["values"]) > 4 else ""),
            ]
        )
    head = ["attribute", "best bit says", "of", "which is", "bits beyond chance", "images", "values"]
    return section(
        "What do bits say about the attributes?",
        "<p>The same for each column of the attributes' file: its entropy is the most that can be said about "
        "it. <b>Good:</b> an attribute that matters has bits of its own. <b>Bad:</b> the bits are about one "
        "that should not matter, such as the camera or the year.</p>",
        table(head, rows),
    )


def difference_section(result: dict[str, Any]) -> str:
    """The bits that differ most between two classes; "" where none were compared."""
    if "class_difference" not in result:
        return ""
    difference = result["class_difference"]
    first, second = map(name_tag, difference["classes"])
    bits = difference["order"][:10]
    columns = [np.array(difference[name])[bits] for name in ("difference", "low", "high")]
    clear = sum(low > 0 or high < 0 for low, high in zip(difference["low"], difference["high"], strict=True))

    def draw(axes: Axes) -> None:
        positions, (middle, low, high) = np.arange(len(bits))[::-1], columns
        errors = np.maximum([middle - low, high - middle], 0)
        axes.errorbar(middle, positions, xerr=errors, fmt="o", color=BLUE, capsize=3)
        axes.axvline(0, color=GRAY, linewidth=1)
        axes.set_yticks(positions, [f"bit {bit}" for bit in bits])
        axes.set(xlabel="share of ones, the first minus the second", xlim=(-1.02, 1.02))
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])

    counts = [result["class_images"][result["classes"].index(name)] for name in difference["classes"]]
    among = f", of those of {MIN_CLASS_IMAGES} images or more" if min(counts) >= MIN_CLASS_IMAGES else ""
    why = "" if difference["named"] else f" No other two classes{among} have more similar shares."
    return section(
        f"What distinguishes {first} from {second}?",
        f"<p>The bits whose shares of ones differ most between <b>{first}</b> (images: {counts[0]}) and "
        f"<b>{second}</b> ({counts[1]}).{why} {clear} of {result['bits']} bits differ beyond chance. "
        "<b>Good:</b> dots far from the middle, with lines that do not cross it. <b>Bad:</b> all lines cross "
        "it: the code does not distinguish the two, or the images are too few.</p>"
        "<p class=small>Lines are 95 % intervals that hold for all bits at once.</p>",
        plot(draw, f"Differences of the shares of ones, the largest {columns[0][0]:+.2f} in bit {bits[0]}"),
    )

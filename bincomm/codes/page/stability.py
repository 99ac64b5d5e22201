"""Sections about what codes have in common: of two crops of an image, and of two checkpoints."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bincomm.page.elements import add_legend, escape, label_bit_counts, plot, section, table
from bincomm.page.style import BLUE, GRAY, ORANGE


def stability_section(result: dict[str, Any]) -> str:
    """What the codes of two crops of an image have in common."""
    stability = result["stability"]
    kappa, equal = np.array(stability["kappa"]), np.array(stability["equal"])

    def draw(axes: Axes) -> None:
        axes.hist(kappa, bins=np.linspace(min(0, kappa.min()), 1, 41).tolist(), color=BLUE)
        axes.set(xlabel="equal in two crops, 0 chance, 1 always")
        label_bit_counts(axes)

    return section(
        "Does a bit stay when the image is cropped and recolored?",
        f"<p>Two crops each of {stability['images']} images were made as in training, and their codes "
        f"compared. {equal.mean():.1%} of the bits are the same; two different images would share "
        f"{np.mean(stability['chance']):.1%}. The figure counts each bit between the two: 0 is chance, 1 is "
        "always. <b>Good:</b> well above 0 for all bits. <b>Bad:</b> near 0: the bit is noise, and nothing "
        "is transmitted. Near 1 for all bits with little entropy is no good either: what never changes says "
        "nothing. Summed over the bits, a crop's bits hold "
        f"{np.sum(stability['information']):.1f} bits of information about those of another crop; bits that "
        "repeat each other are all counted. No published figure.</p>",
        plot(draw, f"Histogram of the bits' stability, mean {kappa.mean():.2f}"),
    )


def comparison_section(result: dict[str, Any]) -> str:
    """What the codes of another checkpoint have in common with these; "" where there is none."""
    other = result.get("other")
    if not other:
        return ""
    directions = [("from_other", "this code"), ("from_this", "the other")]
    rows = [
        [
            name,
            f"{np.mean(other[key]['correlation']):.3f}",
            f"{other[key]['chance']:.3f}",
            f"{np.mean(other[key]['probe']):.3f}",
        ]
        for key, name in directions
    ]
    neighbors = other["neighbors"]

    def draw(axes: Axes) -> None:
        edges = np.linspace(min(0, *other["from_other"]["probe"]), 1, 41).tolist()
        axes.hist(other["from_other"]["correlation"], edges, color=BLUE, alpha=0.6, label="best single bit")
        axes.hist(
            other["from_other"]["probe"], edges, color=ORANGE, alpha=0.6, label="all bits, linear probe"
        )
        axes.axvline(other["from_other"]["chance"], color=GRAY, linestyle="--", label="best bit, by chance")
        axes.set(xlabel="how well a bit is predicted from the other code")
        label_bit_counts(axes)
        add_legend(axes)

    few = ""
    if other["images"] < 4 * max(other["bits"], result["bits"]):
        few = (
            "<p class=note>The linear probe needs four times as many images as bits; here it falls short.</p>"
        )
    return section(
        "What do the two checkpoints have in common?",
        f"<p>Compared with {escape(other['weights'])}. Where the head was reset between the two, the bits "
        "are different ones; the question is whether what they carry is still there. Each bit is predicted "
        "from the other code, by its best single bit and by a linear probe on all of them: 1 is always "
        f"right, 0 is chance for the probe. Of the {neighbors['k']} images nearest to one by one code, "
        f"{neighbors['overlap']:.1%} are among the nearest by the other ({neighbors['chance']:.1%} by "
        "chance). <b>Good:</b> the probe well above 0 and the overlap far above chance, even where no single "
        "bit is the same. <b>Bad:</b> all at chance: each head codes something else. No published figure.</p>"
        f"{few}",
        table(["predicted", "best bit, |r|", "by chance", "linear probe"], rows)
        + plot(draw, f"Neighbors in common {neighbors['overlap']:.1%}, by chance {neighbors['chance']:.1%}"),
    )

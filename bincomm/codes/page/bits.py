"""Sections about the bits: how they are used, whether they repeat each other, and all of them in a table."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bincomm.page.elements import (
    add_legend,
    details,
    join_numbers,
    label_bit_counts,
    plot,
    section,
    table,
    use_integer_ticks,
)
from bincomm.page.style import BLUE, GRAY, ORANGE

MIN_FOR_BLOCKS = 1024  # images from which an 8-bit block's entropy is known: four times its words


def use_section(result: dict[str, Any]) -> str:
    """Shares of ones, entropies, dead and repeated bits."""
    use = result["use"]
    entropy = np.array(use["entropy"])

    def draw(axes: Axes) -> None:
        axes.hist(use["ones"], bins=np.linspace(0, 1, 41).tolist(), color=BLUE)
        axes.axvline(0.5, color=GRAY, linewidth=1, linestyle="--")
        axes.set(xlabel="share of the images in which a bit is 1", xlim=(0, 1))
        label_bit_counts(axes)

    dead = (
        f"Dead (nearly always the same): {join_numbers(use['dead'])}. " if use["dead"] else "No bit is dead. "
    )
    repeats = [f"{bit} is the same as {first}" for first, bit in use["same"]]
    repeats += [f"{bit} is the inverse of {first}" for first, bit in use["inverted"]]
    more = f" and {len(repeats) - 20} more" if len(repeats) > 20 else ""
    repeated = f"Repeats: {'; '.join(repeats[:20])}{more}." if repeats else "No bit repeats another."
    if repeats and result["images"] < 100:
        repeated += " From so few images, that can be chance."
    return section(
        "Are the bits used?",
        f"<p>A bit that is 1 in half of the images says most, one full bit; one that is always the same says "
        f"nothing. Here the entropy of a bit is {entropy.mean():.3f} bits on average, {entropy.min():.3f} at "
        "the least (published: about 0.9). <b>Good:</b> a peak around 0.5. <b>Bad:</b> peaks at 0 and 1: the "
        f"channel has collapsed, and training needs a larger beta.</p><p>{dead}{repeated}</p>",
        plot(draw, f"Histogram of the bits' shares of ones; mean entropy {entropy.mean():.3f} bits"),
    )


def full_blocks(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """The figures of the blocks, without a last one that is shorter than 8 bits."""
    blocks = {name: np.array(values) for name, values in result["blocks"].items()}
    return {name: values[blocks["bits"] == 8] for name, values in blocks.items()}


def blocks_section(result: dict[str, Any]) -> str:
    """Joint entropies of blocks; "" without a block of 8 bits."""
    blocks, n = full_blocks(result), result["images"]
    if len(blocks["bits"]) == 0:
        return ""
    positions = np.arange(len(blocks["bits"]))

    def draw(axes: Axes) -> None:
        axes.bar(positions, blocks["marginals"], color="#cfd8e0", label="if its bits were independent")
        axes.bar(positions, blocks["entropy"], width=0.5, color=BLUE, label="the block")
        axes.set(xlabel="block of 8 consecutive bits", ylabel="entropy, bits", ylim=(0, 8.1))
        use_integer_ticks(axes.xaxis)
        add_legend(axes)

    few = lost = ""
    if n < MIN_FOR_BLOCKS:
        few = (
            f"<p class=note>{n} images are too few for the 256 words of a block: the figures are too low, "
            f"because they can hardly exceed log₂&nbsp;{n}&nbsp;=&nbsp;{np.log2(n):.1f}.</p>"
        )
    else:
        bits = max(np.sum(blocks["marginals"]) - np.sum(blocks["entropy"]), 0)
        lost = f" In all, {bits:.1f} bits are lost inside blocks."
    return section(
        "Do the bits say different things?",
        "<p>Eight bits together say as much as the eight alone only if they are independent. Here the "
        f"entropy of a block is {np.mean(blocks['entropy']):.2f} bits, that of its bits alone adds up to "
        f"{np.mean(blocks['marginals']):.2f} (published: about 7.1 of 8). <b>Good:</b> the blue bars fill "
        f"the pale ones. <b>Bad:</b> they stay far below: the bits repeat each other.{lost}</p>{few}"
        "<p class=small>Corrected for the number of images by the method of Miller and Madow.</p>",
        plot(draw, f"Entropy of each block, mean {np.mean(blocks['entropy']):.2f} bits"),
    )


def correlations_section(result: dict[str, Any]) -> str:
    """Correlations of pairs of bits; "" without a pair that is not dead."""
    correlations = result["correlations"]
    if not any(correlations["absolute"]):
        return ""

    def draw(axes: Axes) -> None:
        axes.bar(np.arange(50) / 50 + 0.01, correlations["absolute"], width=0.018, color=BLUE)
        axes.axvline(
            correlations["by_chance"], color=ORANGE, linewidth=1.5, label="one standard deviation of chance"
        )
        axes.set(xlabel="|correlation| of two bits", ylabel="pairs of bits", yscale="log", xlim=(0, 1))
        add_legend(axes)

    rows = [[f"{a} and {b}", f"{value:+.3f}"] for a, b, value in correlations["strongest"]]
    return section(
        "Which bits go together?",
        "<p>Two bits with a correlation of 1 say the same, with −1 the opposite, with 0 they are unrelated. "
        "The root mean square over pairs of bits that are not dead is "
        f"{correlations['rms']:.3f}; independent bits would have {correlations['by_chance']:.3f} from this "
        "many images. <b>Good:</b> close to that, and no pair near 1. <b>Bad:</b> many pairs above 0.5.</p>",
        plot(draw, f"Histogram of absolute correlations, root mean square {correlations['rms']:.3f}")
        + details("The most strongly correlated bits", table(["bits", "correlation"], rows)),
    )


def table_section(result: dict[str, Any]) -> str:
    """All bits in a table."""
    head, columns = ["bit", "share of 1", "entropy"], [result["use"]["ones"], result["use"]["entropy"]]
    head += ["same in another crop", "above chance"]
    columns += [result["stability"]["equal"], result["stability"]["kappa"]]
    if "information" in result:
        head += ["information on the class", "classes, mostly 1", "mostly 0"]
        columns += [
            result["information"]["corrected"],
            result["majority_classes"]["ones"],
            result["majority_classes"]["zeros"],
        ]
    rows = [
        [str(bit), *(f"{value:d}" if isinstance(value, int) else f"{value:.3f}" for value in values)]
        for bit, values in enumerate(zip(*columns, strict=True))
    ]
    return section("Every bit", "", details("All bits in a table", table(head, rows)))

"""The page about a code: figures, pictures, and what they mean, in one HTML file that needs nothing else.

Figures are PNG files inside the page, drawn narrow enough to be read on a phone.
"""

import base64
import html
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from bincomm.data.sources import Source

FEWEST_FOR_BLOCKS = 1024  # images by which an 8-bit block's entropy is known: four times its words
FEWEST_OF_CLASS = 10  # images by which a class's share of ones says something
LONGEST_NAME = 60
BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#8a8a8a"  # of Okabe and Ito's, told apart by the color-blind
COLORS = (
    *(
        "#0072b2",
        "#d55e00",
        "#009e73",
        "#cc79a7",
        "#e6ab02",
        "#56b4e9",
        "#7a3e9d",
        "#8c564b",
        "#000000",
        "#66a61e",
    ),
    *(
        "#e7298a",
        "#1b4f72",
        "#b15928",
        "#17becf",
        "#a6761d",
        "#fb9a99",
        "#6a7b00",
        "#b2abd2",
        "#b2182b",
        "#35978f",
    ),
)
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --quiet: #4a4a4a }
:root { --line: #d9d9d9; --tile: #f3f5f7; --note: #fff6df }
@media (prefers-color-scheme: dark) {
  :root { --page: #17191c; --ink: #e8e8e8; --quiet: #b5b5b5 }
  :root { --line: #41464c; --tile: #26292e; --note: #3b3215 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 48rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem }
p { margin: .4rem 0 }
.tiles { display: grid; gap: .6rem; margin: 1rem 0 }
.tiles { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) }
.tile { background: var(--tile); border-radius: .4rem; padding: .6rem .7rem }
.tile b { display: block; font-size: 1.25rem; line-height: 1.3 }
.tile span { font-size: .85rem; line-height: 1.3; display: block }
.note { background: var(--note); border-left: 4px solid #e6ab02; padding: .5rem .8rem; margin: .8rem 0 }
.small { font-size: .85rem; color: var(--quiet) }
.scroll { overflow-x: auto; margin: .6rem 0 }
.tall { max-height: 28rem; overflow-y: auto }
figure { margin: .8rem 0 }
figure img { display: block; width: 100%; max-width: 34rem; height: auto; border-radius: .3rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
table { overflow-wrap: normal }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { background: var(--page); position: sticky; top: 0; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
.strip { display: grid; grid-template-columns: 1.2rem 1fr; align-items: center; margin: .9rem 0 }
.strip b { font-size: 1.1rem }
.strip div { display: grid; grid-template-columns: repeat(8, minmax(0, 72px)); gap: 4px }
.strip img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 3px; background: var(--tile) }
@media (max-width: 34rem) { .strip div { grid-template-columns: repeat(4, minmax(0, 1fr)) } }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .9rem }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .35em }
.legend i { outline: 1px solid var(--line) }
summary { cursor: pointer; padding: .5rem 0 }
"""


def draw_page(
    result: dict[str, Any], images: Sequence[int], pictures: dict[int, Image.Image], source: Source
) -> str:
    """The page, of what `bincomm.codes.report.report` found, the numbers of its images in their source, and
    pictures of those shown, by their place among them."""
    sections = [
        _use(result),
        _blocks(result),
        _correlated(result),
        _distances(result),
        _retrieval(result),
        _informed(result),
        _attributes(result),
        _shown(result, images, pictures, source),
        _apart(result),
        _stable(result),
        _compared(result),
        _mapped(result, source),
        _every_bit(result),
    ]
    title = f"Codes of {_text(result['weights'])}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"<h1>{title}</h1>\n{_summary(result)}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _summary(result: dict[str, Any]) -> str:
    n, size, use = result["images"], result["bits"], result["use"]
    whole, steady = _whole_blocks(result)["entropy"], result["stability"]
    tiles = [
        (f"{n:,}", "images"),
        (f"{size}", f"bit{'s' * (size != 1)} in a code"),
        (f"{np.mean(use['entropy']):.2f}", "bits said by a bit, of 1"),
        *([(f"{np.mean(whole):.2f}", "bits said by a block, of 8")] if len(whole) else []),
        (f"{len(use['dead'])}", "dead bits"),
        (f"{len(use['same']) + len(use['inverted'])}", "bits that repeat another"),
        (
            f"{np.mean(steady['agreement']):.1%}",
            f"of bits stay in another crop; chance {np.mean(steady['chance']):.1%}",
        ),
    ]
    if "retrieval" in result:
        found = result["retrieval"]
        tiles.append(
            (f"{found['kept'][0]['precision']:.1%}", f"mAP with all bits; chance {found['by_chance']:.1%}")
        )
    text = f"<p class=small>Images: {_text(result['data'])}</p>" if result["data"] else ""
    text += (
        "<p>A code is what the network's head says about an image: a row of bits, each the sign of one of "
        "its outputs. This page shows how well the bits are used, what they are about, and how far they can "
        "be relied on. The same figures are in codes.json.</p>"
    )
    text += "<div class=tiles>" + "".join(
        f"<div class=tile><b>{a}</b><span>{b}</span></div>" for a, b in tiles
    )
    text += "</div>"
    if n < 1000:
        text += (
            f"<p class=note><b>{n} images are few.</b> A share read here may be off by ± {1 / n**0.5:.0%}, "
            "and what joins many bits, such as the entropy of blocks, or compares classes with few images "
            "each, by more. A thousand images or more give steadier figures.</p>"
        )
    text += "".join(f"<p class=note>{_text(note)}</p>" for note in result["notes"])
    if result["left_out"]:
        lines = "".join(f"<li>{_text(name)}: {_text(why)}</li>" for name, why in result["left_out"][:50])
        text += f"<details><summary>Images that could not be used</summary><ul>{lines}</ul></details>"
    return text + (
        "<p class=small>Published figures quoted below are those of BITS-reset: ViT-B/16 with 256 bits after "
        "100 epochs on ImageNet-1K (arXiv 2602.09764). On other images, classes or sizes they are an "
        "orientation, not a mark to reach.</p>"
    )


def _use(result: dict[str, Any]) -> str:
    use = result["use"]
    entropy = np.array(use["entropy"])

    def draw(axes: Axes) -> None:
        axes.hist(use["ones"], bins=np.linspace(0, 1, 41), color=BLUE)
        axes.axvline(0.5, color=GRAY, linewidth=1, linestyle="--")
        axes.set(xlabel="share of the images in which a bit is 1", xlim=(0, 1))
        _count_bits(axes)

    dead = f"Dead (nearly always the same): {_numbers(use['dead'])}. " if use["dead"] else "No bit is dead. "
    repeats = [f"{bit} says what {first} says" for first, bit in use["same"]]
    repeats += [f"{bit} says the opposite of {first}" for first, bit in use["inverted"]]
    more = f" and {len(repeats) - 20} more" if len(repeats) > 20 else ""
    repeated = f"Repeats: {'; '.join(repeats[:20])}{more}." if repeats else "No bit repeats another."
    if repeats and result["images"] < 100:
        repeated += " From so few images, that can be chance."
    return _section(
        "Are the bits used?",
        f"<p>A bit that is 1 in half of the images says most, one full bit; one that is always the same says "
        f"nothing. Here a bit says {entropy.mean():.3f} bits on average, the least {entropy.min():.3f} "
        f"(published: about 0.9). <b>Good:</b> a heap around 0.5. <b>Bad:</b> heaps at 0 and 1 — the channel "
        f"has collapsed, and training wants a larger beta.</p><p>{dead}{repeated}</p>",
        _plot(draw, f"Histogram of the bits' shares of ones; mean entropy {entropy.mean():.3f} bits"),
    )


def _whole_blocks(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """Without a last one that is shorter."""
    blocks = {name: np.array(values) for name, values in result["blocks"].items()}
    return {name: values[blocks["bits"] == 8] for name, values in blocks.items()}


def _blocks(result: dict[str, Any]) -> str:
    blocks, n = _whole_blocks(result), result["images"]
    if len(blocks["bits"]) == 0:
        return ""
    places = np.arange(len(blocks["bits"]))

    def draw(axes: Axes) -> None:
        axes.bar(places, blocks["marginals"], color="#cfd8e0", label="if its bits were independent")
        axes.bar(places, blocks["entropy"], width=0.5, color=BLUE, label="the block")
        axes.set(xlabel="block of 8 consecutive bits", ylabel="entropy, bits", ylim=(0, 8.1))
        _whole(axes.xaxis)
        _legend(axes)

    few = lost = ""
    if n < FEWEST_FOR_BLOCKS:
        few = (
            f"<p class=note>From {n} images the 256 words of a block cannot be told well: the figures are "
            f"too low, for they can hardly exceed log₂&nbsp;{n}&nbsp;=&nbsp;{np.log2(n):.1f}.</p>"
        )
    else:
        bits = max(np.sum(blocks["marginals"]) - np.sum(blocks["entropy"]), 0)
        lost = f" In all, {bits:.1f} bits are lost inside of blocks."
    return _section(
        "Do the bits say different things?",
        f"<p>Eight bits together say as much as each alone only if they are independent. Here a block says "
        f"{np.mean(blocks['entropy']):.2f} bits, its bits alone would say {np.mean(blocks['marginals']):.2f} "
        "(published: about 7.1 of 8). <b>Good:</b> the blue bars fill the pale ones. <b>Bad:</b> they stay "
        f"far below: the bits repeat each other.{lost}</p>{few}<p class=small>Corrected for the number of "
        "images by Miller's and Madow's method.</p>",
        _plot(draw, f"Entropy of each block, mean {np.mean(blocks['entropy']):.2f} bits"),
    )


def _correlated(result: dict[str, Any]) -> str:
    found = result["correlations"]
    if not any(found["absolute"]):
        return ""

    def draw(axes: Axes) -> None:
        axes.bar(np.arange(50) / 50 + 0.01, found["absolute"], width=0.018, color=BLUE)
        axes.axvline(found["by_chance"], color=ORANGE, linewidth=1.5, label="one deviation of chance")
        axes.set(xlabel="|correlation| of two bits", ylabel="pairs of bits", yscale="log", xlim=(0, 1))
        _legend(axes)

    rows = [[f"{a} and {b}", f"{value:+.3f}"] for a, b, value in found["strongest"]]
    return _section(
        "Which bits go together?",
        "<p>Two bits with a correlation of 1 say the same, with −1 the opposite, with 0 they have nothing "
        "to do with each other. The root mean square over pairs of bits that are not dead is "
        f"{found['rms']:.3f}; independent bits would have {found['by_chance']:.3f} from this many images. "
        "<b>Good:</b> close to that, and no pair near 1. <b>Bad:</b> many pairs above 0.5.</p>",
        _plot(draw, f"Histogram of absolute correlations, root mean square {found['rms']:.3f}")
        + _details("The most strongly correlated bits", _table(["bits", "correlation"], rows)),
    )


def _distances(result: dict[str, Any]) -> str:
    found, size = result["distances"], result["bits"]
    of_classes = found["within"] is not None

    def draw(axes: Axes) -> None:
        parts = [("between", "of two classes", BLUE), ("within", "of one class", ORANGE)]
        for name, label, color in parts if of_classes else [("every", "all pairs", BLUE)]:
            counts = np.array(found[name], float)
            if counts.sum():
                axes.stairs(
                    counts / counts.sum(), np.arange(size + 2) - 0.5, fill=True, alpha=0.45, color=color
                )
                axes.stairs(counts / counts.sum(), np.arange(size + 2) - 0.5, color=color, label=label)
        axes.axvline(size / 2, color=GRAY, linewidth=1, linestyle="--", label="codes by lot")
        last = int(np.flatnonzero(found["every"]).max(initial=0))
        axes.set(xlabel="bits in which two images differ", ylabel="share of the pairs")
        axes.set_xlim(-0.5, min(size, max(last, size // 2) + 1) + 0.5)
        _whole(axes.xaxis)
        _legend(axes)

    text = (
        "<p>How far apart the codes of two images are. Codes drawn by lot would differ in about "
        f"{size / 2:g} ± {size**0.5 / 2:.1f} of the {size} bits. "
    )
    if of_classes:
        text += "<b>Good:</b> images of one class are nearer than those of two, and few pairs are at 0. "
        if "separation" in found:
            text += (
                f"Of a pair of one class and a pair of two the former is nearer in {found['separation']:.1%} "
                "of the cases; 50 % is chance. "
            )
    else:
        text += "<b>Good:</b> a wide heap around the half, with a tail to the left: images that are alike. "
    text += (
        "<b>Bad:</b> everything at 0 (all codes the same), or a heap as narrow as by lot (no image is near "
        "another)."
    )
    kept = "Some of the pairs, drawn by lot." if found["sampled"] else "All pairs are counted."
    mean = np.average(np.arange(size + 1), weights=found["every"])
    return _section(
        "How far apart are images?",
        f"{text}</p><p class=small>{kept}</p>",
        _plot(draw, f"Histogram of Hamming distances, mean {mean:.1f} of {size} bits"),
    )


def _retrieval(result: dict[str, Any]) -> str:
    if "retrieval" not in result:
        return ""
    kept = sorted(result["retrieval"]["kept"], key=lambda one: one["bits"])
    chance = result["retrieval"]["by_chance"]
    bits, values = ([one[name] for one in kept] for name in ("bits", "precision"))

    def draw(axes: Axes) -> None:
        least, largest = ([one[name] for one in kept] for name in ("least", "largest"))
        axes.fill_between(bits, least, largest, color=BLUE, alpha=0.25, label="of several draws of bits")
        axes.plot(bits, values, "o-", color=BLUE, markersize=4)
        axes.axhline(chance, color=GRAY, linewidth=1, linestyle="--", label="chance")
        axes.set_xscale("log", base=2)
        axes.set_xticks(bits, [str(count) for count in bits])
        axes.minorticks_off()
        axes.set(xlabel="bits kept", ylabel="mAP", ylim=(0, 1.1 * max(chance, *largest)))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _legend(axes)

    rows = [
        [str(one["bits"]), f"{one['precision']:.2%}", f"± {one['deviation']:.2%}" if one["draws"] > 1 else ""]
        for one in kept
    ]
    return _section(
        "How many bits does finding images of the same class need?",
        "<p>Images are asked for others of their class, by the nearness of their codes; mAP is 100 % when "
        f"all of them come first, and {chance:.1%} when the order is drawn by lot. Then only some of the "
        "bits are kept, drawn by lot. <b>Good:</b> half of the bits do nearly as well as all: what a class "
        "is about is spread over "
        "the code. <b>Bad:</b> hardly above chance. Published with 256 / 128 / 64 / 32 bits: 47.59 / 45.97 "
        "/ 43.73 / 40.35 %, on ImageNet's 1000 classes, where chance is 0.1 %.</p>"
        "<p class=small>The spread is that between draws of bits; up to 500 images ask, the others "
        "answer.</p>",
        _plot(draw, f"mAP by bits kept, from {values[0]:.1%} to {values[-1]:.1%}")
        + _details("As a table", _table(["bits", "mAP", "deviation"], rows)),
    )


def _informed(result: dict[str, Any]) -> str:
    if "information" not in result:
        return ""
    told, shared = result["information"], result["sharing"]
    corrected, there = np.array(told["corrected"]), sum(count > 0 for count in result["class_images"])
    significant = sum(told["significant"])

    def draw(axes: Axes) -> None:
        order = np.argsort(-corrected, kind="stable")
        beyond = np.array(told["significant"])[order]
        for some, color, label in ((beyond, BLUE, "beyond chance"), (~beyond, ORANGE, "as by chance")):
            if some.any():
                axes.bar(np.flatnonzero(some), corrected[order][some], width=1.0, color=color, label=label)
        axes.set(xlabel="bits, the most telling first", ylabel="bits about the class")
        _whole(axes.xaxis)
        _legend(axes)

    def draw_shared(axes: Axes) -> None:
        step = 1 + there // 50  # a bar of less is too thin to be seen
        axes.hist(shared["ones"], bins=np.arange(0, there + 1 + step, step) - 0.5, color=BLUE)
        axes.set(xlabel="classes in which a bit is mostly 1")
        _whole(axes.xaxis)
        _count_bits(axes)

    return _section(
        "What do bits tell of the class?",
        f"<p>How much of the class one learns from one bit alone, of the {told['entropy']:.2f} bits there "
        f"are to learn; a bit can tell 1 at most. {significant} of {len(corrected)} bits tell more than "
        f"chance would. On average a bit tells {corrected.mean():.3f}, the best {corrected.max():.3f}. "
        "<b>Good:</b> most bits tell a little; with labels unseen, none needs to tell much. <b>Bad:</b> no "
        "bit beyond chance, or a few tell everything and the others nothing.</p><p class=small>What "
        "chance alone would give is subtracted; a bit is beyond it that tells more than the best of all bits "
        "in 19 of 20 permutations of the classes. No published figure.</p>",
        _plot(draw, f"Information of each bit about the class, mean {corrected.mean():.3f} bits")
        + "<p>How many classes share a bit, those where it is significantly more often 1 than 0. "
        "<b>Good:</b> some, neither none nor all: bits are about traits that several classes have.</p>"
        + _plot(draw_shared, f"Histogram of the number of classes that share a bit, of {there}", height=2.2),
    )


def _attributes(result: dict[str, Any]) -> str:
    if not result.get("attributes"):
        return ""
    rows = []
    for name, told in result["attributes"].items():
        best = int(np.argmax(told["corrected"]))
        values = ", ".join(map(_short, told["values"][:4])) + (", …" if len(told["values"]) > 4 else "")
        rows.append(
            [
                _short(name),
                f"{told['corrected'][best]:.3f}",
                f"{told['entropy']:.2f}",
                str(best),
                str(sum(told["significant"])),
                str(told["known"]),
                values,
            ]
        )
    head = ["attribute", "best bit tells", "of", "which is", "bits beyond chance", "images", "values"]
    return _section(
        "What do bits tell of the attributes?",
        "<p>The same for each column of the attributes' file: its entropy is what there is to learn, and the "
        "best bit tells so much of it. <b>Good:</b> an attribute that matters has bits of its own. "
        "<b>Bad:</b> one that should not matter, such as the camera or the year, is what the bits are "
        "about.</p>",
        _table(head, rows),
    )


def _shown(
    result: dict[str, Any], images: Sequence[int], pictures: dict[int, Image.Image], source: Source
) -> str:
    chosen = result["shown"]
    why = {
        "named": "The bits that were asked for.",
        "information": "The bits that tell most about the class, and the two that tell least.",
        "stability": "The bits that are steadiest between crops, and the two that are least so.",
    }
    labels = source.labels if "information" in result else None
    body = ""
    for one in chosen["bits"]:
        bit = one["bit"]
        body += f"<h3>Bit {bit}</h3><p class=small>{_of_bit(result, bit)}</p>"
        for side, name in (("ones", "1"), ("zeros", "0")):
            strip = ""
            for shown in one[side]:
                image = os.path.basename(shown["image"])
                if labels is not None:
                    image = f"{source.classes[labels[images[shown['row']]]]}, {image}"
                said = f"{image}, logit {shown['logit']:+.2f}"
                strip += _thumbnail(pictures[shown["row"]], said)
            side = f"<div>{strip}</div>" if strip else "<span>no image</span>"
            body += f"<div class=strip><b>{name}</b>{side}</div>"
    return _section(
        "What are single bits about?",
        f"<p>{why[chosen['chosen_by']]} Above, the images in which the bit is most surely 1 (the largest "
        "outputs of the head); below, most surely 0. <b>Good:</b> each row has something in common that one "
        "can name. <b>Bad:</b> the two rows look alike. Eight images out of many suggest, they do not "
        "prove.</p>",
        body,
    )


def _of_bit(result: dict[str, Any], bit: int) -> str:
    parts = [f"1 in {result['use']['ones'][bit]:.0%} of the images"]
    parts.append(f"same in another crop {result['stability']['agreement'][bit]:.0%}")
    if "information" in result:
        parts.append(f"tells {result['information']['corrected'][bit]:.3f} bits of the class")
        of_classes = sorted(
            (row[bit], name)
            for row, name, count in zip(
                result["class_shares"], result["classes"], result["class_images"], strict=True
            )
            if count >= FEWEST_OF_CLASS
        )
        few = min(3, len(of_classes) // 2)
        most, least = of_classes[::-1][:few], of_classes[:few]
        for words, some in (("most often 1 in", most), ("least often in", least)):
            if some:
                parts.append(f"{words} " + ", ".join(f"{_name(name)} ({share:.0%})" for share, name in some))
    return "; ".join(parts) + "."


def _apart(result: dict[str, Any]) -> str:
    if "telling_apart" not in result:
        return ""
    found = result["telling_apart"]
    first, second = map(_name, found["classes"])
    bits = found["order"][:10]
    columns = [np.array(found[name])[bits] for name in ("difference", "low", "high")]
    clear = sum(low > 0 or high < 0 for low, high in zip(found["low"], found["high"], strict=True))

    def draw(axes: Axes) -> None:
        places, (middle, low, high) = np.arange(len(bits))[::-1], columns
        errors = np.maximum([middle - low, high - middle], 0)
        axes.errorbar(middle, places, xerr=errors, fmt="o", color=BLUE, capsize=3)
        axes.axvline(0, color=GRAY, linewidth=1)
        axes.set_yticks(places, [f"bit {bit}" for bit in bits])
        axes.set(xlabel="share of ones, the first less the second", xlim=(-1.02, 1.02))
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])

    number = [result["class_images"][result["classes"].index(name)] for name in found["classes"]]
    among = f", of those of {FEWEST_OF_CLASS} images or more" if min(number) >= FEWEST_OF_CLASS else ""
    why = "" if found["named"] else f" No other two classes{among} have shares so much alike."
    return _section(
        f"What tells {first} from {second}?",
        f"<p>The bits whose shares of ones differ most between <b>{first}</b> (images: {number[0]}) and "
        f"<b>{second}</b> ({number[1]}).{why} {clear} of {result['bits']} bits differ beyond chance. "
        "<b>Good:</b> dots far from the middle, with lines that do not cross it. <b>Bad:</b> all lines cross "
        "it: the code does not tell the two apart, or the images are too few.</p>"
        "<p class=small>Lines are 95 % intervals that hold for all bits at once.</p>",
        _plot(draw, f"Differences of the shares of ones, the largest {columns[0][0]:+.2f} in bit {bits[0]}"),
    )


def _stable(result: dict[str, Any]) -> str:
    found = result["stability"]
    kappa, agreement = np.array(found["kappa"]), np.array(found["agreement"])

    def draw(axes: Axes) -> None:
        axes.hist(kappa, bins=np.linspace(min(0, kappa.min()), 1, 41), color=BLUE)
        axes.set(xlabel="agreement of two crops, 0 chance, 1 always")
        _count_bits(axes)

    return _section(
        "Does a bit stay when the image is cropped and recolored?",
        f"<p>Of {found['images']} images two crops each were made as in training, and their codes compared. "
        f"{agreement.mean():.1%} of the bits are the same; two different images would share "
        f"{np.mean(found['chance']):.1%}. The figure counts each bit between the two: 0 is chance, 1 is "
        "always. <b>Good:</b> well above 0 for all bits. <b>Bad:</b> near 0: the bit is noise, and nothing "
        "is transmitted. Near 1 for all bits with little entropy is no good either: what never changes says "
        "nothing. No published figure.</p>",
        _plot(draw, f"Histogram of the bits' stability, mean {kappa.mean():.2f}"),
    )


def _compared(result: dict[str, Any]) -> str:
    found = result.get("other")
    if not found:
        return ""
    parts = [("from_other", "this code"), ("from_this", "the other")]
    rows = [
        [
            name,
            f"{np.mean(found[key]['correlation']):.3f}",
            f"{found[key]['chance']:.3f}",
            f"{np.mean(found[key]['probe']):.3f}",
        ]
        for key, name in parts
    ]
    near = found["neighbors"]

    def draw(axes: Axes) -> None:
        edges = np.linspace(min(0, *found["from_other"]["probe"]), 1, 41)
        axes.hist(found["from_other"]["correlation"], edges, color=BLUE, alpha=0.6, label="best single bit")
        axes.hist(
            found["from_other"]["probe"], edges, color=ORANGE, alpha=0.6, label="all bits, linear probe"
        )
        axes.axvline(found["from_other"]["chance"], color=GRAY, linestyle="--", label="best bit, by chance")
        axes.set(xlabel="how well a bit is known from the other code")
        _count_bits(axes)
        _legend(axes)

    few = ""
    if found["images"] < 4 * max(found["bits"], result["bits"]):
        few = (
            "<p class=note>The linear probe wants four times as many images as bits; here it falls short.</p>"
        )
    return _section(
        "What stays from one checkpoint to the other?",
        f"<p>Compared with {_text(found['weights'])}. Where the head was drawn anew between the two, the "
        "bits are others; the question is whether what they carry is still there. Each bit is predicted from "
        "the other code, by its best single bit and by a linear probe on all of them: 1 is always right, 0 "
        f"is chance for the probe. Of an image's {near['k']} nearest by one code {near['overlap']:.1%} are "
        f"among the nearest by the other ({near['chance']:.1%} by chance). <b>Good:</b> the probe well above "
        "0 and the overlap far above chance, even where no single bit is found again. <b>Bad:</b> all at "
        f"chance: each head codes something else. No published figure.</p>{few}",
        _table(["predicted", "best bit, |r|", "by chance", "linear probe"], rows)
        + _plot(draw, f"Neighbors in common {near['overlap']:.1%}, by chance {near['chance']:.1%}"),
    )


def _mapped(result: dict[str, Any], source: Source) -> str:
    found = result["map"]
    if found is None:
        return ""
    x, y = np.array(found["x"]), np.array(found["y"])
    colors, legend = np.full(len(x), BLUE, dtype=object), ""
    if "information" in result:
        labels = source.labels[found["images"]]
        common = [label for label, _ in Counter(labels.tolist()).most_common(len(COLORS))]
        colors[:] = "#c4c4c4"
        entries = []
        for label, color in zip(sorted(common), COLORS, strict=False):
            colors[labels == label] = color
            entries.append((color, source.classes[label]))
        if len(np.unique(labels)) > len(common):
            entries.append(("#c4c4c4", "other classes"))
        marks = (f"<span><i style='background:{color}'></i>{_name(name)}</span>" for color, name in entries)
        legend = f"<div class=legend>{''.join(marks)}</div>"

    def draw(axes: Axes) -> None:
        size = 4 if len(x) > 800 else 14
        axes.scatter(x, y, s=size, c=list(colors), linewidths=0)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()

    words = (
        "<b>Good:</b> patches of one color." if legend else "<b>Good:</b> clumps of images that are alike."
    )
    return _section(
        "A map of the codes",
        f"<p>{len(x):,} images, near where their codes are near (t-SNE of Hamming distances). {words} "
        "<b>Bad:</b> an even mixture. Only who is next to whom means something: sizes of clumps and gaps "
        "between them do not, and clumps can arise by chance.</p>",
        _plot(draw, f"Map of {len(x)} codes" + (" colored by class" if legend else ""), height=4.6) + legend,
    )


def _every_bit(result: dict[str, Any]) -> str:
    head, columns = ["bit", "share of 1", "entropy"], [result["use"]["ones"], result["use"]["entropy"]]
    head += ["same in another crop", "above chance"]
    columns += [result["stability"]["agreement"], result["stability"]["kappa"]]
    if "information" in result:
        head += ["tells of the class", "classes, mostly 1", "mostly 0"]
        columns += [result["information"]["corrected"], result["sharing"]["ones"], result["sharing"]["zeros"]]
    rows = [
        [str(bit), *(f"{value:d}" if isinstance(value, int) else f"{value:.3f}" for value in values)]
        for bit, values in enumerate(zip(*columns, strict=True))
    ]
    return _section("Every bit", "", _details("All bits in a table", _table(head, rows)))


def _section(title: str, text: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{text}\n{body}\n</section>\n"


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Its cells are escaped."""
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll tall"><table>{"".join(lines)}</table></div>'


def _plot(draw: Callable[[Axes], None], alt: str, height: float = 2.7) -> str:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=220)
    return f"<figure>{_image(file, 'png', alt)}</figure>"


def _legend(axes: Axes) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8.5, frameon=False, handlelength=1.5
    )


def _count_bits(axes: Axes) -> None:
    axes.set_ylabel("bits")
    _whole(axes.yaxis)


def _whole(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _thumbnail(picture: Image.Image, alt: str) -> str:
    file = io.BytesIO()
    picture.save(file, format="jpeg", quality=90)
    return _image(file, "jpeg", alt)


def _image(file: io.BytesIO, kind: str, alt: str) -> str:
    data, alt = base64.b64encode(file.getvalue()).decode(), _text(alt)
    return f'<img src="data:image/{kind};base64,{data}" alt="{alt}" title="{alt}">'


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:30])) + (f" and {len(values) - 30} more" if len(values) > 30 else "")


def _short(text: str) -> str:
    half = LONGEST_NAME // 2
    return text if len(text) <= LONGEST_NAME else f"{text[:half]}…{text[-half:]}"


def _name(text: str) -> str:
    """A name amid other words, short enough, and set apart where it is written from right to left."""
    return f"<bdi>{_text(_short(text))}</bdi>"


def _text(text: str) -> str:
    """Escaped; names of files may be of any bytes."""
    return html.escape(text.encode(errors="backslashreplace").decode())

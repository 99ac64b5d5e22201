"""Sections that show images: the most certain ones of single bits, and a map of all."""

import os
from collections import Counter
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bincomm.codes.classes import MIN_CLASS_IMAGES
from bincomm.codes.observations import Observations
from bincomm.data.sources import Source
from bincomm.page.elements import name_tag, picture_tag, plot, section
from bincomm.page.style import BLUE, CLASS_COLORS, OTHER_CLASSES


def shown_section(result: dict[str, Any], observed: Observations, source: Source) -> str:
    """The most certain images of single bits."""
    reasons = {
        "named": "The bits that were named.",
        "information": "The bits that say most about the class, and the two that say least.",
        "stability": "The bits that are most stable between crops, and the two that are least stable.",
    }
    labels = source.labels if "information" in result else None
    body = ""
    for shown in result["shown"]["bits"]:
        body += f"<h3>Bit {shown['bit']}</h3><p class=small>{_describe_bit(result, shown['bit'])}</p>"
        for side, value in (("ones", "1"), ("zeros", "0")):
            pictures = ""
            for image in shown[side]:
                name, row = os.path.basename(image["image"]), image["row"]
                if labels is not None:
                    name = f"{source.classes[labels[int(observed.indices[row])]]}, {name}"
                pictures += picture_tag(observed.pictures[row], f"{name}, logit {image['logit']:+.2f}")
            strip = f"<div>{pictures}</div>" if pictures else "<span>no image</span>"
            body += f"<div class=strip><b>{value}</b>{strip}</div>"
    return section(
        "What are single bits about?",
        f"<p>{reasons[result['shown']['chosen_by']]} Above, the images in which the bit is most certainly 1 "
        "(the largest outputs of the head); below, most certainly 0. <b>Good:</b> each row has something in "
        "common that one can name. <b>Bad:</b> the two rows look alike. Eight images out of many suggest, "
        "they do not prove.</p>",
        body,
    )


def _describe_bit(result: dict[str, Any], bit: int) -> str:
    parts = [f"1 in {result['use']['ones'][bit]:.0%} of the images"]
    parts.append(f"the same in another crop in {result['stability']['equal'][bit]:.0%}")
    if "information" in result:
        parts.append(f"says {result['information']['corrected'][bit]:.3f} bits about the class")
        of_classes = sorted(
            (row[bit], name)
            for row, name, count in zip(
                result["class_shares"], result["classes"], result["class_images"], strict=True
            )
            if count >= MIN_CLASS_IMAGES
        )
        few = min(3, len(of_classes) // 2)
        most, least = of_classes[::-1][:few], of_classes[:few]
        for words, group in (("most often 1 in", most), ("least often in", least)):
            if group:
                names = (f"{name_tag(name)} ({share:.0%})" for share, name in group)
                parts.append(f"{words} {', '.join(names)}")
    return "; ".join(parts) + "."


def map_section(result: dict[str, Any], source: Source) -> str:
    """The map of all codes; "" where there is none."""
    positions = result["map"]
    if positions is None:
        return ""
    x, y = np.array(positions["x"]), np.array(positions["y"])
    colors, legend = np.full(len(x), BLUE, dtype=object), ""
    if "information" in result and source.labels is not None:
        labels = source.labels[positions["images"]]
        common = [label for label, _ in Counter(labels.tolist()).most_common(len(CLASS_COLORS))]
        colors[:] = OTHER_CLASSES
        entries = []
        for label, color in zip(sorted(common), CLASS_COLORS, strict=False):
            colors[labels == label] = color
            entries.append((color, source.classes[label]))
        if len(np.unique(labels)) > len(common):
            entries.append((OTHER_CLASSES, "other classes"))
        marks = (
            f"<span><i style='background:{color}'></i>{name_tag(name)}</span>" for color, name in entries
        )
        legend = f"<div class=legend>{''.join(marks)}</div>"

    def draw(axes: Axes) -> None:
        size = 4 if len(x) > 800 else 14
        axes.scatter(x, y, s=size, c=list(colors), linewidths=0, rasterized=True)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()

    words = "<b>Good:</b> patches of one color." if legend else "<b>Good:</b> clusters of similar images."
    return section(
        "A map of the codes",
        f"<p>{len(x):,} images, close where their codes are close (t-SNE of Hamming distances). {words} "
        "<b>Bad:</b> an even mixture. Only neighborhood has a meaning: the sizes of clusters and the gaps "
        "between them have none, and clusters can arise by chance.</p>",
        plot(draw, f"Map of {len(x)} codes" + (" colored by class" if legend else ""), height=4.6) + legend,
    )

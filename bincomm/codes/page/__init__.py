"""The page about a code: figures, pictures, and what they mean, in one HTML file that needs nothing else."""

from typing import Any

import numpy as np

from bincomm.codes.observations import Observations
from bincomm.codes.page.bits import (
    blocks_section,
    correlations_section,
    full_blocks,
    table_section,
    use_section,
)
from bincomm.codes.page.classes import (
    attributes_section,
    difference_section,
    distances_section,
    information_section,
    retrieval_section,
)
from bincomm.codes.page.images import map_section, shown_section
from bincomm.codes.page.stability import comparison_section, stability_section
from bincomm.data.sources import Source
from bincomm.page.elements import document, escape


def draw_page(result: dict[str, Any], observed: Observations, source: Source) -> str:
    """The HTML page of a result of `bincomm.codes.report.report`, with the images observed for it."""
    sections = [
        use_section(result),
        blocks_section(result),
        correlations_section(result),
        distances_section(result),
        retrieval_section(result),
        information_section(result),
        attributes_section(result),
        shown_section(result, observed, source),
        difference_section(result),
        stability_section(result),
        comparison_section(result),
        map_section(result, source),
        table_section(result),
    ]
    return document(f"Codes of {escape(result['weights'])}", f"{_summary(result)}\n{''.join(sections)}")


def _summary(result: dict[str, Any]) -> str:
    n, size, use = result["images"], result["bits"], result["use"]
    block_entropy, stability = full_blocks(result)["entropy"], result["stability"]
    tiles = [
        (f"{n:,}", "images"),
        (f"{size}", f"bit{'s' * (size != 1)} in a code"),
        (f"{np.mean(use['entropy']):.2f}", "bits of entropy in a bit, of 1"),
    ]
    if len(block_entropy):
        tiles.append((f"{np.mean(block_entropy):.2f}", "bits of entropy in a block, of 8"))
    tiles += [
        (f"{len(use['dead'])}", "dead bits"),
        (f"{len(use['same']) + len(use['inverted'])}", "bits that repeat another"),
        (
            f"{np.mean(stability['equal']):.1%}",
            f"of bits are the same in another crop; chance {np.mean(stability['chance']):.1%}",
        ),
        (f"{np.sum(stability['information']):.1f}", f"bits transmitted from crop to crop, of {size}"),
    ]
    if "retrieval" in result:
        retrieval = result["retrieval"]
        precision, chance = retrieval["by_bits"][0]["precision"], retrieval["by_chance"]
        tiles.append((f"{precision:.1%}", f"mAP with all bits; chance {chance:.1%}"))
    text = f"<p class=small>Images: {escape(result['data'])}</p>" if result["data"] else ""
    text += (
        "<p>A code is what the network's head says about an image: a row of bits, each the sign of one of "
        "its outputs. This page shows how well the bits are used, what they are about, and how far they can "
        "be relied on. The same figures are in codes.json.</p>"
    )
    text += "<div class=tiles>"
    text += "".join(f"<div class=tile><b>{figure}</b><span>{name}</span></div>" for figure, name in tiles)
    text += "</div>"
    if n < 1000:
        text += (
            f"<p class=note><b>{n} images are few.</b> A share may be off by ± {1 / n**0.5:.0%}, and what "
            "combines many bits, such as the entropy of blocks, or compares classes with few images each, by "
            "more. A thousand images or more give steadier figures.</p>"
        )
    text += "".join(f"<p class=note>{escape(note)}</p>" for note in result["notes"])
    if result["left_out"]:
        lines = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in result["left_out"][:50])
        text += f"<details><summary>Images that could not be used</summary><ul>{lines}</ul></details>"
    return text + (
        "<p class=small>The published figures quoted below are those of BITS-reset: ViT-B/16 with 256 bits "
        "after 100 epochs on ImageNet-1K (arXiv 2602.09764). For other images, classes or sizes they are a "
        "rough guide, not a target.</p>"
    )

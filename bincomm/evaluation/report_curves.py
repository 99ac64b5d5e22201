"""The section about a run's curves: what they show, and what good and bad ones look like."""

import numpy as np
from matplotlib.axes import Axes

from bincomm.config import PretrainConfig
from bincomm.engine.curves import PANELS, Panel, draw_metrics
from bincomm.ops.coding_rate import rate_bounds
from bincomm.page.elements import add_legend, plot, section

POINTS = 300  # of a curve, at most; those of longer runs are means


def curves_section(config: PretrainConfig, records: list[dict[str, float]]) -> str:
    """All curves of records of metrics.jsonl; "" where there are none."""
    if not records:
        return ""
    points = thin(records)
    texts = _explanations(config)
    body = ""
    for panel in PANELS:
        if any(key in record for record in records for key in panel.keys):
            title, text = texts[panel.keys[0]]
            body += f"<h3>{title}</h3><div class=panel>{_panel(panel, points)}<div>{text}</div></div>"
    return section("How did it get there?", "", body)


def _panel(panel: Panel, points: list[dict[str, float]]) -> str:
    def draw(axes: Axes) -> None:
        # Constrained layout takes as long as drawing, and the margins of all panels are alike.
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.set_layout_engine(None)
        figure.subplots_adjust(0.19, 0.19, 0.94, 0.89)
        draw_metrics(axes, panel, points)
        if len(axes.lines) > 1:
            add_legend(axes)

    last = [f"{key} {points[-1][key]:.4g}" for key in panel.keys if key in points[-1]]
    return plot(draw, f"{panel.title} over the steps, at the end {', '.join(last)}")


def _explanations(config: PretrainConfig) -> dict[str, tuple[str, str]]:
    """The heading of each panel, and what good and bad look like, in HTML, by the panel's first key."""
    floor, ceiling = rate_bounds(config.batch_size, config.bits, config.eps_squared)

    def judged(about: str, good: str, bad: str) -> str:
        return f"<p>{about}</p><p><b>Good:</b> {good}</p><p><b>Bad:</b> {bad}</p>"

    cross_entropy = config.method == "bits" and config.agreement != "cosine"
    agreement = judged(
        "How well the student predicts the bits, in nats per bit; agreement_global without the local crops.",
        "it falls from ln 2 = 0.693.",
        "it stays at 0.693: nothing is transmitted; or it falls to 0 with the entropy of the bits: collapse.",
    )
    if not cross_entropy:
        agreement = judged(
            "The mean cosine of the student's and the teacher's outputs.",
            "it changes early and then slowly.",
            "it stays where it began.",
        )
    weighted = (
        " With beta auto its level moves with beta; the other curves tell more."
        if config.beta == "auto"
        else ""
    )
    return {
        "loss": (
            "Loss",
            judged(
                f"What is minimized.{weighted}",
                "it falls, fast at first, then slowly.",
                "it stays where it began, or jumps up and stays there: the learning rate may be too high.",
            ),
        ),
        "agreement": ("Agreement", agreement),
        "transmitted_bits": (
            "Transmitted bits",
            judged(
                f"How many of the {config.bits} bits of a message reach the student: the curve to watch."
                + " Curves named dense_ are of masked patches." * bool(config.dense),
                "it grows.",
                "it stays near 0.",
            ),
        ),
        "rate": (
            "Coding rate",
            judged(
                f"How much room the logits take, from {floor:.1f} to at most {ceiling:.1f} nats here.",
                "well above its least.",
                f"near {floor:.1f}: all images give the same output.",
            ),
        ),
        "beta": (
            "Weight of the coding rate",
            "<p>With beta auto it is found while training, as small as keeps the bits in use: neither a "
            "high nor a low one is bad by itself.</p>",
        ),
        "bit_entropy": (
            "Use of the bits",
            judged(
                "The entropy of a bit over images, mean and least, up to 1; and the share of dead bits, "
                "which nearly always have the same value.",
                "a mean near 0.9, no dead bits.",
                "the mean falls toward 0, bits die: the channel collapses.",
            ),
        ),
        "bit_accuracy": (
            "Bits predicted right",
            judged(
                "bit_accuracy is the student's share, bit_majority that of always guessing a bit's more "
                "frequent value.",
                "the first is clearly above the second.",
                "both are the same: the student has learned how frequent values are, and nothing else.",
            ),
        ),
        "lr": (
            "Learning rate",
            "<p>It rises in the warm-up and falls to its end as planned; nothing to judge.</p>",
        ),
    }


def thin(records: list[dict[str, float]]) -> list[dict[str, float]]:
    """Records of metrics, at most `POINTS`: means of as many in a row as it takes."""
    every = -(-len(records) // POINTS)
    if every < 2:
        return records
    groups = [records[start : start + every] for start in range(0, len(records), every)]
    return [
        {key: float(np.mean([record[key] for record in group if key in record])) for key in group[-1]}
        for group in groups
    ]

"""Warnings when the channel collapses or is mute."""

import math

import torch

from bincomm.config import PretrainConfig
from bincomm.ops.coding_rate import rate_ceiling


class CollapseMonitor:
    """Warns once of every kind of collapse, and says what helps.

    It is asked once the head has had time to learn: the symptoms are common in warm-up and after a reset.

    Args:
        beta: weight of the coding rate where the configuration sets it, as for the method bits; else None.
        floor, ceiling: the least and the largest coding rate there can be, nats.
        hard_bits: whether the agreement is the binary cross-entropy of bits, whose ln 2 means silence.
    """

    PATIENCE = 5  # reports in a row with a symptom before a warning

    def __init__(self, beta: float | None, floor: float, ceiling: float, hard_bits: bool):
        self.beta, self.floor, self.ceiling, self.hard_bits = beta, floor, ceiling, hard_bits
        self.streaks = {"dead": 0, "narrow": 0, "flat": 0, "mute": 0}  # reports in a row; -1: has warned

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """The warnings that a report's metrics give rise to."""
        if not {"bit_entropy", "rate", "agreement"} <= metrics.keys():
            return []
        share = (metrics["rate"] - self.floor) / (self.ceiling - self.floor)
        symptoms = {
            "dead": metrics["dead_bits"] > 0.5,
            "narrow": metrics["bit_entropy"] < 0.2,
            "flat": share < 0.02,
            # No better than chance, or than always guessing the more frequent value, although bits vary.
            "mute": self.hard_bits
            and metrics["bit_entropy"] >= 0.2
            and (
                metrics["bit_accuracy"] < metrics["bit_majority"] - 0.01
                or metrics["agreement"] > 0.98 * math.log(2)
            ),
        }
        messages = self._messages(metrics, share)
        warnings = []
        for name, present in symptoms.items():
            if self.streaks[name] >= 0:
                self.streaks[name] = self.streaks[name] + 1 if present else 0
            if self.streaks[name] == self.PATIENCE:
                warnings.append(f"{messages[name]}, and begin again with another --output.")
                self.streaks[name] = -1
        return warnings

    def _messages(self, metrics: dict[str, float], share: float) -> dict[str, str]:
        stronger, weaker = "lower lr", "lower lr"
        if self.beta is not None:
            stronger = f"raise beta (now {self.beta:g}), say to {2 * self.beta:g}"
            weaker = f"lower beta (now {self.beta:g}), say to {self.beta / 2:g}"
        stronger = f"The coding rate is too weak: {stronger}"
        weaker = f"The coding rate is too strong or the learning rate wrong: {weaker}"
        return {
            "dead": f"{metrics['dead_bits']:.0%} of the bits are dead (nearly always the same). {stronger}",
            "narrow": f"a bit carries {metrics['bit_entropy']:.2f} of the 1 bit it could. {stronger}",
            "flat": f"the coding rate, {metrics['rate']:.1f} nats, is near its least, {self.floor:.1f} (its "
            f"ceiling is {self.ceiling:.1f}): all images give the same output. {stronger}",
            "mute": f"nothing is transmitted: the student gets {metrics['bit_accuracy']:.1%} of the bits "
            f"right, always guessing the more frequent value {metrics['bit_majority']:.1%}; the agreement is "
            f"{metrics['agreement']:.3f} (ln 2 = 0.693: chance), the rate at {share:.0%} of its "
            f"range. {weaker}",
        }

    def state_dict(self) -> dict[str, int]:
        """How long each symptom has been there."""
        return dict(self.streaks)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the state of another monitor."""
        self.streaks = dict(state)


def create_monitor(config: PretrainConfig) -> CollapseMonitor:
    """The monitor with the bounds of the configuration's coding rate and what its agreement means."""
    images = torch.tensor(config.batch_size, dtype=torch.float64)
    return CollapseMonitor(
        config.beta if config.method == "bits" else None,
        floor=math.log1p(config.bits / config.eps_squared) / 2,
        ceiling=rate_ceiling(images, config.bits, config.eps_squared).item(),
        hard_bits=config.method == "bits" and config.agreement != "cosine",
    )

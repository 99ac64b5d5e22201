"""Warnings when the channel collapses or is mute."""

import math


class CollapseMonitor:
    """Warns, once each, when the channel collapses, and says what helps.

    To be asked while the head has had time to learn: its signs are common in warm-up and after a reset.

    Args:
        beta: weight of the coding rate where the configuration sets it, as for the method bits; else None.
        floor, ceiling: the least and the largest coding rate there can be, nats.
        hard_bits: whether the agreement is the binary cross-entropy of bits, whose ln 2 means silence.
    """

    PATIENCE = 5  # reports in a row

    def __init__(self, beta: float | None, floor: float, ceiling: float, hard_bits: bool):
        self.beta, self.floor, self.ceiling, self.hard_bits = beta, floor, ceiling, hard_bits
        self.spells = {"dead": 0, "narrow": 0, "flat": 0, "mute": 0}  # reports in a row; below 0: warned of

    def look(self, metrics: dict[str, float]) -> list[str]:
        """The warnings these metrics give rise to."""
        if "bit_entropy" not in metrics:
            return []
        share = (metrics["rate"] - self.floor) / (self.ceiling - self.floor)
        signs = {
            "dead": metrics["dead_bits"] > 0.5,
            "narrow": metrics["bit_entropy"] < 0.2,
            "flat": share < 0.02,
            # No better than by chance, or than always sending the commoner value, where bits do vary.
            "mute": self.hard_bits
            and metrics["bit_entropy"] >= 0.2
            and (
                metrics["bit_accuracy"] < metrics["bit_majority"] - 0.01
                or metrics["agreement"] > 0.98 * math.log(2)
            ),
        }
        stronger = "The coding rate is too weak: "
        weaker = "The coding rate is too strong or the learning rate wrong: "
        if self.beta is None:
            stronger += "lower lr"
            weaker += "lower lr"
        else:
            stronger += f"raise beta (now {self.beta:g}), say to {2 * self.beta:g}"
            weaker += f"lower beta (now {self.beta:g}), say to {self.beta / 2:g}"
        words = {
            "dead": f"{metrics['dead_bits']:.0%} of the bits are dead (nearly always the same). {stronger}",
            "narrow": f"a bit carries {metrics['bit_entropy']:.2f} of the 1 bit it could. {stronger}",
            "flat": f"the coding rate, {metrics['rate']:.1f} nats, is near its least, {self.floor:.1f} (its "
            f"ceiling is {self.ceiling:.1f}): all images give the same output. {stronger}",
            "mute": f"nothing is transmitted: {metrics['bit_accuracy']:.1%} of the bits agree, "
            f"{metrics['bit_majority']:.1%} would by always sending the commoner value, agreement is "
            f"{metrics['agreement']:.3f} (ln 2 = 0.693: chance), rate at {share:.0%} of its range. {weaker}",
        }
        warnings = []
        for name, seen in signs.items():
            if self.spells[name] >= 0:
                self.spells[name] = self.spells[name] + 1 if seen else 0
            if self.spells[name] == self.PATIENCE:
                warnings.append(f"warning: {words[name]}, and begin again with another --output.")
                self.spells[name] = -1
        return warnings

    def state_dict(self) -> dict[str, int]:
        return dict(self.spells)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.spells = dict(state)

"""Warnings when the channel collapses or is mute."""

from bincomm.config import PretrainConfig
from bincomm.ops.coding_rate import rate_bounds


class CollapseMonitor:
    """Warns once of every kind of collapse, and says what helps.

    It is asked once the head has had time to learn: the symptoms are common in warm-up and after a reset.

    Args:
        beta: weight of the coding rate where the configuration sets it, as for the method bits, a number or
            "auto"; else None.
        frozen: whether the teacher is frozen: its bits are what they are, and advice is for the student.
        floor, ceiling: the least and the largest coding rate there can be, nats.
        bits: K.
    """

    PATIENCE = 5  # reports in a row with a symptom before a warning

    def __init__(
        self, beta: float | str | None, floor: float, ceiling: float, bits: int, frozen: bool = False
    ):
        self.beta, self.floor, self.ceiling, self.bits = beta, floor, ceiling, bits
        self.frozen = frozen
        self.streaks = {"dead": 0, "narrow": 0, "flat": 0, "mute": 0}  # reports in a row; -1: has warned

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """The warnings that a report's metrics give rise to."""
        if not {"bit_entropy", "rate", "agreement"} <= metrics.keys():
            return []
        share = (metrics["rate"] - self.floor) / (self.ceiling - self.floor)
        symptoms = {
            "dead": metrics["dead_bits"] > 0.4,
            "narrow": metrics["bit_entropy"] < 0.2,
            "flat": share < 0.02,
            # The bits vary, but the student does not predict them better than by their frequency, or with
            # next to no confidence, which a beta that is found mends by itself. Local crops do not count: a
            # constant sent to them lowers the agreement although nothing is transmitted.
            "mute": metrics["bit_entropy"] >= 0.2
            and metrics.get("transmitted_bits", self.bits) < 0.02 * self.bits
            and (
                metrics["bit_accuracy"] < metrics["bit_majority"] + 0.01
                or (isinstance(self.beta, float | int) and not self.frozen)
            ),
        }
        messages = self._messages(metrics, share)
        warnings = []
        for name, present in symptoms.items():
            if self.streaks[name] >= 0:
                self.streaks[name] = self.streaks[name] + 1 if present else 0
            if self.streaks[name] == self.PATIENCE:
                warnings.append(messages[name])
                self.streaks[name] = -1
        return warnings

    def _messages(self, metrics: dict[str, float], share: float) -> dict[str, str]:
        if self.frozen:
            stronger = (
                "The bits are those of a frozen teacher, which sees little difference between these images: "
                "choose other --teacher weights, or crops that show more (a larger global_scale or size)."
            )
        elif self.beta is None:
            stronger = "Lower lr, and begin again with another --output."
        elif self.beta == "auto":
            stronger = (
                "beta is raised until they are used again; if that takes long, begin again with a lower lr "
                "and another --output."
            )
        else:
            stronger = (
                f"The coding rate is too weak: use beta auto, or raise beta (now {self.beta:g}), and begin "
                "again with another --output."
            )
        weaker = (
            "If this does not change, the crops have too little in common or the teacher is too slow: begin "
            "again with milder crops (a larger global_scale, no gray, solarize and blur, less jitter), a "
            "lower momentum or a higher lr (auto fits both to the run), and another --output."
        )
        if self.frozen:
            weaker = (
                "If this does not change, what the teacher sees cannot be told from another crop: begin "
                "again with milder crops (a larger global_scale, no gray, solarize and blur, less jitter), "
                "or with a higher lr or more epochs, and another --output."
            )
        elif isinstance(self.beta, float | int):
            weaker = f"beta may be too large (now {self.beta:g}); auto finds it. {weaker}"
        flat = stronger
        if self.frozen:
            flat = (
                "A student cannot predict messages that way: if this does not change, begin again with "
                "another lr (auto fits it to the run), and another --output."
            )
        return {
            "dead": f"{metrics['dead_bits']:.0%} of the bits are dead (nearly always the same). {stronger}",
            "narrow": f"a bit carries {metrics['bit_entropy']:.2f} of the 1 bit it could. {stronger}",
            "flat": f"the coding rate, {metrics['rate']:.1f} nats, is near its least, {self.floor:.1f} (its "
            f"ceiling is {self.ceiling:.1f}): all images give the same output. {flat}",
            "mute": "next to nothing is transmitted: the student hears "
            f"{metrics.get('transmitted_bits', 0):.1f} of {self.bits} bits; it gets "
            f"{metrics['bit_accuracy']:.1%} of them right, and would get {metrics['bit_majority']:.1%} by "
            f"always guessing the more frequent value; the rate is at {share:.0%} of its range. "
            f"{weaker}",
        }

    def state_dict(self) -> dict[str, int]:
        """How long each symptom has been there."""
        return dict(self.streaks)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the state of another monitor."""
        self.streaks = dict(state)


def create_monitor(config: PretrainConfig) -> CollapseMonitor:
    """The monitor with the bounds of the configuration's coding rate."""
    floor, ceiling = rate_bounds(config.batch_size, config.bits, config.eps_squared)
    return CollapseMonitor(
        config.beta if config.method == "bits" else None,
        floor=floor,
        ceiling=ceiling,
        bits=config.bits,
        frozen=config.teacher_is_frozen,
    )

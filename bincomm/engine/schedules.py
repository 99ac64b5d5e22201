"""Values that change from step to step, each a plain function of the step."""

import math


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at the last of `steps` steps along half a cosine."""
    progress = min(step / max(1, steps - 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, end: float) -> float:
    """Linear from peak/warmup to `peak` over `warmup` steps, then along half a cosine to `end`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, end)

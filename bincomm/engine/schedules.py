"""Values that change from step to step, each a plain function of the step."""

import math
from typing import TypedDict

from bincomm.config import PretrainConfig


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at the last of `steps` steps along half a cosine."""
    progress = min(step / max(1, steps - 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, end: float) -> float:
    """Linear from peak/warmup to `peak` over `warmup` steps, then along half a cosine to `end`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, end)


class Hyperparameters(TypedDict):
    """What the schedule gives a step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher's moving average


class Schedule:
    """How many steps a run has, and what each of them is given.

    Args:
        epoch_steps: steps of an epoch.
    """

    def __init__(self, config: PretrainConfig, epoch_steps: int):
        self.config, self.epoch_steps = config, epoch_steps
        self.steps = min(config.epochs * epoch_steps, config.max_steps or config.epochs * epoch_steps)
        self.warmup = min(config.warmup_epochs * epoch_steps, self.steps // 4)

    def __call__(self, step: int) -> Hyperparameters:
        """Learning rate, weight decay and the teacher's momentum of a step, which counts from 0."""
        config = self.config
        peak = config.lr * config.batch_size / 256
        return {
            "lr": warmup_cosine(step, self.steps, self.warmup, peak, min(config.min_lr, peak)),
            "weight_decay": cosine(step, self.steps, config.weight_decay, config.weight_decay_end),
            "momentum": cosine(step, self.steps, config.momentum, 1.0),
        }

    def epoch(self, step: int) -> int:
        """The epoch of a step, both counting from 0."""
        return step // self.epoch_steps

    def resets_head(self, step: int) -> bool:
        """Whether the head is re-initialized before a step: at the start of epochs R, 2R, ..."""
        period = self.config.reset_every * self.epoch_steps
        return bool(period) and step > 0 and step % period == 0

    def head_has_settled(self, steps_done: int) -> bool:
        """Whether the head has had time to learn: the warm-up and, after every reset, one epoch."""
        epoch = self.epoch(steps_done - 1)
        new = self.config.reset_every > 1 and epoch > 0 and epoch % self.config.reset_every == 0
        return steps_done > self.warmup and not new

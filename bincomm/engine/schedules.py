"""Values that change from step to step, each a plain function of the step."""

import math
from typing import TypedDict

from bincomm.config import PretrainConfig
from bincomm.engine.resolution import Resolution


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

    What the configuration leaves to "auto" depends on the number of steps S, so that a run of 300 steps
    learns as one of 500 000 does, and equals the paper's values for its run (ViT-B/16, batches of 256, 100
    epochs of 5 004 steps):

    - warm-up: a tenth of the steps;
    - teacher's momentum: 1 - 20/S, so that it averages a twentieth of the run, from 0.9 to 0.996;
    - learning rate: 5e-4·f·√(batch/256), f the larger one of (768/D)² and √(20 000/S), from 1 to 8, D the
      width of the features: narrow backbones and short runs need larger steps;
    - resets of the head: every tenth of the run if that is at least `MIN_RESET_STEPS`, else none.

    A frozen teacher has the momentum 1, and no head is reset.

    Args:
        epoch_steps: steps of an epoch.
        features: D.
    """

    MIN_RESET_STEPS = 2000

    def __init__(self, config: PretrainConfig, epoch_steps: int, features: int):
        self.config, self.epoch_steps = config, epoch_steps
        self.steps = config.steps(epoch_steps)
        self.resolution = Resolution(config, self.steps)
        if config.warmup_epochs == "auto":
            self.warmup = self.steps // 10
        else:
            self.warmup = min(config.warmup_epochs * epoch_steps, self.steps // 4)
        self.frozen = min(config.freeze_backbone * epoch_steps, self.steps // 4)  # steps of the head alone
        if config.teacher_is_frozen:
            self.momentum = 1.0
        elif config.momentum == "auto":
            self.momentum = min(max(1 - 20 / self.steps, 0.9), 0.996)
        else:
            self.momentum = config.momentum
        if config.lr == "auto":
            factor = max((768 / features) ** 2, math.sqrt(20_000 / self.steps))
            self.peak = 5e-4 * min(max(factor, 1), 8) * math.sqrt(config.batch_size / 256)
        else:
            self.peak = config.lr * config.batch_size / 256
        if config.teacher_is_frozen:
            self.reset_every = 0
        elif config.reset_every == "auto":
            period = math.ceil(self.steps / epoch_steps / 10)
            self.reset_every = period if period * epoch_steps >= self.MIN_RESET_STEPS else 0
        else:
            self.reset_every = config.reset_every

    def __call__(self, step: int) -> Hyperparameters:
        """Learning rate, weight decay and the teacher's momentum of a step, which counts from 0."""
        config = self.config
        return {
            "lr": warmup_cosine(step, self.steps, self.warmup, self.peak, min(config.min_lr, self.peak)),
            "weight_decay": cosine(step, self.steps, config.weight_decay, config.weight_decay_end),
            "momentum": cosine(step, self.steps, self.momentum, 1.0),
        }

    def describe(self) -> str:
        """The values that "auto" may stand for or that a method brings, in words."""
        resets = f"reset every {self.reset_every} epochs" if self.reset_every else "never reset"
        config = self.config
        teacher = "teacher frozen" if config.teacher_is_frozen else f"teacher's momentum {self.momentum:.3g}"
        frozen = f", last layer frozen for {config.freeze_last_layer} epochs" * bool(config.freeze_last_layer)
        frozen += f", backbone frozen for {self.frozen} steps" * bool(self.frozen)
        return (
            f"learning rate {self.peak:.2g} after {self.warmup} steps of warm-up, {config.min_lr:.2g} at the "
            f"end, gradients clipped at {config.clip:g}, {teacher}, head {resets}{frozen}"
        )

    def epoch(self, step: int) -> int:
        """The epoch of a step, both counting from 0."""
        return step // self.epoch_steps

    def resets_head(self, step: int) -> bool:
        """Whether the head is re-initialized before a step: at the start of epochs R, 2R, ..."""
        period = self.reset_every * self.epoch_steps
        return bool(period) and step > 0 and step % period == 0

    def head_has_settled(self, steps_done: int) -> bool:
        """Whether the head has had time to learn: the warm-up and, after every reset, one epoch."""
        epoch = self.epoch(steps_done - 1)
        new = self.reset_every > 1 and epoch > 0 and epoch % self.reset_every == 0
        return steps_done > self.warmup and not new

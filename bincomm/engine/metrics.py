"""Metrics of the steps between two reports, gathered on the device."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bincomm.bits import bit_statistics, transmitted_bits
from bincomm.engine.step import StepOutput
from bincomm.ops.messages import unpack_signs


class MetricsWindow:
    """Metrics of the steps since the last report, gathered on the device; only reading them syncs.

    Args:
        length: most steps between two reports.
        scalars: names of the objective's; the gradient's norm comes after them.
        bits: K where the outputs are bits, whose use is then reported too; else None.
        device: of the steps.
        predicts_bits: whether the sigmoid of a student's output is the probability of the teacher's bit.
    """

    STATE = ("steps", "scalars", "messages", "correct", "ones", "cross_entropy")  # what steps are gathered in

    def __init__(
        self,
        length: int,
        scalars: Sequence[str],
        bits: int | None,
        device: torch.device,
        predicts_bits: bool = True,
    ):
        self.names = (*scalars, "gradient_norm")
        self.predicts_bits = predicts_bits
        self.steps = torch.zeros((), dtype=torch.int64)  # on the host
        self.scalars = torch.zeros(length, len(self.names), device=device)
        # Of the steps that were not skipped: messages, correct predictions, and for each bit ones and nats.
        self.messages, self.correct = torch.zeros(2, dtype=torch.int64, device=device)
        self.ones = torch.zeros(bits or 0, dtype=torch.int64, device=device)
        self.cross_entropy = torch.zeros(bits or 0, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, output: StepOutput) -> None:
        """Add one step, and where the outputs are bits how they were used and predicted."""
        scalars = [*(output.losses[name] for name in self.names[:-1]), output.gradient_norm]
        self.scalars[self.steps] = torch.stack(scalars)
        self.steps += 1
        if not len(self.ones):
            return
        used = output.skipped == 0
        if output.teacher.dtype == torch.int32:
            message = unpack_signs(output.teacher, len(self.ones))
        else:
            message = output.teacher > 0
        # The other global view's message, as in training. Local views are left out: a student that cannot
        # predict anything from them gets the more frequent values right, which lowers the mean agreement.
        logits = output.student[: len(message)].roll(1, 0)
        self.messages += used * message.shape[0] * message.shape[1]
        self.ones += used * message.sum((0, 1))
        self.correct += used * (message == (logits > 0)).sum()
        if self.predicts_bits:
            nats = F.binary_cross_entropy_with_logits(logits.float(), message.float(), reduction="none")
            self.cross_entropy += torch.where(used, nats.sum((0, 1), dtype=torch.float64), 0)

    def report(self) -> dict[str, float]:
        """The window's metrics; the window is empty afterwards. All ranks call it, and get the metrics of all
        images.

        Scalars are means over the steps in which all of them were finite, and left out if there is no such
        step; "skipped" counts the others. Bits are those of the pairs of global views.
        """
        steps = int(self.steps)
        scalars = self.scalars[:steps].double()
        counts = [value.clone() for value in (self.messages, self.ones, self.correct, self.cross_entropy)]
        if dist.is_initialized():
            for value in (scalars, *counts):
                dist.all_reduce(value)
            scalars /= dist.get_world_size()
        finite = scalars.isfinite().all(1)
        means = scalars[finite].mean(0).tolist() if finite.any() else []
        metrics = dict(zip(self.names, means, strict=bool(means)))
        metrics["skipped"] = steps - int(finite.sum())
        messages, ones, correct, cross_entropy = counts
        if len(ones) and (number := int(messages)):
            metrics |= bit_statistics(ones, number)
            metrics["bit_accuracy"] = correct.item() / (number * len(ones))
            if self.predicts_bits:
                metrics["agreement_global"] = cross_entropy.mean().item() / number
                metrics["transmitted_bits"] = transmitted_bits(ones, cross_entropy / math.log(2), number)
        for name in self.STATE:
            getattr(self, name).zero_()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank has gathered."""
        return {name: getattr(self, name).to("cpu", copy=True) for name in self.STATE}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether a state is of a window as long as this one."""
        return state["scalars"].shape == self.scalars.shape

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with what a rank had gathered."""
        for name in self.STATE:
            getattr(self, name).copy_(state[name])

"""Metrics of the steps between two reports, gathered on the device."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bincomm.bits import bit_statistics
from bincomm.engine.step import StepOutput


class MetricsWindow:
    """Metrics of the steps since the last report, gathered on the device; only reading them syncs.

    Args:
        length: most steps between two reports.
        scalars: names of the objective's; the gradient's norm comes after them.
        bits: K where the outputs are bits, whose use is then reported too; else None.
        device: of the steps.
    """

    def __init__(self, length: int, scalars: Sequence[str], bits: int | None, device: torch.device):
        self.names = (*scalars, "gradient_norm")
        self.scalars = torch.zeros(length, len(self.names), device=device)
        self.ones = torch.zeros(bits or 0, dtype=torch.int64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64)  # steps, messages, compared bits; on the host

    @torch.no_grad()
    def add(self, output: StepOutput) -> None:
        """Add one step, and where the outputs are bits how they were used and predicted."""
        scalars = [*(output.losses[name] for name in self.names[:-1]), output.gradient_norm]
        self.scalars[self.counts[0]] = torch.stack(scalars)
        self.counts[0] += 1
        if len(self.ones):
            message = output.teacher > 0
            # A view's prediction against the other view's message, which is what the training asks for.
            prediction = output.student[: len(message)].roll(1, 0) > 0
            self.ones += message.sum((0, 1))
            self.correct += (message == prediction).sum()
            self.counts += torch.tensor([0, message.shape[0] * message.shape[1], message.numel()])

    def report(self) -> dict[str, float]:
        """The window's metrics; the window is empty afterwards. All ranks call it, and get the metrics of all
        images.

        Scalars are means over the steps in which all of them were finite, and left out if there is no such
        step; "skipped" counts the others.
        """
        steps, messages, compared = self.counts.tolist()
        values = self.scalars[:steps].double()
        scalars, ones, correct = values.clone(), self.ones.clone(), self.correct.clone()
        if dist.is_initialized():
            for value in (scalars, ones, correct):
                dist.all_reduce(value)
            scalars /= dist.get_world_size()
            messages, compared = messages * dist.get_world_size(), compared * dist.get_world_size()
        finite = scalars.isfinite().all(1)
        means = scalars[finite].mean(0).tolist() if finite.any() else []
        metrics = dict(zip(self.names, means, strict=bool(means)))
        metrics["skipped"] = steps - int(finite.sum())
        if len(ones):
            metrics |= bit_statistics(ones, messages)
            metrics["bit_accuracy"] = correct.item() / compared
        for value in (self.scalars, self.ones, self.correct, self.counts):
            value.zero_()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank has gathered."""
        names = ("scalars", "ones", "correct", "counts")
        return {name: getattr(self, name).to("cpu", copy=True) for name in names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with what a rank had gathered."""
        for name, value in state.items():
            getattr(self, name).copy_(value)

"""Metrics of the steps between two reports, gathered on the device."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bincomm.bits import bit_statistics, transmitted_bits
from bincomm.engine.step import StepOutput
from bincomm.objectives import DenseCommunication
from bincomm.ops.messages import unpack_signs


class BitCounts:
    """How the bits of messages were used and predicted, summed on the device.

    Args:
        bits: K.
        device: of the messages.
        predicts_bits: whether the sigmoid of a logit is the probability of the bit.
    """

    NAMES = ("messages", "correct", "ones", "cross_entropy")

    def __init__(self, bits: int, device: torch.device, predicts_bits: bool):
        self.predicts_bits = predicts_bits
        # Of the steps that were not skipped: messages, correct predictions, and for each bit ones and nats.
        self.messages, self.correct = torch.zeros(2, dtype=torch.int64, device=device)
        self.ones = torch.zeros(bits, dtype=torch.int64, device=device)
        self.cross_entropy = torch.zeros(bits, dtype=torch.float64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """What is summed, by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    def add(self, teacher: Tensor, logits: Tensor, used: Tensor) -> None:
        """Add (V, n, K) logits, or a message (V, n, ⌈K/32⌉) int32, and the logits that predict its bits, if
        the step was `used`, a bool."""
        packed = teacher.dtype == torch.int32
        message = unpack_signs(teacher, len(self.ones)) if packed else teacher > 0
        self.messages += used * message.shape[0] * message.shape[1]
        self.ones += used * message.sum((0, 1))
        self.correct += used * (message == (logits > 0)).sum()
        if self.predicts_bits:
            nats = F.binary_cross_entropy_with_logits(logits.float(), message.float(), reduction="none")
            self.cross_entropy += torch.where(used, nats.sum((0, 1), dtype=torch.float64), 0)


class MetricsWindow:
    """Metrics of the steps since the last report, gathered on the device; only reading them syncs.

    Args:
        length: most steps between two reports.
        scalars: names of the objective's; the gradient's norm comes after them.
        bits: K where the outputs are bits, whose use is then reported too; else None.
        device: of the steps.
        predicts_bits: whether the sigmoid of a student's output is the probability of the teacher's bit.
        patches: whether there are masked patches, whose bits are reported beside those of the images.
    """

    def __init__(
        self,
        length: int,
        scalars: Sequence[str],
        bits: int | None,
        device: torch.device,
        predicts_bits: bool = True,
        *,
        patches: bool = False,
    ):
        self.names = (*scalars, "gradient_norm")
        self.predicts_bits = predicts_bits
        self.steps = torch.zeros((), dtype=torch.int64)  # on the host
        self.scalars = torch.zeros(length, len(self.names), device=device)
        self.images = BitCounts(bits or 0, device, predicts_bits)
        self.patches = BitCounts(bits or 0, device, True) if patches else None

    @torch.no_grad()
    def add(self, output: StepOutput) -> None:
        """Add one step, and where the outputs are bits how they were used and predicted."""
        scalars = [*(output.losses[name] for name in self.names[:-1]), output.gradient_norm]
        self.scalars[self.steps] = torch.stack(scalars)
        self.steps += 1
        if not len(self.images.ones):
            return
        used = output.skipped == 0
        # The other global view's message, as in training. Local views are left out: a student that cannot
        # predict anything from them gets the more frequent values right, which lowers the mean agreement.
        self.images.add(output.teacher, output.student[: len(output.teacher)].roll(1, 0), used)
        if self.patches is not None and output.patches is not None:
            # As many as their coding rate is of: a sample, as they are drawn in random order.
            student, teacher = (logits[: DenseCommunication.SAMPLE] for logits in output.patches)
            self.patches.add(teacher, student, used)

    def report(self) -> dict[str, float]:
        """The window's metrics; the window is empty afterwards. All ranks call it, and get the metrics of all
        images.

        Scalars are means over the steps in which all of them were finite, and left out if there is no such
        step; "skipped" counts the others. Bits are those of the pairs of global views, "dense_" those of
        masked patches.
        """
        steps = int(self.steps)
        scalars = self.scalars[:steps].double()
        counts = {name: value.clone() for name, value in self._counts().items()}
        if dist.is_initialized():
            for value in (scalars, *counts.values()):
                dist.all_reduce(value)
            scalars /= dist.get_world_size()
        finite = scalars.isfinite().all(1)
        means = scalars[finite].mean(0).tolist() if finite.any() else []
        metrics = dict(zip(self.names, means, strict=bool(means)))
        metrics["skipped"] = steps - int(finite.sum())
        ones, cross_entropy = counts["ones"], counts["cross_entropy"]
        if len(ones) and (number := int(counts["messages"])):
            metrics |= bit_statistics(ones, number)
            metrics["bit_accuracy"] = counts["correct"].item() / (number * len(ones))
            if self.predicts_bits:
                metrics["agreement_global"] = cross_entropy.mean().item() / number
                metrics["transmitted_bits"] = transmitted_bits(ones, cross_entropy / math.log(2), number)
            if self.patches is not None:
                ones, number = counts["dense_ones"], int(counts["dense_messages"])
                nats = counts["dense_cross_entropy"]
                metrics["dense_transmitted_bits"] = transmitted_bits(ones, nats / math.log(2), number)
                metrics["dense_bit_entropy"] = bit_statistics(ones, number)["bit_entropy"]
        for value in self._tensors().values():
            value.zero_()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank has gathered."""
        return {name: value.to("cpu", copy=True) for name, value in self._tensors().items()}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether a state is of a window as long as this one."""
        return state["scalars"].shape == self.scalars.shape

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with what a rank had gathered."""
        for name, value in self._tensors().items():
            value.copy_(state[name])

    def _counts(self) -> dict[str, Tensor]:
        patches = {} if self.patches is None else self.patches.tensors()
        return self.images.tensors() | {f"dense_{name}": value for name, value in patches.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """All that steps are gathered in."""
        return {"steps": self.steps, "scalars": self.scalars, **self._counts()}

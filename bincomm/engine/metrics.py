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
        scalars: the objective's; the gradient's norm comes to them.
        bits: K where the outputs are bits, whose use is then reported too; else None.
        device: of the steps.
    """

    def __init__(self, length: int, scalars: Sequence[str], bits: int | None, device: torch.device):
        self.names = (*scalars, "gradient_norm")
        self.scalars = torch.zeros(length, len(self.names), device=device)
        self.ones = torch.zeros(bits or 0, dtype=torch.int64, device=device)
        self.equal = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64)  # steps, messages, compared bits; on the host

    @torch.no_grad()
    def add(self, done: StepOutput) -> None:
        """One step, and where the outputs are bits what was sent and received."""
        scalars = [*(done.losses[name] for name in self.names[:-1]), done.gradient_norm]
        self.scalars[self.counts[0]] = torch.stack(scalars)
        self.counts[0] += 1
        if len(self.ones):
            sent = done.teacher > 0
            # A view against the other view's message: what the training asks for.
            received = done.student[: len(sent)].roll(1, 0) > 0
            self.ones += sent.sum((0, 1))
            self.equal += (sent == received).sum()
            self.counts += torch.tensor([0, sent.shape[0] * sent.shape[1], sent.numel()])

    def report(self) -> dict[str, float]:
        """The window's metrics, and an empty window. All ranks call it, and get the metrics of all images.

        Scalars are means over the steps in which all of them were finite; "skipped" counts the others.
        """
        steps, messages, compared = self.counts.tolist()
        values = self.scalars[:steps].double()
        scalars, ones, equal = values.clone(), self.ones.clone(), self.equal.clone()
        if dist.is_initialized():
            for value in (scalars, ones, equal):
                dist.all_reduce(value)
            scalars /= dist.get_world_size()
            messages, compared = messages * dist.get_world_size(), compared * dist.get_world_size()
        finite = scalars.isfinite().all(1)
        means = scalars[finite].mean(0).tolist()
        metrics = dict(zip(self.names, means, strict=True))
        metrics["skipped"] = steps - int(finite.sum())
        if len(ones):
            metrics |= bit_statistics(ones, messages)
            metrics["bit_accuracy"] = equal.item() / compared
        for value in (self.scalars, self.ones, self.equal, self.counts):
            value.zero_()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank has gathered."""
        return {
            name: getattr(self, name).to("cpu", copy=True) for name in ("scalars", "ones", "equal", "counts")
        }

    def load_state_dicts(self, states: Sequence[dict[str, Tensor]], rank: int, world: int) -> None:
        """Go on from what all ranks had gathered, of which there may have been another number than now."""
        if len(states) == world:
            state = states[rank]
        else:
            state = {name: sum(state[name] for state in states) for name in states[0]}
            state["scalars"] = state["scalars"] / len(states)  # means over the ranks, wherever they lie
            # Sums over the ranks: all of it on one, and of what is counted alike on all a share on each.
            state["ones"], state["equal"] = (state[name] * (rank == 0) for name in ("ones", "equal"))
            state["counts"] = state["counts"] // torch.tensor([len(states), world, world])
        for name, value in state.items():
            getattr(self, name).copy_(value)

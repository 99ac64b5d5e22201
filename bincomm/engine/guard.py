"""Steps that are not finite: counted on the device, skipped, and the end after several in a row."""

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class TrainingError(RuntimeError):
    """Training cannot go on; the run's last checkpoint is kept."""


class Verdict(NamedTuple):
    """What the guard knows of the steps up to now."""

    skipped_total: int  # steps, since the run began
    skipped_in_row: int  # steps, up to the last one
    stop: bool  # a rank has asked all ranks to stop


# Where the counts lie in one tensor, so that a single copy brings them to the host.
TOTAL, IN_ROW, ASKS_TO_STOP, STOP = range(4)


class Guard:
    """Counts the steps that were skipped because something was not finite, and says when to stop.

    The counts are on the device. On a GPU the host is one step behind: it reads the counts of the step before
    the last one, so that it never waits for the device. In the meantime, once more than `LIMIT` steps in a
    row were skipped, all further steps are skipped, too.
    """

    LIMIT = 3

    def __init__(self, device: torch.device, ranks: int):
        self.ranks = ranks
        self.lag = 0 if device.type == "cpu" else 1  # steps that `read` is behind
        self.counts = torch.zeros(4, dtype=torch.float32, device=device)
        self.copies: deque[tuple[Tensor, torch.cuda.Event | None]] = deque(maxlen=self.lag + 1)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """0 if loss and gradient are finite on all ranks, else 1; also 1 once too many in a row were not."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) | (self.counts[IN_ROW] > self.LIMIT)
        flags = torch.stack([bad.float(), self.counts[ASKS_TO_STOP]])
        if self.ranks > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        skip = flags[0]
        in_row = (self.counts[IN_ROW] + 1) * skip
        total, asks = self.counts[TOTAL] + skip, self.counts[ASKS_TO_STOP]
        self.counts.copy_(torch.stack([total, in_row, asks, flags[1]]))
        return skip

    def ask_to_stop(self) -> None:
        """Let all ranks stop after the same step, soon."""
        self.counts[ASKS_TO_STOP] = 1

    def copy_to_host(self) -> None:
        """Begin to copy the counts of the step just launched."""
        if self.counts.device.type == "cpu":
            self.copies.append((self.counts.clone(), None))
            return
        copy = torch.empty(4, pin_memory=True).copy_(self.counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.copies.append((copy, event))

    def read(self, last: bool = False) -> Verdict:
        """The counts as of this step on a CPU or where it is the `last`, else as of the step before it; to be
        read once a step."""
        if len(self.copies) <= self.lag and not last:
            return Verdict(0, 0, False)
        copy, event = self.copies.pop() if last else self.copies.popleft()
        if event is not None:
            event.synchronize()
        counts = copy.tolist()
        return Verdict(int(counts[TOTAL]), int(counts[IN_ROW]), bool(counts[STOP]))

    def state_dict(self) -> dict[str, Tensor]:
        """The counts that a resumed run continues from."""
        return {"skipped": self.counts[:2]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the counts of another run."""
        self.counts[:2].copy_(state["skipped"])

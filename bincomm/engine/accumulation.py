"""A step whose batch is split into microbatches, to need less memory, with the loss of the whole batch."""

from typing import Any

import torch
from torch import Tensor, nn

from bincomm.engine.forward import split_batch
from bincomm.engine.frozen_teacher import FrozenTeacher
from bincomm.engine.step import Step, StepOutput
from bincomm.networks import Network


class AccumulatedStep(Step):
    """Splits every batch into microbatches for the forward and backward passes of the networks.

    The coding rate of a batch is not the sum of its microbatches' rates. So the gradient at the logits is
    computed first, after forward passes of all microbatches without a graph; then every microbatch runs again
    and takes its share of that gradient. This costs one more forward pass of the student.

    Args:
        microbatches: their number; the other arguments are those of `Step`.

    Raises:
        ValueError: the student has batch norm, whose statistics would be those of a microbatch.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | FrozenTeacher | None,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        microbatches: int,
        **options: Any,
    ):
        if has_batch_norm(student):
            raise ValueError(
                f"accumulate: expected 1 for a backbone with batch norm, got {microbatches}: its statistics "
                "would be those of a part of the batch"
            )
        super().__init__(student, teacher, objective, optimizer, **options)
        self.microbatches = microbatches

    def gradient(
        self, global_views: Tensor, local_views: Tensor | None, messages: Tensor | None = None
    ) -> StepOutput:
        """Compute the student's clipped gradient, and judge whether the step is to be skipped.

        Raises:
            ValueError: the number of images is no multiple of `microbatches`.
        """
        if len(global_views) % self.microbatches:
            raise ValueError(
                f"global_views: expected a multiple of accumulate = {self.microbatches} images, got "
                f"{len(global_views)}"
            )
        before = self.buffers.copy()
        places = self.draw_masks(global_views)
        parts = split_batch(global_views, local_views, places, self.microbatches)
        if messages is None:
            sent = self.forward.teacher_output(global_views, places, parts=self.microbatches)
        else:
            sent = messages
        self.mark("teacher")
        draws, outputs = [], []
        with torch.no_grad():
            for part in parts:
                draws.append(get_random_state(self.forward.device))
                outputs.append(self.forward.student_logits(*part))
        logits = torch.cat(outputs, dim=1).requires_grad_()
        self.mark("student")
        losses = self.objective(logits, sent)
        losses["loss"].backward()
        self.mark("loss")
        assert logits.grad is not None
        gradients = logits.grad.chunk(self.microbatches, dim=1)
        for number, (part, draw, gradient) in enumerate(zip(parts, draws, gradients, strict=True), 1):
            set_random_state(self.forward.device, draw)  # the same paths are dropped again
            with self.forward.without_averaging(number < self.microbatches):  # the last one averages the sum
                self.forward.student_logits(*part).backward(gradient)
        self.mark("backward")
        return self.clip_and_judge(losses, logits, sent, before)


def has_batch_norm(network: nn.Module) -> bool:
    """Whether an image's features depend on the other images of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def get_random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of the generators that the networks draw from, of the CPU and, where it is one, a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    """Go back to a state of `get_random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)

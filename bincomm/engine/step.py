"""One training step: the teacher's message, the student's gradient, both networks moved on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bincomm.engine.buffers import Buffers
from bincomm.engine.forward import Forward
from bincomm.engine.frozen_teacher import FrozenTeacher
from bincomm.engine.guard import Guard
from bincomm.engine.masks import Masks
from bincomm.engine.optimizer import set_hyperparameters, step_unless
from bincomm.networks import Network, update_teacher
from bincomm.ops.clip import clip_gradients_


class StepOutput(NamedTuple):
    """What a step leaves for the metrics, all on the device."""

    losses: dict[str, Tensor]
    gradient_norm: Tensor  # of all gradients together, before clipping
    student: Tensor  # (V, n, K) logits
    teacher: Tensor  # (U, n, K) logits, or the message (U, n, ⌈K/32⌉) int32
    skipped: Tensor  # 0 or 1: whether it was not finite on some rank, and changed nothing
    # Logits of student and teacher of the masked patches, each (M, n, K), if there are any.
    patches: tuple[Tensor, Tensor] | None = None


class Step:
    """Trains a student and its teacher on one batch after another, without waiting for the device.

    A step whose loss or gradient is not finite on any rank moves neither the student nor any buffer, on all
    ranks alike; see `Guard`. The teacher's moving average is updated as always.

    Args:
        student: trained.
        teacher: an equal network, which becomes the student's moving average; a frozen one, which stays as
            it is; or None where every batch comes with its messages.
        objective: of `bincomm.objectives`.
        optimizer: of the student's parameters, from `create_optimizer`.
        clip: largest norm of a parameter's gradient, 0 = no clipping.
        precision: of the networks' forward passes, "bf16" or "fp32".
        masks: of patches, where the networks are a `DenseNetwork` each and the objective is for patches, too.
        mark: is called at the end of each part of the step, with its name, to measure the time.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | FrozenTeacher | None,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        precision: str,
        masks: Masks | None = None,
        mark: Callable[[str], None] = lambda part: None,
    ):
        self.student, self.teacher, self.objective = student, teacher, objective
        self.optimizer, self.clip, self.masks, self.mark = optimizer, clip, masks, mark
        # Listed once: going through all modules takes longer than reading some of the parameters.
        follower = teacher if isinstance(teacher, Network) else None
        self.parameters = list(student.parameters())
        self.averages, self.averaged = [], []
        if follower is not None:
            self.averages = list(follower.parameters())
            named = dict(student.named_parameters())
            self.averaged = [named[name] for name, _ in follower.named_parameters()]  # it has no mask token
        changed = [module for module in (student, follower, objective, masks) if module is not None]
        self.buffers = Buffers(b for module in changed for b in module.buffers())
        self.forward = Forward(student, teacher, precision)
        self.guard = Guard(self.forward.device, self.forward.ranks)

    def __call__(
        self,
        global_views: Tensor,
        local_views: Tensor | None,
        messages: Tensor | None = None,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> StepOutput:
        """One step on crops (n, 2, 3, S, S) and (n, L, 3, s, s), and the messages (2, n, ⌈K/32⌉) int32 that
        are stored of the first ones, if there are any."""
        output = self.gradient(global_views, local_views, messages)
        self.update(output.skipped, lr=lr, weight_decay=weight_decay, momentum=momentum)
        self.optimizer.zero_grad()
        return output

    def gradient(
        self, global_views: Tensor, local_views: Tensor | None, messages: Tensor | None = None
    ) -> StepOutput:
        """Compute the student's clipped gradient, and judge whether the step is to be skipped."""
        before = self.buffers.copy()
        places = self.draw_masks(global_views)
        # Logits, whose signs are the message, or the message itself.
        sent = self.forward.teacher_output(global_views, places) if messages is None else messages
        self.mark("teacher")
        outputs = self.forward.student_logits(global_views, local_views, places)
        self.mark("student")
        # Cut here, because an accumulated step takes the loss's gradient at the logits of the whole batch.
        logits = outputs.detach().requires_grad_()
        losses = self.objective(logits, sent)
        losses["loss"].backward()
        self.mark("loss")
        outputs.backward(logits.grad)
        self.mark("backward")
        return self.clip_and_judge(losses, logits, sent, before)

    def draw_masks(self, global_views: Tensor) -> Tensor | None:
        """The places of the patches that this step masks, (n, M), if it masks any."""
        return None if self.masks is None else self.masks(len(global_views))

    def clip_and_judge(
        self, losses: dict[str, Tensor], logits: Tensor, sent: Tensor, before: list[Tensor]
    ) -> StepOutput:
        """Clip the gradient, and judge whether everything is finite; if not, restore the buffers."""
        norm = clip_gradients_([p.grad for p in self.parameters if p.grad is not None], self.clip)
        losses = {name: value.detach() for name, value in losses.items()}
        skip = self.guard.judge(losses["loss"], norm)
        self.buffers.restore(before, where=skip)
        self.mark("clip")
        logits = logits.detach()
        if self.masks is None:
            return StepOutput(losses, norm, logits, sent, skip)
        count = self.masks.count
        patches = logits[-count:], sent[-count:]
        return StepOutput(losses, norm, logits[:-count], sent[:-count], skip, patches)

    def update(self, skip: Tensor, *, lr: float, weight_decay: float, momentum: float) -> None:
        """Move the student by AdamW, unless the step is to be skipped, and the teacher after it."""
        set_hyperparameters(self.optimizer, lr, weight_decay)
        step_unless(skip, self.optimizer)
        self.mark("optimizer")
        if self.averages:
            update_teacher(self.averages, self.averaged, momentum)
        self.mark("average")
        self.guard.copy_to_host()

"""The forward passes of both networks on this rank, and the averaging of gradients over the ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from bincomm.engine.frozen_teacher import FrozenTeacher
from bincomm.networks import Network


class Forward:
    """Runs student and teacher under autocast.

    Where torch.distributed is initialized gradients are averaged over the ranks, by DistributedDataParallel
    unless the parameters are split by `bincomm.distributed.sharding.shard`.

    Args:
        student: trained.
        teacher: an equal network, or a frozen one of its own kind; None where its messages are stored.
        precision: of the forward passes, "bf16" or "fp32".
    """

    def __init__(self, student: Network, teacher: Network | FrozenTeacher | None, precision: str):
        self.device = next(student.parameters()).device
        self.autocast = precision == "bf16"
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.student: nn.Module = student
        self.teacher = teacher
        # A frozen teacher is not compiled, so that its messages are those that are stored of it.
        self.compilable = [network for network in (student, teacher) if isinstance(network, Network)]
        self.compiled = False
        self.sharded = isinstance(student, FSDPModule)
        if self.ranks > 1 and not self.sharded:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            # Statistics of batch norm are each rank's own or, on a GPU, common to all anyway.
            self.student = DistributedDataParallel(
                student, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def teacher_output(self, global_views: Tensor, places: Tensor | None = None, *, parts: int = 1) -> Tensor:
        """Global crops (n, 2, 3, S, S) -> the teacher's logits (2, n, K), without a gradient; with the places
        (n, M) of patches (2 + M, n, K); of a frozen one the message (2, n, ⌈K/32⌉) int32. The images are
        passed in so many parts."""
        assert self.teacher is not None  # else the batch has its messages
        with torch.inference_mode():
            output = torch.cat(
                [
                    self._run(self.teacher, views, places=some)
                    for views, _, some in split_batch(global_views, None, places, parts)
                ],
                dim=1,
            )
        self.reshard_teacher()
        return output.clone()  # outside inference mode, because autograd saves it

    def student_logits(
        self, global_views: Tensor, local_views: Tensor | None, places: Tensor | None = None
    ) -> Tensor:
        """Crops (n, 2, 3, S, S) and (n, L, 3, s, s) -> the student's logits (2 + L, n, K); with the places
        (n, M) of masked patches (2 + L + M, n, K)."""
        views = [global_views] if local_views is None else [global_views, local_views]
        return self._run(self.student, *views, places=places)

    def compile(self) -> None:
        """Let the networks go through torch.compile, for inputs of constant shapes."""
        for network in self.compilable:
            network.compile(dynamic=False)
        self.compiled = True

    def undo_compile(self) -> None:
        """Let the networks run as they are."""
        for network in self.compilable:
            network._compiled_call_impl = None
        self.compiled = False

    def reshard_teacher(self) -> None:
        """Free the parameters that FSDP gathered: without a backward pass it keeps them."""
        if isinstance(self.teacher, FSDPModule):
            self.teacher.reshard()

    @contextmanager
    def without_averaging(self, without: bool = True) -> Iterator[None]:
        """Keep gradients this rank's own, until a later backward pass averages their sum."""
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(not without)
            try:
                yield
            finally:
                self.student.set_requires_gradient_sync(True)
        elif without and isinstance(self.student, DistributedDataParallel):
            with self.student.no_sync():
                yield
        else:
            yield

    def _run(self, network: nn.Module, *views: Tensor, places: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return network(*views) if places is None else network(*views, places=places)


Part = tuple[Tensor, Tensor | None, Tensor | None]  # global and local crops, and places of patches


def split_batch(
    global_views: Tensor, local_views: Tensor | None, places: Tensor | None, count: int
) -> list[Part]:
    """A batch as `count` parts of equally many images."""
    others = ([None] * count if some is None else some.chunk(count) for some in (local_views, places))
    return list(zip(global_views.chunk(count), *others, strict=True))

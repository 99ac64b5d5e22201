"""One training step: the teacher's message, the student's gradient, both networks moved on."""

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bincomm.engine.guard import Guard
from bincomm.engine.optimizer import set_rates
from bincomm.networks import Network, update_teacher
from bincomm.ops.clip import clip_gradients_


class StepOutput(NamedTuple):
    """What a step leaves for the log, all on the device."""

    losses: dict[str, Tensor]
    gradient_norm: Tensor  # of all gradients together, before clipping
    student: Tensor  # (V, n, K) logits
    teacher: Tensor  # (U, n, K) logits


class Step:
    """Trains a student and its teacher on one batch after another, without waiting for the device.

    A step whose loss or gradient is not finite on any rank moves neither the student nor any buffer, on all
    ranks alike; see `Guard`. The teacher takes its average of the student, as ever.

    Where torch.distributed is initialized gradients are averaged over the ranks, by DistributedDataParallel
    unless the parameters are split by `bincomm.distributed.ranks.shard`.

    Args:
        student, teacher: equal networks; the teacher becomes the student's moving average.
        objective: of `bincomm.objectives`.
        optimizer: of the student's parameters, from `create_optimizer`.
        clip: largest norm of a parameter's gradient, 0 = no clipping.
        precision: of the networks' forward passes, "bf16" or "fp32".
        accumulate: parts that a batch is cut into, to need less memory. The loss is that of the whole batch,
            for the coding rate of all images is not the sum of the parts' rates: its gradient at the logits
            is taken first, after forward passes of all parts that keep nothing, then every part runs again
            and takes its share of it. That costs one more forward pass of the student.

    Raises:
        ValueError: `accumulate` with batch norm, whose statistics would be those of a part.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        precision: str,
        accumulate: int = 1,
    ):
        if accumulate > 1 and has_batch_norm(student):
            raise ValueError(
                f"accumulate: expected 1 for a backbone with batch norm, got {accumulate}: its statistics "
                "would be those of a part of the batch"
            )
        self.student, self.teacher, self.objective, self.optimizer = student, teacher, objective, optimizer
        self.clip, self.accumulate = clip, accumulate
        # Listed once: going through all modules takes longer than reading some of the parameters.
        self.parameters, self.averages = list(student.parameters()), list(teacher.parameters())
        self.device = self.parameters[0].device
        self.autocast = precision == "bf16"
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.sharded = hasattr(student, "reshard")
        self.forward: nn.Module = student
        if self.ranks > 1 and not self.sharded:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            # Statistics of batch norm are each rank's own or, on a GPU, common to all anyway.
            self.forward = DistributedDataParallel(
                student, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # What a step changes beside the parameters: statistics of batch norm, the center of DINO.
        self.buffers = [b for module in (student, teacher, objective) for b in module.buffers()]
        self.guard = Guard(self.device, self.ranks)
        # Once captured: the graph, the crops that it reads, and what it leaves.
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: list[Tensor | None] = []
        self.captured: tuple[StepOutput, Tensor] | None = None
        self.mark: Callable[[str], None] = lambda part: None  # called at the end of each part, by name

    def __call__(
        self,
        global_views: Tensor,
        local_views: Tensor | None,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> StepOutput:
        """One step on crops (n, 2, 3, S, S) and (n, L, 3, s, s).

        Raises:
            ValueError: n is no multiple of `accumulate`.
        """
        if len(global_views) % self.accumulate:
            raise ValueError(
                f"global_views: expected a multiple of accumulate = {self.accumulate} images, got "
                f"{len(global_views)}"
            )
        if self.graph is None:
            done, skip = self._gradient(global_views, local_views)
        else:
            done, skip = self._replay(global_views, local_views)
        set_rates(self.optimizer, lr, weight_decay)
        self.optimizer.found_inf, self.optimizer.grad_scale = skip, None  # where 1, it stands still
        self.optimizer.step()
        if self.graph is None:  # whose gradients lie where it writes them
            self.optimizer.zero_grad()
        self.mark("optimizer")
        update_teacher(self.averages, self.parameters, momentum)
        self.mark("average")
        self.guard.copy_to_host()
        return done

    def _gradient(self, global_views: Tensor, local_views: Tensor | None) -> tuple[StepOutput, Tensor]:
        """The student's clipped gradient, and whether the step is to be skipped: 0 or 1, on the device."""
        before = [buffer.clone() for buffer in self.buffers]
        cut = [_cut(views, self.accumulate) for views in (global_views, local_views)]
        parts = list(zip(*cut, strict=True))
        with torch.inference_mode():
            message = torch.cat([self._run(self.teacher, views, None) for views, _ in parts], dim=1)
        message = message.clone()  # out of inference mode: autograd is to save it
        if self.sharded:
            self.teacher.reshard()
        self.mark("teacher")

        if self.accumulate == 1:
            outputs = self._run(self.forward, *parts[0])
            logits = outputs.detach().requires_grad_()
        else:
            draws, found = [], []
            with torch.no_grad():
                for part in parts:
                    draws.append(_random_state(self.device))
                    found.append(self._run(self.forward, *part))
            logits = torch.cat(found, dim=1).requires_grad_()
        self.mark("student")

        losses = self.objective(logits, message)
        losses["loss"].backward()
        self.mark("loss")

        if self.accumulate == 1:
            outputs.backward(logits.grad)
        else:
            gradients = logits.grad.chunk(self.accumulate, dim=1)
            for number, (part, draw, gradient) in enumerate(zip(parts, draws, gradients, strict=True), 1):
                _set_random_state(self.device, draw)  # the same paths are dropped again
                with self._without_averaging(number < self.accumulate):
                    self._run(self.forward, *part).backward(gradient)
        self.mark("backward")

        norm = clip_gradients_([p.grad for p in self.parameters if p.grad is not None], self.clip)
        losses = {name: value.detach() for name, value in losses.items()}
        skip = self.guard.judge(losses["loss"], norm)
        for buffer, old in zip(self.buffers, before, strict=True):
            buffer.copy_(torch.where(skip > 0, old, buffer))
        self.mark("clip")
        return StepOutput(losses, norm, logits.detach(), message), skip

    def _run(self, network: nn.Module, global_views: Tensor, local_views: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return network(global_views) if local_views is None else network(global_views, local_views)

    @contextlib.contextmanager
    def _without_averaging(self, without: bool):
        """Gradients stay this rank's own, until the last part's backward pass averages the sum."""
        if self.sharded:
            self.student.set_requires_gradient_sync(not without)
            try:
                yield
            finally:
                self.student.set_requires_gradient_sync(True)
        elif without and self.forward is not self.student:
            with self.forward.no_sync():
                yield
        else:
            yield

    def compile(self, global_views: Tensor, local_views: Tensor | None) -> str:
        """Compile both networks for batches of this shape; what came of it, in words.

        Where torch.compile fails the networks are left as they were.

        Raises:
            ValueError: it failed where parameters are split; gradients are left then that nothing clears.
        """
        part = [_cut(views, self.accumulate)[0] for views in (global_views, local_views)]
        networks = (self.forward, self.teacher)
        before = [buffer.clone() for buffer in self.buffers]
        started = time.perf_counter()
        try:
            for network in networks:
                network.compile(dynamic=False)
            devices = [self.device] if self.device.type == "cuda" else []
            # Split parameters keep a gradient that is not averaged where zero_grad() does not reach it.
            with torch.random.fork_rng(devices), self._without_averaging(not self.sharded):
                with torch.inference_mode():
                    self._run(self.teacher, part[0], None)
                if self.accumulate > 1:  # a pass of its own
                    with torch.no_grad():
                        self._run(self.forward, *part)
                self._run(self.forward, *part).sum().backward()
            outcome = f"torch.compile: both networks, in {time.perf_counter() - started:.0f} s"
        except Exception as error:  # of any of its compilers; which exception is theirs to choose
            for network in networks:
                network._compiled_call_impl = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if self.sharded:
                raise ValueError(f"compile: expected off, for torch.compile failed: {reason}") from error
            outcome = f"warning: torch.compile failed, so the networks run without it, slower: {reason}"
        finally:
            self.optimizer.zero_grad()
            if self.sharded:
                self.teacher.reshard()
            self._put_back(before)
        return outcome

    def capture(self, global_views: Tensor, local_views: Tensor | None) -> None:
        """Capture all of a step up to the gradient in a CUDA graph, for crops of these shapes.

        What follows, the optimizer and the average, is few launches, with numbers that change every step.

        Raises:
            ValueError: not on a GPU, on several ranks, or with `accumulate`.
        """
        if self.device.type != "cuda" or self.ranks > 1 or self.accumulate > 1:
            raise ValueError(
                "cuda_graph: expected one GPU and accumulate = 1, got "
                f"{self.ranks} × {self.device.type} and accumulate = {self.accumulate}"
            )
        counts = self.guard.counts.clone()
        self.static = [None if v is None else v.clone() for v in (global_views, local_views)]
        before = [buffer.clone() for buffer in self.buffers]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side), torch.random.fork_rng([self.device]):
            for _ in range(3):
                self._gradient(*self.static)
                self.optimizer.zero_grad()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._put_back(before)
        graph = torch.cuda.CUDAGraph()
        # The loader's threads allocate meanwhile, which is no business of this thread's capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.captured = self._gradient(*self.static)
        self.guard.counts.copy_(counts)
        self.graph = graph

    @torch.no_grad()
    def _put_back(self, before: list[Tensor]) -> None:
        for buffer, old in zip(self.buffers, before, strict=True):
            buffer.copy_(old)

    def _replay(self, global_views: Tensor, local_views: Tensor | None) -> tuple[StepOutput, Tensor]:
        for static, views in zip(self.static, (global_views, local_views), strict=True):
            if static is not None:
                static.copy_(views)
        self.graph.replay()
        self.mark("clip")
        return self.captured


def has_batch_norm(network: nn.Module) -> bool:
    """Whether an image's features depend on the other images of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _cut(views: Tensor | None, parts: int) -> list[Tensor | None]:
    return [None] * parts if views is None else list(views.chunk(parts))


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)

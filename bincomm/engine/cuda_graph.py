"""A step whose launches are replayed from a CUDA graph."""

import torch
from torch import Tensor

from bincomm.engine.accumulation import AccumulatedStep
from bincomm.engine.step import Step, StepOutput


class CapturedStep:
    """Replays all of a step up to the gradient, for crops of the shapes it was captured with.

    What follows, the optimizer and the moving average, is few launches, with numbers that change every step.

    Args:
        step: what is captured; the buffers and the guard's counts are afterwards as they were.
        global_views, local_views, messages: a batch, as a step is given it.

    Raises:
        ValueError: not on a GPU, on several ranks, or with accumulation.
    """

    def __init__(
        self, step: Step, global_views: Tensor, local_views: Tensor | None, messages: Tensor | None = None
    ):
        device, ranks = step.forward.device, step.forward.ranks
        if device.type != "cuda" or ranks > 1 or isinstance(step, AccumulatedStep):
            count = step.microbatches if isinstance(step, AccumulatedStep) else 1
            raise ValueError(
                "cuda_graph: expected one GPU and accumulate = 1, got "
                f"{ranks} × {device.type} and accumulate = {count}"
            )
        self.step = step
        step.optimizer.zero_grad()  # else gradients keep the memory of a graph that was captured before
        batch = global_views, local_views, messages
        self.static_batch = [None if tensor is None else tensor.clone() for tensor in batch]
        global_copy, *others = self.static_batch
        assert global_copy is not None
        counts, before = step.guard.counts.clone(), step.buffers.copy()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side), torch.random.fork_rng([device]):
            for _ in range(3):
                step.gradient(global_copy, *others)
                step.optimizer.zero_grad()
        torch.cuda.current_stream(device).wait_stream(side)
        step.buffers.restore(before)
        self.graph = torch.cuda.CUDAGraph()
        # The loader's threads allocate meanwhile, which is no business of this thread's capture.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = step.gradient(global_copy, *others)
        step.guard.counts.copy_(counts)

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
        """One step, as of `Step`."""
        for static, tensor in zip(self.static_batch, (global_views, local_views, messages), strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor)
        self.graph.replay()
        self.step.mark("clip")
        # Gradients are not cleared: they lie where the graph writes them.
        self.step.update(self.output.skipped, lr=lr, weight_decay=weight_decay, momentum=momentum)
        return self.output

"""torch.compile for the networks of a step, which run without it where it fails."""

import time

import torch
from torch import Tensor

from bincomm.engine.accumulation import AccumulatedStep
from bincomm.engine.forward import split_batch
from bincomm.engine.step import Step


def compile_networks(step: Step, global_views: Tensor, local_views: Tensor | None) -> tuple[bool, str]:
    """Compile the networks for batches of this shape; returns whether that worked, and in words what came
    of it. Where torch.compile fails the networks stay as they were.

    Raises:
        ValueError: it failed where parameters are split, because gradients are left then that nothing clears.
    """
    forward = step.forward
    accumulates = isinstance(step, AccumulatedStep)
    count = step.microbatches if isinstance(step, AccumulatedStep) else 1
    before = step.buffers.copy()
    part = split_batch(global_views, local_views, step.draw_masks(global_views), count)[0]
    start = time.perf_counter()
    # What earlier runs of this process compiled counts against the limit of graphs of the networks' code.
    torch.compiler.reset()
    try:
        forward.compile()
        devices = [forward.device] if forward.device.type == "cuda" else []
        # Split parameters keep a gradient that is not averaged where zero_grad() does not reach it.
        with torch.random.fork_rng(devices), forward.without_averaging(not forward.sharded):
            if forward.teacher in forward.compilable:
                forward.teacher_output(part[0], part[2])
            if accumulates:  # its first passes keep nothing, which is a graph of its own
                with torch.no_grad():
                    forward.student_logits(*part)
            forward.student_logits(*part).sum().backward()
        which = "both networks" if len(forward.compilable) == 2 else "the student"
        return True, f"torch.compile: {which}, in {time.perf_counter() - start:.0f} s"
    except Exception as error:  # of any of its compilers; which exception is theirs to choose
        forward.undo_compile()
        reason = describe(error)
        if forward.sharded:
            raise ValueError(f"compile: expected off, because torch.compile failed: {reason}") from error
        return False, f"torch.compile failed, so the networks run without it, slower: {reason}"
    finally:
        step.optimizer.zero_grad()
        forward.reshard_teacher()
        step.buffers.restore(before)


def describe(error: Exception) -> str:
    """The error in one line: how it begins, and the lines further down that name a compiler's errors."""
    text = str(error)
    begin = " ".join(text.split())[:300] or type(error).__name__
    named = [line.strip()[:200] for line in text.splitlines() if "error: " in line.lower()]
    return " | ".join([begin, *(line for line in named[:3] if line not in begin)])
